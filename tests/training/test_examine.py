"""What a run tells of its examples, against the same numbers computed by hand with transformers and PEFT."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch.nn import functional

from app.core.chat import Chat, Message
from app.core.events import Evaluated, Examined, Finished, Stepped, Stopped
from app.core.render import Example
from app.core.spec import PreferenceSpec
from app.core.tokens.tokenise import TokenisedSet, tokenise
from tests.training import make
from tests.training.make import Runner
from worker.model.base import LoadedBase
from worker.training.examine import Examination, Part, PerExample

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks by it


@torch.no_grad()
def by_hand(model: Any, examples: list[Example]) -> list[tuple[float, int, int]]:
    """Of each document: summed loss over its labelled tokens, how many the model would have said, how many there are."""
    found = []
    for example in examples:
        labels_T = torch.tensor([t if flag else -100 for t, flag in zip(example.tokens, example.is_trained, strict=True)])[1:]
        logits_TV = model(input_ids=torch.tensor([example.tokens])).logits[0, :-1]
        loss = functional.cross_entropy(logits_TV, labels_T, reduction="sum")
        found.append((float(loss), int((logits_TV.argmax(-1) == labels_T).sum()), int((labels_T != -100).sum())))
    return found


def both(runner: Runner, examples: list[Example]) -> tuple[list[tuple[float, int, int]], list[tuple[float, int, int]]]:
    """By the base, and by the adapter as PEFT loads it."""
    model = runner.base.model
    model.config._attn_implementation = "sdpa"
    model.eval()
    of_base = by_hand(model, examples)
    tuned = PeftModel.from_pretrained(model, str(runner.paths.output)).eval()
    try:
        return of_base, by_hand(tuned, examples)
    finally:
        tuned.unload()


def mean(found: list[tuple[float, int, int]]) -> tuple[float, float]:
    """Loss and accuracy over all labelled tokens."""
    loss, correct, labelled = (sum(column) for column in zip(*found, strict=True))
    return loss / labelled, correct / labelled


def table_of(runner: Runner) -> list[dict[str, str]]:
    with runner.paths.table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_held_out_rows_are_measured_as_by_hand(exact: LoadedBase, tmp_path: Path) -> None:
    runner = Runner(exact, tmp_path, has_validation=True)
    runner.go(make.spec(n_epochs=10))  # a tenth of it is the whole file
    (said,), (finished,) = runner.of(Examined), runner.of(Finished)
    documents = [exact.renderer.example(chat.messages) for chat in make.chats()]
    of_base, of_adapter = both(runner, documents)
    held_out = said.held_out
    assert held_out is not None

    assert (held_out.examples, held_out.tokens) == (5, sum(labelled for _, _, labelled in of_base[:5]))
    for scores, found in ((held_out.base, of_base), (held_out.adapter, of_adapter)):
        assert (scores.loss, scores.mean_token_accuracy) == pytest.approx(mean(found[:5]), rel=1e-4)
        assert scores.ranking_accuracy is None
    assert held_out.adapter.loss == pytest.approx(runner.of(Evaluated)[-1].valid_loss, rel=1e-5)
    assert (said.training.loss, said.training.mean_token_accuracy) == pytest.approx(mean(of_adapter), rel=1e-4)

    assert finished.table == str(runner.paths.table)
    for split, count in (("training", 12), ("validation", 5)):
        rows = [row for row in table_of(runner) if row["split"] == split]
        assert [int(row["line"]) for row in rows] == list(range(2, count + 2))
        for row, base, adapter in zip(rows, of_base, of_adapter, strict=False):
            assert int(row["tokens"]) == adapter[2]
            assert float(row["loss"]) == pytest.approx(adapter[0] / adapter[2], rel=1e-3, abs=1e-5)
            assert float(row["base_loss"]) == pytest.approx(base[0] / base[2], rel=1e-4)
            assert float(row["token_accuracy"]) == adapter[1] / adapter[2]
            assert float(row["base_token_accuracy"]) == base[1] / base[2]
    hardest = [row.loss for row in said.hardest if row.split == "training"]
    assert hardest == sorted(hardest, reverse=True) and len(hardest) == 12


def test_pairs_are_told_by_their_preferred_answer_and_by_which_is_likelier(exact: LoadedBase, tmp_path: Path) -> None:
    runner = Runner(exact, tmp_path, has_validation=True, examples=make.preferences)
    runner.go(make.spec(preference=PreferenceSpec(method="dpo", beta=0.3), micro_batch_tokens=300))
    (said,) = runner.of(Examined)
    pairs = make.pairs(5)
    preferred, other = (
        both(runner, [exact.renderer.example(side) for side in sides])
        for sides in ([chat.messages for chat in pairs], [(*chat.messages[:-1], chat.rejected) for chat in pairs])
    )
    rows = [row for row in table_of(runner) if row["split"] == "validation"]

    for which, scores in enumerate((said.held_out.base, said.held_out.adapter)):
        ranked = [one[0] < two[0] for one, two in zip(preferred[which], other[which], strict=True)]
        assert (scores.loss, scores.mean_token_accuracy) == pytest.approx(mean(preferred[which]), rel=1e-4)
        assert scores.ranking_accuracy == sum(ranked) / len(ranked)
    for row, of_base, of_adapter in zip(rows, *other, strict=True):
        assert float(row["base_rejected_loss"]) == pytest.approx(of_base[0] / of_base[2], rel=1e-4)
        assert float(row["rejected_loss"]) == pytest.approx(of_adapter[0] / of_adapter[2], rel=1e-3)


@pytest.mark.parametrize(("publish", "kept"), [("last", 6), ("best", 4)])
def test_a_stop_in_the_middle_of_it_changes_nothing(exact: LoadedBase, tmp_path: Path, publish: str, kept: int) -> None:
    """With `best`, an older adapter is in the model by then: the run goes on from its last checkpoint."""
    spec = make.spec(publish=publish)
    straight, stopped = (make.overfitting(exact, tmp_path / name) for name in ("straight", "stopped"))
    straight.go(spec)
    early = stopped.go(spec, should_stop=lambda: any(event.step == 6 for event in stopped.of(Evaluated)))
    stopped.said.clear()
    stopped.go(spec)

    assert early == Stopped(step=kept)
    assert stopped.of(Examined) == straight.of(Examined)
    assert [event.step for event in stopped.of(Stepped)] == list(range(kept + 1, 7))
    assert stopped.weights == straight.weights


@pytest.mark.parametrize(
    ("rows", "epochs", "looked_at"), [(100, 1, 10), (100, 3, 30), (100, 20, 100), (3, 1, 1), (9000, 10, 2000)]
)
def test_a_tenth_of_what_was_trained_on_is_looked_at(rows: int, epochs: int, looked_at: int) -> None:
    spec = make.spec(n_epochs=epochs)
    examination = Examination(of_lengths([10] * rows), of_lengths([7] * 4), spec, max_tokens=100)

    assert examination.tokens == 10 * looked_at + 2 * 7 * 4
    assert Examination(of_lengths([10] * rows), None, spec, max_tokens=100).tokens == 10 * looked_at


def test_which_are_looked_at_goes_by_the_seed() -> None:
    def tokens(seed: int) -> int:
        return Examination(of_lengths(list(range(1, 51))), None, make.spec(n_epochs=1, seed=seed), max_tokens=100).tokens

    assert tokens(1) == tokens(1)
    assert len({tokens(seed) for seed in range(5)}) > 1


def test_of_rated_answers_the_good_ones_are_looked_at() -> None:
    """A bad answer is hard because it was pushed away."""
    asked = make.spec(n_epochs=10)  # a tenth of it is the whole file
    training, held_out = of_lengths([10, 20, 40], [1, -1, 1]), of_lengths([3, 5], [-1, 1])

    assert Examination(training, held_out, asked, max_tokens=100).tokens == 10 + 40 + 2 * 5
    assert Examination(of_lengths([10, 20], [-1, -1]), None, asked, max_tokens=100).tokens == 30  # there are no others


def of_lengths(lengths: list[int], ratings: list[int] | None = None) -> TokenisedSet:
    total = sum(lengths)
    return TokenisedSet(
        tokens_N=np.zeros(total, np.int32),
        is_trained_N=np.ones(total, np.bool_),
        offsets_E1=np.concatenate([[0], np.cumsum(lengths)]),
        lines_E=np.arange(1, len(lengths) + 1, dtype=np.int32),
        seconds_E=np.zeros(len(lengths), np.int32),
        ratings_E=np.array(ratings or [0] * len(lengths), np.int8),
    )


def per_example(*loss: Any, labelled: int = 10) -> PerExample:
    """Of means in nats per token; a tuple is a pair."""
    loss_ES = np.array(loss, np.float64).reshape(len(loss), -1) * labelled
    return PerExample(loss_ES, np.zeros(loss_ES.shape, np.int64), np.full(loss_ES.shape, labelled))


def reasons(adapter: PerExample, base: PerExample, compared: list[int]) -> dict[int, tuple[str, ...]]:
    """By line, where there are any."""
    count = len(adapter.loss_ES)
    chosen_E: NDArray[np.int64] = np.arange(count)
    part = Part("training", of_lengths([10] * count), chosen_E, adapter, np.array(compared, np.int64), base)
    return {row.line: row.reasons for row in part.rows() if row.reasons}


def test_an_example_far_from_the_others_looks_suspicious() -> None:
    usual = [0.1 + 0.01 * (n % 5) for n in range(30)]

    assert reasons(per_example(*usual, 0.6), per_example(9.0), [30]) == {}
    assert reasons(per_example(*usual, 0.7), per_example(9.0), [30]) == {31: ("outlier",)}
    assert reasons(per_example(*usual[:10], 0.7), per_example(9.0), [10]) == {}  # of so few nobody can say what is usual


def test_an_example_that_the_base_knew_better_looks_suspicious() -> None:
    assert reasons(per_example(1.0, 1.2, 1.2), per_example(1.0, 1.15, 1.0), [0, 1, 2]) == {3: ("worse_than_base",)}
    assert reasons(per_example(1.0, 1.2, 1.2), per_example(1.0), [2]) == {3: ("worse_than_base",)}  # the others were not asked


def test_a_pair_whose_other_answer_is_still_likelier_looks_suspicious() -> None:
    adapter, base = per_example((1.0, 2.0), (2.0, 1.0)), per_example((0.1, 3.0), (0.1, 3.0))

    assert reasons(adapter, base, [0, 1]) == {2: ("misranked",)}


def test_a_row_that_says_the_opposite_of_the_others_is_found(tiny: LoadedBase, tmp_path: Path) -> None:
    """Thirty times the same answer, once another."""

    def examples(renderer: Any, count: int = 30) -> TokenisedSet:
        usual = [make.chat(line, f"What of {line}?", "yes yes yes yes") for line in range(1, count + 1)]
        odd = Chat((Message("user", "What of 31?"), Message("assistant", "no -- never --- 7")), count + 1)
        return tokenise([*usual, odd], renderer, max_seq_length=make.CONTEXT)

    runner = Runner(tiny, tmp_path, examples=examples)
    runner.go(make.spec(n_epochs=10, batch_size=8, checkpoint_every_steps=1000))
    (said,) = runner.of(Examined)

    assert said.held_out is None
    assert said.hardest[0].line == 31
    assert [(row.line, "outlier" in row.reasons) for row in said.suspicious] == [(31, True)]
