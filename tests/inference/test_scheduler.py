"""Who runs in which pages, whatever comes: a scheduler without a model, in cases worth reading and under Hypothesis."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from app.core.engine import GenerateRequest, Sampling
from app.core.errors import RateLimited, Unavailable
from tests.inference import make
from worker.inference.pages import Pages
from worker.inference.scheduler import PATIENCE_STEPS, Scheduler
from worker.inference.sequence import Choice, Sequence, Slice
from worker.inference.vocabulary import Vocabulary
from worker.model.base import LoadedBase

SAID = 97  # no end of a turn

Build = Callable[..., Sequence]


@pytest.fixture(scope="module")
def sequence(oracle: LoadedBase) -> Build:
    vocabulary = make.vocabulary(oracle.renderer)
    return lambda prompt=(1, 2, 3), **asked: build(vocabulary, prompt, **asked)


def build(vocabulary: Vocabulary, prompt: list[int], *, tenant: str = "", seed: bytes = b"", max_tokens: int = 4) -> Sequence:
    asked = Sampling(max_tokens=max_tokens, temperature=0)
    wanted = GenerateRequest(request_id="req", tenant=tenant, prompt=tuple(prompt), sampling=asked)
    return Sequence(wanted, vocabulary=vocabulary, max_tokens=max_tokens, emit=lambda _: None, seed=seed)


def step(scheduler: Scheduler) -> list[Slice]:
    """As the engine takes one."""
    slices = scheduler.schedule()
    speaking = [part.sequence for part in slices if part.is_last]
    scheduler.advance(slices)
    for sequence in speaking:
        if not sequence.is_over:
            sequence.accept(Choice(SAID))
    scheduler.sweep()
    return slices


def run(scheduler: Scheduler) -> None:
    while scheduler.running or scheduler.waiting:
        assert step(scheduler), "nobody can go on"


def test_what_was_read_for_one_is_not_read_again_for_the_next(sequence: Build) -> None:
    scheduler = make.scheduler(pages=Pages(count=16, size=4), step_tokens=99)
    text = list(range(1, 12))
    scheduler.add(sequence(text, seed=b"a"))
    run(scheduler)
    scheduler.add(again := sequence([*text, 50, 51], seed=b"a"))
    scheduler.add(stranger := sequence(text, seed=b"b"))

    read = {part.sequence: (part.start, part.count) for part in step(scheduler)}
    assert read == {again: (8, 5), stranger: (0, 11)}


def test_the_whole_of_a_known_prompt_leaves_one_token_to_read(sequence: Build) -> None:
    scheduler = make.scheduler(pages=Pages(count=16, size=4), step_tokens=99)
    for _ in range(2):
        scheduler.add(one := sequence(list(range(1, 9))))
        slices = step(scheduler)
        run(scheduler)

    assert [(part.sequence, part.start, part.count) for part in slices] == [(one, 4, 4)]


def test_when_pages_run_out_the_newest_gives_way_and_everyone_is_answered(sequence: Build) -> None:
    scheduler = make.scheduler(pages=Pages(count=6, size=4), step_tokens=99)
    first, second = (sequence([n] * 4, max_tokens=16) for n in (1, 2))
    scheduler.add(first)
    scheduler.add(second)
    gave_way = False
    while scheduler.running or scheduler.waiting:
        step(scheduler)
        gave_way |= second in scheduler.waiting
        assert first not in scheduler.waiting

    assert gave_way
    assert [one.completion_tokens for one in (first, second)] == [16, 16]
    assert scheduler.pages.held == 0


def test_nobody_is_let_in_to_be_put_out_at_once(sequence: Build) -> None:
    scheduler = make.scheduler(pages=Pages(count=5, size=4), step_tokens=99)
    for n in (1, 2):
        scheduler.add(sequence([n] * 7, max_tokens=8))
    step(scheduler)

    assert (len(scheduler.running), len(scheduler.waiting)) == (2, 0)
    scheduler.add(sequence([3] * 3))
    step(scheduler)
    assert len(scheduler.waiting) == 1


def test_a_tenant_with_much_waiting_does_not_hold_up_one_with_little(sequence: Build) -> None:
    scheduler = make.scheduler(max_batch=1, max_waiting=99)
    for _ in range(6):
        scheduler.add(sequence(tenant="busy"))
    step(scheduler)
    scheduler.add(sequence(tenant="quiet"))
    order = []
    while scheduler.running or scheduler.waiting:
        order += [part.sequence.tenant for part in step(scheduler) if part.start == 0]

    assert order == ["quiet", "busy", "busy", "busy", "busy", "busy"]


def test_tenants_that_always_wait_are_given_the_same_number_of_tokens(sequence: Build) -> None:
    scheduler = make.scheduler(max_batch=2, max_waiting=999, max_waiting_of_tenant=999, step_tokens=99)
    for _ in range(150):
        scheduler.add(sequence([5] * 3, tenant="short", max_tokens=2))
        scheduler.add(sequence([5] * 30, tenant="long", max_tokens=12))
    given = Counter[str]()
    for _ in range(400):
        for part in step(scheduler):
            given[part.sequence.tenant] += part.count + 2 * part.is_last

    assert 0.8 < given["short"] / given["long"] < 1.25


def test_staying_away_saves_nothing_up(sequence: Build) -> None:
    scheduler = make.scheduler(max_batch=1, max_waiting=99)
    scheduler.add(sequence(tenant="late"))
    for _ in range(9):
        scheduler.add(sequence(tenant="busy", max_tokens=30))
    for _ in range(150):
        step(scheduler)
    for _ in range(4):
        scheduler.add(sequence(tenant="late", max_tokens=30))
    order = []
    while scheduler.running or scheduler.waiting:
        order += [part.sequence.tenant for part in step(scheduler) if part.start == 0]

    assert order[:4] in (["late", "busy", "late", "busy"], ["late", "late", "busy", "late"])


def test_a_full_batch_of_one_tenant_makes_a_place_for_another(sequence: Build) -> None:
    scheduler = make.scheduler(max_batch=2, max_waiting=99)
    held = [sequence([n, n], tenant="busy", max_tokens=200) for n in (1, 2)]
    for one in held:
        scheduler.add(one)
    step(scheduler)
    scheduler.add(quiet := sequence([3], tenant="quiet", max_tokens=200))
    for _ in range(PATIENCE_STEPS):
        step(scheduler)

    assert scheduler.running == [held[0], quiet]
    run(scheduler)
    assert {one.completion_tokens for one in (*held, quiet)} == {200}


def test_a_tenant_fills_its_own_part_of_the_queue_and_not_the_others(sequence: Build) -> None:
    scheduler = make.scheduler(max_batch=1, max_waiting=4, max_waiting_of_tenant=2)
    for tenant in ("a", "a", "b", "b"):
        scheduler.add(sequence(tenant=tenant))
    with pytest.raises(RateLimited) as limited:
        scheduler.add(sequence(tenant="a"))
    scheduler.add(sequence(tenant="c"))
    with pytest.raises(Unavailable) as full:
        scheduler.add(sequence(tenant="d"))

    assert limited.value.headers == {"Retry-After": "1"}
    assert full.value.code == "engine_overloaded"


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, are cancelled and answered, in few pages, so that many give way and find each other's text."""

    vocabulary: Vocabulary

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make.scheduler(
            pages=Pages(count=6, size=2), max_batch=3, max_waiting=6, max_waiting_of_tenant=4, step_tokens=5, busy_tokens=3
        )
        self.sequences: list[Sequence] = []
        self.written: dict[int, tuple[bytes, list[int]]] = {}  # page: seed and text up to its end

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=8),
        max_tokens=st.integers(1, 4),
        tenant=st.sampled_from(["a", "b"]),
    )
    def arrive(self, prompt: list[int], max_tokens: int, tenant: str) -> None:
        sequence = build(self.vocabulary, prompt, tenant=tenant, seed=tenant.encode(), max_tokens=max_tokens)
        try:
            self.scheduler.add(sequence)
        except (RateLimited, Unavailable):
            return
        self.sequences.append(sequence)

    @precondition(lambda self: any(not one.is_over for one in self.sequences))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([one for one in self.sequences if not one.is_over])).fail("cancelled")

    @rule()
    def step(self) -> None:
        self.scheduler.sweep()
        slices = self.scheduler.schedule()
        assert bool(slices) == bool(self.scheduler.running or self.scheduler.waiting), "nobody can go on"
        counts = [part.count for part in slices]
        assert counts == sorted(counts, key=lambda count: count > 1), "a single token after a longer slice"
        assert sum(count for count in counts if count > 1) <= 5
        for part in slices:
            self._compute(part)
        speaking = [part.sequence for part in slices if part.is_last]
        self.scheduler.advance(slices)
        for sequence in speaking:
            sequence.accept(Choice(SAID))
        self.scheduler.sweep()

    def _compute(self, part: Slice) -> None:
        """Everything before the slice is in the sequence's pages, and nobody else looks at those it writes."""
        sequence, size = part.sequence, self.scheduler.pages.size
        assert len(sequence.pages) * size >= part.start + part.count
        for place in range(part.start // size):
            assert self.written[sequence.pages[place]] == (sequence.tenant.encode(), sequence.tokens[: (place + 1) * size])
        for place in range(part.start // size, -(-(part.start + part.count) // size)):
            page = sequence.pages[place]
            assert not any(page in other.pages for other in self.scheduler.running if other is not sequence)
            self.written[page] = (sequence.tenant.encode(), sequence.tokens[: min((place + 1) * size, part.start + part.count)])

    @invariant()
    def pages_are_held_by_who_runs(self) -> None:
        held = {page for one in self.scheduler.running for page in one.pages}
        assert self.scheduler.pages.held == len(held)
        assert len(self.scheduler.running) <= 3
        assert all(not one.pages for one in self.sequences if one not in self.scheduler.running)

    def teardown(self) -> None:
        for _ in range(500):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            self.step()
        assert all(one.is_over for one in self.sequences), "someone waits for ever"
        assert self.scheduler.pages.held == 0


def test_whatever_comes_is_answered_and_leaves_nothing_behind(oracle: LoadedBase) -> None:
    class OfTiny(SchedulerMachine):
        vocabulary = make.vocabulary(oracle.renderer)

    run_state_machine_as_test(OfTiny, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))
