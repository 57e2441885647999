"""How long a claim and a look at the queue take while thousands of jobs wait (docs/decisions/0013).

    python bench/queues.py [--quick] [--json FILE] [--jobs N]

A Postgres of its own is started. Jobs are of one organization, of ten, of a thousand; each claim is a transaction, as a worker's.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import insert, orm

from app import db
from app.accounts.caller import Caller
from app.accounts.people import create_organization
from app.core import ids
from app.core.settings import LeaseSettings
from app.jobs import leases, queue
from app.jobs.leases import Lease
from app.models import Job, Throughput
from migrations.upgrade import upgrade
from worker.embedded import Servers

CLAIM_MS, LOOK_MS = 25.0, 100.0
BASE = "tiny-random-llama"
Sessions = orm.sessionmaker[orm.Session]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 claims of each instead of 100")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--jobs", type=int, default=10_000, metavar="N", help="that wait")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        servers = Servers(Path(folder), durable=True).start()
        try:
            upgrade(servers.settings.database.owner_url.get_secret_value())
            sessions, api = (
                db.open_sessions(url) for url in (servers.settings.database.system_url, servers.settings.database.api_url)
            )
            rows = [_measured(sessions, api, count, asked.jobs, 20 if asked.quick else 100) for count in (1, 10, 1000)]
        finally:
            servers.stop()
    targets = [
        _target("claim, 95th percentile in ms", max(row["claim_ms_p95"] for row in rows), CLAIM_MS),
        _target("places, median in ms", max(row["places_ms"] for row in rows), LOOK_MS),
    ]
    for target in targets:
        print(f"{target['name']:30} {target['value']:7.1f}   target {target['target']}: {'met' if target['ok'] else 'MISSED'}")
    if asked.json:
        asked.json.write_text(json.dumps({"targets": targets, "runs": rows}, indent=2) + "\n")


def _target(name: str, value: float, target: float) -> dict[str, Any]:
    return {"name": name, "value": value, "target": target, "ok": value <= target}


def _measured(sessions: Sessions, api: Sessions, organizations: int, jobs: int, claims: int) -> dict[str, Any]:
    name = f"train.{ids.new('q')}"
    callers = _waiting(sessions, name, organizations, jobs)
    held = list[Lease]()

    def claim() -> None:
        with sessions.begin() as session:
            lease = leases.claim(session, name, owner="bench", settings=LeaseSettings())
        assert lease is not None
        held.append(lease)

    def look() -> None:
        with db.organization_session(api, callers[0].organization_id) as session:
            queue.place_of_next(session, name)

    def end() -> None:
        with sessions.begin() as session:
            leases.fail(session, held.pop(), code="over", message="It is over")

    took = _times(claim, claims)
    row = {
        "organizations": organizations,
        "waiting": jobs,
        "claim_ms": statistics.median(took),
        "claim_ms_p95": sorted(took)[math.ceil(0.95 * len(took)) - 1],
        "end_ms": statistics.median(_times(end, claims // 2)),
        "places_ms": statistics.median(_times(look, 10)),
    }
    print(
        f"{jobs:,} waiting of {organizations:5,} organizations: claim {row['claim_ms']:6.1f} ms (p95 {row['claim_ms_p95']:.1f}), "
        f"end {row['end_ms']:.1f} ms, places {row['places_ms']:.1f} ms",
        flush=True,
    )
    return row


def _times(work: Callable[[], None], count: int) -> list[float]:
    """In milliseconds, the first one left out: it plans the statements."""
    work()
    took = []
    for _ in range(count):
        started_at = time.perf_counter()
        work()
        took.append(1000 * (time.perf_counter() - started_at))
    return took


def _waiting(sessions: Sessions, name: str, organizations: int, jobs: int) -> list[Caller]:
    """Jobs of organizations at random, of all lengths, as preparing leaves them."""
    rng = random.Random(1)
    with sessions.begin() as session:
        made = [create_organization(session, name="Bench", slug=ids.new("b")) for _ in range(organizations)]
        callers = [Caller(ids.new("key_"), organization.id, project.id, organization.slug) for organization, project in made]
        session.add(Throughput(id=ids.new("tp_"), queue=name, base=BASE, tokens=1000, worker_seconds=10.0))
        session.execute(insert(Job), [_job(rng.choice(callers), name, rng.randrange(1000, 100_000)) for _ in range(jobs)])
    return callers


def _job(caller: Caller, name: str, tokens: int) -> dict[str, Any]:
    return {
        "id": ids.new("ftjob-"),
        "organization_id": caller.organization_id,
        "project_id": caller.project_id,
        "api_key_id": caller.key_id,
        "organization_slug": caller.organization_slug,
        "state": "queued",
        "requested_model": BASE,
        "base": BASE,
        "training_file_id": "file-none",
        "seed": 1,
        "request": {},
        "request_sha256": "",
        "queue": name,
        "queued_at": datetime.now(UTC),
        "total_tokens": tokens,
    }


if __name__ == "__main__":
    main()
