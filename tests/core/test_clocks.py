"""The wall clock may jump: durations are counted by one that does not, and what processes agree on is the database's time."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WALL_CLOCK = {
    ("time", name) for name in ("time", "time_ns", "gmtime", "localtime", "ctime", "asctime", "strftime", "clock_gettime")
} | {("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today"), ("date", "today")}
ALLOWED = {
    "app/core/ids.py": "ids sort by it, roughly; no decision hangs on their order",
    "app/core/chat_template.py": "what day it is, where a model's template asks",
    "app/core/tracing.py": "where in a trace a part lies, whose length is counted otherwise",
    "app/inference/service.py": "`created` of an answer",
    "app/webhooks/emit.py": "`created_at` of an event",
    "app/webhooks/sending.py": "the timestamp that receivers hold against their own clock",
    "worker/datasets.py": "the age of files left behind, in whole hours",
    "worker/embedded/backup.py": "when a backup was made",
    "worker/embedded/output.py": "the time before a line of the log",
    "worker/relay.py": "the age of multipart uploads nobody finished, in whole days",
}


def test_the_wall_clock_is_read_where_the_time_of_day_is_meant_and_nowhere_else() -> None:
    sources = [path for folder in ("app", "worker") for path in (ROOT / folder).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix() for path in sources if any(_readings(path))}
    assert found == ALLOWED.keys()


def _readings(path: Path) -> Iterator[ast.AST]:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in WALL_CLOCK:
                yield node
            case ast.ImportFrom(module="time" | "datetime" as module, names=names):
                yield from (node for alias in names if (module, alias.name) in WALL_CLOCK)
