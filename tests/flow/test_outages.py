"""Postgres, Valkey and S3, hung for ten seconds or killed: clear answers meanwhile, and nothing lost afterwards."""

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from bench.chaos.house import PROCESSES
from bench.chaos.machine import send
from tests import make
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from tests.flow.test_survival import begin, messages, wait_for_checkpoint, wait_for_end
from tests.stack import Stack

HUNG_SECONDS, KILLED_SECONDS = 10.0, 3.0
LONGEST_ANSWER_SECONDS = 15.0
RECOVERY_SECONDS = PATIENCE_SECONDS
EPOCHS = 9  # of 16 steps
GAP_SECONDS = 0.2  # between the requests of one client


@dataclass
class Client:
    """A thread that asks again and again, and keeps what it was told."""

    ask: Callable[[httpx.Client], None]
    told: list[str] = field(default_factory=list)
    riddles: list[str] = field(default_factory=list)

    def run(self, stack: Stack, is_over: threading.Event) -> None:
        headers = {"Authorization": f"Bearer {stack.api_key}"}
        with httpx.Client(base_url=stack.base_url, headers=headers, timeout=60) as http:
            while not is_over.wait(GAP_SECONDS):
                began_at = time.monotonic()
                try:
                    self.ask(http)
                except Riddle as riddle:
                    self.riddles.append(str(riddle))
                except httpx.HTTPError as error:
                    self.riddles.append(f"no answer: {error!r}")
                if (took_seconds := time.monotonic() - began_at) > LONGEST_ANSWER_SECONDS:
                    self.riddles.append(f"an answer took {took_seconds:.1f} s")


class Riddle(Exception):
    """An answer that is neither a success nor a 503 that says what is away."""


def understood(answer: httpx.Response) -> bool:
    """True for a success, False for a clear 503. Raises Riddle."""
    if answer.status_code == 200:
        return True
    try:
        error = answer.json()["error"]
    except ValueError:
        raise Riddle(f"{answer.status_code} {answer.text[:200]}") from None
    is_clear = set(error) == {"message", "type", "param", "code"} and error["code"] and error["message"]
    if answer.status_code != 503 or not is_clear or not answer.headers.get("retry-after", "").isdigit():
        raise Riddle(f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {error} {answer.headers}")
    return False


class Traffic:
    """Everything customers do at once."""

    def __init__(self, training_file: str) -> None:
        self._training_file = training_file
        self._count = 0
        self.uploaded: dict[str, bytes] = {}
        self.jobs: list[str] = []
        asked = (self.upload, self.create_job, self.poll, self.chat, self.stream)
        self.clients = {ask.__name__: Client(ask) for ask in asked}

    def upload(self, http: httpx.Client) -> None:
        self._count += 1
        content = make.chat_file(20) + b"\n" + make.chat_line("Which one?", str(self._count)).encode()
        answer = http.post("/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"})
        self._note("upload", answer)
        if answer.status_code == 200:
            self.uploaded[answer.json()["id"]] = content

    def create_job(self, http: httpx.Client) -> None:
        if self.jobs:  # it is trained in the end, which takes seconds
            return
        body = {"model": make.TINY, "training_file": self._training_file, "hyperparameters": {"n_epochs": 1}}
        answer = http.post("/fine_tuning/jobs", json=body)
        self._note("create_job", answer)
        if answer.status_code == 200:
            self.jobs.append(answer.json()["id"])

    def poll(self, http: httpx.Client) -> None:
        self._note("poll", http.get("/fine_tuning/jobs"))

    def chat(self, http: httpx.Client) -> None:
        self._note("chat", http.post("/chat/completions", json=said()))

    def stream(self, http: httpx.Client) -> None:
        with http.stream("POST", "/chat/completions", json={**said(), "stream": True}) as answer:
            answer.read()
        self._note("stream", answer)
        if answer.status_code == 200 and not answer.text.endswith("data: [DONE]\n\n"):
            raise Riddle(f"a stream broke off: {answer.text[-200:]!r}")

    def _note(self, client: str, answer: httpx.Response) -> None:
        code = "ok" if understood(answer) else answer.json()["error"]["code"]
        self.clients[client].told.append(code)

    @property
    def riddles(self) -> list[str]:
        return [f"{name}: {riddle}" for name, client in self.clients.items() for riddle in client.riddles]

    @contextmanager
    def flowing(self, stack: Stack) -> Iterator[None]:
        is_over = threading.Event()
        threads = [threading.Thread(target=client.run, args=(stack, is_over)) for client in self.clients.values()]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            is_over.set()
            for thread in threads:
                thread.join()

    def await_recovery(self) -> None:
        """Every client gets what it asks for again."""
        marks = {name: len(client.told) for name, client in self.clients.items() if name != "create_job"}
        give_up_at = time.monotonic() + RECOVERY_SECONDS
        while not all("ok" in self.clients[name].told[mark:] for name, mark in marks.items()):
            told = {name: self.clients[name].told[mark:] for name, mark in marks.items()}
            assert time.monotonic() < give_up_at, (told, self.riddles)
            time.sleep(0.1)


def said() -> dict[str, Any]:
    return {"model": make.TINY, "messages": [{"role": "user", "content": "What comes after 3?"}], "max_tokens": 4}


def process_of(stack: Stack, name: str) -> psutil.Process | None:
    """The one that the stack started under this name."""
    found = (child for child in stack.children(*PROCESSES[name]) if child.ppid() == stack.process.pid)
    return next(found, None)


def kill(stack: Stack, name: str) -> None:
    process = process_of(stack, name)
    assert process is not None, f"{name} does not run"
    process.kill()


def servers_of(stack: Stack, name: str) -> list[psutil.Process]:
    """The process and its children: Postgres has one for each connection."""
    found = {process for root in stack.children(*PROCESSES[name]) for process in (root, *root.children(recursive=True))}
    assert found
    return sorted(found, key=lambda process: process.create_time())


@contextmanager
def hung(stack: Stack, name: str) -> Iterator[None]:
    """Its connections stay open and are not answered: a black hole."""
    processes = servers_of(stack, name)
    try:
        _tell_all(processes, signal.SIGSTOP)
        yield
    finally:
        _tell_all(processes, signal.SIGCONT)


def _tell_all(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:  # a connection's end is its server process's
        send(process, number)


@contextmanager
def killed(stack: Stack, *names: str) -> Iterator[None]:
    """At once, with all their children; the supervisor brings them back."""
    processes = [process for name in names for process in servers_of(stack, name)]
    _tell_all(processes, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=KILLED_SECONDS)
    yield


@pytest.mark.parametrize(
    ("outage", "names"),
    [(hung, ("postgres",)), (hung, ("valkey",)), (hung, ("s3",)), (killed, ("postgres", "s3"))],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value.__name__,
)
def test_an_outage_loses_nothing_and_is_told_as_one(
    stack: Stack, client: OpenAI, outage: Callable[..., Any], names: tuple[str, ...]
) -> None:
    training = client.files.create(file=("train.jsonl", make.chat_file(8)), purpose="fine-tune")
    running = begin(client, epochs=EPOCHS)
    wait_for_checkpoint(client, running)
    traffic = Traffic(training.id)
    with traffic.flowing(stack):
        with outage(stack, *names):
            time.sleep(HUNG_SECONDS if outage is hung else KILLED_SECONDS)
        traffic.await_recovery()

    assert traffic.riddles == []
    for file_id, content in traffic.uploaded.items():
        kept = client.files.content(file_id).content
        assert hashlib.sha256(kept).digest() == hashlib.sha256(content).digest()
    ended = wait_for_end(client, running)
    assert (ended.id, ended.status) == (running.id, "succeeded"), messages(client, running)
    steps = [row.split(",")[0] for row in client.files.content(ended.result_files[0]).text.splitlines()[1:]]
    assert steps == [str(step) for step in range(1, 16 * EPOCHS + 1)]
    for job_id in traffic.jobs:
        assert wait_for_end(client, client.fine_tuning.jobs.retrieve(job_id)).status == "succeeded"


def await_ready(stack: Stack) -> None:
    """Until the API answers, which its own start precedes, and has an engine."""
    give_up_at = time.monotonic() + RECOVERY_SECONDS
    while not is_ready(stack):
        assert time.monotonic() < give_up_at, console(stack)[-3000:]
        time.sleep(0.2)


def is_ready(stack: Stack) -> bool:
    try:
        return httpx.get(f"{stack.base_url.removesuffix('/v1')}/readyz", timeout=20).status_code == 200
    except httpx.TransportError:
        return False


def console(stack: Stack) -> str:
    return (stack.data_dir / "console").read_text()


@pytest.mark.parametrize("names", [("api", "relay", "cpu", "s3"), ("train", "engine", "valkey", "postgres")], ids="-".join)
def test_every_process_can_be_killed_while_a_job_runs(stack: Stack, client: OpenAI, names: tuple[str, ...]) -> None:
    job = begin(client, epochs=EPOCHS)
    wait_for_checkpoint(client, job)
    said_before = len(console(stack))
    for name in names:
        kill(stack, name)
    for name in names:
        eventually(lambda name=name: f"{name} was ended by SIGKILL" in console(stack)[said_before:])
        eventually(lambda name=name: process_of(stack, name))
    await_ready(stack)

    assert wait_for_end(client, job).status == "succeeded", messages(client, job)
    assert client.chat.completions.create(**said()).choices


def test_a_worker_that_is_told_to_go_hands_its_job_on(stack: Stack, client: OpenAI) -> None:
    """SIGTERM: a checkpoint, back to the queue, and the next worker goes on from there. It is not counted as a failure."""
    job = begin(client, epochs=EPOCHS)
    wait_for_checkpoint(client, job)
    said_before = len(console(stack))
    for name in ("train", "api"):
        process = process_of(stack, name)
        assert process is not None
        process.terminate()
    eventually(lambda: "api was ended by SIGTERM" in console(stack)[said_before:])
    await_ready(stack)
    ended = wait_for_end(client, job)

    told = messages(client, ended)
    assert ended.status == "succeeded", told
    assert any("going down" in message for message in told), told
    assert any(message.startswith("Training resumed at step") for message in told), told
    assert not any("broke off" in message or "fallen silent" in message for message in told), told
