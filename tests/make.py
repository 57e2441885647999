"""What tests need to exist, as functions."""

import json
import socket
from collections.abc import Set
from datetime import timedelta

from sqlalchemy import func, orm, select

from app.accounts.caller import Caller
from app.core import catalog, data, ids, spec
from app.core.events import MeasuredMemory
from app.core.manifest import BaseEntry, Manifest
from app.core.settings import EvaluationSettings, GpuSettings, LeaseSettings
from app.core.spec import USUAL, QuantizationName
from app.core.storage import Storage, Stored
from app.evaluations import leases as evaluation_leases
from app.evaluations import service as evaluations
from app.evaluations.schemas import EvaluationCreate
from app.files import service as files
from app.files.service import Result
from app.inference.service import Whole
from app.jobs import admission, leases, preparing
from app.jobs import service as jobs
from app.jobs.admission import Admission, Data
from app.jobs.leases import Lease
from app.jobs.preparing import Dataset, Datasets
from app.jobs.schemas import JobCreate
from app.models import Evaluation, EvaluationSample, EvaluationState, File, Job, Sweep, WebhookDelivery
from app.sweeps import service as sweeps
from app.sweeps.schemas import SweepCreate
from app.webhooks.emit import EventType, emit

TINY = "tiny-random-llama"
# for processes that compute with it: threads would only wait for each other, and compiling takes ten seconds and gains nothing
UNHURRIED = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
LEASES = LeaseSettings()
CPU = frozenset({"cpu"})


def free_port() -> int:
    """A port of this machine that nobody listens on just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def chat_line(question: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


def chat_file(rows: int = 12) -> bytes:
    """A small valid training file."""
    return "\n".join(chat_line(f"What comes after {n}?", str(n + 1)) for n in range(rows)).encode()


def preference_file(rows: int = 12) -> bytes:
    """A small valid file for DPO: each answer is preferred to a lazier one."""
    lines = [
        {
            "input": {"messages": [{"role": "user", "content": f"What comes after {n}?"}]},
            "preferred_output": [{"role": "assistant", "content": str(n + 1)}],
            "non_preferred_output": [{"role": "assistant", "content": "Dunno" + "." * (n % 4)}],
        }
        for n in range(rows)
    ]
    return "\n".join(map(json.dumps, lines)).encode()


def rated_file(rows: int = 12) -> bytes:
    """A small valid file for KTO: of three answers one is called bad."""
    said = ((f"What comes after {n}?", str(n + 1) if n % 3 else "Dunno.", n % 3 > 0) for n in range(rows))
    return "\n".join(
        json.dumps({"messages": json.loads(chat_line(question, answer))["messages"], "label": label})
        for question, answer, label in said
    ).encode()


def uploaded_file(session: orm.Session, caller: Caller) -> File:
    """A file row as an upload leaves it."""
    stored = Stored(size_bytes=10, sha256="0" * 64)
    return files.add(session, caller, file_id=ids.new("file-"), filename="a.jsonl", purpose="fine-tune", stored=stored)


def valid_file(session: orm.Session, caller: Caller) -> File:
    file = uploaded_file(session, caller)
    files.finish_validation(session, file.id, data.Report(rows=12, problem_count=0))
    return file


def stored_file(session: orm.Session, caller: Caller, storage: Storage, content: bytes) -> File:
    """A valid file whose bytes are in storage."""
    file = valid_file(session, caller)
    file.sha256, file.size_bytes = storage.put(file.storage_key, content).sha256, len(content)
    session.flush()
    return file


def job(
    session: orm.Session,
    caller: Caller,
    *,
    training_file: File | None = None,
    quantizations: Set[QuantizationName] = frozenset({USUAL}),
    **asked: object,
) -> Job:
    """A job as its creation leaves it: its files are still to be looked at."""
    training_file = training_file or valid_file(session, caller)
    request = JobCreate.model_validate({"model": TINY, "training_file": training_file.id, **asked})
    return jobs.create(session, caller, catalog.load(), request=request, tiers=CPU, quantizations=quantizations)


def queued_job(session: orm.Session, caller: Caller, **asked: object) -> Job:
    """A job that a worker may take, in a queue of its own so that no other test's worker does."""
    return prepared(session, job(session, caller, **asked))


def prepared(session: orm.Session, made: Job) -> Job:
    """The same of a job that there is."""
    datasets = Datasets(training=Dataset(key="nowhere", sha256="0" * 64))
    resolved = admitted(requested=spec.Requested.model_validate(made.request))
    preparing.finish(session, made.id, admitted=resolved, datasets=datasets)
    made.queue = f"train.{made.id}"
    session.flush()
    return made


def sweep(session: orm.Session, caller: Caller, **asked: object) -> Sweep:
    """Of two learning rates, with part of the file held back."""
    body: dict[str, object] = {
        "model": TINY,
        "training_file": valid_file(session, caller).id,
        "training": {"validation_split": 2},
        "grid": {"training.learning_rate": [1e-3, 1e-4]},
    }
    request = SweepCreate.model_validate(body | asked)
    return sweeps.create(session, caller, catalog.load(), request=request, tiers=CPU)


def evaluation(session: orm.Session, caller: Caller, model: str) -> tuple[Evaluation, str]:
    """A running evaluation of a model, and the id of its one answer."""
    file = uploaded_file(session, caller)
    file.purpose = data.TO_EVALUATE
    files.finish_validation(session, file.id, data.Report(format=data.CHAT, rows=1, problem_count=0))
    grader = {"type": "regex", "name": "g", "pattern": "a"}
    request = EvaluationCreate.model_validate({"file": file.id, "models": [model], "graders": [grader]})
    made = evaluations.create(session, caller, catalog.load(), request=request, judges=(), settings=EvaluationSettings())
    made.lease_owner, made.lease_expires_at, made.attempt = "worker", func.clock_timestamp() + timedelta(hours=1), 1
    made.state = EvaluationState.RUNNING
    session.flush()
    answer = Whole("42", "stop", 1, 1)
    lease = evaluation_leases.Lease(made.id, 1, "worker")
    evaluation_leases.record_answer(session, lease, position=0, line=1, model=model, answer=answer)
    return made, session.scalars(select(EvaluationSample.id).where(EvaluationSample.evaluation_id == made.id)).one()


def delivery(session: orm.Session, caller: Caller, endpoint_id: str) -> WebhookDelivery:
    """Of an event to an endpoint of the project. Nothing more is tried, or a relay of another test would send it."""
    owner = {"organization_id": caller.organization_id, "project_id": caller.project_id}
    emit(session, **owner, type=EventType.FAILED, data_id="ftjob-any")
    made = session.scalars(select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)).one()
    made.next_attempt_at = None
    return made


def admitted(*, tokens: int = 600, requested: spec.Requested = spec.Requested()) -> Admission:
    """A dozen short rows of the tiny base, in the cpu tier."""
    data = Data(examples=12, dropped=0, tokens=tokens, trained_tokens=tokens // 2, longest=90)
    known = catalog.load()
    return admission.admit(known[TINY], requested, data, seed=1, among=CPU, gpu=GpuSettings(), catalog=known)


def claim(session: orm.Session, of: Job, *, owner: str = "worker") -> Lease:
    lease = leases.claim(session, of.queue, owner=owner, settings=LEASES)
    assert lease is not None
    return lease


def expire_lease(session: orm.Session, of: Job) -> None:
    """Time passes by ageing the row, since the clock is the database's."""
    of.lease_expires_at = func.clock_timestamp() - timedelta(seconds=1)
    session.flush()


def make_due(session: orm.Session, of: Job) -> None:
    of.not_before = func.clock_timestamp() - timedelta(seconds=1)
    session.flush()


def checkpoint(session: orm.Session, lease: Lease, *, step: int = 1, metrics: dict[str, float] | None = None) -> None:
    prefix = f"somewhere/{lease.job_id}/a{lease.attempt}/step-{step}"
    leases.checkpoint(session, lease, step=step, prefix=prefix, manifest=manifest(lease.job_id), metrics=metrics or {})


def complete(session: orm.Session, lease: Lease, *, metrics: dict[str, float] | None = None) -> None:
    leases.complete(
        session,
        lease,
        prefix=f"somewhere/{lease.job_id}/a{lease.attempt}",
        manifest=manifest(lease.job_id).model_copy(update={"metrics": metrics or {}}),
        trained_tokens=100,
        memory=MeasuredMemory(peak_bytes=1, measured_as="rss", micro_batch_tokens=2048, is_checkpointing=False),
        tables=[
            Result(name, f"results/{lease.job_id}/{name}", Stored(size_bytes=1, sha256="0" * 64))
            for name in ("metrics.csv", "examples.csv")
        ],
    )


def tuned_model(session: orm.Session, caller: Caller) -> str:
    """The name of a model that a job has made."""
    made = queued_job(session, caller)
    complete(session, claim(session, made))
    return str(made.fine_tuned_model)


def manifest(of: str = "") -> Manifest:
    return Manifest(
        kind="adapter",
        files={},
        base=BaseEntry(id=TINY, revision="1", digest="0" * 64),
        dataset_sha256=of,
        template_sha256="",
        token_vectors=(),
        spec={},
        code_version="0",
        step=1,
        metrics={},
    )


def reread(session: orm.Session, made: Job) -> Job:
    return session.scalars(select(Job).where(Job.id == made.id).execution_options(populate_existing=True)).one()


def require_envelope(status: int, body: object) -> dict[str, object]:
    """The `error` object of an answer that has no other shape: four keys, a sentence, nothing of Python's."""
    assert isinstance(body, dict) and set(body) == {"error"}, body
    error = body["error"]
    assert isinstance(error, dict) and set(error) == {"message", "type", "param", "code"}, error
    assert error["message"] and "Traceback" not in error["message"], error
    assert error["type"] == "server_error" or status < 500, error
    return error
