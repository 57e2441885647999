from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.tokens.tokenise import TokenisedSet
from tests.training import make
from worker.model.base import LoadedBase
from worker.training.data import TrainData, micro_batches


def of_lengths(lengths: list[int]) -> TokenisedSet:
    """Examples of distinct tokens, each labelled but for its first."""
    offsets = np.cumsum([0, *lengths])
    is_trained = np.ones(offsets[-1], dtype=np.bool_)
    is_trained[offsets[:-1]] = False
    lines, seconds = np.arange(len(lengths), dtype=np.int32), np.zeros(len(lengths), dtype=np.int32)
    return TokenisedSet(np.arange(offsets[-1], dtype=np.int32), is_trained, offsets, lines, seconds)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30), budget=st.integers(20, 100))
def test_packing_keeps_every_document_whole_and_within_the_budget(lengths: list[int], budget: int) -> None:
    examples = of_lengths(lengths)
    packed = micro_batches(examples, range(len(lengths)), max_tokens=budget)

    assert Counter(length for batch in packed for length in batch.lengths) == Counter(lengths)
    for batch in packed:
        assert len(batch.tokens_T) == sum(batch.lengths) and (len(batch.tokens_T) <= budget or len(batch.lengths) == 1)
        assert np.array_equal(batch.targets_N, batch.tokens_T[batch.labelled_N] + 1)  # each predicts its own successor
        assert len(batch.targets_N) == sum(length - 1 for length in batch.lengths)
        assert np.array_equal(np.flatnonzero(batch.positions_T == 0), np.cumsum([0, *batch.lengths[:-1]]))


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own(tiny: LoadedBase) -> None:
    data = TrainData(make.examples(tiny.renderer), make.spec(micro_batch_tokens=8))
    seen = [[batch.tokens_T.tobytes() for batch in step.micro_batches] for step in data.steps_after(0)]

    first, second = [one for step in seen[:3] for one in step], [one for step in seen[3:] for one in step]
    assert data.total_steps == len(seen) == 6
    assert len(set(first)) == 12 and set(first) == set(second)
    assert [set(step) for step in seen[:3]] != [set(step) for step in seen[3:]]


def test_going_on_after_any_step_sees_what_would_have_come(tiny: LoadedBase) -> None:
    data = TrainData(make.examples(tiny.renderer), make.spec(batch_size=5))  # the last batch of an epoch is smaller
    said = [(step.number, step.tokens, step.micro_batches[0].tokens_T.tobytes()) for step in data.steps_after(0)]

    for step in range(data.total_steps):
        rest = [(s.number, s.tokens, s.micro_batches[0].tokens_T.tobytes()) for s in data.steps_after(step)]
        assert rest == said[step:]


def test_what_is_left_is_what_the_later_steps_hold(tiny: LoadedBase) -> None:
    data = TrainData(make.examples(tiny.renderer), make.spec(batch_size=5, n_epochs=3))

    for done in range(data.total_steps + 1):
        assert data.tokens_after(done) == sum(step.tokens for step in data.steps_after(done))
