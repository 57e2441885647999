"""How fast the dashboard's pages are with 10,000 jobs, and a job of 50,000 steps in a real Chromium (docs/dashboard.md).

    PYTHONPATH=. python bench/dashboard.py [--quick] [--json FILE]

Postgres, S3 and one API process are started, and an organization is given a history. Each page is asked for over and over by
one client on one connection, the pages in turn; what is told is the time until the whole answer is there. Then Chromium, with
nothing in its cache, opens pages: the first contentful paint, what came over the wire, and how long after a job's curves are
asked for they are drawn.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import httpx
from api import Api, api
from playwright.sync_api import Browser, BrowserContext
from sqlalchemy import insert, inspect, orm

from app import db
from app.accounts import bootstrap
from app.core import ids
from app.core.storage import open_storage
from app.models import Job, JobEvent, JobState
from tests import make
from tests.browser import seeding
from tests.browser.chromium import launched

JOBS, WAITING, STEPS = 10_000, 40, 50_000
STATES = (JobState.SUCCEEDED,) * 8 + (JobState.FAILED, JobState.CANCELLED)
SERVER_P95_MS, PAINT_MS, DRAWN_MS, WEIGHT_KB = 100.0, 1000.0, 300.0, 300.0
# when the curves of a page stand on the screen: two frames after they were given to the chart
NOTES_WHEN_DRAWN = """
new MutationObserver((_, observer) => {
  if (!document.querySelector("#job[data-curves=drawn]")) return;
  observer.disconnect();
  requestAnimationFrame(() => requestAnimationFrame(() => { window.drawnAt = performance.now(); }));
}).observe(document, { subtree: true, childList: true, attributes: true });
"""
MEASURES = """async () => {
  const hasCurves = document.getElementById("loss") !== null;
  const isReady = () => performance.getEntriesByName("first-contentful-paint").length && (!hasCurves || window.drawnAt);
  while (!isReady()) await new Promise((resolve) => setTimeout(resolve, 20));
  const loaded = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")];
  const asked = loaded.find((entry) => entry.name.includes("/curves"));
  return {
    paint: performance.getEntriesByName("first-contentful-paint")[0].startTime,
    weight: loaded.reduce((sum, entry) => sum + entry.transferSize, 0) / 1000,
    drawn: hasCurves ? window.drawnAt - asked.startTime : null,
  };
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 requests of each page instead of 200")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, api(Path(folder) / "data") as at:
        pages = _history(at)
        with closing(_signed_in(at)) as http:
            server = _asked(http, pages, rounds=40 if asked.quick else 200)
            cookies = dict(http.cookies)
        with launched() as browser:
            seen = {name: _opened(browser, at, cookies, path, times=3 if asked.quick else 7) for name, path in pages.items()}
    _tell(server, seen, asked.json)


def _history(at: Api) -> dict[str, str]:
    """Of the organization whose operator signs in. Returns the pages by what they are called."""
    bootstrap.sign_in_link(at.settings)  # which makes the operator, in the first organization: ours
    sessions, storage = db.open_sessions(at.settings.database.system_url), open_storage(at.settings.storage)
    with sessions.begin() as session:
        good, bad = seeding.uploads(session, at.caller, storage)
        done, other, _, running, *_ = seeding.history(session, at.caller, good)
        evaluation = seeding.evaluation(session, at.caller, storage, [make.TINY, str(done.fine_tuned_model)])
        endpoint, _ = seeding.webhook(session, at.caller)
        _add_jobs(session, done)
        long = make.queued_job(session, at.caller, suffix="long")
        _add_steps(session, long)
        pages = {
            "overview": "/",
            "files": "/files",
            "file": f"/files/{bad.id}",
            "new job": "/jobs/new",
            "jobs": "/jobs",
            "job": f"/jobs/{done.id}",
            "job, running": f"/jobs/{running.id}",
            "job, 50,000 steps": f"/jobs/{long.id}",
            "compare": f"/jobs/compare?ids={done.id}&ids={other.id}",
            "models": "/models",
            "model": f"/models/{done.fine_tuned_model}",
            "evaluations": "/evaluations",
            "new evaluation": f"/evaluations/new?file={evaluation.file_id}",
            "evaluation": f"/evaluations/{evaluation.id}",
            "playground": "/playground",
            "webhooks": "/webhooks",
            "webhook": f"/webhooks/{endpoint.id}",
            "keys": "/keys",
            "account": "/account",
        }
    with sessions() as session:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"}).exec_driver_sql("ANALYZE")
    return pages


def _add_jobs(session: orm.Session, like: Job) -> None:
    """Ten thousand, most of them over, some waiting."""
    rng = random.Random(9)
    row = {column.key: getattr(like, column.key) for column in inspect(Job).column_attrs}
    over = [
        row | {"id": ids.new("ftjob-"), "state": rng.choice(STATES), "suffix": f"job-{n}", "fine_tuned_model": None}
        for n in range(JOBS - WAITING)
    ]
    waits = {"state": JobState.QUEUED, "finished_at": None, "started_at": None, "trained_tokens": None, "queue": "train.cpu"}
    waiting = [
        row | waits | {"id": ids.new("ftjob-"), "suffix": f"waiting-{n}", "fine_tuned_model": None} for n in range(WAITING)
    ]
    session.execute(insert(Job), over + waiting)


def _add_steps(session: orm.Session, job: Job) -> None:
    rng = random.Random(9)
    owner = {"organization_id": job.organization_id, "project_id": job.project_id, "job_id": job.id}
    told = []
    for step in range(1, STEPS + 1):
        loss = 0.4 + 2 * math.exp(-5 * step / STEPS) + rng.gauss(0, 0.05)
        measured = {"step": step, "train_loss": loss, "learning_rate": 1e-4, "tokens_per_second": 5200.0, "tokens": 2048}
        told.append({"data": measured})
        if step % 1000 == 0:
            told.append({"data": {"step": step, "valid_loss": loss + 0.1}})
    shared = {"level": "info", "type": "metrics", "message": "Step"}
    first = job.event_count + 1
    rows = [owner | shared | one | {"id": ids.new("ftevent-"), "sequence": first + n} for n, one in enumerate(told)]
    session.execute(insert(JobEvent), rows)
    job.event_count += len(rows)


def _signed_in(at: Api) -> httpx.Client:
    http = httpx.Client(base_url=at.url, headers={"origin": at.url}, follow_redirects=True, trust_env=False, timeout=60)
    http.post(bootstrap.sign_in_link(at.settings)).raise_for_status()
    return http


def _asked(http: httpx.Client, pages: dict[str, str], *, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each answer. The first round, which loads what is loaded once, is not counted."""
    took = {name: list[float]() for name in pages}
    for turn in range(rounds + 1):
        for name, path in pages.items():
            began_at = time.perf_counter()
            http.get(path).raise_for_status()
            if turn:
                took[name].append(1000 * (time.perf_counter() - began_at))
    return took


def _opened(browser: Browser, at: Api, cookies: dict[str, str], path: str, *, times: int) -> dict[str, float | None]:
    """Medians over browsers that have seen nothing before."""
    found = [_opened_once(browser, at, cookies, path) for _ in range(times)]
    medians = {name: [one[name] for one in found if one[name] is not None] for name in found[0]}
    return {name: statistics.median(values) if values else None for name, values in medians.items()}


def _opened_once(browser: Browser, at: Api, cookies: dict[str, str], path: str) -> dict[str, float | None]:
    context: BrowserContext = browser.new_context(viewport={"width": 1360, "height": 850})
    context.add_cookies([{"name": name, "value": value, "url": at.url} for name, value in cookies.items()])
    page = context.new_page()
    page.add_init_script(NOTES_WHEN_DRAWN)
    page.goto(at.url + path, wait_until="load")
    measured: dict[str, float | None] = page.evaluate(MEASURES)
    context.close()
    return measured


def _tell(server: dict[str, list[float]], seen: dict[str, dict[str, float | None]], to: Path | None) -> None:
    rows: dict[str, dict[str, float | None]] = {}
    print(f"{'page':20} {'server p50':>10} {'p95':>7}   {'painted':>8}   {'drawn':>7}   {'weight':>8}")
    for name, took in server.items():
        p95 = sorted(took)[math.ceil(0.95 * len(took)) - 1]
        rows[name] = {"server_p50_ms": statistics.median(took), "server_p95_ms": p95, **seen[name]}
        drawn = seen[name]["drawn"]
        print(
            f"{name:20} {statistics.median(took):7.1f} ms {p95:4.0f} ms   {seen[name]['paint']:5.0f} ms   "
            f"{f'{drawn:4.0f} ms' if drawn is not None else '':>7}   {seen[name]['weight']:5.0f} kB"
        )
    worst = {of: max((row[of] or 0.0, name) for name, row in rows.items()) for of in ("server_p95_ms", "paint", "weight")}
    long = rows["job, 50,000 steps"]["drawn"] or math.inf
    wanted = (
        (f"server's p95 of the slowest page ({worst['server_p95_ms'][1]}), ms", worst["server_p95_ms"][0], SERVER_P95_MS),
        (f"first contentful paint of the slowest page ({worst['paint'][1]}), ms", worst["paint"][0], PAINT_MS),
        ("curves of 50,000 steps, from asked for to drawn, ms", long, DRAWN_MS),
        (f"weight of the heaviest page ({worst['weight'][1]}), kB", worst["weight"][0], WEIGHT_KB),
    )
    targets = [{"name": name, "value": value, "target": target, "ok": value <= target} for name, value, target in wanted]
    for one in targets:
        print(f"{one['name']:75} {one['value']:7.1f}   target {one['target']:.0f}: {'met' if one['ok'] else 'MISSED'}")
    if to:
        to.write_text(json.dumps({"targets": targets, "pages": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
