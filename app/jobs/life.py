"""A job's life as a value: where it may go, what its owner's wishes do, what a broken attempt costs. No database.

app.jobs.states and app.jobs.leases do to rows what is decided here.
"""

from dataclasses import dataclass, replace

from app.core.errors import Conflict
from app.core.settings import LeaseSettings
from app.models import Desired, JobState

S = JobState

MOVES: dict[JobState, frozenset[JobState]] = {
    S.VALIDATING_FILES: frozenset({S.QUEUED, S.FAILED, S.CANCELLED}),
    S.QUEUED: frozenset({S.RUNNING, S.PAUSED, S.CANCELLED}),
    # QUEUED: its worker died or drains
    S.RUNNING: frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED, S.PAUSED, S.QUEUED, S.EVALUATING}),
    S.EVALUATING: frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED}),
    S.PAUSED: frozenset({S.QUEUED, S.CANCELLED}),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset(),
    S.CANCELLED: frozenset(),
}
TERMINAL = frozenset(state for state, nexts in MOVES.items() if not nexts)

POISON, EXHAUSTED = "poison", "infra_exhausted"
MAX_BACKOFF_SECONDS = 600.0


class IllegalMove(Conflict):
    code = "illegal_state"


@dataclass(frozen=True)
class Life:
    """All that decides what may become of a job.

    `failures` are the broken attempts since it was last seen to get on, which is a checkpoint. `step` is the highest that was
    ever told, `attempt_step` that of the last attempt, None for one that has not begun to train. `deaths` counts attempts in a
    row that died with the last step told being `died_at_step`.
    """

    id: str
    state: JobState
    desired: Desired = Desired.RUN
    attempt: int = 0
    failures: int = 0
    step: int = 0
    attempt_step: int | None = None
    died_at_step: int | None = None
    deaths: int = 0


@dataclass(frozen=True)
class Broken:
    """What follows a broken attempt: `wait_seconds` before the next, or the code of the error that the job ends with."""

    after: Life
    wait_seconds: float = 0.0
    error_code: str | None = None


def moved(life: Life, to: JobState) -> Life:
    """Raises IllegalMove."""
    if to not in MOVES[life.state]:
        raise IllegalMove(f"job {life.id} is {life.state} and cannot become {to}")
    return replace(life, state=to)


def prepared(life: Life) -> Life:
    """Its files are read: it waits for a worker, or for its owner."""
    queued = replace(moved(life, S.QUEUED), failures=0)
    return moved(queued, S.PAUSED) if life.desired == Desired.PAUSE else queued


def claimed(life: Life) -> Life:
    return replace(moved(life, S.RUNNING), attempt=life.attempt + 1, attempt_step=None)


def stepped(life: Life, step: int) -> Life:
    """The running attempt trains, and has come to this step; where it begins is told so, too."""
    return replace(life, step=max(life.step, step), attempt_step=step)


def checkpointed(life: Life) -> Life:
    """It gets on: what broke before is forgiven, so that a long job on machines that come and go ends well."""
    return replace(life, failures=0)


def completed(life: Life, *, has_gate: bool) -> Life:
    """A cancel that came first wins."""
    if life.desired == Desired.CANCEL:
        return moved(life, S.CANCELLED)
    return moved(life, S.EVALUATING if has_gate else S.SUCCEEDED)


def stopped(life: Life) -> Life:
    """The attempt has ended as it was told to. Nothing is counted."""
    return moved(life, {Desired.CANCEL: S.CANCELLED, Desired.PAUSE: S.PAUSED, Desired.RUN: S.QUEUED}[life.desired])


def broken(life: Life, *, is_death: bool, settings: LeaseSettings) -> Broken:
    """A broken attempt of a job that its owner has cancelled or paused is what they wanted.

    `is_death`: the trainer or its worker died, and what it was computing may be why; an outage of storage is not.
    """
    if life.desired != Desired.RUN:
        return Broken(stopped(life))
    counted = replace(life, failures=life.failures + 1)
    if is_death and life.attempt_step is not None:
        again = life.deaths + 1 if life.attempt_step == life.died_at_step else 1
        counted = replace(counted, died_at_step=life.attempt_step, deaths=again)
        if again >= settings.max_deaths_at_step:
            return Broken(moved(counted, S.FAILED), error_code=POISON)
    if counted.failures >= settings.max_attempts:
        return Broken(moved(counted, S.FAILED), error_code=EXHAUSTED)
    doublings = min(counted.failures - 1, 20)  # beyond it the cap holds in any case
    return Broken(moved(counted, S.QUEUED), wait_seconds=min(settings.backoff_seconds * 2**doublings, MAX_BACKOFF_SECONDS))


def cancelled(life: Life) -> Life:
    """A waiting job is cancelled at once, a running one once its worker hears of it. Twice is once. Raises IllegalMove."""
    if life.state == S.CANCELLED:
        return life
    _require_unfinished(life, "cancelled")
    wanted = replace(life, desired=Desired.CANCEL)
    return wanted if life.state == S.RUNNING else moved(wanted, S.CANCELLED)


def paused(life: Life) -> Life:
    """A waiting job is halted at once, others as soon as they can be. Twice is once. Raises IllegalMove."""
    _require_unfinished(life, "paused")
    if life.state == S.EVALUATING:
        raise IllegalMove(f"job {life.id} is trained, and its model is evaluated: there is nothing to pause; cancel it")
    wanted = replace(life, desired=Desired.PAUSE)
    return moved(wanted, S.PAUSED) if life.state == S.QUEUED else wanted


def resumed(life: Life) -> Life:
    """One that is not paused is left as it is. Raises IllegalMove."""
    _require_unfinished(life, "resumed")
    wanted = replace(life, desired=Desired.RUN)
    return moved(wanted, S.QUEUED) if life.state == S.PAUSED else wanted


def _require_unfinished(life: Life, participle: str) -> None:
    """A job that is to be cancelled is as good as cancelled: only its worker has yet to hear of it."""
    if life.state in TERMINAL:
        raise IllegalMove(f"job {life.id} has {life.state} and cannot be {participle}")
    if life.desired == Desired.CANCEL and participle != "cancelled":
        raise IllegalMove(f"job {life.id} is being cancelled and cannot be {participle}")
