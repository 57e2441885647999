"""Configurations of Axolotl and TRL as jobs: what is mapped, and that nothing is swallowed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import OpenAI

from app.core import catalog
from app.core.importing import Imported, convert
from app.core.importing.convert import known_keys
from app.jobs.schemas import JobCreate
from cli.main import main
from tests import make

AXOLOTL = """
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
load_in_4bit: true
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
peft_use_rslora: true
datasets:
  - path: our/recipes
    split: train
    type: alpaca
    field_instruction: question
val_set_size: 0.1
sequence_len: 1024
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 2e-4
warmup_ratio: 0.1
weight_decay: 0.01
early_stopping_patience: 3
load_best_model_at_end: true
wandb_project: recipes
wandb_name: first
flash_attention: true
hub_model_id:
"""
TRL = f"""
model_name_or_path: {make.TINY}
use_peft: true
load_in_4bit: true
use_bnb_nested_quant: true
assistant_only_loss: true
dataset_name: our/chats
lora_target_modules: all-linear
num_train_epochs: 2
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
learning_rate: 1.0e-3
warmup_steps: 0.1
report_to: [tensorboard]
bf16: true
"""


def imported(text: str, method: str | None = None, **changed: Any) -> Imported:
    document = {**yaml.safe_load(text), **changed}
    kept = {key: value for key, value in document.items() if value is not ...}
    return convert(kept, catalog.load(), method=method)


def refusals(found: Imported) -> dict[str, bool]:
    return {refused.key: refused.matters for refused in found.refused}


def test_a_configuration_of_axolotl_is_a_job() -> None:
    found = imported(AXOLOTL)

    assert found.body == {
        "model": "smollm2-135m-instruct",
        "training_file": "THE-ID-OF-THE-UPLOADED-FILE",
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        "quantization": {"scheme": "nf4", "double_quant": True},
        "training": {
            "max_seq_length": 1024,
            "validation_split": 0.1,
            "learning_rate": 2e-4,  # which YAML 1.1 reads as text
            "scheduler": "cosine",
            "min_learning_rate_ratio": 0.1,
            "warmup_ratio": 0.1,
            "optimizer": "paged_adamw_8bit",
            "weight_decay": 0.01,
            "early_stopping": {"patience": 3},
            "publish": "best",
        },
        "seed": 42,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 8, "n_epochs": 3}}},
        "integrations": [{"type": "wandb", "wandb": {"project": "recipes", "name": "first"}}],
    }
    assert JobCreate.model_validate(found.body).requested().adapter.targets == ("q_proj", "v_proj")
    assert found.refused == []
    assert {"flash_attention", "hub_model_id", "datasets", "adapter"} == {ignored.key for ignored in found.ignored}
    assert [mapped.key for mapped in found.mapped if mapped.is_default and mapped.to == "seed"] == ["seed"]
    assert found.uploads[0].startswith("training_file: upload our/recipes train as JSON Lines of the format `alpaca`")
    assert found.uploads[1] == "training_file: call the column `question` of our/recipes train `instruction`"


def test_a_configuration_of_trl_is_a_job_that_the_api_makes(client: OpenAI, file_id: str, tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text(TRL)
    written = tmp_path / "job.json"
    assert main(["import-config", str(tmp_path / "trl.yaml"), "--training-file", file_id, "--output", str(written)]) == 0
    body = json.loads(written.read_text())
    job = client.fine_tuning.jobs.create(model=body.pop("model"), training_file=body.pop("training_file"), extra_body=body)

    assert job.hyperparameters.n_epochs == 2 and job.hyperparameters.batch_size == 8 and job.seed == 42
    assert job.model_extra is not None
    assert job.model_extra["adapter"]["rank"] == 16 and job.model_extra["adapter"]["dropout"] == 0.05
    shown = job.model_extra["training"]
    assert (shown["learning_rate"], shown["scheduler"], shown["warmup_ratio"]) == (1e-3, "linear", 0.1)
    assert job.model_extra["trackers"] == [{"type": "tensorboard"}]


def test_what_would_train_something_else_stops_unless_it_is_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yml").write_text(AXOLOTL + "max_steps: 100\nlearning_rat: 1\nquantum: 7\n")
    command = ["import-config", str(tmp_path / "a.yml")]
    assert main(command) == 1
    said = capsys.readouterr()
    assert said.out == "" and "3 keys ask for what is not offered" in said.err
    assert "max_steps" in said.err and "instead: hyperparameters.n_epochs" in said.err
    assert "learning_rat " in said.err and "instead: learning_rate" in said.err and "quantum" in said.err

    assert main([*command, "--force"]) == 0
    JobCreate.model_validate_json(capsys.readouterr().out)


def test_what_the_api_refuses_is_told_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yml").write_text(AXOLOTL.replace("lora_r: 8", "lora_r: 4096"))
    assert main(["import-config", str(tmp_path / "a.yml"), "--force"]) == 0
    said = capsys.readouterr()

    assert "rank" not in json.loads(said.out)["adapter"]
    assert "lora_r  adapter.rank: Input should be less than or equal to 128; instead" in said.err
    assert "lora_r  " not in said.err.partition("ignored:")[0]  # it is not told as mapped too


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"adapter": ...}, {"adapter": True}),
        ({"base_model": "our/own"}, {"base_model": True}),
        ({"rl": "grpo"}, {"rl": True}),
        ({"optimizer": "lion_8bit"}, {"optimizer": True}),
        ({"lr_scheduler": "one_cycle"}, {"lr_scheduler": True}),
        ({"num_epochs": 1.5}, {"num_epochs": True}),
        ({"save_steps": 0.25}, {"save_steps": False}),
        ({"lora_target_modules": ["embed_tokens"]}, {"lora_target_modules": True}),
        ({"warmup_steps": 10, "warmup_ratio": ...}, {"warmup_steps": True}),
        ({"train_on_inputs": True}, {"train_on_inputs": True}),
        ({"train_on_inputs": False}, {}),
        ({"adam_beta2": 0.95}, {"adam_beta2": True}),
        ({"adam_beta2": 0.999}, {}),
        ({"chat_template": "chatml"}, {"chat_template": False}),
        ({"excess_length_strategy": "truncate"}, {"excess_length_strategy": True}),
        ({"datasets": [{"path": "a", "type": "alpaca", "temperature": 2}]}, {"datasets[0].temperature": True}),
        (
            {"datasets": [{"path": "a", "type": "chat_template", "roles_to_train": ["user"]}]},
            {"datasets[0].roles_to_train": True},
        ),
    ],
)
def test_what_is_not_offered_is_refused_by_its_key(changed: dict[str, Any], refused: dict[str, bool]) -> None:
    assert refusals(imported(AXOLOTL, **changed)) == refused


def test_pairs_have_a_method_and_its_beta() -> None:
    axolotl = imported(AXOLOTL, rl="dpo", rl_beta=0.2, datasets=[{"path": "a", "type": "chat_template.default"}])
    assert axolotl.body["method"] == {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 8, "n_epochs": 3, "beta": 0.2}}}
    assert "of the format `preference`" in axolotl.uploads[0]
    trl = imported(TRL, "dpo", beta=0.3, learning_rate=..., assistant_only_loss=...)
    assert trl.body["method"]["dpo"]["hyperparameters"]["beta"] == 0.3
    assert (trl.body["training"]["learning_rate"], trl.body["adapter"]["dropout"]) == (1e-6, 0.0)  # its own defaults
    for found in (axolotl, trl):
        JobCreate.model_validate(found.body)


@pytest.mark.parametrize(
    ("given", "scheme"),
    [
        ({"load_in_4bit": True}, {"scheme": "nf4", "double_quant": False}),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {"scheme": "fp4", "double_quant": False}),
        ({"load_in_8bit": True}, {"scheme": "int8"}),
        ({}, {"scheme": "none"}),
    ],
)
def test_what_the_base_is_held_in_is_said_as_the_api_says_it(given: dict[str, Any], scheme: dict[str, Any]) -> None:
    asked = {"load_in_4bit": ..., "use_bnb_nested_quant": ..., **given}

    assert imported(TRL, **asked).body["quantization"] == scheme


def test_the_set_that_is_evaluated_on_is_a_file_too() -> None:
    found = imported(TRL, eval_strategy="steps", dataset_test_split="held_out")

    assert found.body["validation_file"] == "THE-ID-OF-THE-UPLOADED-FILE"
    assert found.uploads[-1].startswith("validation_file: upload our/chats held_out as JSON Lines")


@pytest.mark.parametrize("text", ["", "- 1", "lora_r: 8", "a: [", "\x00"])
def test_what_is_no_configuration_is_told_in_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yml").write_text(text)

    assert main(["import-config", str(tmp_path / "a.yml")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "a.yml" in said.err


@pytest.mark.parametrize("text", [AXOLOTL, TRL], ids=["axolotl", "trl"])
def test_no_value_of_any_key_is_swallowed_or_breaks_off(text: str) -> None:
    tool = "axolotl" if text == AXOLOTL else "trl"
    for key in known_keys(tool) - {"base_model", "model_name_or_path"}:
        for value in ("x", 0.5, [{}]):
            found = imported(text, **{key: value})
            told = {one.key for one in (*found.mapped, *found.ignored, *found.refused)}
            assert any(key in one for one in told), (key, value)


OTHERWISE_SAID = {"adamw_torch_fused": "adamw_32bit", None: ["q_proj", "v_proj"]}


def test_every_key_of_the_trl_at_hand_is_known_and_its_defaults_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the table against a newer TRL: a key that it does not speak of, or a default that has changed."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig
    from trl.experimental.kto import KTOConfig
    from trl.experimental.orpo import ORPOConfig
    from trl.scripts.utils import DatasetMixtureConfig

    classes: tuple[Any, ...] = (ScriptArguments, ModelConfig, DatasetMixtureConfig, SFTConfig, DPOConfig, ORPOConfig, KTOConfig)
    fields = {one.name: one.default for kind in classes for one in dataclasses.fields(kind)}
    assert set(fields) <= known_keys("trl")
    found = imported(f"model_name_or_path: {make.TINY}\nuse_peft: true\ndataset_name: a")
    theirs = {one.name: one.default for kind in (ModelConfig, SFTConfig) for one in dataclasses.fields(kind)}
    for mapped in found.mapped:
        if mapped.is_default and mapped.key in theirs and mapped.to.split(".")[0] in ("adapter", "training", "seed"):
            expected = {"adamw_torch_fused": "adamw_32bit", None: ["q_proj", "v_proj"]}.get(
                theirs[mapped.key], theirs[mapped.key]
            )
            assert mapped.value == expected, mapped.key
    assert {dataclasses.MISSING, 1e-6} >= {DPOConfig.learning_rate, ORPOConfig.learning_rate, KTOConfig.learning_rate}
