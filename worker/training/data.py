"""What each step trains on: decided by seed and step alone, so that a resumed run sees what it would have seen.

Axes: T tokens of a micro-batch, documents one after the other; N labelled positions of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from app.core.spec import PreferenceSpec, TrainSpec
from app.core.tokens.tokenise import TokenisedSet


@dataclass(frozen=True)
class MicroBatch:
    """Whole documents side by side, without padding. Position `labelled_N[n]` predicts token `targets_N[n]`.

    With `pairs` the documents are two of each pair, the preferred one first; with `ratings` the answer of each was called good
    or bad. `is_answer_N`: of the labelled ones, those that are trained on as the token set says. What else of a preferred one is
    copied (see PreferenceSpec) is labelled without being so.
    """

    tokens_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]  # start at 0 in every document
    lengths: tuple[int, ...]
    labelled_N: NDArray[np.int64]
    targets_N: NDArray[np.int64]
    is_answer_N: NDArray[np.bool_]
    pairs: int = 0
    ratings: tuple[bool, ...] = ()

    @property
    def weight(self) -> int:
        """How many there are of what a step's loss is the mean over: pairs, rated answers, or labelled tokens."""
        return self.pairs or len(self.ratings) or len(self.labelled_N)

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
    """The micro-batches whose gradients make one optimizer step. Steps count from 1.

    `mismatched`, where answers are rated, are questions with answers to others: what KTO estimates its KL from.
    """

    number: int
    micro_batches: tuple[MicroBatch, ...]
    mismatched: tuple[MicroBatch, ...] = ()

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
    """What a micro-batch has to know of all those that are measured together: what their sums are divided by, see `MicroBatch`;
    and their KL, in nats, which is known only once it has been measured.
    """

    weight: int
    judged_tokens: int
    pairs: int
    good: int
    kl: float = 0.0

    @classmethod
    def of(cls, batches: Sequence[MicroBatch]) -> "Totals":
        return cls(
            weight=sum(batch.weight for batch in batches),
            judged_tokens=sum(batch.judged_tokens for batch in batches),
            pairs=sum(batch.pairs for batch in batches),
            good=sum(sum(batch.ratings) for batch in batches),
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
            order_E, first = self._order_E(epoch), within * self._spec.batch_size
            chosen = order_E[first : first + self._spec.batch_size]
            before = order_E[first - 1] if len(chosen) == 1 else chosen[-1]
            packed = micro_batches(self._examples, chosen, max_tokens=self.micro_batch_tokens, preference=self._spec.preference)
            yield Step(number, packed, mismatched(self._examples, chosen, before, max_tokens=self.micro_batch_tokens))

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
    examples: TokenisedSet,
    chosen: Sequence[int] | NDArray[np.int64],
    *,
    max_tokens: int,
    preference: PreferenceSpec | None = None,
) -> tuple[MicroBatch, ...]:
    """Each of `packs` as a micro-batch."""
    return tuple(micro_batch(examples, packed, preference) for packed in packs(examples, chosen, max_tokens=max_tokens))


def packs(examples: TokenisedSet, chosen: Sequence[int] | NDArray[np.int64], *, max_tokens: int) -> list[list[int]]:
    """Pack whole examples, the longest first, each into the first micro-batch with room. One over the budget stands alone."""
    bins = _packed([int(examples.lengths_E[example]) for example in chosen], max_tokens)
    return [[int(chosen[place]) for place in places] for places in bins]


def mismatched(
    examples: TokenisedSet, chosen: Sequence[int] | NDArray[np.int64], before: int, *, max_tokens: int
) -> tuple[MicroBatch, ...]:
    """Each question with the answer of the one before it, as in TRL; the first with that of `before`. Nothing where rows are not
    rated, or there is one alone.

    No answer is longer there than the longest row leaves room for, so that these fit where rows do.
    """
    if not examples.rated or examples.examples == 1:
        return ()
    documents = [_mismatch(examples, *pair) for pair in zip(chosen, [before, *chosen[:-1]], strict=True)]
    bins = _packed([len(tokens) for tokens, _ in documents], max_tokens)
    return tuple(_mismatched_batch([documents[place] for place in places]) for places in bins)


def _packed(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """The places of documents by micro-batch."""
    bins, room = list[list[int]](), list[int]()
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):  # stable: ties keep the order of the epoch
        fits = next((i for i, left in enumerate(room) if lengths[place] <= left), None)
        if fits is None:
            bins.append([])
            room.append(max_tokens)
            fits = len(bins) - 1
        bins[fits].append(place)
        room[fits] -= lengths[place]
    return bins


def micro_batch(examples: TokenisedSet, chosen: Sequence[int], preference: PreferenceSpec | None = None) -> MicroBatch:
    """These examples side by side, in this order."""
    spans = [slice(examples.offsets_E1[e], examples.offsets_E1[e + 1]) for e in chosen]
    is_trained_T = np.concatenate([examples.is_trained_N[span] for span in spans])
    is_labelled_T = is_trained_T
    if preference is not None and preference.copies_preferred:
        is_labelled_T = is_trained_T | np.concatenate([_is_copied(examples, example) for example in chosen])
    made = _side_by_side(
        tokens_T=np.concatenate([examples.tokens_N[span] for span in spans]),
        is_labelled_T=is_labelled_T,
        is_trained_T=is_trained_T,
        lengths=[length for e in chosen for length in examples.lengths_of(e)],
    )
    return replace(
        made,
        pairs=len(chosen) if examples.pairs else 0,
        ratings=tuple(bool(examples.ratings_E[e] > 0) for e in chosen) if examples.rated else (),
    )


def _is_copied(examples: TokenisedSet, pair: int) -> NDArray[np.bool_]:
    """Of the tokens of both sides those of the preferred one, from its second to the end of its answer."""
    is_trained_T = examples.is_trained_N[examples.offsets_E1[pair] : examples.offsets_E1[pair + 1]]
    is_copied_T = np.zeros_like(is_trained_T)
    is_copied_T[1 : np.flatnonzero(is_trained_T[: examples.seconds_E[pair]])[-1] + 1] = True
    return is_copied_T


def _mismatched_batch(documents: Sequence[tuple[NDArray[np.int32], int]]) -> MicroBatch:
    is_answer_T = np.concatenate([np.arange(len(tokens)) >= first for tokens, first in documents])
    return _side_by_side(
        tokens_T=np.concatenate([tokens for tokens, _ in documents]),
        is_labelled_T=is_answer_T,
        is_trained_T=is_answer_T,
        lengths=[len(tokens) for tokens, _ in documents],
    )


def _mismatch(examples: TokenisedSet, asking: int, answering: int) -> tuple[NDArray[np.int32], int]:
    """A question and another's answer, and where that begins."""
    asked, answered = (slice(examples.offsets_E1[e], examples.offsets_E1[e + 1]) for e in (asking, answering))
    first = int(np.flatnonzero(examples.is_trained_N[asked])[0])
    answer = examples.tokens_N[answered][examples.is_trained_N[answered]]
    return np.concatenate([examples.tokens_N[asked][:first], answer[: examples.longest - first]]), first


def _side_by_side(
    *,
    tokens_T: NDArray[np.int32],
    is_labelled_T: NDArray[np.bool_],
    is_trained_T: NDArray[np.bool_],
    lengths: Sequence[int],
) -> MicroBatch:
    labelled_N = np.flatnonzero(is_labelled_T)  # never the first token of a document, so the position before is its own
    return MicroBatch(
        tokens_T=tokens_T.astype(np.int64),
        positions_T=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        lengths=tuple(lengths),
        labelled_N=labelled_N - 1,
        targets_N=tokens_T[labelled_N].astype(np.int64),
        is_answer_N=is_trained_T[labelled_N],
    )
