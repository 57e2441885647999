"""Runs one claimed job: feeds a trainer process, keeps the lease, uploads what comes, ends the job.

Everything said about the job goes through app.jobs.leases, which refuses a worker that no longer holds it.
"""

import contextvars
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import structlog
from sqlalchemy import orm

from app import db
from app.adapters import service as adapters
from app.core import checkpoints, crash, events, manifest, tracing
from app.core.engine import AdapterRef
from app.core.errors import AppError, NotFound, Unavailable
from app.core.settings import PREFIX
from app.core.spec import TrainSpec
from app.core.storage import Storage
from app.files.service import Result
from app.jobs import leases, results, states, tracking
from app.jobs.leases import Lease, LeaseLost
from app.jobs.preparing import Dataset, Datasets
from app.models import Desired, Job
from worker import patience, wire
from worker.heart import Heart
from worker.metrics import Outcome
from worker.model.directory import is_full
from worker.services import Services
from worker.trackers import tensorboard
from worker.trainers import POLL_SECONDS, Bench, Trainer, TrainerDied

log = structlog.get_logger()

STOP_SECONDS = 120.0  # what a trainer gets to end its micro-batch and write a checkpoint
P = ParamSpec("P")
T = TypeVar("T")
OnCheckpoint = Callable[[events.Checkpointed], None]


class StorageDamaged(RuntimeError):
    """What lies in storage is not what was put there."""


class Unwanted(Exception):
    """The job is to stop, and what the attempt has in hand is not worth keeping: it is cancelled, or has not begun to train."""


@dataclass(frozen=True)
class Assignment:
    """What the database says of a claimed job."""

    lease: Lease
    base: str
    spec: TrainSpec
    datasets: Datasets
    prefix: str
    start: AdapterRef | None  # the model that it continues
    resume_from: tuple["Kept", ...]  # the newest first
    wants_event_file: bool
    trace: str | None


@dataclass(frozen=True)
class Kept:
    """A checkpoint in storage that can be gone on from."""

    step: int
    prefix: str
    metrics: dict[str, Any]


class Supervisor:
    """One worker's jobs, one at a time."""

    def __init__(self, to: Services, *, owner: str) -> None:
        self._to, self._owner = to, owner
        self._bench = Bench(to.settings)
        self._is_draining = threading.Event()

    def warm_up(self) -> None:
        self._bench.warm_up()

    def drain(self) -> None:
        """Let the running job checkpoint and go back to the queue, and take no other."""
        self._is_draining.set()

    def close(self) -> None:
        self._bench.close()

    def run_all(self, queue: str) -> None:
        """Claim and run jobs of this queue until none is left."""
        settings = self._to.settings.leases
        while not self._is_draining.is_set():
            try:
                with self._to.sessions.begin() as session:
                    lease = leases.claim(session, queue, owner=self._owner, settings=settings)
            except db.OUTAGE:
                log.warning("look_postponed")  # the relay rings again when the database is back
                return
            if lease is None:
                return
            with structlog.contextvars.bound_contextvars(job_id=lease.job_id, attempt=lease.attempt):
                self._run(lease)
            if not self._is_draining.is_set():
                self._bench.warm_up()

    def _run(self, lease: Lease) -> None:
        """One attempt, whatever becomes of it: succeeded, failed, cancelled, or back in the queue."""
        log.info("job_claimed")
        crash.point("job_claimed")
        self._to.metrics.attempts_started.inc()
        outcome: Outcome = "broken"
        directory = self._to.settings.work_dir / lease.job_id
        shutil.rmtree(directory, ignore_errors=True)  # an attempt that was killed here has left its own
        try:
            # a folder for each attempt: a transfer of the last one may still hang
            outcome = _Attempt(self._to, lease, directory / f"a{lease.attempt}", self._bench, self._is_draining).run()
        except LeaseLost:
            outcome = "lease_lost"
            log.warning("lease_lost")
        except (TrainerDied, StorageDamaged, AppError) as error:
            log.warning("attempt_failed", error=str(error))
            self._release(lease, reason=str(error), is_death=isinstance(error, TrainerDied))
        except OSError as error:  # of its own files, or of its trainer's
            self._release_for_lack_of_files(lease, error)
        except db.OUTAGE:
            outcome = "database_lost"
            log.warning("database_lost")  # the lease runs out by itself, and the reaper gives the job to another
        finally:
            self._to.metrics.attempts_ended.labels(outcome).inc()
            shutil.rmtree(directory, ignore_errors=True)

    def _release_for_lack_of_files(self, lease: Lease, error: OSError) -> None:
        """Paths are for the operator; the job's owner is told the setting's name."""
        work_dir, path = self._to.settings.work_dir, Path(error.filename or self._to.settings.work_dir)
        if not is_full(error):
            log.error("files_failed", path=str(path), error=str(error))
            self._release(lease, reason=f"the worker cannot use its files ({type(error).__name__})")
            return
        setting = f"{PREFIX}WORK_DIR" if path.is_relative_to(work_dir) else f"{PREFIX}CACHE_DIR"
        log.error("disk_full", path=str(path), setting=setting)
        reason = f"the disk under the worker's {setting} is full, and its operator has to free space there"
        self._release(lease, reason=reason, code=events.DISK_FULL)

    def _release(self, lease: Lease, *, reason: str, code: str | None = None, is_death: bool = False) -> None:
        settings, said = self._to.settings.leases, f"The attempt broke off: {reason}"
        try:
            with self._to.sessions.begin() as session:
                leases.release(session, lease, reason=said, code=code, is_death=is_death, settings=settings)
            crash.point("attempt_released")
        except (LeaseLost, *db.OUTAGE) as error:
            log.warning("release_failed", error=type(error).__name__)


class _Attempt:
    """One attempt at one job, from download to the last word."""

    def __init__(self, to: Services, lease: Lease, directory: Path, bench: Bench, is_draining: threading.Event) -> None:
        self._to, self._lease, self._directory, self._bench = to, lease, directory, bench
        self._is_draining = is_draining
        self._heart = Heart(to.sessions, lease, to.settings.leases)
        self._transfers = ThreadPoolExecutor(1, thread_name_prefix="transfer")

    def run(self) -> Outcome:
        """How it ended. Raises what leaves the job to others."""
        with self._to.sessions.begin() as session:
            assignment = _assignment(session, self._lease)
        job_id, number = self._lease.job_id, self._lease.attempt
        with tracing.span("attempt", parent=assignment.trace, job_id=job_id, attempt=number) as span, self._heart:
            outcome = self._run(assignment)
            span.set(outcome=outcome)
        return outcome

    def _run(self, assignment: Assignment) -> Outcome:
        try:
            job = self._awaited(self._transfer(self._fetch, assignment))
            return self._end(self._trained(job, assignment), assignment)
        except Unwanted:
            return self._stop()
        finally:
            self._transfers.shutdown(wait=False, cancel_futures=True)  # what is left nobody wants, or another worker has

    def _transfer(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """To or from storage, in turn, in a thread of its own: a transfer that hangs keeps nobody from hearing a cancel."""
        return self._transfers.submit(contextvars.copy_context().run, partial(work, *args, **kwargs))

    def _awaited(self, transfer: "Future[T]") -> T:
        """Raises what it raises, and what `_check` raises."""
        while futures.wait([transfer], timeout=POLL_SECONDS).not_done:
            self._check()
        return transfer.result()

    def _fetch(self, assignment: Assignment) -> wire.TrainerJob:
        with tracing.span("fetch"):
            job = self._patiently(lambda: _fetch_data(self._to, assignment, self._directory))
            self._fetch_checkpoint(assignment, job.checkpoints_dir)
        crash.point("data_fetched")
        return job

    def _fetch_checkpoint(self, assignment: Assignment, into: Path) -> None:
        """The newest that is in storage as it was put there; and the best, where that is to be published."""
        known = {kept.step: kept for kept in assignment.resume_from}
        newest = next((step for step, kept in known.items() if self._is_fetched(kept, into)), None)
        if newest is None or assignment.spec.publish != "best":
            return
        best = checkpoints.best({step: kept.metrics for step, kept in known.items()}, newest=newest)
        if best is not None and best != newest:
            self._is_fetched(known[best], into)

    def _is_fetched(self, kept: Kept, into: Path) -> bool:
        """False once it has been said why not."""
        directory = into / f"step-{kept.step}"
        try:
            self._patiently(partial(_download_checkpoint, self._to.storage, kept.prefix, directory))
        except (manifest.Damaged, NotFound) as error:
            shutil.rmtree(directory, ignore_errors=True)
            log.error("checkpoint_damaged", prefix=kept.prefix, reason=str(error))
            self._heart.say(events.Noted(level="warn", message=f"The checkpoint of step {kept.step} is not used: {error}."))
            return False
        return True

    def _trained(self, job: wire.TrainerJob, assignment: Assignment) -> events.Event:
        """The last word of the job's trainer, once the checkpoints are in storage that it has left."""
        uploads: list[Future[None]] = []
        try:
            return self._train(job, lambda event: uploads.append(self._transfer(self._keep_checkpoint, assignment, event)))
        finally:
            self._settle(uploads)

    def _settle(self, uploads: "list[Future[None]]") -> None:
        """A checkpoint that could not be kept costs a resume, not the run."""
        for upload in uploads:
            try:
                self._awaited(upload)
            except (Unavailable, *db.OUTAGE, StorageDamaged) as error:
                log.warning("checkpoint_not_kept", error=str(error))

    def _train(self, job: wire.TrainerJob, keep: OnCheckpoint) -> events.Event:
        """The last word of its trainer. One that runs out of memory is followed by a new process with half the tokens at once."""
        with tracing.span("train", micro_batch_tokens=job.micro_batch_tokens) as span:
            trainer = self._bench.take(self._check_before_training)
            try:
                trainer.start(job)
                last = self._follow(trainer, keep)
                span.set(ended=last.kind)
            finally:
                trainer.kill()
        if not (isinstance(last, events.Failed) and last.code == events.OUT_OF_MEMORY):
            return last
        smaller = job.smaller()
        if smaller is None:
            message = f"a micro-batch of {job.micro_batch_tokens} tokens does not fit; lower max_seq_length or the rank"
            return events.Failed(code=events.OUT_OF_MEMORY, message=message, is_user_error=True)
        message = f"Out of memory: going on with {smaller.micro_batch_tokens} tokens at once, more slowly, the same steps."
        self._heart.say(events.Noted(level="warn", message=message))
        return self._train(smaller, keep)

    def _follow(self, trainer: Trainer, keep: OnCheckpoint) -> events.Event:
        """Pass the trainer's words on until its last one. Checkpoints are uploaded beside the training."""
        stop_by: float | None = None
        check, part, began_at = self._check_before_training, "load", time.perf_counter()
        try:
            while True:
                event = trainer.next_event(POLL_SECONDS)
                if event is not None:
                    self._to.metrics.note(event)
                check()
                match event:
                    case events.Started():
                        self._heart.say(event)
                        check, part, began_at = self._check, "steps", _told(part, began_at)
                    case events.Finished() | events.Stopped() | events.Failed():
                        return event
                    case events.Checkpointed():
                        keep(event)
                    case None:
                        pass
                    case _:
                        self._heart.say(event)
                if stop_by is None and self._is_to_stop:
                    trainer.stop()
                    stop_by = time.monotonic() + STOP_SECONDS
                if stop_by is not None and time.monotonic() > stop_by:
                    raise TrainerDied("the trainer did not stop when it was told to")
        finally:
            _told(part, began_at)

    def _keep_checkpoint(self, assignment: Assignment, event: events.Checkpointed) -> None:
        prefix = f"{assignment.prefix}/step-{event.step}"
        local = Path(event.directory)
        crash.point("checkpoint_received")
        began_at = time.perf_counter()
        with tracing.span("checkpoint", step=event.step):
            adapter = self._upload(local / "adapter", f"{prefix}/adapter")
            crash.point("checkpoint_half_uploaded")
            self._upload(local / "state", f"{prefix}/state")
        self._to.metrics.checkpoint_seconds.observe(time.perf_counter() - began_at)
        crash.point("checkpoint_uploaded")
        shutil.rmtree(local)
        self._flush()  # whoever goes on from here finds the metrics up to here
        self._say(
            lambda session: leases.checkpoint(
                session, self._lease, step=event.step, prefix=prefix, manifest=adapter, metrics=event.metrics
            )
        )
        crash.point("checkpoint_committed")

    def _end(self, last: events.Event, assignment: Assignment) -> Outcome:
        match last:
            case events.Finished():
                with tracing.span("publish"):
                    self._publish(last, assignment)
                return "succeeded"
            case events.Failed(is_user_error=True):
                self._flush()
                self._say(lambda session: leases.fail(session, self._lease, code=last.code, message=last.message))
                return "refused"
            case events.Failed(code=events.DISK_FULL):
                written = last.path or str(self._to.settings.cache_dir)  # what it does not name is compiled there
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), written)
            case events.Failed():
                raise TrainerDied(last.message)
            case _:
                return self._stop()

    def _stop(self) -> Outcome:
        self._flush()
        self._say(lambda session: leases.stop(session, self._lease))
        return "stopped"

    def _publish(self, finished: events.Finished, assignment: Assignment) -> None:
        """Upload, verify, and let the job succeed: model, result file and webhooks appear in one transaction."""
        prefix = f"{assignment.prefix}/adapter"
        adapter = self._awaited(self._transfer(self._upload, Path(finished.directory), prefix))
        crash.point("adapter_uploaded")
        self._flush()  # the last metrics belong into the result file
        files = [
            ("metrics.csv", self._say(lambda session: results.csv_of(session, self._lease.job_id))),
            ("examples.csv", Path(finished.table).read_bytes()),
        ]
        if assignment.wants_event_file:
            points, config = self._say(lambda session: tracking.whole(session, self._lease.job_id))
            files.append((tensorboard.NAME, tensorboard.event_file(points, config)))
        stored = [self._awaited(self._transfer(self._result, assignment, name, content)) for name, content in files]
        crash.point("results_stored")
        self._say(
            lambda session: leases.complete(
                session,
                self._lease,
                prefix=prefix,
                manifest=adapter,
                trained_tokens=finished.trained_tokens,
                memory=finished.memory,
                tables=stored,
            )
        )
        crash.point("job_completed")
        log.info("job_trained", peak_bytes=finished.memory.peak_bytes, measured_as=finished.memory.measured_as)

    def _result(self, assignment: Assignment, name: str, content: bytes) -> Result:
        key = f"{assignment.prefix}/{name}"
        return Result(name, key, self._patiently(lambda: self._to.storage.put(key, content)))

    def _upload(self, directory: Path, prefix: str) -> manifest.Manifest:
        return self._patiently(lambda: _upload_directory(self._to.storage, directory, prefix))

    def _say(self, words: Callable[[orm.Session], T]) -> T:
        """If an outage hides how a commit ended, saying it again finds the lease gone."""
        return patience.say(self._to.sessions, words, check=self._heart.check)

    def _flush(self) -> None:
        patience.patiently(self._heart.flush, check=self._heart.check)

    def _patiently(self, work: Callable[[], T]) -> T:
        """For as long as the lease is ours and the job is wanted. Raises what `_check` raises."""
        return patience.patiently(work, check=self._check)

    def _check(self) -> None:
        """Raises what `Heart.check` raises, and Unwanted of a cancelled job."""
        self._heart.check()
        if self._heart.wants == Desired.CANCEL:
            raise Unwanted

    def _check_before_training(self) -> None:
        """As `_check`; while there is nothing to keep, whoever wants the job to stop need not wait for a checkpoint."""
        self._check()
        if self._is_to_stop:
            raise Unwanted

    @property
    def _is_to_stop(self) -> bool:
        return self._heart.wants != Desired.RUN or self._is_draining.is_set()


def _told(part: str, since: float) -> float:
    """A part of a trainer's work is over. It has no network, so whoever hears its words makes spans of them. Returns now."""
    now = time.perf_counter()
    tracing.record(part, since, now)
    return now


def _assignment(session: orm.Session, lease: Lease) -> Assignment:
    job: Job = leases.holding(session, lease)
    return Assignment(
        lease=lease,
        base=job.base,
        spec=TrainSpec.model_validate(job.spec),
        datasets=Datasets.model_validate(job.datasets),
        prefix=f"{states.prefix_of(job)}a{lease.attempt}",
        start=adapters.find_start(session, job),
        resume_from=tuple(Kept(kept.step, kept.prefix, kept.metrics) for kept in leases.resumable_checkpoints(session, lease)),
        wants_event_file=any(one["type"] == "tensorboard" for one in job.integrations or ()),
        trace=job.trace,
    )


def _fetch_data(to: Services, assignment: Assignment, directory: Path) -> wire.TrainerJob:
    """Make the job's directory here, with its data. Raises StorageDamaged."""
    directory.mkdir(parents=True, exist_ok=True)
    datasets = assignment.datasets
    return wire.TrainerJob(
        spec=assignment.spec,
        base=to.catalog[assignment.base],
        dataset=_download(to.storage, datasets.training, directory / "training.safetensors"),
        validation=_download(to.storage, datasets.validation, directory / "validation.safetensors")
        if datasets.validation
        else None,
        start=_download_directory(to.storage, assignment.start.prefix, directory / "start") if assignment.start else None,
        output_dir=directory / "adapter",
        checkpoints_dir=directory / "checkpoints",
        handover_dir=directory / "handover",
        micro_batch_tokens=assignment.spec.micro_batch_tokens,
    )


def _download(storage: Storage, dataset: Dataset, path: Path) -> Path:
    if storage.get_file(dataset.key, path).sha256 != dataset.sha256:
        raise StorageDamaged(f"{dataset.key} differs from its digest")
    return path


def _download_checkpoint(storage: Storage, prefix: str, directory: Path) -> None:
    """Raises Damaged, NotFound."""
    _download_directory(storage, prefix, directory)
    for part in ("adapter", "state"):
        manifest.read(directory / part)


def _download_directory(storage: Storage, prefix: str, directory: Path) -> Path:
    """All there is under `prefix`, which may be nothing: whoever opens it reads its manifest. Raises NotFound."""
    directory.mkdir(parents=True, exist_ok=True)
    for key in storage.list_keys(f"{prefix}/"):
        path = directory / key.removeprefix(f"{prefix}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.get_file(key, path)
    return directory


def _upload_directory(storage: Storage, directory: Path, prefix: str) -> manifest.Manifest:
    """Every file, the manifest last. What storage took is read back and compared with the manifest. Raises StorageDamaged."""
    told = manifest.Manifest.model_validate_json((directory / manifest.NAME).read_bytes())
    for name, entry in told.files.items():
        storage.put_file(f"{prefix}/{name}", directory / name)
        if storage.sha256_of(f"{prefix}/{name}") != entry.sha256:
            raise StorageDamaged(f"{name} is not in storage as it was sent")
    storage.put(f"{prefix}/{manifest.NAME}", told.to_bytes(), content_type="application/json")
    return told
