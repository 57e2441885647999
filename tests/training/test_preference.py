"""Training on which of two answers is better. TRL's trainers are the oracle: the same pairs give the same loss and gradient."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

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
from worker.training.data import MicroBatch, Totals, micro_batches
from worker.training.evaluate import evaluate
from worker.training.failures import WrongRows
from worker.training.preference import means
from worker.training.trainee import Trainee, adapted

PAIRS = 6
DPO = PreferenceSpec(method="dpo", beta=0.3)


def spec(preference: PreferenceSpec = DPO, **changes: Any) -> TrainSpec:
    return make.spec(preference=preference, micro_batch_tokens=300, **changes)


@pytest.fixture
def untouched(bases_dir: Path) -> LoadedBase:
    """A base of this test's own: TRL leaves its marks on the model it is given."""
    return bases.load(catalog.load()[TINY], bases_dir, device="cpu", dtype=torch.float32, for_training=True)


@pytest.fixture
def trainee(exact: LoadedBase) -> Iterator[Trainee]:
    with adapted(exact, spec()) as trainee:
        excite(trainee.parameters)
        yield trainee


def packed(base: LoadedBase, *, max_tokens: int) -> tuple[MicroBatch, ...]:
    return micro_batches(make.preferences(base.renderer), range(PAIRS), max_tokens=max_tokens)


def step_of(trainee: Trainee, batches: tuple[MicroBatch, ...]) -> tuple[float, dict[str, float], Tensor]:
    """Loss, rewards and gradient of one step, as the loop takes them."""
    totals, loss, rewards = Totals.of(batches), 0.0, torch.zeros(3)
    for parameter in trainee.parameters:
        parameter.grad = torch.zeros_like(parameter)
    for batch in batches:
        measured = trainee.backward(batch, scale=1 / totals.weight)
        assert measured.rewards is not None
        loss, rewards = loss + float(measured.loss_sum) / totals.weight, rewards + measured.rewards
    gradient = torch.cat([parameter.grad.flatten() for parameter in trainee.parameters])
    return loss, means(rewards, totals), gradient


def tokenizer_of(base: LoadedBase) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=base.renderer.tokenizer, pad_token="<|im_end|>", eos_token="<|im_end|>")


def rows(base: LoadedBase) -> list[dict[str, list[int]]]:
    """Those of make.pairs, as TRL's collator takes them: without the template's words after the end of the turn."""
    told = list[dict[str, list[int]]]()
    for chat in make.pairs(PAIRS):
        (asked, chosen), (_, rejected) = (question_and_answer(base.renderer.example(side)) for side in chat.sides)
        told.append({"prompt_ids": asked, "chosen_ids": chosen, "rejected_ids": rejected})
    return told


def question_and_answer(example: Example) -> tuple[list[int], list[int]]:
    first, count = example.is_trained.index(True), sum(example.is_trained)
    return example.tokens[:first], example.tokens[first : first + count]


@pytest.mark.filterwarnings("ignore")  # TRL, datasets and PEFT warn of each other
def test_loss_gradient_and_rewards_of_dpo_are_those_of_trl(untouched: LoadedBase, tmp_path: Path) -> None:
    with adapted(untouched, spec()) as trainee:
        parameters = trainee.parameters
        some = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        args = DPOConfig(
            output_dir=str(tmp_path), beta=DPO.beta, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[]
        )
        trainer = DPOTrainer(model=trainee.model, args=args, train_dataset=some, processing_class=tokenizer_of(untouched))
        for parameter in parameters:
            parameter.data = parameter.data.float()  # TRL has rounded the adapters of 4-bit bases to bf16
        excite(parameters)
        theirs = trainer.compute_loss(trainee.model, DataCollatorForPreference(pad_token_id=0)(rows(untouched)))
        their_gradient = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(theirs, parameters)])
        ours, rewards, our_gradient = step_of(trainee, packed(untouched, max_tokens=10_000))

    said = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("rewards/")}
    assert ours == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert (our_gradient - their_gradient).norm() < 1e-5 * their_gradient.norm()
    assert list(rewards.values()) == pytest.approx(
        [said[f"rewards/{name}"] for name in ("chosen", "rejected", "accuracies", "margins")], rel=1e-4
    )


def excite(parameters: list[Any]) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.05)


def test_a_step_does_not_depend_on_how_it_is_cut_up(trainee: Trainee, exact: LoadedBase) -> None:
    loss, rewards, gradient = step_of(trainee, packed(exact, max_tokens=10_000))
    parts = packed(exact, max_tokens=1)
    loss_of_parts, rewards_of_parts, gradient_of_parts = step_of(trainee, parts)

    assert len(parts) == PAIRS and all(len(batch.lengths) == 2 for batch in parts)  # a pair is never torn apart
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)
    assert rewards_of_parts == pytest.approx(rewards, rel=1e-4)
    torch.testing.assert_close(gradient_of_parts, gradient, atol=1e-6, rtol=1e-3)


def test_a_fresh_adapter_prefers_nothing(exact: LoadedBase) -> None:
    with adapted(exact, spec()) as trainee:
        loss, rewards, _ = step_of(trainee, packed(exact, max_tokens=10_000))

    assert loss == pytest.approx(math.log(2), rel=1e-6)
    assert set(rewards.values()) == {0.0}


def test_an_evaluation_tells_the_same_loss_and_rewards(trainee: Trainee, exact: LoadedBase) -> None:
    batches = packed(exact, max_tokens=300)
    loss, rewards, _ = step_of(trainee, batches)
    said = evaluate(trainee, batches, step=1, should_stop=lambda: False)

    assert said is not None and said.valid_loss == pytest.approx(loss, rel=1e-5)
    assert said.rewards == pytest.approx({f"valid_{name}": mean for name, mean in rewards.items()}, rel=1e-4)
    assert said.valid_mean_token_accuracy <= 1.0


def test_training_makes_the_preferred_answers_likelier(tiny: LoadedBase, tmp_path: Path) -> None:
    runner = Runner(tiny, tmp_path, has_validation=True, examples=make.preferences)
    result = runner.go(spec(n_epochs=4))
    first, *_, last = runner.of(Stepped)

    assert isinstance(result, Finished) and last.train_loss < 0.8 * first.train_loss
    assert last.rewards["rewards/accuracy"] == 1.0 and last.rewards["rewards/margin"] > 0.3
    assert last.rewards["rewards/margin"] == pytest.approx(last.rewards["rewards/chosen"] - last.rewards["rewards/rejected"])
    assert runner.of(Evaluated)[-1].rewards["valid_rewards/accuracy"] == 1.0
    assert adapter.open(Path(result.directory), base=tiny, max_rank=4).modules


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_stopped_and_resumed_run_gives_the_same_bits(tiny: LoadedBase, tmp_path: Path, dropout: float) -> None:
    asked = spec(lora={"dropout": dropout}, batch_size=5)
    straight, halting = (Runner(tiny, tmp_path / name, True, examples=make.preferences) for name in "ab")
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


@pytest.mark.parametrize(("asked", "made"), [(make.spec(), make.preferences), (spec(), make.examples)])
def test_rows_of_another_method_are_refused(tiny: LoadedBase, tmp_path: Path, asked: TrainSpec, made: Any) -> None:
    with pytest.raises(WrongRows, match="the method"):
        Runner(tiny, tmp_path, examples=made).go(asked)


def test_the_base_is_seen_without_its_adapter(trainee: Trainee, exact: LoadedBase) -> None:
    (batch,) = packed(exact, max_tokens=10_000)
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
