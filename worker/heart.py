"""Keeps a lease alive for as long as an attempt lasts, whatever the attempt is busy with, and carries its words along."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import structlog
from sqlalchemy import orm

from app import db
from app.core import crash, events
from app.core.settings import LeaseSettings
from app.jobs import leases
from app.jobs.leases import Lease, LeaseLost
from app.models import Desired

log = structlog.get_logger()

_REMEMBERED = 0.95  # of the pace so far, at each step
EVALUATED = 0.3  # of the time of a token that is trained on, until one evaluation has been seen (bench/estimate.py)
FLUSH_SECONDS = 1.0  # metrics reach their reader within this


class Heart:
    """A thread that beats, and looks every second between its beats. `wants` is what the job's owner wanted then.

    An outage of the database costs nothing for as long as nobody else has taken the job: what was not said is said later.
    """

    def __init__(self, sessions: orm.sessionmaker[orm.Session], lease: Lease, settings: LeaseSettings) -> None:
        self._sessions, self._lease, self._settings = sessions, lease, settings
        self._unsaid: list[events.Event] = []
        self._words = 0  # that were said, as far as we have heard: a commit may be lost on its way back
        self._pace = Pace()
        self._lock = threading.Lock()  # of what is unsaid
        self._beating = threading.Lock()  # one beat at a time, so that nothing is said twice
        self._is_over = threading.Event()
        self._failure: Exception | None = None
        self._last_beat_at = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="heart")
        self.wants = Desired.RUN

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join()
        if self._unsaid and self._failure is None:
            with suppress(LeaseLost, *db.OUTAGE):
                self.flush()  # what a trainer said before it died is said all the same

    def say(self, event: events.Event) -> None:
        """Pass this on with the next beat."""
        with self._lock:
            self._unsaid.append(event)
            self._pace.note(event)

    def check(self) -> None:
        """Raises whatever stopped the heart, LeaseLost above all."""
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Beat now, so that nothing is left unsaid. Raises LeaseLost, or what a database raises that is away."""
        with self._beating:
            self._beat()

    def _loop(self) -> None:
        while not self._is_over.wait(FLUSH_SECONDS) and self._failure is None:
            silent_seconds = time.monotonic() - self._last_beat_at
            is_due = self._unsaid or silent_seconds >= self._settings.heartbeat_seconds - FLUSH_SECONDS
            self._try(self.flush if is_due else self._look, silent_seconds)

    def _try(self, do: Callable[[], None], silent_seconds: float) -> None:
        try:
            do()
        except Exception as error:
            if db.is_outage(error):
                log.warning("heartbeat_failed", silent_seconds=round(silent_seconds, 1))
            else:  # a heart that stopped in silence would let a worker go on for nobody
                self._failure = error

    def _look(self) -> None:
        with self._sessions.begin() as session:
            self.wants = leases.desired(session, self._lease)

    def _beat(self) -> None:
        with self._lock:
            said, seconds_left = list(self._unsaid), self._pace.seconds_left
        with self._sessions.begin() as session:
            self.wants = leases.heartbeat(
                session, self._lease, said, settings=self._settings, seconds_left=seconds_left, words_before=self._words
            )
        crash.point("beat_committed")
        with self._lock:
            del self._unsaid[: len(said)]
        self._words += len(said)
        self._last_beat_at = time.monotonic()


class Pace:
    """How long a run will take: the tokens that are left, at the pace of the last steps most of all, and the evaluations."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0
        self._run: events.Started | None = None
        self._marked_at: float | None = None  # when the last step was done, or the evaluation after it
        self._tokens_left = self._evaluations_left = 0
        self._evaluation_seconds: float | None = None

    def note(self, event: events.Event) -> None:
        now = time.monotonic()
        match event:
            case events.Started():
                self._run, self._marked_at = event, None  # what comes before its first step is not all training
            case events.Stepped():
                self._note_step(event, now)
            case events.Evaluated() if self._marked_at is not None:
                self._evaluation_seconds, self._marked_at = now - self._marked_at, now
                self._evaluations_left -= 1

    def _note_step(self, step: events.Stepped, now: float) -> None:
        if self._marked_at is not None:
            self._seconds = _REMEMBERED * self._seconds + now - self._marked_at
            self._tokens = _REMEMBERED * self._tokens + self._tokens_left - step.tokens_left
        self._marked_at, self._tokens_left = now, step.tokens_left
        if self._run and self._run.evaluation_tokens:  # one with each checkpoint, perhaps right now, and one at the end
            every = self._run.checkpoint_every_steps
            self._evaluations_left = (step.total_steps - 1) // every - (step.step - 1) // every + 1

    @property
    def seconds_left(self) -> float | None:
        if not self._tokens:
            return None
        pace, evaluation = self._seconds / self._tokens, self._evaluation_seconds
        of_evaluation, of_examination = (self._run.evaluation_tokens, self._run.examination_tokens) if self._run else (0, 0)
        evaluated = evaluation / of_evaluation if evaluation and of_evaluation else EVALUATED * pace  # seconds a token
        return pace * self._tokens_left + evaluated * (of_evaluation * self._evaluations_left + of_examination)
