"""The process that reads strangers' files: what it is given, what it may take, and what becomes of it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app.core import data, ids
from app.core.errors import Unavailable
from app.core.settings import Settings
from app.core.storage import Storage, open_storage
from app.files.service import ToValidate
from tests import make
from tests.embedded.patience import eventually
from worker import examiner
from worker.tasks import validate

Examined = Callable[..., data.Report]


@pytest.fixture
def examined(storage: Storage) -> Examined:
    """Store a body and have it examined, as a worker would."""

    def run(body: bytes, *, seconds: int = 60, stored: bytes | None = None) -> data.Report:
        key = f"orgs/test/files/{ids.new('file-')}"
        sha256 = storage.put(key, body).sha256
        if stored is not None:
            storage.put(key, stored)
        try:
            return validate.examine(storage, ToValidate("file-1", key, sha256, seconds))
        finally:
            storage.delete(key)

    return run


def codes(report: data.Report) -> list[str]:
    return [problem.code for problem in report.problems]


def test_the_report_is_that_of_reading_the_file_here(examined: Examined) -> None:
    body = make.chat_file(3000) + b'\n{"text": "a"}\n{'

    assert examined(body) == data.examine(data.split_lines([body]))


def test_a_file_that_is_judged_by_its_beginning_is_hashed_to_its_end(examined: Examined) -> None:
    body = b"PAR1" + bytes(4 * 2**20)

    assert codes(examined(body)) == ["file_binary"]
    assert codes(examined(body, stored=body[:-1] + b"x")) == ["file_damaged"]


def test_memory_has_a_limit(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examiner, "MEMORY_BYTES", 32 * 2**20)

    assert codes(examined(make.chat_file(40_000))) == ["limits_exceeded"]


def test_processor_time_has_a_limit(examined: Examined) -> None:
    """Brackets in what is no JSON are the slowest there is to read."""
    line = b"[]" * 250_000 + b"\n"

    assert codes(examined(line * 240, seconds=1)) == ["limits_exceeded"]


def test_an_outage_ends_the_examiner_and_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    away = settings.storage.model_copy(update={"endpoint_url": f"http://127.0.0.1:{make.free_port()}"})
    started, start = list["subprocess.Popen[bytes]"](), validate._examiner
    monkeypatch.setattr(validate, "_examiner", lambda *asked, **more: started.append(start(*asked, **more)) or started[0])
    with pytest.raises(Unavailable):
        validate.examine(open_storage(away), ToValidate("file-1", "key", "0" * 64, 60))

    assert started[0].returncode is not None


def test_it_is_given_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_STORAGE__SECRET_KEY", "s3cret")
    with validate._examiner("fine-tune", seconds=10) as process:
        eventually(Path(f"/proc/{process.pid}/environ").read_bytes)  # empty until the kernel has set it up
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        is_apart = os.getsid(process.pid) == process.pid
        process.communicate()

    assert b"PATH=" in environment
    assert b"s3cret" not in environment
    assert is_apart


def test_it_needs_neither_torch_nor_a_database() -> None:
    code = "import sys, worker.examiner; sys.exit(bool({'torch', 'sqlalchemy', 'transformers', 'celery'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
