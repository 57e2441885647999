"""What each step trains on: decided by seed and step alone, so that a resumed run sees what it would have seen.

Axes: T tokens of a micro-batch, documents one after the other; N labelled positions of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.core.spec import TrainSpec
from app.core.tokens.tokenise import TokenisedSet


@dataclass(frozen=True)
class MicroBatch:
    """Whole documents side by side, without padding. Position `labelled_N[n]` predicts token `targets_N[n]`.

    With `pairs` the documents are two of each pair, the preferred one first.
    """

    tokens_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]  # start at 0 in every document
    lengths: tuple[int, ...]
    labelled_N: NDArray[np.int64]
    targets_N: NDArray[np.int64]
    pairs: int = 0

    @property
    def weight(self) -> int:
        """How many there are of what a step's loss is the mean over: pairs, or labelled tokens."""
        return self.pairs or len(self.labelled_N)

    @property
    def documents_N(self) -> NDArray[np.int64]:
        """Which document each labelled position is of."""
        return np.searchsorted(np.cumsum(self.lengths), self.labelled_N, side="right")

    @property
    def labelled_B(self) -> tuple[int, ...]:
        """How many labelled positions each document has."""
        return tuple(np.bincount(self.documents_N, minlength=len(self.lengths)).tolist())

    @property
    def judged_tokens(self) -> int:
        """Those that accuracy is told of: of a pair, the preferred side's."""
        return sum(self.labelled_B[::2]) if self.pairs else len(self.labelled_N)


@dataclass(frozen=True)
class Step:
    """The micro-batches whose gradients make one optimizer step. Steps count from 1."""

    number: int
    micro_batches: tuple[MicroBatch, ...]

    @property
    def tokens(self) -> int:
        return sum(len(batch.tokens_T) for batch in self.micro_batches)

    @property
    def labelled_tokens(self) -> int:
        return sum(len(batch.labelled_N) for batch in self.micro_batches)

    @property
    def totals(self) -> "Totals":
        return Totals.of(self.micro_batches)


@dataclass(frozen=True)
class Totals:
    """What the sums over some micro-batches are divided by: see `MicroBatch`."""

    weight: int
    judged_tokens: int
    pairs: int

    @classmethod
    def of(cls, batches: Sequence[MicroBatch]) -> "Totals":
        return cls(
            weight=sum(batch.weight for batch in batches),
            judged_tokens=sum(batch.judged_tokens for batch in batches),
            pairs=sum(batch.pairs for batch in batches),
        )


class TrainData:
    """The steps of a whole run."""

    def __init__(self, examples: TokenisedSet, spec: TrainSpec, *, micro_batch_tokens: int | None = None) -> None:
        self._examples, self._spec = examples, spec
        self.micro_batch_tokens = micro_batch_tokens or spec.micro_batch_tokens
        self.total_steps = spec.total_steps(examples.examples)

    def steps_after(self, step: int) -> Iterator[Step]:
        """The steps that follow `step`; after 0 come all."""
        for number in range(step + 1, self.total_steps + 1):
            epoch, within = divmod(number - 1, self._steps_per_epoch)
            chosen = self._order_E(epoch)[within * self._spec.batch_size :][: self._spec.batch_size]
            yield Step(number, micro_batches(self._examples, chosen, max_tokens=self.micro_batch_tokens))

    def tokens_after(self, step: int) -> int:
        """How many are still to be trained on once `step` is done."""
        epoch, within = divmod(step, self._steps_per_epoch)
        done_E = self._order_E(epoch)[: within * self._spec.batch_size]
        return (self._spec.n_epochs - epoch) * self._examples.tokens - int(self._examples.lengths_E[done_E].sum())

    @property
    def _steps_per_epoch(self) -> int:
        return -(-self._examples.examples // self._spec.batch_size)

    def _order_E(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._spec.seed, epoch]).permutation(self._examples.examples)


def micro_batches(
    examples: TokenisedSet, chosen: Sequence[int] | NDArray[np.int64], *, max_tokens: int
) -> tuple[MicroBatch, ...]:
    """Each of `packs` as a micro-batch."""
    return tuple(micro_batch(examples, packed) for packed in packs(examples, chosen, max_tokens=max_tokens))


def packs(examples: TokenisedSet, chosen: Sequence[int] | NDArray[np.int64], *, max_tokens: int) -> list[list[int]]:
    """Pack whole examples, the longest first, each into the first micro-batch with room. One over the budget stands alone."""
    bins, room = list[list[int]](), list[int]()
    for example in sorted(chosen, key=lambda e: -int(examples.lengths_E[e])):  # stable: ties keep the order of the epoch
        length = int(examples.lengths_E[example])
        fits = next((i for i, left in enumerate(room) if length <= left), None)
        if fits is None:
            bins.append([])
            room.append(max_tokens)
            fits = len(bins) - 1
        bins[fits].append(int(example))
        room[fits] -= length
    return bins


def micro_batch(examples: TokenisedSet, chosen: Sequence[int]) -> MicroBatch:
    """These examples side by side, in this order."""
    spans = [slice(examples.offsets_E1[e], examples.offsets_E1[e + 1]) for e in chosen]
    lengths = tuple(length for e in chosen for length in examples.lengths_of(e))
    tokens_T = np.concatenate([examples.tokens_N[span] for span in spans]).astype(np.int64)
    is_trained_T = np.concatenate([examples.is_trained_N[span] for span in spans])
    trained_N = np.flatnonzero(is_trained_T)  # never the first token of a document, so the position before is its own
    return MicroBatch(
        tokens_T=tokens_T,
        positions_T=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        lengths=lengths,
        labelled_N=trained_N - 1,
        targets_N=tokens_T[trained_N],
        pairs=len(chosen) if examples.pairs else 0,
    )
