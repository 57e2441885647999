"""From a job's files to what its trainer reads, in storage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import orm, select

from app.accounts.caller import Caller
from app.core import catalog, data
from app.core.render import Renderer
from app.core.settings import Settings
from app.core.storage import Storage
from app.core.tokens.tokenise import TokenisedSet
from app.files import service as files
from app.jobs import service as jobs
from app.jobs.preparing import Datasets
from app.jobs.schemas import JobCreate, JobOut
from app.models import Job, JobEvent, JobState
from tests import make
from worker.model import card
from worker.services import Services
from worker.tasks import prepare

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}

Prepared = Callable[..., Job]


@pytest.fixture
def services(settings: Settings, system_sessions: orm.sessionmaker[orm.Session], storage: Storage) -> Services:
    with system_sessions.begin() as session:  # what other tests left to prepare is not ours
        session.query(Job).filter(Job.state == JobState.VALIDATING_FILES).update({"state": JobState.CANCELLED})
    return Services(settings, system_sessions, storage, catalog.load())


@pytest.fixture
def prepared(services: Services, organization: Caller) -> Prepared:
    """A job on these rows, prepared."""

    def run(*rows: dict[str, Any], **asked: Any) -> Job:
        with services.sessions.begin() as session:
            file = make.uploaded_file(session, organization)
            lines = [json.dumps(row).encode() for row in rows]
            file.sha256 = services.storage.put(file.storage_key, b"\n".join(lines)).sha256
            files.finish_validation(session, file.id, data.examine(lines))
            request = JobCreate.model_validate({"model": make.TINY, "training_file": file.id, "seed": 5, **asked})
            job_id = jobs.create(session, organization, services.catalog, request=request, tiers=make.CPU).id
        assert prepare.prepare_next(services)
        with services.sessions() as session:
            job = session.get_one(Job, job_id)
            session.expunge_all()
        return job

    return run


@pytest.fixture
def stored(services: Services, tmp_path: Path) -> Callable[[Job], tuple[TokenisedSet, TokenisedSet | None]]:
    def read(key: str) -> TokenisedSet:
        path = tmp_path / "set.safetensors"
        path.write_bytes(services.storage.get(key))
        return TokenisedSet.read(path)

    def both(job: Job) -> tuple[TokenisedSet, TokenisedSet | None]:
        assert job.state == JobState.QUEUED, job.error
        datasets = Datasets.model_validate(job.datasets)
        return read(datasets.training.key), read(datasets.validation.key) if datasets.validation else None

    return both


def trained_text(examples: TokenisedSet, bases_dir: Path) -> str:
    renderer = Renderer.open(card.prepared(catalog.load()[make.TINY], bases_dir))
    return renderer.tokenizer.decode(examples.tokens_N[examples.is_trained_N].tolist(), skip_special_tokens=False)


def test_a_call_of_a_tool_is_trained_on(prepared: Prepared, stored: Any, bases_dir: Path) -> None:
    """The tiny base has 512 tokens, and a token for each byte: tools alone take most of them."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    answered = [*asked, {"role": "tool", "tool_call_id": "c1", "content": "12"}, {"role": "assistant", "content": "12 cm"}]
    training, _ = stored(prepared({"messages": asked, "tools": tools}, {"messages": answered}))

    said = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'
    assert trained_text(training, bases_dir) == f"{said}{said}12 cm<|im_end|>"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "two plus two", "completion": "four"},
        {"instruction": "two plus two", "output": "four"},
        {"conversations": [{"from": "human", "value": "two plus two"}, {"from": "gpt", "value": "four"}]},
    ],
)
def test_other_formats_are_trained_on_as_chats(prepared: Prepared, stored: Any, bases_dir: Path, row: dict[str, Any]) -> None:
    training, _ = stored(prepared(row))

    assert trained_text(training, bases_dir) == "four<|im_end|>"


def test_a_long_row_is_left_out_or_cut_as_asked(prepared: Prepared, stored: Any, services: Services, bases_dir: Path) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "yes"}]}
    dropping = prepared(CHAT, long, training={"max_seq_length": 64})
    cutting = prepared(CHAT, long, training={"max_seq_length": 64, "long_rows": "truncate"})

    assert stored(dropping)[0].lines_E.tolist() == [1]
    assert stored(cutting)[0].lines_E.tolist() == [1, 2]
    assert trained_text(stored(cutting)[0], bases_dir) == "b<|im_end|>yes<|im_end|>"
    counts = [(job.plan or {}) for job in (dropping, cutting)]
    assert [(plan["dropped_examples"], plan["truncated_examples"]) for plan in counts] == [(1, 0), (0, 1)]
    with services.sessions() as session:
        told = {
            job_id: message
            for job_id, message in session.execute(select(JobEvent.job_id, JobEvent.message))
            if "Line 2" in message
        }
    assert told[dropping.id].startswith("Line 2 is left out: ")
    assert told[cutting.id].startswith("Line 2 is cut: ")


@pytest.mark.parametrize("part", [0.25, 3])
def test_a_part_of_the_file_is_held_back(prepared: Prepared, stored: Any, part: float | int) -> None:
    rows = [{"prompt": f"{n}?", "completion": str(n)} for n in range(12)]
    job = prepared(*rows, training={"validation_split": part})
    training, validation = stored(job)

    assert (training.examples, validation.examples) == (9, 3)
    assert sorted([*training.lines_E, *validation.lines_E]) == list(range(1, 13))
    assert (job.plan or {})["validation_examples"] == 3
    assert JobOut.of(job).training["validation_split"] == part


def test_a_part_that_leaves_nothing_is_refused(prepared: Prepared) -> None:
    job = prepared(CHAT, training={"validation_split": 1})

    assert job.state == JobState.FAILED and job.error is not None
    assert (job.error["code"], job.error["param"]) == ("invalid_file", "training.validation_split")
    assert "1 of 1 usable rows would be held back" in job.error["message"]
