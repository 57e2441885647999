"""Training on which of two answers is better. TRL's trainers are the oracle: the same pairs give the same loss and gradient."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from app.core import catalog
from app.core.events import Evaluated, Finished, Started, Stepped, Stopped
from app.core.render import Example
from app.core.spec import PreferenceSpec, TrainSpec
from tests.make import TINY
from tests.training import make
from tests.training.make import Runner
from worker.model import adapter
from worker.model import base as bases
from worker.model.base import LoadedBase
from worker.training.data import Step, Totals, micro_batches, mismatched
from worker.training.evaluate import evaluate
from worker.training.failures import WrongRows
from worker.training.preference import judge, means
from worker.training.trainee import Trainee, adapted, meaningless

ROWS = 6
DPO, ORPO = PreferenceSpec(method="dpo", beta=0.3), PreferenceSpec(method="orpo", beta=0.3)
KTO = PreferenceSpec(method="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
MADE = {"dpo": make.preferences, "orpo": make.preferences, "kto": make.ratings}
LEAST_MARGIN = {"dpo": 0.3, "orpo": 0.1}  # of sums of log-probabilities, and of means
EACH = pytest.mark.parametrize("preference", [DPO, ORPO, KTO], ids=["dpo", "orpo", "kto"])
BOTH = pytest.mark.parametrize("preference", [DPO, ORPO], ids=["dpo", "orpo"])


def spec(preference: PreferenceSpec = DPO, **changes: Any) -> TrainSpec:
    return make.spec(preference=preference, micro_batch_tokens=300, **changes)


@pytest.fixture
def untouched(bases_dir: Path) -> LoadedBase:
    """A base of this test's own: TRL leaves its marks on the model it is given."""
    return bases.load(catalog.load()[TINY], bases_dir, device="cpu", dtype=torch.float32, for_training=True)


@pytest.fixture
def preference() -> PreferenceSpec:
    return DPO


@pytest.fixture
def trainee(exact: LoadedBase, preference: PreferenceSpec) -> Iterator[Trainee]:
    with adapted(exact, spec(preference)) as trainee:
        excite(trainee.parameters)
        yield trainee


def step(trainee: Trainee, *, max_tokens: int = 10_000) -> Step:
    assert trainee.preference is not None
    examples = MADE[trainee.preference.method](trainee.base.renderer)
    packed = micro_batches(examples, range(ROWS), max_tokens=max_tokens, preference=trainee.preference)
    return Step(1, packed, mismatched(examples, range(ROWS), ROWS - 1, max_tokens=max_tokens))


def taken(trainee: Trainee, step: Step) -> tuple[float, dict[str, float], Tensor]:
    """Loss, what is told and gradient of one step, as the loop takes them."""
    kl = trainee.kl(step.mismatched, should_stop=lambda: False)
    assert kl is not None
    totals, loss, sums = replace(step.totals, kl=kl), 0.0, list[Tensor]()
    for parameter in trainee.parameters:
        parameter.grad = torch.zeros_like(parameter)
    for batch in step.micro_batches:
        measured = trainee.backward(batch, of=totals)
        assert measured.rewards is not None
        loss, sums = loss + float(measured.loss_sum) / totals.weight, [*sums, measured.rewards]
    gradient = torch.cat([parameter.grad.flatten() for parameter in trainee.parameters])
    return loss, means(trainee.preference, torch.stack(sums).sum(0), totals), gradient


def tokenizer_of(base: LoadedBase) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=base.renderer.tokenizer, pad_token="<|im_end|>", eos_token="<|im_end|>")


def rows(base: LoadedBase) -> list[dict[str, list[int]]]:
    """Those of make.pairs, as TRL's collator takes them: without the template's words after the end of the turn."""
    told = list[dict[str, list[int]]]()
    for chat in make.pairs(ROWS):
        (asked, chosen), (_, rejected) = (question_and_answer(base.renderer.example(side)) for side in chat.sides)
        told.append({"prompt_ids": asked, "chosen_ids": chosen, "rejected_ids": rejected})
    return told


def question_and_answer(example: Example) -> tuple[list[int], list[int]]:
    first, count = example.is_trained.index(True), sum(example.is_trained)
    return example.tokens[:first], example.tokens[first : first + count]


@pytest.mark.filterwarnings("ignore")  # TRL, datasets and PEFT warn of each other
@pytest.mark.parametrize("has_start", [False, True])
def test_loss_gradient_and_rewards_of_dpo_are_those_of_trl(untouched: LoadedBase, tmp_path: Path, has_start: bool) -> None:
    """With a start, answers are compared with those of a tuned model, of which TRL makes an adapter named `ref`."""
    with adapted(untouched, spec()) as fresh:
        trainee, parameters = fresh, fresh.parameters
        if has_start:
            excite(parameters, seed=6)
            trainee = replace(fresh, start=tuple(parameter.detach().clone() for parameter in parameters))
        some = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        args = DPOConfig(
            output_dir=str(tmp_path), beta=DPO.beta, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[]
        )
        trainer = DPOTrainer(model=trainee.model, args=args, train_dataset=some, processing_class=tokenizer_of(untouched))
        for parameter in parameters:
            parameter.data = parameter.data.float()  # TRL has rounded the adapters of 4-bit bases to bf16
        excite(parameters)
        reference = [parameter for name, parameter in trainee.model.named_parameters() if ".ref." in name]
        for parameter, at_start in zip(reference, trainee.start, strict=has_start):
            parameter.data = at_start  # in all its bits, as above
        theirs = trainer.compute_loss(trainee.model, DataCollatorForPreference(pad_token_id=0)(rows(untouched)))
        their_gradient = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(theirs, parameters)])
        ours, rewards, our_gradient = taken(trainee, step(trainee))

    said = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("rewards/")}
    assert ours == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert (our_gradient - their_gradient).norm() < 1e-5 * their_gradient.norm()
    assert list(rewards.values()) == pytest.approx(
        [said[f"rewards/{name}"] for name in ("chosen", "rejected", "accuracies", "margins")], rel=1e-4
    )


def excite(parameters: list[Any], *, seed: int = 4) -> None:
    torch.manual_seed(seed)  # mismatched answers become likelier with 4: KTO's KL is never below 0
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.05)


@pytest.mark.filterwarnings("ignore")
def test_loss_gradient_and_what_is_told_of_orpo_are_those_of_trl(untouched: LoadedBase, tmp_path: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    with adapted(untouched, spec(ORPO)) as trainee:
        parameters = trainee.parameters
        some = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        args = ORPOConfig(
            output_dir=str(tmp_path), beta=ORPO.beta, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[]
        )
        trainer = ORPOTrainer(model=trainee.model, args=args, train_dataset=some, processing_class=tokenizer_of(untouched))
        for parameter in parameters:
            parameter.data = parameter.data.float()
        excite(parameters)
        theirs, said = trainer.get_batch_loss_metrics(trainee.model, trainer.data_collator(sides(untouched)))
        their_gradient = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(theirs, parameters)])
        ours, told, our_gradient = taken(trainee, step(trainee))

    assert ours == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert (our_gradient - their_gradient).norm() < 1e-5 * their_gradient.norm()
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "nll_loss", "log_odds_chosen")
    assert list(told.values()) == pytest.approx([said[name] for name in names], rel=1e-4)


def sides(base: LoadedBase) -> list[dict[str, list[int]]]:
    """The same rows as TRL's ORPO has them: whole, with what is no answer masked in the labels."""
    told = list[dict[str, list[int]]]()
    for row in rows(base):
        asked, made = row["prompt_ids"], dict[str, list[int]]()
        for side in ("chosen", "rejected"):
            answer = row[f"{side}_ids"]
            made |= {f"{side}_input_ids": asked + answer, f"{side}_attention_mask": [1] * len(asked + answer)}
            made[f"{side}_labels"] = [-100] * len(asked) + answer
        told.append(made)
    return told


@pytest.mark.filterwarnings("ignore")
def test_loss_gradient_and_what_is_told_of_kto_are_those_of_trl(untouched: LoadedBase, tmp_path: Path) -> None:
    with adapted(untouched, spec(KTO)) as trainee:
        parameters = trainee.parameters
        some = Dataset.from_list([{"prompt": "a", "completion": "b", "label": label} for label in (True, False)])
        args = KTOConfig(
            output_dir=str(tmp_path),
            beta=KTO.beta,
            desirable_weight=KTO.desirable_weight,
            undesirable_weight=KTO.undesirable_weight,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
        )
        trainer = KTOTrainer(model=trainee.model, args=args, train_dataset=some, processing_class=tokenizer_of(untouched))
        for parameter in parameters:
            parameter.data = parameter.data.float()
        excite(parameters)
        collate = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=make.ratings(untouched.renderer).longest)
        theirs = trainer.compute_loss(trainee.model, collate(rated_rows(untouched)))
        their_gradient = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(theirs, parameters)])
        ours, told, our_gradient = taken(trainee, step(trainee))

    said = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert ours == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert (our_gradient - their_gradient).norm() < 1e-5 * their_gradient.norm()
    assert told["kl"] > 0.01
    names = {"rewards/chosen": "rewards/chosen", "rewards/rejected": "rewards/rejected", "rewards/margin": "rewards/margins"}
    for name, of_theirs in (names | {"kl": "kl"}).items():
        assert told[name] == pytest.approx(said[of_theirs], rel=1e-4)


def test_an_answer_is_right_beyond_the_kl_on_its_side() -> None:
    batch = replace(meaningless((3, 3, 3, 3)), labelled_N=np.array([0, 3, 6, 9]), ratings=(True, True, False, False))
    gained_N, of = torch.tensor([0.3, 0.1, 0.1, -2.0]), replace(Totals.of([batch]), kl=0.2)
    measured, weights_N = judge(KTO, batch, of, -gained_N, torch.ones(4), torch.zeros(4))
    assert measured.rewards is not None
    beyond = [0.3 * by for by in (0.1, -0.1, 0.1, 2.2)]
    chances = [1 / (1 + math.exp(by)) for by in beyond]
    weights = [1.5, 1.5, 0.7, 0.7]

    assert float(measured.loss_sum) == pytest.approx(sum(w * p for w, p in zip(weights, chances, strict=True)))
    slopes = [0.3 * w * p * (1 - p) for w, p in zip(weights, chances, strict=True)]
    assert weights_N.tolist() == pytest.approx([slopes[0], slopes[1], -slopes[2], -slopes[3]])
    assert means(KTO, measured.rewards, of) == pytest.approx(
        {
            "rewards/accuracy": 3 / 4,
            "kl": 0.2,
            "rewards/chosen": 0.3 * 0.2,
            "rewards/rejected": 0.3 * -0.95,
            "rewards/margin": 0.3 * 1.15,
        }
    )
    good = replace(batch, ratings=(True,) * 4)
    measured, _ = judge(KTO, good, replace(Totals.of([good]), kl=0.2), -gained_N, torch.ones(4), torch.zeros(4))
    assert measured.rewards is not None
    assert means(KTO, measured.rewards, Totals.of([good])).keys() == {"rewards/accuracy", "kl", "rewards/chosen"}


def rated_rows(base: LoadedBase) -> list[dict[str, Any]]:
    told = list[dict[str, Any]]()
    for chat in make.rated(ROWS):
        asked, answer = question_and_answer(base.renderer.example(chat.messages))
        told.append({"prompt_ids": asked, "completion_ids": answer, "label": chat.is_good})
    answers = [row["completion_ids"] for row in told]
    return [row | {"KL_completion_ids": answers[n - 1]} for n, row in enumerate(told)]


def test_an_answer_that_is_certain_has_finite_odds(trainee: Trainee) -> None:
    (batch,) = step(trainee).micro_batches
    losses_N, is_first_N = torch.zeros(len(batch.labelled_N)), torch.ones(len(batch.labelled_N))
    measured, weights_N = judge(ORPO, batch, Totals.of([batch]), losses_N, is_first_N, None)

    assert torch.isfinite(measured.loss_sum) and torch.isfinite(weights_N).all()


@EACH
def test_a_step_does_not_depend_on_how_it_is_cut_up(trainee: Trainee, preference: PreferenceSpec) -> None:
    loss, rewards, gradient = taken(trainee, step(trainee))
    parts = step(trainee, max_tokens=1)
    loss_of_parts, rewards_of_parts, gradient_of_parts = taken(trainee, parts)

    documents = 1 if preference is KTO else 2  # a pair is never torn apart
    assert [len(batch.lengths) for batch in parts.micro_batches] == [documents] * ROWS
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)
    assert rewards_of_parts == pytest.approx(rewards, rel=1e-4)
    torch.testing.assert_close(gradient_of_parts, gradient, atol=1e-6, rtol=1e-3)


def test_a_fresh_adapter_prefers_nothing(exact: LoadedBase) -> None:
    with adapted(exact, spec()) as trainee:
        loss, rewards, _ = taken(trainee, step(trainee))

    assert loss == pytest.approx(math.log(2), rel=1e-6)
    assert set(rewards.values()) == {0.0}


@EACH
def test_an_evaluation_tells_the_same_loss_and_rewards(trainee: Trainee) -> None:
    cut = step(trainee, max_tokens=300)
    loss, rewards, _ = taken(trainee, cut)
    said = evaluate(trainee, cut.micro_batches, mismatched=cut.mismatched, step=1, should_stop=lambda: False)

    assert said is not None and said.valid_loss == pytest.approx(loss, rel=1e-5)
    assert said.rewards == pytest.approx({f"valid_{name}": mean for name, mean in rewards.items()}, rel=1e-4)
    assert said.valid_mean_token_accuracy <= 1.0


@BOTH
def test_training_makes_the_preferred_answers_likelier(tiny: LoadedBase, tmp_path: Path, preference: PreferenceSpec) -> None:
    runner = Runner(tiny, tmp_path, has_validation=True, examples=make.preferences)
    result = runner.go(spec(preference, n_epochs=4))
    first, *_, last = runner.of(Stepped)

    assert isinstance(result, Finished) and last.train_loss < 0.8 * first.train_loss
    assert last.rewards["rewards/accuracy"] == 1.0 and last.rewards["rewards/margin"] > LEAST_MARGIN[preference.method]
    assert last.rewards["rewards/margin"] == pytest.approx(last.rewards["rewards/chosen"] - last.rewards["rewards/rejected"])
    assert runner.of(Evaluated)[-1].rewards["valid_rewards/accuracy"] == 1.0
    assert adapter.open(Path(result.directory), base=tiny, max_rank=4).modules


@pytest.mark.parametrize(("preference", "dropout"), [(DPO, 0.0), (DPO, 0.1), (ORPO, 0.0), (KTO, 0.0), (KTO, 0.1)])
def test_a_stopped_and_resumed_run_gives_the_same_bits(
    tiny: LoadedBase, tmp_path: Path, preference: PreferenceSpec, dropout: float
) -> None:
    asked = spec(preference, lora={"dropout": dropout}, batch_size=5)
    straight, halting = (Runner(tiny, tmp_path / name, True, examples=MADE[preference.method]) for name in "ab")
    straight.go(asked)
    stopped = halting.go(asked, should_stop=halting.stop_after(3))
    torch.manual_seed(99)
    halting.go(asked)

    assert stopped == Stopped(step=3) and halting.of(Started)[1].resumed_from == 3
    assert halting.weights == straight.weights
    assert [(event.train_loss, event.rewards) for event in halting.of(Stepped)] == [
        (event.train_loss, event.rewards) for event in straight.of(Stepped)
    ]


def test_layers_computed_again_give_the_same_bits(tiny: LoadedBase, tmp_path: Path) -> None:
    keeping, again = (Runner(tiny, tmp_path / name, examples=make.preferences) for name in "ab")
    keeping.go(spec())
    again.go(spec(), is_checkpointing=True)

    assert again.weights == keeping.weights


@pytest.mark.parametrize(
    ("asked", "made"),
    [(make.spec(), make.preferences), (spec(), make.examples), (spec(KTO), make.preferences), (spec(ORPO), make.ratings)],
)
def test_rows_of_another_method_are_refused(tiny: LoadedBase, tmp_path: Path, asked: TrainSpec, made: Any) -> None:
    with pytest.raises(WrongRows, match="the method"):
        Runner(tiny, tmp_path, examples=made).go(asked)


def test_the_tuned_model_is_asked_without_dropout(exact: LoadedBase) -> None:
    (batch,) = micro_batches(make.preferences(exact.renderer), range(ROWS), max_tokens=10_000)
    with adapted(exact, spec(lora={"dropout": 0.5})) as trainee:
        excite(trainee.parameters)
        started = replace(trainee, start=tuple(parameter.detach().clone() for parameter in trainee.parameters))
        first, second = (started._losses_of_reference(batch) for _ in range(2))

        assert torch.equal(first, second) and not torch.equal(first, trainee._losses_of_reference(batch))
        assert trainee.model.training


def test_the_base_is_seen_without_its_adapter(trainee: Trainee, exact: LoadedBase) -> None:
    (batch,) = step(trainee).micro_batches
    found, _ = trainee.token_losses(batch, of_base=True)
    assert isinstance(trainee.model, PeftModel)
    with trainee.model.disable_adapter():
        logits_TV = torch.cat(
            [exact.model(tokens[None]).logits[0] for tokens in torch.from_numpy(batch.tokens_T).split(list(batch.lengths))]
        )
    expected = torch.nn.functional.cross_entropy(
        logits_TV[torch.from_numpy(batch.labelled_N)], torch.from_numpy(batch.targets_N), reduction="none"
    )

    torch.testing.assert_close(found[: len(expected)], expected, atol=1e-4, rtol=1e-4)
