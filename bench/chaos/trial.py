"""One trial: customers at work, something that strikes meanwhile, rest, and the questions."""

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.chaos.checks import Checks
from bench.chaos.house import BASE, House, eventually, house
from bench.chaos.ledger import Ledger
from bench.chaos.load import PAUSE_SECONDS, Customers
from bench.chaos.sink import Sink, receiving

REST_SECONDS = 300.0


@dataclass(frozen=True)
class Outcome:
    """`broken` has the sentences of `checks` by invariant; each is empty if all is well."""

    ledger: Ledger
    checks: Checks
    broken: dict[str, list[str]]


def run(
    data_dir: Path,
    cache_dir: Path,
    *,
    seed: int,
    strike: Callable[[House, Ledger], None],
    crash_at: Path | None = None,
    pause_seconds: float = PAUSE_SECONDS,
) -> Outcome:
    """What was left in `data_dir` is gone on with. `pause_seconds` lie between two things that a customer does. Raises Stuck if
    the service does not recover, or does not come to rest."""
    data_dir.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(data_dir / "ledger.jsonl")
    sink = Sink(ledger)
    known_port = next((entry["port"] for entry in ledger.all("endpoint")), 0)
    with closing(ledger), receiving(sink, port=known_port), house(data_dir, cache_dir, crash_at=crash_at) as at:
        _ensure_endpoint(at, sink, ledger)
        customers = Customers(at, ledger, seed=seed + len(ledger.all("fault")), pause_seconds=pause_seconds)
        with customers.busy():
            strike(at, ledger)
        sink.refused_share = 0.0
        _await_quiet(at)
        _probe(at, ledger)
        _await_quiet(at)
        _await_tidiness(at)
        checks = Checks(at, ledger)
        return Outcome(ledger, checks, checks.all())


def _ensure_endpoint(at: House, sink: Sink, ledger: Ledger) -> None:
    if not ledger.all("endpoint"):
        with at.client() as client:
            url = f"http://127.0.0.1:{sink.port}/hooks"
            made = client.post("/webhook_endpoints", body={"url": url}, cast_to=dict[str, Any])
        ledger.note("endpoint", secret=made["signing_secret"], port=sink.port)
    (endpoint,) = ledger.all("endpoint")
    sink.secret = endpoint["secret"]


def _probe(at: House, ledger: Ledger) -> None:
    """With all workers idle one more job is made: how long does it wait in the queue?"""
    rows = (
        f'{{"messages": [{{"role": "user", "content": "{n}"}}, {{"role": "assistant", "content": "{n}"}}]}}' for n in range(8)
    )
    with at.client() as client:
        content = "\n".join(rows).encode()
        file = client.files.create(file=("probe.jsonl", content), purpose="fine-tune")
        ledger.note("file", id=file.id, sha256=hashlib.sha256(content).hexdigest())
        job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, hyperparameters={"n_epochs": 1})
        ledger.note("job", id=job.id, mark=None, is_keyed=False)
    waited = (
        "SELECT extract(epoch FROM started_at - queued_at)::float AS seconds FROM jobs WHERE id = %s AND started_at IS NOT NULL"
    )
    (row,) = eventually(lambda: at.rows(waited, job.id), "a job is claimed")
    ledger.note("probe", id=job.id, seconds=row["seconds"])


def _await_quiet(at: House) -> None:
    """Until every job has ended, every message is out and every delivery made. What waits for its hour is let wait no longer."""

    def is_quiet() -> bool:
        at.change("UPDATE webhook_deliveries SET next_attempt_at = now() WHERE next_attempt_at > now() + interval '1 minute'")
        at.change("UPDATE outbox SET not_before = now() WHERE not_before > now() + interval '1 minute' AND topic <> 'tidy'")
        unfinished = "state IN ('validating_files', 'queued', 'running', 'evaluating')"
        (left,) = at.rows(
            f"SELECT (SELECT count(*) FROM jobs WHERE {unfinished})"  # noqa: S608 - a constant
            " + (SELECT count(*) FROM files WHERE status = 'uploaded')"
            " + (SELECT count(*) FROM outbox WHERE topic <> 'tidy')"
            " + (SELECT count(*) FROM webhook_deliveries WHERE next_attempt_at IS NOT NULL) AS count"
        )
        return bool(left["count"] == 0)

    eventually(is_quiet, "all is at rest", seconds=REST_SECONDS, pause_seconds=1)


def _await_tidiness(at: House) -> None:
    def is_tidy() -> bool:
        return not at.rows("SELECT 1 FROM outbox UNION ALL SELECT 1 FROM uploads WHERE status = 'pending' LIMIT 1")

    for as_if_days_had_passed in (
        "UPDATE outbox SET not_before = now() WHERE topic = 'tidy'",
        "UPDATE uploads SET expires_at = now(), sweep_at = now() WHERE status = 'pending'",  # by a client who gave up
    ):
        at.change(as_if_days_had_passed)
    eventually(is_tidy, "what the dead left is deleted", seconds=REST_SECONDS, pause_seconds=1)
