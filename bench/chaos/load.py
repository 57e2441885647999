"""Customers: they upload, train, halt, cancel and chat all the while, and write down what they were told."""

import hashlib
import json
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
from openai import APIConnectionError, APIStatusError, NotFoundError, OpenAI
from openai.types.fine_tuning import FineTuningJob

from bench.chaos.house import BASE, House
from bench.chaos.ledger import Ledger

FILES_KEPT, UNFINISHED_JOBS = 20, 6
EPOCHS = (4, 8, 16)  # of ten steps of a tenth of a second
CANCELLED_SHARE, PAUSED_SHARE, KEYED_SHARE, IN_PARTS_SHARE = 0.1, 0.2, 0.5, 0.3
PAUSE_SECONDS = 0.3
TERMINAL = ("succeeded", "failed", "cancelled")


class Customers:
    """A thread for each thing that they do. `riddles` are answers that no customer could make sense of."""

    def __init__(self, house: House, ledger: Ledger, *, seed: int, pause_seconds: float = PAUSE_SECONDS) -> None:
        self._pause_seconds = pause_seconds
        self._house, self._ledger = house, ledger
        self._rng = random.Random(seed)
        self._is_over = threading.Event()
        deleted = {entry["id"] for entry in ledger.all("deleting")}
        self._files: list[str] = [entry["id"] for entry in ledger.all("file") if entry["id"] not in deleted]
        self._watched: set[str] = {entry["id"] for entry in ledger.all("job")} - {entry["id"] for entry in ledger.all("ended")}
        self._disturbed = deque[str]()

    @contextmanager
    def busy(self) -> Iterator[None]:
        work = (self._upload, self._create, self._disturb, self._watch, self._follow, self._chat, self._read, self._forget)
        threads = [threading.Thread(target=self._repeat, args=(one,), name=one.__name__, daemon=True) for one in work]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join()

    def _repeat(self, work: Callable[[OpenAI], None]) -> None:
        with self._house.client() as client:
            while not self._is_over.wait(self._pause_seconds):
                try:
                    work(client)
                except Exception as error:
                    self._note_failure(work.__name__, error)

    def _note_failure(self, what: str, error: Exception) -> None:
        """Outages may be told as such, in the envelope; all else is a riddle."""
        match error:
            case APIConnectionError():
                is_told = True
            case APIStatusError():
                is_told = (error.status_code in (429, 503) and bool(error.code)) or error.code == "engine_failed"
            case _:
                is_told = False
        self._ledger.note("refused" if is_told else "riddle", what=what, error=f"{type(error).__name__}: {error}"[:500])

    def _upload(self, client: OpenAI) -> None:
        if len(self._files) > FILES_KEPT:
            return
        rows = [self._row() for _ in range(self._rng.randint(8, 60))]
        content = "\n".join(rows).encode()
        if self._rng.random() < IN_PARTS_SHARE:
            file_id = self._upload_in_parts(client, content)
        else:
            file_id = client.files.create(file=("train.jsonl", content), purpose="fine-tune").id
        self._ledger.note("file", id=file_id, sha256=hashlib.sha256(content).hexdigest())
        self._files.append(file_id)

    def _upload_in_parts(self, client: OpenAI, content: bytes) -> str:
        upload = client.uploads.upload_file_chunked(
            file=content,
            filename="train.jsonl",
            bytes=len(content),
            mime_type="application/jsonl",
            purpose="fine-tune",
            part_size=len(content) // 3 + 1,
        )
        assert upload.file is not None
        return upload.file.id

    def _row(self) -> str:
        messages = [{"role": "user", "content": uuid.uuid4().hex}, {"role": "assistant", "content": uuid.uuid4().hex[:8]}]
        return json.dumps({"messages": messages})

    def _create(self, client: OpenAI) -> None:
        """With a key, asked for until there is an answer, and then once more. Without one, the SDK's own tries are trusted."""
        if len(self._watched) >= UNFINISHED_JOBS or not self._files:
            return
        mark, is_keyed = uuid.uuid4().hex, self._rng.random() < KEYED_SHARE
        create = self._creation(client, mark, is_keyed=is_keyed)
        self._ledger.note("asked", mark=mark)
        job = self._until_answered(create) if is_keyed else create()
        if job is None:
            return
        self._ledger.note("job", id=job.id, mark=mark, is_keyed=is_keyed)
        self._watched.add(job.id)
        if is_keyed and (again := self._until_answered(create)) is not None and again.id != job.id:
            self._ledger.note("riddle", what="idempotency", error=f"{job.id} and {again.id} for one key")
        self._disturbed.append(job.id)

    def _creation(self, client: OpenAI, mark: str, *, is_keyed: bool) -> Callable[[], FineTuningJob]:
        training_file, epochs, seed = self._rng.choice(self._files), self._rng.choice(EPOCHS), self._rng.randrange(1000)
        headers = {"Idempotency-Key": mark} if is_keyed else {}

        def create() -> FineTuningJob:
            return client.fine_tuning.jobs.create(
                model=BASE,
                training_file=training_file,
                seed=seed,
                metadata={"mark": mark},
                hyperparameters={"n_epochs": epochs, "batch_size": 4},
                extra_body={"training": {"checkpoint_every_steps": 5}},
                extra_headers=headers,
            )

        return create

    def _until_answered(self, create: Callable[[], FineTuningJob]) -> FineTuningJob | None:
        while not self._is_over.is_set():
            try:
                return create()
            except (APIConnectionError, APIStatusError) as error:
                if isinstance(error, APIStatusError) and error.status_code < 500 and error.status_code != 429:
                    raise
                time.sleep(PAUSE_SECONDS)
        return None

    def _disturb(self, client: OpenAI) -> None:
        if not self._disturbed:
            return
        job_id, drawn = self._disturbed.popleft(), self._rng.random()
        if drawn < CANCELLED_SHARE:
            time.sleep(self._rng.uniform(0, 5))
            with _unless_it_has_ended():
                client.fine_tuning.jobs.cancel(job_id)
                self._ledger.note("cancelled", id=job_id)
        elif drawn < CANCELLED_SHARE + PAUSED_SHARE:
            with _unless_it_has_ended():
                client.fine_tuning.jobs.pause(job_id)
                time.sleep(self._rng.uniform(0, 2))
                self._resume(client, job_id)

    def _resume(self, client: OpenAI, job_id: str) -> None:
        """A job that its owner has halted must not wait for ever for a customer who met an outage."""
        while True:
            try:
                client.fine_tuning.jobs.resume(job_id)
                return
            except APIStatusError as error:
                if error.status_code == 400:  # it has ended meanwhile
                    return
            except APIConnectionError:
                pass
            time.sleep(PAUSE_SECONDS)

    def _watch(self, client: OpenAI) -> None:
        for job_id in list(self._watched):
            job = client.fine_tuning.jobs.retrieve(job_id)
            if job.status in TERMINAL:
                self._ledger.note("ended", id=job.id, status=job.status)
                self._watched.discard(job.id)

    def _follow(self, client: OpenAI) -> None:
        """A job's events as a stream, from the first to the last, by a client who comes back after every break."""
        if not self._watched:
            return
        job_id, cursor, told, is_done = self._rng.choice(sorted(self._watched)), "", list[int](), False
        url, headers = f"{client.base_url}fine_tuning/jobs/{job_id}/events?stream=true", client.auth_headers
        while not is_done and not self._is_over.is_set():
            try:
                with httpx.stream("GET", url, headers={**headers, "Last-Event-ID": cursor}, timeout=60) as answer:
                    for line in answer.iter_lines():
                        name, _, value = line.partition(": ")
                        if name == "id":
                            cursor = value
                        elif name == "data" and value != "[DONE]":
                            told.append(json.loads(value).get("sequence", -1))
                        is_done = value == "[DONE]"
                        if is_done or self._is_over.is_set():
                            break
            except httpx.TransportError:
                time.sleep(PAUSE_SECONDS)
        if told != list(range(1, len(told) + 1)):
            self._ledger.note("riddle", what="_follow", error=f"{job_id} told {told}")
        self._ledger.note("followed", id=job_id, count=len(told), is_done=is_done)

    def _chat(self, client: OpenAI) -> None:
        question = {"role": "user", "content": f"What comes after {self._rng.randrange(1000)}?"}
        answer = client.chat.completions.create(model=BASE, messages=[question], max_tokens=4)  # type: ignore[list-item]
        assert answer.choices[0].finish_reason, answer
        self._ledger.note("chat", id=answer.id)

    def _forget(self, client: OpenAI) -> None:
        """Now and then a file that no job is to be made of any more."""
        if len(self._files) < FILES_KEPT:
            return
        file_id = self._files.pop(0)
        self._ledger.note("deleting", id=file_id)
        try:
            client.files.delete(file_id)
        except APIStatusError as error:
            if error.code not in ("file_in_use", "file_not_found"):  # the second: the first answer was lost on its way
                raise

    def _read(self, client: OpenAI) -> None:
        known = [entry for entry in self._ledger.all("file") if entry["id"] in self._files]
        if not known:
            return
        file = self._rng.choice(known)
        try:
            content = client.files.content(file["id"]).read()
        except NotFoundError:
            if file["id"] in self._files:
                raise
            return  # it was just deleted
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            self._ledger.note("riddle", what="read", error=f"{file['id']} is not what was uploaded")


@contextmanager
def _unless_it_has_ended() -> Iterator[None]:
    """A job that is over cannot be stopped any more, and says so."""
    try:
        yield
    except APIStatusError as error:
        if error.code != "illegal_state":
            raise
