"""All that can happen to a job: what app.jobs.life expects of it, and the same done in Postgres."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import func, orm, select

from app.accounts.caller import Caller
from app.core import events
from app.core.settings import LeaseSettings
from app.jobs import leases, life
from app.jobs import service as jobs
from app.jobs.leases import Lease, LeaseLost
from app.jobs.life import IllegalMove, Life
from app.models import Desired, Job, JobState
from tests import make

SETTINGS = LeaseSettings(max_attempts=4, backoff_seconds=600, lease_seconds=3600)  # the clock of the model alone moves
OWNER = "worker"


@dataclass(frozen=True)
class World:
    """A job, who holds it, and where the clock stands. `history` are the states it has been in."""

    life: Life
    history: tuple[JobState, ...]
    is_due: bool = True
    is_expired: bool = False

    def become(self, after: Life, **changes: Any) -> "World":
        told = (*self.history, after.state) if after.state != self.life.state else self.history
        return replace(self, life=after, history=told, **changes)


@dataclass(frozen=True)
class Done:
    """What came of it: `world` as it must be now, `answer` what whoever did it was told."""

    world: World
    answer: object


@dataclass(frozen=True)
class InPostgres:
    """The same job as rows."""

    sessions: orm.sessionmaker[orm.Session]
    caller: Caller
    job_id: str
    queue: str

    def held(self, attempt: int) -> Lease:
        return Lease(self.job_id, attempt, OWNER)


@dataclass(frozen=True)
class Act:
    """One thing that somebody does. `attempt` is who speaks, of those that speak for an attempt."""

    kind: str
    attempt: int = 0
    step: int = 0
    is_death: bool = True

    def expected(self, world: World) -> Done:
        return _EXPECTED[self.kind](self, world)

    def done(self, there: InPostgres) -> object:
        """In a transaction of its own. What it was told, refusals among it."""
        try:
            with there.sessions.begin() as session:
                return _DONE[self.kind](self, there, session)
        except LeaseLost:
            return "lost"
        except IllegalMove:
            return "refused"

    @property
    def may_be_skipped(self) -> bool:
        """It passes over a row that somebody else holds just now, and comes again later."""
        return self.kind in ("claim", "reap")


_OF_WORKERS, _OF_OTHERS = ("beat", "checkpoint", "complete", "fail", "release", "stop"), ("claim", "wait", "silence", "reap")
KINDS = (*_OF_WORKERS, *_OF_OTHERS, "cancel", "pause", "resume")
_OFTEN = ("beat", "beat", "checkpoint", "release", "claim", "claim", "claim", "wait", "wait", "silence", "reap", "resume")
Drawn = tuple[str, int, int, bool]
DRAWN: st.SearchStrategy[Drawn] = st.tuples(
    st.sampled_from(KINDS + _OFTEN), st.sampled_from((0, 0, 0, 1)), st.integers(0, 2), st.booleans()
)


def act_of(drawn: Drawn, world: World) -> Act:
    """A worker that has lost the job speaks now and then all the same."""
    kind, behind, gain, is_death = drawn
    return Act(kind, world.life.attempt - behind, (world.life.attempt_step or 0) + gain, is_death)


def _claim(_: Act, world: World) -> Done:
    if world.life.state != JobState.QUEUED or not world.is_due:
        return Done(world, None)
    after = life.claimed(world.life)
    return Done(world.become(after, is_expired=False), after.attempt)


def _spoken(say: Callable[[Act, World], World]) -> Callable[[Act, World], Done]:
    """Heard only from the attempt that holds the job."""

    def expected(act: Act, world: World) -> Done:
        if world.life.state != JobState.RUNNING or act.attempt != world.life.attempt:
            return Done(world, "lost")
        return Done(say(act, world), world.life.desired if act.kind == "beat" else "ok")

    return expected


def _beat(act: Act, world: World) -> World:
    return world.become(life.stepped(world.life, act.step), is_expired=False)


def _checkpoint(_: Act, world: World) -> World:
    return world.become(life.checkpointed(world.life))


def _complete(_: Act, world: World) -> World:
    return world.become(life.completed(world.life, has_gate=False))


def _fail(_: Act, world: World) -> World:
    return world.become(life.moved(world.life, JobState.FAILED))


def _release(act: Act, world: World) -> World:
    after = life.broken(world.life, is_death=act.is_death, settings=SETTINGS).after
    return world.become(after, is_due=after.state != JobState.QUEUED and world.is_due)


def _stop(_: Act, world: World) -> World:
    return world.become(life.stopped(world.life))


def _wait(_: Act, world: World) -> Done:
    return Done(replace(world, is_due=True), "ok")


def _silence(_: Act, world: World) -> Done:
    return Done(replace(world, is_expired=world.life.state == JobState.RUNNING), "ok")


def _reap(act: Act, world: World) -> Done:
    is_silent = world.life.state == JobState.RUNNING and world.is_expired
    return Done(replace(_release(Act("release"), world), is_expired=False) if is_silent else world, "ok")


def _asked(decide: Callable[[Life], Life], *, is_due: bool = False) -> Callable[[Act, World], Done]:
    def expected(_: Act, world: World) -> Done:
        try:
            after = decide(world.life)
        except IllegalMove:
            return Done(world, "refused")
        is_moved = after.state != world.life.state
        return Done(world.become(after, is_due=world.is_due or (is_due and is_moved)), "ok")

    return expected


_EXPECTED: dict[str, Callable[[Act, World], Done]] = {
    "claim": _claim,
    "beat": _spoken(_beat),
    "checkpoint": _spoken(_checkpoint),
    "complete": _spoken(_complete),
    "fail": _spoken(_fail),
    "release": _spoken(_release),
    "stop": _spoken(_stop),
    "wait": _wait,
    "silence": _silence,
    "reap": _reap,
    "cancel": _asked(life.cancelled),
    "pause": _asked(life.paused),
    "resume": _asked(life.resumed, is_due=True),
}


def _really_claim(_: Act, there: InPostgres, session: orm.Session) -> object:
    lease = leases.claim(session, there.queue, owner=OWNER, settings=SETTINGS)
    return lease.attempt if lease else None


def _really_beat(act: Act, there: InPostgres, session: orm.Session) -> Desired:
    at = events.Started(
        total_steps=9, resumed_from=act.step, trainable_parameters=1, checkpoint_every_steps=1, evaluation_tokens=0
    )
    return leases.heartbeat(session, there.held(act.attempt), [at], settings=SETTINGS)


def _really_checkpoint(act: Act, there: InPostgres, session: orm.Session) -> str:
    make.checkpoint(session, there.held(act.attempt), step=act.step)
    return "ok"


def _really_complete(act: Act, there: InPostgres, session: orm.Session) -> str:
    make.complete(session, there.held(act.attempt))
    return "ok"


def _really_fail(act: Act, there: InPostgres, session: orm.Session) -> str:
    leases.fail(session, there.held(act.attempt), code="diverged", message="the loss is not finite")
    return "ok"


def _really_release(act: Act, there: InPostgres, session: orm.Session) -> str:
    leases.release(session, there.held(act.attempt), reason="It broke off", is_death=act.is_death, settings=SETTINGS)
    return "ok"


def _really_stop(act: Act, there: InPostgres, session: orm.Session) -> str:
    leases.stop(session, there.held(act.attempt))
    return "ok"


def _locked(there: InPostgres, session: orm.Session) -> Job:
    return session.scalars(select(Job).where(Job.id == there.job_id).with_for_update()).one()


def _really_wait(_: Act, there: InPostgres, session: orm.Session) -> str:
    make.make_due(session, _locked(there, session))
    return "ok"


def _really_silence(_: Act, there: InPostgres, session: orm.Session) -> str:
    job = _locked(there, session)
    if job.state == JobState.RUNNING:
        make.expire_lease(session, job)
    return "ok"


def _really_reap(_: Act, there: InPostgres, session: orm.Session) -> str:
    leases.reap(session, settings=SETTINGS)
    return "ok"


def _really_ask(ask: Callable[[orm.Session, Caller, str], Job]) -> Callable[[Act, InPostgres, orm.Session], str]:
    def done(_: Act, there: InPostgres, session: orm.Session) -> str:
        ask(session, there.caller, there.job_id)
        return "ok"

    return done


_DONE: dict[str, Callable[[Act, InPostgres, orm.Session], object]] = {
    "claim": _really_claim,
    "beat": _really_beat,
    "checkpoint": _really_checkpoint,
    "complete": _really_complete,
    "fail": _really_fail,
    "release": _really_release,
    "stop": _really_stop,
    "wait": _really_wait,
    "silence": _really_silence,
    "reap": _really_reap,
    "cancel": _really_ask(jobs.cancel),
    "pause": _really_ask(jobs.pause),
    "resume": _really_ask(jobs.resume),
}


def is_due(session: orm.Session, job: Job) -> bool:
    return bool(session.scalar(select(Job.not_before <= func.clock_timestamp()).where(Job.id == job.id)))
