"""An organization with a history: what pages show when there is something to show."""

import math
import random
from collections.abc import Iterator
from datetime import timedelta

from sqlalchemy import func, orm, select

from app import processes, standing
from app.accounts.caller import Caller
from app.core import catalog, data, ids
from app.core.engine import Heartbeat
from app.core.events import Evaluated, Examined, ExaminedExample, HeldOut, Reason, Scores, Stepped
from app.core.memory import GIB
from app.core.settings import EvaluationSettings, WebhookSettings
from app.core.storage import Storage
from app.evaluations import leases as evaluation_leases
from app.evaluations import results
from app.evaluations import service as evaluations
from app.evaluations.schemas import EvaluationCreate
from app.files import service as files
from app.inference import engines
from app.inference.service import Whole
from app.jobs import events, leases
from app.jobs import service as jobs
from app.jobs.leases import Lease
from app.models import Evaluation, EvaluationSample, EvaluationState, File, Job, WebhookDelivery, WebhookEndpoint
from app.webhooks import service as webhooks
from app.webhooks.schemas import EndpointCreate
from tests import make

STEPS = 240
PAGES = (  # which are there before there is anything to show
    "/",
    "/files",
    "/files?purpose=fine-tune-results",
    "/jobs",
    "/jobs/new",
    "/models",
    "/playground",
    "/webhooks",
    "/keys",
    "/evaluations",
    "/evaluations/new",
    "/account",
)
_SUPPORT = (
    ("My parcel says delivered, but it is not here.", "I am sorry. Please ask your neighbours first; if it is not there by noon "
     "tomorrow, answer here and I send it again at no cost."),
    ("Can I change the size after ordering?", "Yes, until it is packed. Tell me the order number and the size you would like."),
    ("Where is my refund?", "It was sent on Monday and takes three to five working days to arrive."),
)  # fmt: skip


def history(session: orm.Session, caller: Caller, trained_on: File) -> list[Job]:
    """Jobs in each state a page can meet, the oldest first."""
    rng = random.Random(9)
    support = _finished(session, caller, rng, trained_on, suffix="support-tone", final=0.41)
    router = _finished(
        session, caller, rng, trained_on, suffix="ticket-router", final=0.12, seed=4, training={"learning_rate": 1e-4}
    )
    failed = _failed(session, caller, suffix="invoice-extract")
    running = _running(session, caller, rng, suffix="support-tone-v2", steps=150)
    waiting = _queued(session, caller, suffix="sql-helper")
    paused = _queued(session, caller, suffix="legal-summaries")
    jobs.pause(session, caller, paused.id)
    for age, job in enumerate((paused, waiting, running, failed, router, support)):
        job.created_at = func.clock_timestamp() - timedelta(hours=age * age * 3, minutes=4)
    session.flush()
    return [support, router, failed, running, waiting, paused]


def uploads(session: orm.Session, caller: Caller, storage: Storage) -> list[File]:
    """A file that is valid, and one with problems."""
    good = "\n".join(make.chat_line(question, answer) for question, answer in _SUPPORT * 40)
    wrong = '{"messages": []}', '{"messages": [{"role": "user"', "[1, 2]"
    bad = "\n".join([*(make.chat_line(*pair) for pair in _SUPPORT), *wrong])
    named = ("support-chats.jsonl", good), ("ticket-export.jsonl", bad)
    return [uploaded(session, caller, storage, name, text) for name, text in named]


def uploaded(
    session: orm.Session, caller: Caller, storage: Storage, name: str, text: str, *, purpose: str = data.TO_TRAIN
) -> File:
    """A file, read and judged."""
    content, file_id = text.encode(), ids.new("file-")
    stored = storage.put(files.key_for(caller, file_id), content)
    file = files.add(session, caller, file_id=file_id, filename=name, purpose=purpose, stored=stored)
    examined(session, file, content)
    return file


def examined(session: orm.Session, file: File, content: bytes) -> None:
    """What the cpu worker finds in it."""
    examine = data.examine_evaluation if file.purpose == data.TO_EVALUATE else data.examine
    files.finish_validation(session, file.id, examine(data.split_lines([content])))


def webhook(session: orm.Session, caller: Caller) -> tuple[WebhookEndpoint, WebhookDelivery]:
    """An endpoint, and a message that it has not taken at first."""
    settings = WebhookSettings(allow_loopback=True)
    asked = EndpointCreate(url="http://127.0.0.1:9/hooks", name="Deploy on success")
    endpoint = webhooks.create(session, caller, request=asked, settings=settings)
    delivery = make.delivery(session, caller, endpoint.id)
    refused = {"at": 1_795_000_000, "status": 503, "error": "the receiver answered 503", "milliseconds": 41}
    delivery.recent_attempts = [refused, {"at": 1_795_000_030, "status": 200, "error": None, "milliseconds": 38}]
    delivery.attempts, delivery.last_status, delivery.delivered_at = 2, 200, func.clock_timestamp()
    session.flush()
    session.refresh(delivery)
    return endpoint, delivery


def service(session: orm.Session) -> None:
    """Who works in the installation, as the relay sees it."""
    held = {"slots": 12, "memory": 140}
    beat = Heartbeat(engine_id="engine-a", url="http://x", base=make.TINY, base_digest="d", running=3, waiting=0, adapters=held)
    engines.record(session, beat)
    works = ("relay@a", ()), ("cpu@a", ("cpu",)), ("train@b", ("train.24",)), ("train@c", ("train.24", "train.48"))
    for name, queues in works:
        processes.record(session, name, kind=name.partition("@")[0], queues=queues, broker_seconds=1)
    standing.keep(session, standing.read(session, engine_timeout_seconds=60))


def measure(session: orm.Session, job: Job, rng: random.Random, *, steps: int, of: int, final: float) -> None:
    """Events of so many steps: a loss that falls and is never quite still, an evaluation at each tenth."""
    for event in _measured(rng, steps=steps, of=of, final=final):
        events.record(session, job, event)
    job.step = steps


def _measured(rng: random.Random, *, steps: int, of: int, final: float) -> Iterator[Stepped | Evaluated]:
    for step in range(1, steps + 1):
        fell = final + (2.6 - final) * math.exp(-5 * step / of)
        rate = 2e-4 * min(1, step / (of / 20)) * (1 + math.cos(math.pi * step / of)) / 2
        yield Stepped(
            step=step,
            total_steps=of,
            train_loss=max(0.01, fell + rng.gauss(0, 0.06)),
            train_mean_token_accuracy=1 - fell / 4,
            learning_rate=rate,
            grad_norm=0.4 + rng.random() / 5,
            tokens=2048,
            labelled_tokens=900,
            tokens_left=2048 * (of - step),
            tokens_per_second=5200 + rng.gauss(0, 120),
        )
        if step % max(1, of // 10) == 0:
            yield Evaluated(step=step, valid_loss=fell + 0.05 + step / of / 40, valid_mean_token_accuracy=1 - fell / 4)


def evaluation(session: orm.Session, caller: Caller, storage: Storage, models: list[str]) -> Evaluation:
    """Of two models on a few rows, one of them better, judged and over."""
    rng = random.Random(9)
    held_back = "\n".join(make.chat_line(*pair) for pair in _SUPPORT)
    file = uploaded(session, caller, storage, "held-back-chats.jsonl", held_back, purpose=data.TO_EVALUATE)
    grader = {"type": "text_similarity", "name": "likeness", "input": "a", "reference": "b", "evaluation_metric": "bleu"}
    asked = {"name": "Support, held back", "file": file.id, "models": models, "graders": [grader]}
    request = EvaluationCreate.model_validate(asked)
    made = evaluations.create(session, caller, catalog.load(), request=request, judges=(), settings=EvaluationSettings())
    made.lease_owner, made.lease_expires_at, made.attempt = "worker", func.clock_timestamp() + timedelta(hours=1), 1
    made.state, made.rows, made.started_at = EvaluationState.RUNNING, len(_SUPPORT), func.clock_timestamp()
    session.flush()
    lease = evaluation_leases.Lease(made.id, 1, "worker")
    for position in range(len(_SUPPORT) * len(models)):
        line, place = divmod(position, len(models))
        answer = Whole(_SUPPORT[line][1] if place else "I do not know.", "stop", 30, 12)
        at = {"position": position, "line": line + 1}
        evaluation_leases.record_answer(session, lease, **at, model=models[place], answer=answer)
        grade = {"score": min(1.0, 0.2 + 0.6 * place + rng.random() / 5), "errors": {}}
        evaluation_leases.record_grades(session, lease, position=position, grades={"likeness": grade})
    samples = session.scalars(select(EvaluationSample).where(EvaluationSample.evaluation_id == made.id)).all()
    evaluation_leases.finish(session, lease, results=results.of(samples, models=models, graders=["likeness"], seed=0))
    session.flush()
    session.refresh(made)
    return made


def _queued(session: orm.Session, caller: Caller, **asked: object) -> Job:
    asked = {"training": {"validation_split": 2}} | asked
    return make.queued_job(session, caller, **asked)


def _claimed(session: orm.Session, caller: Caller, **asked: object) -> tuple[Job, Lease]:
    job = _queued(session, caller, **asked)
    lease = make.claim(session, job)
    job.plan = {**(job.plan or {}), "total_steps": STEPS, "predicted_peak_bytes": 18.4 * GIB, "tier": "24"}
    return job, lease


def _running(session: orm.Session, caller: Caller, rng: random.Random, *, steps: int, **asked: object) -> Job:
    job, lease = _claimed(session, caller, **asked)
    measure(session, job, rng, steps=steps, of=STEPS, final=0.35)
    make.checkpoint(session, lease, step=96, metrics={"valid_loss": 0.62})
    job.lease_expires_at = func.clock_timestamp() + timedelta(days=1)
    job.estimated_finish_at = func.clock_timestamp() + timedelta(minutes=14)
    return job


def _finished(
    session: orm.Session, caller: Caller, rng: random.Random, trained_on: File, *, final: float, **asked: object
) -> Job:
    job, lease = _claimed(session, caller, training_file=trained_on, **asked)
    measure(session, job, rng, steps=STEPS, of=STEPS, final=final)
    for step in (STEPS // 2, STEPS):
        make.checkpoint(
            session, lease, step=step, metrics={"train_loss": final, "valid_loss": final + 0.07 + (STEPS - step) / 400}
        )
    events.record(session, job, _examined(final))
    make.complete(session, lease, metrics={"valid_loss": final + 0.07})
    job.trained_tokens = 2048 * STEPS
    job.plan = {**(job.plan or {}), "measured_peak_bytes": round(17.9 * GIB)}
    return job


def _examined(final: float) -> Examined:
    def row(line: int, loss: float, base_loss: float, *reasons: Reason) -> ExaminedExample:
        accuracy = {"token_accuracy": 1 - loss / 4, "base_token_accuracy": 1 - base_loss / 4}
        return ExaminedExample(
            split="training", line=line, tokens=31, loss=loss, base_loss=base_loss, **accuracy, reasons=reasons
        )

    rows = row(2, final + 1.4, final + 0.9, "worse_than_base"), row(7, final + 1.1, 2.4), row(3, final + 0.8, 2.2, "outlier")
    return Examined(
        held_out=HeldOut(
            examples=24,
            tokens=610,
            base=Scores(loss=2.31, mean_token_accuracy=0.52),
            adapter=Scores(loss=final + 0.07, mean_token_accuracy=0.87),
        ),
        training_examples=96,
        training=Scores(loss=final, mean_token_accuracy=0.9),
        hardest=rows,
        suspicious=(rows[0], rows[2]),
        suspicious_count=2,
    )


def _failed(session: orm.Session, caller: Caller, **asked: object) -> Job:
    job, lease = _claimed(session, caller, **asked)
    message = "line 12 of the training file has no assistant message to learn from; add one, or take the line out"
    leases.fail(session, lease, code="invalid_training_file", message=message, param="training_file")
    return job
