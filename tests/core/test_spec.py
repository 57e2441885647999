from pathlib import Path

import pytest
from pydantic import ValidationError

from app.core import catalog, spec
from app.core.errors import NotFound

BASE = catalog.load()["smollm2-135m-instruct"]


def test_auto_becomes_numbers() -> None:
    resolved = spec.resolve(spec.Requested(), BASE, seed=1, examples=400, longest=90)

    assert (resolved.n_epochs, resolved.batch_size) == (2, 12)
    assert resolved.total_steps(400) == 2 * 34
    assert resolved.optimizer.learning_rate > 0


def test_what_was_asked_for_is_what_is_done() -> None:
    asked = spec.Requested(
        hyperparameters=spec.Hyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=0.5),
        training=spec.TrainingOptions(max_seq_length=128, checkpoint_every_steps=7),
    )
    auto, resolved = (spec.resolve(requested, BASE, seed=1, examples=100, longest=90) for requested in (spec.Requested(), asked))

    assert (resolved.n_epochs, resolved.batch_size, resolved.max_seq_length) == (2, 4, 128)
    assert resolved.checkpoint_every_steps == 7
    assert resolved.optimizer.learning_rate == pytest.approx(auto.optimizer.learning_rate / 2)


def test_what_an_old_spec_is_known_by_stays() -> None:
    """Checkpoints of the first release are gone on from only if its specs read the same. This is one of them."""
    said = (
        '{"base":"smollm2-135m-instruct","n_epochs":2,"batch_size":12,"seed":1,"max_seq_length":4096,"micro_batch_tokens":2048,'
        '"checkpoint_every_steps":17,"lora":{"rank":16,"alpha":32.0,"dropout":0.0,"target_modules":"all-linear"},'
        '"quantization":{"scheme":"nf4","double_quant":true},'
        '"optimizer":{"learning_rate":0.001,"warmup_ratio":0.05,"weight_decay":0.0,"max_grad_norm":1.0}}'
    )

    assert spec.resolve(spec.Requested(), BASE, seed=1, examples=400, longest=90).model_dump_json() == said
    assert spec.TrainSpec.model_validate_json(said).model_dump_json() == said


def test_an_option_asked_for_is_told() -> None:
    asked = spec.Requested(
        adapter=spec.LoraSpec(use_rslora=True, init_lora_weights="orthogonal"),
        training=spec.TrainingOptions(
            optimizer="adamw_32bit", scheduler="linear", min_learning_rate_ratio=0.1, lora_plus_ratio=16, learning_rate=3e-4
        ),
    )
    resolved = spec.resolve(asked, BASE, seed=1, examples=400, longest=90)
    optimizer = resolved.optimizer

    assert spec.TrainSpec.model_validate_json(resolved.model_dump_json()) == resolved
    assert spec.Requested.model_validate(asked.model_dump(mode="json")) == asked
    assert (optimizer.kind, optimizer.scheduler, optimizer.min_rate_ratio) == ("adamw_32bit", "linear", 0.1)
    assert (optimizer.lora_plus_ratio, optimizer.learning_rate) == (16, 3e-4)
    assert (resolved.lora.use_rslora, resolved.lora.init_lora_weights) == (True, "orthogonal")


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (spec.LoraSpec, {"init_lora_weights": "orthogonal", "rank": 5}),
        (spec.LoraSpec, {"init_lora_weights": "pissa"}),
        (spec.LoraSpec, {"init_lora_weights": 1}),
        (spec.TrainingOptions, {"scheduler": "constant", "min_learning_rate_ratio": 0.1}),
        (spec.TrainingOptions, {"min_learning_rate_ratio": 1}),
        (spec.TrainingOptions, {"lora_plus_ratio": 0.5}),
    ],
)
def test_options_that_make_no_sense_are_refused(kind: type[spec.LoraSpec], wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        kind.model_validate(wrong)


def test_one_example_is_enough() -> None:
    assert spec.resolve(spec.Requested(), BASE, seed=1, examples=1, longest=90).total_steps(1) >= 1


def test_a_method_that_judges_by_the_base_moves_less() -> None:
    supervised, dpo, asked = (
        spec.resolve(requested, BASE, seed=1, examples=100, longest=90)
        for requested in (spec.Requested(), spec.Requested(method="dpo"), spec.Requested(method="dpo", beta=0.5))
    )

    assert dpo.preference == spec.PreferenceSpec(method="dpo", beta=0.1) and asked.preference is not None
    assert asked.preference.beta == 0.5
    assert (supervised.n_epochs, dpo.n_epochs) == (8, 3)
    assert dpo.optimizer.learning_rate == pytest.approx(supervised.optimizer.learning_rate / 10)


def test_orpo_moves_as_supervised_training_does() -> None:
    supervised, orpo = (
        spec.resolve(spec.Requested(method=method), BASE, seed=1, examples=100, longest=90) for method in ("supervised", "orpo")
    )

    assert orpo == supervised.model_copy(update={"preference": spec.PreferenceSpec(method="orpo", beta=0.1)})


@pytest.mark.parametrize(
    ("asked", "good", "weights"),
    [
        ({}, 50, (1.0, 1.0)),
        ({}, 20, (4.0, 1.0)),
        ({}, 80, (1.0, 4.0)),
        ({}, 2, (10.0, 1.0)),
        ({}, 0, (1.0, 1.0)),
        ({"undesirable_weight": 2.0}, 20, (1.0, 2.0)),
    ],
)
def test_the_rarer_rating_weighs_more(asked: dict[str, float], good: int, weights: tuple[float, float]) -> None:
    requested = spec.Requested.model_validate({"method": "kto", **asked})
    resolved = spec.resolve(requested, BASE, seed=1, examples=100, longest=90, good=good)

    assert resolved.preference is not None and (resolved.n_epochs, resolved.batch_size) == (3, 8)
    assert (resolved.preference.desirable_weight, resolved.preference.undesirable_weight) == weights


def test_what_is_asked_of_other_methods_is_stored_as_the_last_release_knows_it() -> None:
    """It refuses settings that it does not know, and may be the one that prepares the job."""
    assert not {"desirable_weight", "undesirable_weight"} & spec.Requested(method="dpo").model_dump().keys()


def test_a_supervised_spec_says_what_the_last_release_said() -> None:
    """Its words are part of what a checkpoint is known by: one more would make every run begin anew."""
    said = spec.resolve(spec.Requested(), BASE, seed=1, examples=100, longest=90)

    assert list(said.model_dump(mode="json")) == [
        "base", "n_epochs", "batch_size", "seed", "max_seq_length", "micro_batch_tokens", "checkpoint_every_steps", "lora",
        "quantization", "optimizer",
    ]  # fmt: skip
    assert spec.TrainSpec.model_validate_json(said.model_dump_json()) == said


def test_a_row_never_outgrows_the_base() -> None:
    asked = spec.Requested(training=spec.TrainingOptions(max_seq_length=1_000_000))

    assert spec.max_seq_length(asked, BASE) == BASE.context_length


@pytest.mark.parametrize("wrong", [0, -1, 101, "many", 1.5, True])
def test_epochs_are_auto_or_a_number_in_range(wrong: object) -> None:
    with pytest.raises(ValidationError):
        spec.Hyperparameters.model_validate({"n_epochs": wrong})


def test_every_base_of_the_catalog_has_a_template() -> None:
    from app.core.render import marked_template

    for base in catalog.load().values():
        assert "endgeneration %}" in marked_template(base.family)


def test_an_alias_means_its_base_and_an_unknown_name_is_told_what_there_is() -> None:
    assert catalog.load().resolve("HuggingFaceTB/SmolLM2-135M-Instruct") is BASE
    with pytest.raises(NotFound, match="smollm2-135m-instruct"):
        catalog.load().resolve("gpt-5")


def test_an_operators_file_replaces_and_adds(tmp_path: Path) -> None:
    (tmp_path / "more.toml").write_text('[aliases]\n"gpt-4o-mini" = "smollm2-135m-instruct"\n')

    assert catalog.load(tmp_path / "more.toml").resolve("gpt-4o-mini").id == BASE.id
