"""The second pass of bench/data.py: tokens, duplicates, a second job on a file, dry runs (docs/data.md).

Files are tokenised and compared in fresh processes, as a worker starts them, limits included. Rows are chats of about 1.3 kB
from the standard library's documentation, under one system prompt; every twentieth row repeats an earlier one with a few words
changed. Recall is counted on pairs whose similarity is known because it was computed in full.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import orm

from app.accounts.caller import Caller
from app.accounts.people import create_organization
from app.core import catalog, data, ids
from app.core.chat import Message
from app.core.limited import environment
from app.core.render import SPEAKERS, Example, Renderer
from app.core.tokens import duplicates
from app.core.tokens.token_file import TokenReader, TokenWriter
from app.core.tokens.tokeniser import Answer, Order, SetOrder
from app.files import service as files
from app.jobs import service as jobs
from app.jobs.dry_run import DryRunner
from app.jobs.schemas import JobCreate
from app.models import Job
from migrations.upgrade import upgrade
from worker.datasets import MEMORY_BYTES
from worker.embedded import Servers
from worker.model import card
from worker.services import Services, open_services
from worker.tasks import prepare, publish

BASE, SEED, LONGEST = "smollm2-135m-instruct", 1, 1 << 20
SYSTEM = "You explain Python's standard library to people who have just begun to program. Be short, and never wrong. " * 4
Run = dict[str, float]


def measure(*, rounds: int, megabytes: int, pairs: int, cache_dir: Path) -> tuple[list[dict[str, Any]], dict[str, list[Run]]]:
    """Targets and runs."""
    written_card = card.prepared(catalog.load()[BASE], cache_dir)
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, run in _cells(Path(folder), written_card, megabytes, pairs).items():
            for _ in range(rounds):
                runs.setdefault(name, []).append(run())
                print(f"{name:24}", "  ".join(f"{what} {value:,.3g}" for what, value in runs[name][-1].items()), flush=True)
    return _targets(runs, megabytes), runs


def _cells(folder: Path, written_card: Path, megabytes: int, pairs: int) -> dict[str, Callable[[], Run]]:
    renderer = Renderer.open(written_card)
    small, large, worst = (folder / f"{name}.jsonl" for name in ("small", "large", "worst"))
    _write(small, _rows(), megabytes * 10**6)
    _write(large, _rows(), 4 * megabytes * 10**6)
    _write(worst, _long_rows(), 8 * 10**6)
    return {
        "row by row": lambda: one_by_one(small, renderer),
        f"{megabytes} MB": lambda: in_process(small, written_card),
        f"{4 * megabytes} MB": lambda: in_process(large, written_card),
        "rows of 1 MiB": lambda: in_process(worst, written_card),
        "pairs": lambda: quality(pairs),
        "jobs": lambda: jobs_on(small.read_bytes(), written_card.parents[1]),
    }


def one_by_one(path: Path, renderer: Renderer) -> Run:
    """A row at a time, on one core: what batches are compared with."""
    chats = list(islice(data.read(data.split_lines([path.read_bytes()])), 1000))
    size_bytes = sum(len(line) for line in islice(path.open("rb"), 1000))
    began_at = time.perf_counter()
    for chat in chats:
        renderer.example(chat.messages)
    return {"MB/s": size_bytes / 1e6 / (time.perf_counter() - began_at)}


def in_process(path: Path, written_card: Path) -> Run:
    """A file as a job's is: tokenised and compared in one process, then compared again in another to tell the two apart."""
    tokens = path.with_suffix(".safetensors")
    order = Order(card=written_card, max_seq_length=LONGEST, long_rows="drop", training=SetOrder(tokens=tokens, source=path))
    start = _started(order.model_copy(update={"training": SetOrder(tokens=_nothing(path.parent))}))
    both = _started(order)
    comparing = _started(order.model_copy(update={"training": SetOrder(tokens=tokens)}))
    report = both.answer.training
    assert report is not None
    size_megabytes, seconds = path.stat().st_size / 1e6, both.wall_seconds - comparing.wall_seconds
    return {
        "MB/s": size_megabytes / seconds,
        "MB/s of one core": size_megabytes / (both.cpu_seconds - comparing.cpu_seconds),
        "tokens/s": report.tokens / seconds,
        "rows/s": report.rows / seconds,
        "rows compared/s": report.rows / max(0.01, comparing.wall_seconds - start.wall_seconds),
        "peak RSS, MiB": both.peak_rss_bytes / 2**20,
        "start, s": start.wall_seconds,
    }


def _nothing(folder: Path) -> Path:
    path = folder / "nothing.safetensors"
    with TokenWriter(path) as writer:
        writer.finish({})
    return path


@dataclass(frozen=True)
class Started:
    """What a tokeniser process answered, and what it took."""

    answer: Answer
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


# a process's peak begins with that of the one which forked it: this one is small
_LAUNCHER = """
import os, resource, sys
status = os.spawnv(os.P_WAIT, sys.argv[1], sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, file=sys.stderr)
sys.exit(status)
"""


def _started(order: Order) -> Started:
    tokeniser = [sys.executable, "-m", "app.core.tokens.tokeniser", str(MEMORY_BYTES), "3600"]
    began_at = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-S", "-c", _LAUNCHER, *tokeniser],
        input=order.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
        env=environment() | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    if done.returncode:
        raise SystemExit(f"the tokeniser failed:\n{done.stderr[-4000:]}")
    cpu_seconds, peak_rss_bytes = done.stderr.split()[-2:]
    answer = Answer.model_validate_json(done.stdout)
    return Started(answer, time.perf_counter() - began_at, float(cpu_seconds), int(peak_rss_bytes))


def quality(pairs: int) -> Run:
    """Of pairs whose similarity is at least 0.8, how many are found; of rows like none by 0.79, how many are named.

    Rows are random tokens under one prompt and one beginning; each has a copy with 1 to 12 of its 80 tokens changed.
    """
    rng = random.Random(SEED)
    beginning = [rng.randrange(1000) for _ in range(40)]
    rows = [[*beginning, *(rng.randrange(10**6) for _ in range(80))] for _ in range(pairs)]
    copies = [_changed(row, rng.randint(1, 12), rng, keep=len(beginning)) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        with TokenWriter(path) as writer:
            writer.append([_example(row) for row in (*rows, *copies)], range(1, 2 * pairs + 1))
            writer.finish({})
        with TokenReader(path) as reader:
            began_at = time.perf_counter()
            found = _found(reader, Path(folder))
            seconds = time.perf_counter() - began_at
    alike = [_jaccard(row[len(beginning) - 2 :], copy[len(beginning) - 2 :]) for row, copy in zip(rows, copies, strict=True)]
    near = {pairs + number for number, similarity in enumerate(alike) if similarity >= duplicates.NEAR}
    edge = {pairs + number for number, similarity in enumerate(alike) if 0 < duplicates.NEAR - similarity <= 0.01}
    return {
        "recall": len(near & found) / len(near),
        "wrong": len(found - near - edge) / (2 * pairs - len(near) - len(edge)),
        "near pairs": len(near),
        "rows/s": 2 * pairs / seconds,
    }


def _found(reader: TokenReader, folder: Path) -> set[int]:
    rows = duplicates._Rows([reader], folder)
    rows.sign()
    rows.match_exact()
    rows.match_near()
    return {int(row) for row in (rows._state["kind"] != 0).nonzero()[0]}


def _example(row: list[int]) -> Example:
    half = len(row) // 2
    speakers = bytes([SPEAKERS.index("user")] * half + [SPEAKERS.index("assistant")] * (len(row) - half))
    return Example(row, [number == SPEAKERS.index("assistant") for number in speakers], speakers)


def _changed(row: list[int], changes: int, rng: random.Random, *, keep: int) -> list[int]:
    changed = list(row)
    for place in rng.sample(range(keep, len(row)), changes):
        changed[place] = rng.randrange(10**6, 2 * 10**6)
    return changed


def _jaccard(one: list[int], two: list[int]) -> float:
    size = duplicates.SHINGLE
    sets = [{tuple(row[i : i + size]) for i in range(len(row) - size + 1)} for row in (one, two)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def jobs_on(content: bytes, cache_dir: Path) -> Run:
    """With real servers: a dry run of the first 1,000 rows, which nobody has validated; then, from a job in the hands of a worker
    to its place in the queue, the first and the second on the same file.
    """
    with tempfile.TemporaryDirectory() as folder:
        servers = Servers(Path(folder), durable=False).start()
        try:
            upgrade(servers.settings.database.owner_url.get_secret_value())
            changes = {"cache_dir": cache_dir, "work_dir": Path(folder) / "work"}
            to = open_services(servers.settings.model_copy(update=changes))
            publish.publish(to, to.catalog[BASE])
            with to.sessions.begin() as session:
                organization, project = create_organization(session, name="Bench", slug="bench")
                caller = Caller(ids.new("key_"), organization.id, project.id, organization.slug)
                file_id = _file(session, caller, to, content)
                files.finish_validation(session, file_id, data.Report(format="chat", rows=1, problem_count=0))
                short_id = _file(session, caller, to, b"".join(islice(BytesIO(content), 1000)))
            dry = _dry_run(to, caller, short_id)
            first, second = _prepared(to, caller, file_id), _prepared(to, caller, file_id)
            to.sessions.kw["bind"].dispose()
        finally:
            servers.stop()
    return {"dry run, s": dry, "first, s": first, "second, s": second}


def _dry_run(to: Services, caller: Caller, file_id: str) -> float:
    runner = DryRunner(to.sessions, to.storage, to.catalog, to.settings)
    began_at = time.perf_counter()
    told = runner.run(caller, JobCreate(model=BASE, training_file=file_id, dry_run=True))
    seconds = time.perf_counter() - began_at
    assert told.ok
    assert told.sampled == {}
    assert told.data_report is not None
    assert told.data_report.training.rows == 1000
    return seconds


def _file(session: orm.Session, caller: Caller, services: Services, content: bytes) -> str:
    file_id = ids.new("file-")
    stored = services.storage.put(files.key_for(caller, file_id), content)
    files.add(session, caller, file_id=file_id, filename="rows.jsonl", purpose="fine-tune", stored=stored)
    return file_id


def _prepared(services: Services, caller: Caller, file_id: str) -> float:
    with services.sessions.begin() as session:
        request = JobCreate(model=BASE, training_file=file_id, seed=1)
        job_id = jobs.create(session, caller, services.catalog, request=request, tiers=frozenset({"cpu"})).id
    began_at = time.perf_counter()
    prepare.prepare_next(services)
    seconds = time.perf_counter() - began_at
    with services.sessions() as session:
        assert session.get_one(Job, job_id).state == "queued"
    return seconds


def _rows() -> Iterator[list[Message]]:
    words = _words()
    rng, said = random.Random(SEED), list[tuple[list[str], list[str]]]()
    while True:
        if said and rng.random() < 0.05:
            question, answer = (list(part) for part in rng.choice(said))
            for _ in range(rng.randint(1, 6)):
                part = rng.choice((question, answer))
                part[rng.randrange(len(part))] = rng.choice(words)
        else:
            question, answer = (words[start : start + 75] for start in rng.sample(range(len(words) - 75), 2))
            said = [*said[-500:], (question, answer)]
        yield [Message("system", SYSTEM), Message("user", " ".join(question)), Message("assistant", " ".join(answer))]


def _words() -> list[str]:
    """Of the docstrings of the standard library."""
    sources = "\n".join(path.read_text() for path in sorted(Path(argparse.__file__).parent.glob("*.py")))
    return " ".join(re.findall(r'"""(.*?)"""', sources, re.DOTALL)).split()


def _long_rows() -> Iterator[list[Message]]:
    """As long as a line may be, and of the most tokens: the worst that one row can do to memory."""
    rng = random.Random(SEED)
    while True:
        yield [Message("user", "".join(chr(rng.randrange(33, 126)) for _ in range(900_000))), Message("assistant", "ok")]


def _write(path: Path, rows: Iterator[list[Message]], size_bytes: int) -> None:
    with path.open("wb") as file:
        while file.tell() < size_bytes:
            messages = [{"role": message.role, "content": message.content} for message in next(rows)]
            file.write(json.dumps({"messages": messages}).encode() + b"\n")


def _targets(runs: dict[str, list[Run]], megabytes: int) -> list[dict[str, Any]]:
    def median(cell: str, figure: str) -> float:
        return statistics.median(run[figure] for run in runs[cell])

    small, large = f"{megabytes} MB", f"{4 * megabytes} MB"
    found = [
        ("tokenising, over row by row on one core", median(small, "MB/s") / median("row by row", "MB/s"), 1.5, True),
        ("rows compared a second", median(small, "rows compared/s"), 5_000, True),
        ("recall of near-duplicates", median("pairs", "recall"), 0.97, True),
        ("part of the other rows that is named", median("pairs", "wrong"), 0.0, False),
        (
            "peak RSS, four times the file over the file",
            median(large, "peak RSS, MiB") / median(small, "peak RSS, MiB"),
            1.2,
            False,
        ),
        (
            "peak RSS with rows of 1 MiB, of what it may take",
            median("rows of 1 MiB", "peak RSS, MiB") / (MEMORY_BYTES >> 20),
            0.75,
            False,
        ),
        ("dry run of 1,000 rows, s", median("jobs", "dry run, s"), 3.0, False),
        ("second job on a file, s", median("jobs", "second, s"), 1.0, False),
    ]
    return [
        {"name": name, "value": value, "target": target, "ok": value >= target if is_floor else value <= target}
        for name, value, target, is_floor in found
    ]
