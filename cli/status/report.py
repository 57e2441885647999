"""What is asked, and what of it is a problem."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from app import db, standing
from app.core.settings import Settings
from app.files.service import CPU_QUEUE
from app.models import Process
from app.standing import Standing
from cli.doctor import services
from cli.doctor.examination import without_secrets
from cli.doctor.finding import Finding, failed, ok, warning
from migrations.upgrade import revisions

ANSWER_SECONDS = 5.0
LATE_SECONDS = 60.0  # for what the relay does at once when all is well
LONG_SECONDS_OF_CPU, LONG_SECONDS_OF_TRAIN = 300.0, 3600.0  # as of the alert QueueOld
KINDS = {
    "relay": "python -m worker.relay",
    "cpu": "python -m celery -A worker.celery --quiet worker -Q cpu -n cpu@%h --pool threads -c 1"
    " --without-gossip --without-mingle --without-heartbeat",
    "train": "python -m worker.train",
}


@dataclass(frozen=True)
class Report:
    """`standing` is None where the database did not answer."""

    parts: list[Finding]
    standing: Mapping[str, Any] | None

    @property
    def problems(self) -> list[Finding]:
        return [part for part in self.parts if part.state == "failed"]

    @property
    def is_well(self) -> bool:
        return not self.problems


def look(settings: Settings) -> Report:
    """Ask everyone. Nothing that does not answer is waited for longer than some seconds."""
    parts, found = _asked(settings)
    return Report(without_secrets(parts, settings), standing.as_data(found) if found else None)


def _asked(settings: Settings) -> tuple[list[Finding], Standing | None]:
    parts = [_api(settings.inference.gateway_url), *services.examine(settings, all_of_them=False)]
    sessions = db.open_sessions(settings.database.system_url, pool_size=1, statement_seconds=int(ANSWER_SECONDS))
    try:
        with sessions.begin() as session:
            parts.append(_schema(*revisions(session.connection())))
            found = standing.read(session, engine_timeout_seconds=settings.inference.heartbeat_timeout_seconds)
    except Exception as error:  # away, of another release, or not ours to read: each is told in its own words
        remedy = "give TUNESMITH_DATABASE__SYSTEM_URL, or run this where the relay runs"
        return [*parts, failed("standing", f"{type(error).__name__}: {error}", remedy)], None
    finally:
        sessions.kw["bind"].dispose()
    return [*parts, *judged(found)], found


def _api(url: str) -> Finding:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=ANSWER_SECONDS, trust_env=False)
        return _ready(url, answer.status_code, answer.json())
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError, AttributeError) as error:
        # nobody, or somebody else
        return failed(
            "api", f"{url}: {str(error) or type(error).__name__}", "start it, or correct TUNESMITH_INFERENCE__GATEWAY_URL"
        )


def _ready(url: str, status: int, said: Any) -> Finding:
    if status != httpx.codes.OK:
        return failed("api", f"{url}: {said.get('status') or said['error']['message']}", "see the parts below, and its log")
    ready = f"{url}: ready, bases {', '.join(said['bases'])}"
    if away := said["bases_away"]:
        return warning("api", f"{ready}; away: {', '.join(away)}", "see the log of the engines that hold them")
    return ok("api", ready)


def _schema(current: str, wanted: str) -> Finding:
    if current != wanted:
        return failed("schema", f"the database is at {current}, and this release at {wanted}", "tunesmith migrate")
    return ok("schema", f"at {current}")


def judged(found: Standing) -> Iterator[Finding]:
    """What the database's numbers say of each part."""
    yield from (_processes(found, kind) for kind in KINDS)
    yield _engines(found)
    yield from (_queue(found, name) for name in sorted(found.queues))
    yield _leases(found)
    yield _relayed("outbox", found.outbox)
    yield _relayed("webhooks", found.webhooks.due)


def _processes(found: Standing, kind: str) -> Finding:
    live = [process for process in found.processes if process.kind == kind]
    if not live:
        return failed(kind, "none has been heard of lately", f"start one: {KINDS[kind]}")
    silent = [process for process in live if _broker_silence(process) > LATE_SECONDS]
    if silent:
        names = ", ".join(f"{process.id} for {_broker_silence(process):.0f} s" for process in silent)
        return failed(kind, f"the broker has not answered {names}", "start the broker if it is down, else the process anew")
    return ok(kind, f"{len(live)} live, none waits for the broker")


def _broker_silence(process: Process) -> float:
    return (process.heartbeat_at - process.broker_at).total_seconds()


def _engines(found: Standing) -> Finding:
    if not found.engines:
        return failed("engine", "none has been heard of lately", "start one: python -m worker.inference.server")
    return ok("engine", ", ".join(f"{engine.base} ({engine.quantization})" for engine in found.engines))


def _queue(found: Standing, name: str) -> Finding:
    waiting = found.queues[name]
    told = f"{waiting.count} waiting" + (f", the oldest for {waiting.oldest_seconds:.0f} s" if waiting.count else "")
    is_served = any(name in process.queues for process in found.processes)
    if waiting.count and not is_served:
        remedy = f"start one: {KINDS['cpu']}" if name == CPU_QUEUE else "start a worker that holds this size: docs/gpu.md"
        return failed(f"queue {name}", f"{told}, and no worker serves it", remedy)
    if waiting.oldest_seconds > (LONG_SECONDS_OF_CPU if name == CPU_QUEUE else LONG_SECONDS_OF_TRAIN):
        return warning(f"queue {name}", told, "see the log of its workers, or start more")
    return ok(f"queue {name}", told)


def _leases(found: Standing) -> Finding:
    if found.leases_expired:
        told = f"{found.leases_expired} running jobs whose worker is silent"
        return warning("leases", told, "the relay gives them to others within seconds; where it does not, see its log")
    return ok("leases", "none has expired")


def _relayed(name: str, waiting: standing.Waiting) -> Finding:
    told = f"{waiting.count} due" + (f", the oldest for {waiting.oldest_seconds:.0f} s" if waiting.count else "")
    if waiting.oldest_seconds > LATE_SECONDS:
        return failed(name, told, "see whether the relay runs, and its log")
    return ok(name, told)
