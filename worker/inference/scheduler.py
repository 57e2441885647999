"""Who runs in the next step. No torch and no threads here: the engine calls it under its lock."""

from collections import deque
from collections.abc import Sequence as SequenceOf

from app.core.errors import Unavailable
from worker.inference.sequence import Sequence, Slice


class Scheduler:
    """First come, first served: a bounded queue, a bounded batch, and at most `step_tokens` tokens read in a step.

    Running sequences decode in every step; what is left of the step's tokens goes to prompts, in pieces if they are long, so
    that a long prompt delays its neighbours' next token by one bounded step at a time.
    """

    def __init__(self, *, max_batch: int, max_waiting: int, step_tokens: int) -> None:
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._step_tokens = max(step_tokens, max_batch + 1)  # room for every decode and at least a little prefill
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Raises Unavailable when the queue is full."""
        if len(self.running) + len(self.waiting) >= self._max_batch + self._max_waiting:
            raise Unavailable("every place in the engine's queue is taken; try again shortly", code="engine_overloaded")
        self.waiting.append(sequence)

    def schedule(self) -> list[Slice]:
        """The slices of the next step: decodes first, then prompts in order of arrival."""
        while self.waiting and len(self.running) < self._max_batch:
            self.running.append(self.waiting.popleft())
        slices, left = list[Slice](), self._step_tokens
        for sequence in sorted(self.running, key=lambda sequence: sequence.remaining > 1):
            if count := min(sequence.remaining, left):
                slices.append(Slice(sequence, sequence.computed, count))
                left -= count
        return slices

    def advance(self, slices: SequenceOf[Slice]) -> None:
        """The step has been computed."""
        for part in slices:
            part.sequence.computed += part.count

    def sweep(self) -> list[Sequence]:
        """Take out what is over, wherever it stands."""
        over = [sequence for sequence in (*self.running, *self.waiting) if sequence.is_over]
        if over:
            self.running = [sequence for sequence in self.running if not sequence.is_over]
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.is_over)
        return over
