from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.tokens.tokenise import TokenisedSet
from tests.training import make
from worker.model.base import LoadedBase
from worker.training.data import Step, TrainData, micro_batches


def of_lengths(lengths: list[int]) -> TokenisedSet:
    """Examples of distinct tokens, each labelled but for its first."""
    offsets = np.cumsum([0, *lengths])
    is_trained = np.ones(offsets[-1], dtype=np.bool_)
    is_trained[offsets[:-1]] = False
    lines, seconds = np.arange(len(lengths), dtype=np.int32), np.zeros(len(lengths), dtype=np.int32)
    ratings = np.zeros(len(lengths), dtype=np.int8)
    return TokenisedSet(np.arange(offsets[-1], dtype=np.int32), is_trained, offsets, lines, seconds, ratings)


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


def answers_of(step: Step) -> list[tuple[list[int], list[int]]]:
    """Questions and answers, by document, of a step's mismatched ones."""
    told = list[tuple[list[int], list[int]]]()
    for batch in step.mismatched:
        documents = np.split(batch.tokens_T, np.cumsum(batch.lengths)[:-1])
        for tokens, labelled in zip(documents, batch.labelled_B, strict=True):
            told.append((tokens[: len(tokens) - labelled].tolist(), tokens[len(tokens) - labelled :].tolist()))
    return told


@pytest.mark.parametrize("budget", [8, 1000])
def test_each_question_meets_the_answer_of_the_row_before_it(tiny: LoadedBase, budget: int) -> None:
    asked = make.spec(batch_size=5, n_epochs=2, micro_batch_tokens=budget, preference={"method": "kto", "beta": 0.1})
    examples = make.ratings(tiny.renderer, 11)
    whole = TrainData(examples, asked)
    order_E = np.random.default_rng([asked.seed, 1]).permutation(11).tolist()
    steps = list(whole.steps_after(3))

    assert [len(answers_of(step)) for step in steps] == [5, 5, 1]
    befores = [[order_E[4], *order_E[:4]], [order_E[9], *order_E[5:9]], [order_E[9]]]  # one alone: the row before it
    for step, asking, before in zip(steps, (order_E[:5], order_E[5:10], order_E[10:]), befores, strict=True):
        expected = [(question_of(examples, e), answer_of(examples, b)) for e, b in zip(asking, before, strict=True)]
        cut = [(question, answer[: examples.longest - len(question)]) for question, answer in expected]
        assert sorted(answers_of(step)) == sorted(cut)
    assert next(TrainData(make.ratings(tiny.renderer, 1), asked).steps_after(0)).mismatched == ()
    assert next(TrainData(make.examples(tiny.renderer), asked).steps_after(0)).mismatched == ()


def question_of(examples: TokenisedSet, e: int) -> list[int]:
    span = slice(examples.offsets_E1[e], examples.offsets_E1[e + 1])
    return list(examples.tokens_N[span][: np.argmax(examples.is_trained_N[span])].tolist())


def answer_of(examples: TokenisedSet, e: int) -> list[int]:
    span = slice(examples.offsets_E1[e], examples.offsets_E1[e + 1])
    return list(examples.tokens_N[span][examples.is_trained_N[span]].tolist())
