"""The scheduler and the step loop, told with a runner that only says what it is given. No torch runs here."""

import threading
import time
from collections.abc import Callable

import pytest

from app.core.engine import Chunk
from app.core.errors import Unavailable
from tests.inference import make
from worker.inference.engine import LEAVING, Engine, Runner
from worker.inference.sequence import Sequence, Slice
from worker.model.base import LoadedBase

Add = Callable[..., tuple[Sequence, list[Chunk]]]
Spell = Callable[[str], list[int]]


@pytest.fixture
def sequence(oracle: LoadedBase) -> Add:
    """A sequence and the chunks that it will have emitted."""

    def build(prompt: list[int] | None = None, **sampling: object) -> tuple[Sequence, list[Chunk]]:
        wanted, told = make.request(prompt or [1, 2, 3], **sampling), list[Chunk]()
        renderer, limit = oracle.renderer, wanted.sampling.max_tokens
        return Sequence(wanted, vocabulary=make.vocabulary(renderer), max_tokens=limit, emit=told.append), told

    return build


@pytest.fixture
def spell(oracle: LoadedBase) -> Spell:
    """Token ids of a text, one a byte."""
    return lambda text: list(oracle.renderer.tokenizer.encode(text, add_special_tokens=False).ids)


def engine(runner: Runner, *, max_batch: int = 4, max_waiting: int = 8, step_tokens: int = 16) -> Engine:
    """One whose steps the test takes itself."""
    return Engine(runner, make.scheduler(max_batch=max_batch, max_waiting=max_waiting, step_tokens=step_tokens))


def run(engine: Engine) -> None:
    while engine.step():
        pass


def test_everyone_running_decodes_in_every_step_and_newcomers_join_at_once(sequence: Add) -> None:
    runner = make.SayingRunner()
    loop = engine(runner)
    (first, _), (second, _) = sequence(max_tokens=3), sequence(max_tokens=2)
    loop.submit(first)
    loop.step()
    loop.submit(second)
    run(loop)

    one, two = first.request_id, second.request_id
    assert runner.steps == [[(one, 3)], [(one, 1), (two, 3)], [(one, 1), (two, 1)]]


def test_a_long_prompt_is_read_in_pieces_while_the_others_go_on(sequence: Add) -> None:
    runner = make.SayingRunner()
    loop = engine(runner, step_tokens=10)
    (quick, quick_told), (long, long_told) = sequence(max_tokens=4), sequence(list(range(1, 21)), max_tokens=1)
    loop.submit(quick)
    loop.step()
    loop.submit(long)
    run(loop)

    assert [dict(step).get(long.request_id) for step in runner.steps] == [None, 10, 10, None]
    assert [chunk.completion_tokens for chunk in quick_told] == [1, 2, 3, 4]
    assert [chunk.completion_tokens for chunk in long_told] == [1]


def test_a_full_batch_makes_others_wait_in_order_of_arrival(sequence: Add) -> None:
    runner = make.SayingRunner()
    loop = engine(runner, max_batch=2)
    made = [sequence(max_tokens=2)[0] for _ in range(3)]
    for one in made:
        loop.submit(one)
    loop.step()

    assert loop.counts() == (2, 1)
    run(loop)
    assert list(dict.fromkeys(name for step in runner.steps for name, _ in step)) == [one.request_id for one in made]


def test_a_full_queue_turns_away(sequence: Add) -> None:
    loop = engine(make.SayingRunner(), max_batch=1, max_waiting=1)
    loop.submit(sequence()[0])
    loop.submit(sequence()[0])

    with pytest.raises(Unavailable) as refusal:
        loop.submit(sequence()[0])
    assert refusal.value.code == "engine_overloaded"
    assert refusal.value.retry_after_seconds > 0


def test_the_end_of_turn_token_is_counted_but_is_no_text(sequence: Add, spell: Spell, oracle: LoadedBase) -> None:
    one, told = sequence(max_tokens=9)
    loop = engine(make.SayingRunner([*spell("Hi"), min(oracle.renderer.stop_ids)]))
    loop.submit(one)
    run(loop)

    assert make.text_of(told) == "Hi"
    assert told[-1] == Chunk(text="", finish_reason="stop", completion_tokens=3)


def test_a_stop_string_across_tokens_never_leaks(sequence: Add, spell: Spell) -> None:
    one, told = sequence(max_tokens=9, stop=("c!",))
    loop = engine(make.SayingRunner(spell("abc!d")))
    loop.submit(one)
    run(loop)

    assert make.text_of(told) == "ab"
    assert (told[-1].finish_reason, told[-1].completion_tokens) == ("stop", 4)


def test_what_was_held_back_is_told_when_the_tokens_run_out(sequence: Add, spell: Spell) -> None:
    one, told = sequence(max_tokens=3, stop=("c!",))
    loop = engine(make.SayingRunner(spell("abc")))
    loop.submit(one)
    run(loop)

    assert make.text_of(told) == "abc"
    assert told[-1].finish_reason == "length"


def test_cancelling_frees_a_running_and_a_waiting_one(sequence: Add) -> None:
    runner = make.SayingRunner()
    loop = engine(runner, max_batch=1)
    (running, _), (waiting, _) = sequence(), sequence()
    loop.submit(running)
    loop.submit(waiting)
    loop.step()
    loop.cancel(waiting)
    loop.cancel(running)
    loop.cancel(running)

    assert loop.step() is False
    assert (running.pages, waiting.pages) == ([], [])
    assert loop.counts() == (0, 0)


def test_one_cancelled_while_its_step_runs_is_told_nothing_more(sequence: Add) -> None:
    one, told = sequence()
    cancelled_at_its_second_step = _Interrupting(lambda: loop.cancel(one), at_step=2)
    loop = engine(cancelled_at_its_second_step)
    loop.submit(one)
    run(loop)

    assert [chunk.error for chunk in told] == [None, "the request was cancelled"]
    assert one.pages == []


def test_a_step_that_breaks_ends_its_requests_and_not_the_engine(sequence: Add) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    runner = _Interrupting(fail, at_step=1)
    loop = engine(runner)
    (unlucky, unlucky_told), (next_one, next_told) = sequence(), sequence(max_tokens=1)
    loop.submit(unlucky)
    loop.step()
    loop.submit(next_one)
    run(loop)

    assert unlucky_told[-1].error
    assert next_told[-1].finish_reason == "length"
    assert (unlucky.pages, next_one.pages) == ([], [])


def test_a_row_without_a_distribution_ends_alone(sequence: Add) -> None:
    class Half(make.SayingRunner):
        def run(self, slices: list[Slice]) -> list[tuple[Sequence, int | None]]:  # type: ignore[override]
            return [(one, None if one is broken else token) for one, token in super().run(slices)]

    (broken, broken_told), (whole, whole_told) = sequence(max_tokens=2), sequence(max_tokens=2)
    loop = engine(Half())
    loop.submit(broken)
    loop.submit(whole)
    run(loop)

    assert [chunk.error is None for chunk in broken_told] == [False]
    assert whole_told[-1].finish_reason == "length"


def test_draining_finishes_what_was_begun_and_refuses_the_rest(sequence: Add) -> None:
    (one, told), (waiting, waiting_told) = sequence(max_tokens=5), sequence(max_tokens=5)
    loop = engine(make.SayingRunner(), max_batch=1)
    loop.submit(one)
    loop.submit(waiting)
    loop.step()
    draining = threading.Thread(target=loop.drain)
    draining.start()
    while not waiting_told:
        time.sleep(0.01)
    run(loop)
    draining.join()

    assert told[-1].finish_reason == "length"
    assert [(chunk.text, chunk.error) for chunk in waiting_told] == [("", LEAVING)]
    with pytest.raises(Unavailable) as refusal:
        loop.submit(sequence()[0])
    assert refusal.value.code == "engine_draining"


class _Interrupting(make.SayingRunner):
    """Something happens in the middle of a step."""

    def __init__(self, happens: Callable[[], None], *, at_step: int) -> None:
        super().__init__()
        self._happens, self._at_step = happens, at_step

    def run(self, slices: list[Slice]) -> list[tuple[Sequence, int | None]]:  # type: ignore[override]
        answers = super().run(slices)
        if len(self.steps) == self._at_step:
            self._happens()
        return answers
