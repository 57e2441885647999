"""What a run has come to, example by example: its adapter against the base, on held-out examples and on some that it learnt from.

Axes: E examples; S sides of one: a single answer, or the preferred and the other. docs/metrics.md defines what is told.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from app.core.events import Examined, ExaminedExample, HeldOut, Reason, Scores, Split
from app.core.spec import TrainSpec
from app.core.tokens.tokenise import TokenisedSet
from worker.training.data import micro_batch, packs
from worker.training.trainee import Trainee

SHARE_OF_RUN, MOST_EXAMPLES = 0.1, 2000  # how much of the training set is looked at: a forward is a third of a step
MOST_LISTED, MOST_COMPARED = 20, 64  # of each split; of the training examples, the hardest are put to the base too
FENCE, FEWEST_NATS, FEWEST_EXAMPLES = 3.0, 0.5, 20  # Tukey's far fence; not where all lie close together, or are few
WORSE_NATS = 0.1

COLUMNS: Final = (
    "split",
    "line",
    "tokens",
    "loss",
    "base_loss",
    "token_accuracy",
    "base_token_accuracy",
    "rejected_loss",
    "base_rejected_loss",
    "reasons",
)

ShouldStop = Callable[[], bool]


class ToldToStop(Exception):
    """In the middle of it."""


@dataclass(frozen=True)
class PerExample:
    """Over the labelled tokens of each side of each example: summed loss in nats, first choices, how many there are."""

    loss_ES: NDArray[np.float64]
    correct_ES: NDArray[np.int64]
    labelled_ES: NDArray[np.int64]

    @property
    def means_ES(self) -> NDArray[np.float64]:
        """Nats per token."""
        return self.loss_ES / self.labelled_ES

    @property
    def accuracy_E(self) -> NDArray[np.float64]:
        return self.correct_ES[:, 0] / self.labelled_ES[:, 0]

    @property
    def scores(self) -> Scores:
        """Over all tokens of the answers, of pairs those of the preferred ones."""
        labelled = int(self.labelled_ES[:, 0].sum())
        return Scores(
            loss=float(self.loss_ES[:, 0].sum()) / labelled,
            mean_token_accuracy=int(self.correct_ES[:, 0].sum()) / labelled,
            ranking_accuracy=float(np.mean(self.is_ranked_E)) if self.loss_ES.shape[1] == 2 else None,
        )

    @property
    def is_ranked_E(self) -> NDArray[np.bool_]:
        """Of pairs: whether the preferred answer is the likelier one."""
        is_ranked: NDArray[np.bool_] = self.loss_ES[:, 0] < self.loss_ES[:, 1]
        return is_ranked


@dataclass(frozen=True)
class Part:
    """Examples of one set, by the adapter, and some of them by the base: `compared_C` are their places in `chosen_E`."""

    split: Split
    examples: TokenisedSet
    chosen_E: NDArray[np.int64]
    adapter: PerExample
    compared_C: NDArray[np.int64]
    base: PerExample

    def rows(self) -> list[ExaminedExample]:
        """In the order of their lines."""
        means_ES, accuracy_E = self.adapter.means_ES, self.adapter.accuracy_E
        of_base = {int(place): row for row, place in enumerate(self.compared_C)}
        reasons_E, is_pair = self._reasons(), means_ES.shape[1] == 2
        found = []
        for place, example in enumerate(self.chosen_E):
            row = of_base.get(place)
            base_means_S = None if row is None else self.base.means_ES[row]
            found.append(
                ExaminedExample(
                    split=self.split,
                    line=int(self.examples.lines_E[example]),
                    tokens=int(self.adapter.labelled_ES[place, 0]),
                    loss=float(means_ES[place, 0]),
                    token_accuracy=float(accuracy_E[place]),
                    base_loss=None if base_means_S is None else float(base_means_S[0]),
                    base_token_accuracy=None if row is None else float(self.base.accuracy_E[row]),
                    rejected_loss=float(means_ES[place, 1]) if is_pair else None,
                    base_rejected_loss=float(base_means_S[1]) if is_pair and base_means_S is not None else None,
                    reasons=reasons_E[place],
                )
            )
        return sorted(found, key=lambda row: row.line)

    def _reasons(self) -> list[tuple[Reason, ...]]:
        """Why an example looks as if it were not meant so."""
        loss_E = self.adapter.means_ES[:, 0]
        is_pair = self.adapter.loss_ES.shape[1] == 2
        first, third = np.quantile(loss_E, (0.25, 0.75))
        fence = third + max(FENCE * (third - first), FEWEST_NATS)
        is_far_E = (loss_E > fence) & (len(loss_E) >= FEWEST_EXAMPLES)
        is_worse_E, is_misranked_E = np.zeros_like(is_far_E), np.zeros_like(is_far_E)
        if is_pair:
            is_misranked_E = ~self.adapter.is_ranked_E
        else:
            is_worse_E[self.compared_C] = loss_E[self.compared_C] > self.base.means_ES[:, 0] + WORSE_NATS
        marks: tuple[tuple[Reason, NDArray[np.bool_]], ...] = (
            ("outlier", is_far_E),
            ("worse_than_base", is_worse_E),
            ("misranked", is_misranked_E),
        )
        return [tuple(reason for reason, is_so_E in marks if is_so_E[place]) for place in range(len(loss_E))]


class Examination:
    """Which examples of a run are looked at once it is over. `tokens` are those of all its forwards."""

    def __init__(self, training: TokenisedSet, validation: TokenisedSet | None, spec: TrainSpec, *, max_tokens: int) -> None:
        self._training, self._validation, self._max_tokens = training, validation, max_tokens
        self._chosen_E = _chosen(training, spec)
        self._held_out_E = _to_learn(validation) if validation else np.arange(0)
        held_out = int(validation.lengths_E[self._held_out_E].sum()) if validation else 0
        self.tokens = 2 * held_out + int(training.lengths_E[self._chosen_E].sum())

    def of(self, trainee: Trainee, *, table: Path, should_stop: ShouldStop) -> Examined:
        """The adapter that the trainee has now. Every example looked at is a row of the CSV file `table`. Raises ToldToStop."""
        ask = partial(measure, trainee, max_tokens=self._max_tokens, should_stop=should_stop)
        trainee.model.eval()
        try:
            training = self._of_training(ask)
            validation = self._of_validation(ask)
        finally:
            trainee.model.train()
        rows = [row for part in (training, validation) if part for row in part.rows()]
        _write(table, rows)
        return Examined(
            held_out=_held_out(validation) if validation else None,
            training_examples=len(self._chosen_E),
            training=training.adapter.scores,
            hardest=tuple(_hardest(rows)),
            suspicious=tuple(_hardest([row for row in rows if row.reasons])),
            suspicious_count=sum(bool(row.reasons) for row in rows),
        )

    def _of_training(self, ask: Callable[..., PerExample]) -> Part:
        chosen_E = self._chosen_E
        adapter = ask(self._training, chosen_E, of_base=False)
        hardest_C = np.argsort(-adapter.means_ES[:, 0], kind="stable")[:MOST_COMPARED]
        base = ask(self._training, chosen_E[hardest_C], of_base=True)
        return Part("training", self._training, chosen_E, adapter, hardest_C, base)

    def _of_validation(self, ask: Callable[..., PerExample]) -> Part | None:
        examples = self._validation
        all_E = self._held_out_E
        if examples is None or not len(all_E):
            return None
        adapter, base = (ask(examples, all_E, of_base=of_base) for of_base in (False, True))
        return Part("validation", examples, all_E, adapter, np.arange(len(all_E)), base)


def measure(
    trainee: Trainee,
    examples: TokenisedSet,
    chosen_E: NDArray[np.int64],
    *,
    of_base: bool,
    max_tokens: int,
    should_stop: ShouldStop,
) -> PerExample:
    """Each of the chosen examples. Raises ToldToStop."""
    shape = (len(chosen_E), 2 if examples.pairs else 1)
    found = PerExample(np.zeros(shape), np.zeros(shape, np.int64), np.zeros(shape, np.int64))
    place_of = {int(example): place for place, example in enumerate(chosen_E)}
    for packed in packs(examples, chosen_E, max_tokens=max_tokens):
        if should_stop():
            raise ToldToStop
        batch = micro_batch(examples, packed)
        losses_N, is_first_N = (values.cpu().numpy() for values in trainee.token_losses(batch, of_base=of_base))
        places_E = [place_of[example] for example in packed]
        labelled = len(batch.labelled_N)  # what comes after is padding
        for into, values_N in (
            (found.loss_ES, losses_N[:labelled]),
            (found.correct_ES, is_first_N[:labelled]),
            (found.labelled_ES, np.ones(labelled)),
        ):
            sums_B = np.bincount(batch.documents_N, weights=values_N, minlength=len(batch.lengths))
            into[places_E] = sums_B.reshape(len(packed), -1)
    return found


def _chosen(training: TokenisedSet, spec: TrainSpec) -> NDArray[np.int64]:
    """Drawn by the seed: at least one, at most so many that their tokens are a tenth of those trained on."""
    rng = np.random.default_rng([spec.seed, spec.n_epochs])  # epochs draw with less than that
    order_E = rng.permutation(_to_learn(training))
    tokens_E = np.cumsum(training.lengths_E[order_E])
    within = int(np.searchsorted(tokens_E, SHARE_OF_RUN * spec.n_epochs * training.tokens, side="right"))
    return np.sort(order_E[: min(MOST_EXAMPLES, max(1, within))])


def _to_learn(examples: TokenisedSet) -> NDArray[np.int64]:
    """All but answers that were called bad: they are hard when all went well. Where no other is, these."""
    good_E = np.flatnonzero(examples.ratings_E >= 0)
    return good_E if len(good_E) else np.arange(examples.examples)


def _held_out(part: Part) -> HeldOut:
    return HeldOut(
        examples=len(part.chosen_E),
        tokens=int(part.adapter.labelled_ES[:, 0].sum()),
        base=part.base.scores,
        adapter=part.adapter.scores,
    )


def _hardest(rows: Sequence[ExaminedExample]) -> Iterator[ExaminedExample]:
    """Of each split, those with the highest loss."""
    for split in ("training", "validation"):
        of_split = [row for row in rows if row.split == split]
        yield from sorted(of_split, key=lambda row: -row.loss)[:MOST_LISTED]


def _write(table: Path, rows: Sequence[ExaminedExample]) -> None:
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            told = row.model_dump(exclude_none=True)
            writer.writerow(told | {"reasons": " ".join(row.reasons)})
