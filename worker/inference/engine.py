"""The step loop: schedule, run, tell. One thread computes; everyone else only submits and cancels."""

import threading
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import structlog

from app.core.errors import Unavailable
from worker.inference.pages import Pages
from worker.inference.scheduler import Scheduler
from worker.inference.sequence import Choice, Sequence, Slice

log = structlog.get_logger()

LEAVING = "this engine is shutting down; another one will answer"


class Runner(Protocol):
    """The model, as the loop sees it. Only the loop's thread calls it."""

    def run(self, slices: SequenceOf[Slice]) -> list[tuple[Sequence, Choice | None]]:
        """The next token of every sequence whose slice is its last; None where the model gave no distribution."""
        ...


class Engine:
    """Owns the runner and the scheduler. Sequences join and leave between any two steps."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner, self._scheduler = runner, scheduler
        self._changed = threading.Condition()
        self._is_draining = self._is_closed = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Queue it. Raises what `Scheduler.add` raises, and Unavailable when the engine is leaving."""
        with self._changed:
            if self._is_draining:
                raise Unavailable(LEAVING, code="engine_draining")
            self._scheduler.add(sequence)
            self._changed.notify_all()

    def cancel(self, sequence: Sequence) -> None:
        """End it, unless it has ended. What it holds is free before the next step begins."""
        with self._changed:
            if not sequence.is_over:
                sequence.fail("the request was cancelled")
                self._changed.notify_all()

    def find(self, request_id: str) -> list[Sequence]:
        with self._changed:
            known = (*self._scheduler.running, *self._scheduler.waiting)
            return [sequence for sequence in known if sequence.request_id == request_id]

    def counts(self) -> tuple[int, int]:
        """Running and waiting."""
        with self._changed:
            return len(self._scheduler.running), len(self._scheduler.waiting)

    @property
    def pages(self) -> Pages:
        """Whose numbers may be read at any time."""
        return self._scheduler.pages

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def drain(self) -> None:
        """Refuse new work, and what has waited without a word so far: another engine may answer it. Waits for the rest."""
        with self._changed:
            self._is_draining = True
            for sequence in self._scheduler.waiting:
                if not sequence.completion_tokens and not sequence.is_over:  # who has spoken gave way for a while
                    sequence.fail(LEAVING)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closed or not self._has_work())

    def close(self) -> None:
        """Stop now; whoever is still answered is told."""
        with self._changed:
            self._is_draining = self._is_closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def step(self) -> bool:
        """One forward over everything that can run. False when there was nothing to do."""
        with self._changed:
            self._sweep()
            slices = self._scheduler.schedule()
        if not slices:
            return False
        try:
            answers = self._runner.run(slices)
            with self._changed:
                self._scheduler.advance(slices)
                self._tell(answers)
                self._sweep()
        except Exception:  # a step that breaks must not take the engine with it
            log.exception("step_failed", sequences=len(slices))
            with self._changed:
                self._fail([part.sequence for part in slices], "the engine could not compute an answer")
        return True

    def _tell(self, answers: SequenceOf[tuple[Sequence, Choice | None]]) -> None:
        for sequence, choice in answers:
            if sequence.is_over:  # cancelled while the step ran
                continue
            if choice is None:
                sequence.fail("the model gave no usable distribution for the next token")
            else:
                sequence.accept(choice)

    def _fail(self, sequences: SequenceOf[Sequence], message: str) -> None:
        for sequence in sequences:
            if not sequence.is_over:
                sequence.fail(message)
        self._sweep()

    def _sweep(self) -> None:
        self._scheduler.sweep()
        self._changed.notify_all()

    def _has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def _loop(self) -> None:
        while not self._is_closed:
            if not self.step():
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed or self._has_work())
        with self._changed:
            self._fail([*self._scheduler.running, *self._scheduler.waiting], "the engine was shut down")
