"""`tunesmith demo`: the main job on real input, measured: tune a model, get its webhook, ask base and tuned model."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from cli.failure import Failed
from cli.options import AsJson

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import FileObject
    from openai.types.fine_tuning import FineTuningJob
    from rich.console import Console

DATA = Path(__file__).parent / "orders"
BASE = "smollm2-135m-instruct"
MIN_GAIN_POINTS, MAX_P = 30.0, 0.01
UP_SECONDS, WEBHOOK_SECONDS = 900.0, 60.0
ASKERS = 8  # questions under way at once: the engine answers them in one batch

Chat = list[dict[str, str]]


class DemoFailed(RuntimeError):
    """A stage did not do what it must."""


@dataclass
class Stages:
    """Seconds by stage, in the order they were passed."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


@dataclass(frozen=True)
class Question:
    """A held-out chat without its answer, and the one right answer."""

    prompt: Chat
    answer: Any


@dataclass(frozen=True)
class Outcome:
    """Parts of the held-out questions that were answered exactly, and whether the tuned model is better beyond doubt."""

    model: str
    base_rate: float
    tuned_rate: float
    p: float
    trained_tokens: int | None
    adapter_bytes: int

    @property
    def gain_points(self) -> float:
        return 100 * (self.tuned_rate - self.base_rate)

    @property
    def is_better(self) -> bool:
        return self.gain_points >= MIN_GAIN_POINTS and self.p < MAX_P


Keep = Annotated[bool, Option("--keep", help="Leave the stack running afterwards, until Ctrl-C.")]
DataDir = Annotated[Path | None, Option(metavar="DIR", help="Where to keep its data; by default a fresh folder.")]


def demo(keep: Keep = False, data_dir: DataDir = None, as_json: AsJson = False) -> int:
    """See the main job done on this machine.

    Start the embedded stack, tune SmolLM2-135M on 320 chats, receive the webhook, and
    compare base and tuned model. The status is 1 if the tuned model is no better.
    """
    from rich.console import Console

    try:
        from openai import OpenAI, OpenAIError
    except ImportError as error:
        raise Failed(f"{error}; `tunesmith demo` needs: pip install 'tunesmith[embedded]'") from error
    console = Console(stderr=as_json)
    data_dir = data_dir or Path(tempfile.mkdtemp(prefix="tunesmith-demo-"))
    stages = Stages()
    try:
        with _stack(data_dir, stages, console) as credentials, _Receiver() as receiver:
            client = OpenAI(base_url=credentials["base_url"], api_key=credentials["api_key"])
            outcome = _tell_story(client, receiver, stages, console)
            if as_json:
                print(json.dumps(asdict(outcome) | {"seconds": stages.seconds}), flush=True)
            if keep:
                console.print(f"The stack goes on; its key is in {data_dir}/credentials.json. Ctrl-C stops it.")
                signal.pause()
    except (DemoFailed, OpenAIError) as error:
        raise Failed(f"{error} (logs: {data_dir}/logs)") from error
    return 0 if outcome.is_better else 1


def _tell_story(client: "OpenAI", receiver: "_Receiver", stages: Stages, console: "Console") -> Outcome:
    """The way of a customer through the API, stage by stage."""
    endpoint = client.webhooks.create(name="demo", url=receiver.url, event_types=["fine_tuning.job.succeeded"])
    with stages.timed("upload"):
        training, validation = (_upload(client, DATA / name) for name in ("train.jsonl", "heldout.jsonl"))
    with stages.timed("validate"):
        for file in (training, validation):
            if (checked := client.files.wait_for_processing(file.id, poll_interval=0.2)).status != "processed":
                raise DemoFailed(f"{file.filename}: {checked.status_details}")
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=training.id,
        validation_file=validation.id,
        suffix="orders",
        seed=7,
        hyperparameters={"n_epochs": 2, "batch_size": 8},
    )
    console.print(f"Job {job.id}: tuning {BASE} on {DATA / 'train.jsonl'}")
    job = _watch(client, job, stages, console)
    tuned = str(job.fine_tuned_model)
    _first_token(client, tuned, stages)
    _webhook(client, receiver, endpoint.signing_secret, job.id, stages)
    questions = _questions(DATA / "heldout.jsonl")
    with stages.timed(f"ask both {len(questions)} questions"):
        of_base = _ask(client, BASE, questions, console)
        of_tuned = _ask(client, tuned, questions, console)
    outcome = _outcome(job, of_base, of_tuned, (client.models.retrieve(tuned).model_extra or {})["size_bytes"])
    _report(console, outcome, stages, len(questions))
    return outcome


@contextmanager
def _stack(data_dir: Path, stages: Stages, console: "Console") -> Iterator[dict[str, str]]:
    """`tunesmith up` as a user starts it, its lines in a file."""
    data_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(data_dir), "--port", str(_free_port())]
    console.print(f"Starting the embedded stack in {data_dir} (the first time, the base model is quantized)")
    with (data_dir / "up.log").open("wb") as log, stages.timed("start the stack"):
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        credentials = data_dir / "credentials.json"
        deadline = time.monotonic() + UP_SECONDS
        while not credentials.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise DemoFailed(f"the stack did not start; {data_dir}/up.log says why")
            time.sleep(0.2)
    try:
        yield json.loads(credentials.read_text())
    finally:
        process.terminate()
        process.wait(timeout=60)


class _Receiver:
    """A webhook receiver of the customer's own: keeps what is posted to it."""

    def __enter__(self) -> "_Receiver":
        received = self.received = list[tuple[bytes, dict[str, str]]]()
        arrived = self.arrived = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                received.append((body, {name.lower(): value for name, value in self.headers.items()}))
                self.send_response(200)
                self.end_headers()
                arrived.set()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _upload(client: "OpenAI", path: Path) -> "FileObject":
    with path.open("rb") as file:
        return client.files.create(file=file, purpose="fine-tune")


def _watch(client: "OpenAI", job: "FineTuningJob", stages: Stages, console: "Console") -> "FineTuningJob":
    """Follow the job's events to its end, with a bar for its steps."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    created, first_step, last_step, claimed = time.perf_counter(), 0.0, 0.0, 0.0
    seen = 0
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("waiting for a worker", total=None)
        while True:
            job = client.fine_tuning.jobs.retrieve(job.id)
            news = [e for e in client.fine_tuning.jobs.list_events(job.id, limit=50).data if _sequence(e) > seen]
            for event in reversed(news):
                seen = _sequence(event)
                data: Any = event.data or {}
                if "train_loss" in data:
                    last_step = time.perf_counter()
                    first_step = first_step or last_step
                    words = f"loss {data['train_loss']:.3f}  {data['tokens_per_second']:.0f} tokens/s"
                    progress.update(bar, description=words, total=data["total_steps"], completed=data["step"])
                    if not console.is_terminal and data["step"] % 10 == 0:  # a log file shows no bar
                        console.print(f"  step {data['step']}/{data['total_steps']}  {words}")
                elif event.type == "message":
                    progress.console.print(f"  {event.message}")
            if job.status == "running":
                claimed = claimed or time.perf_counter()
            if job.status in {"failed", "cancelled"}:
                raise DemoFailed(f"the job {job.status}: {job.error.message if job.error else ''}")
            if job.status == "succeeded" and not news:
                break
            time.sleep(0.5)
    ended = time.perf_counter()
    stages.seconds |= {
        "prepare and wait in the queue": claimed - created,
        "claim to first step done": first_step - claimed,
        "train": last_step - first_step,
        "publish": ended - last_step,
    }
    return job


def _sequence(event: Any) -> int:
    return int((event.model_extra or {})["sequence"])


def _first_token(client: "OpenAI", model: str, stages: Stages) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    with stages.timed("first token of the new model"):
        stream = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0, stream=True)
        next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content)
        stream.close()


def _webhook(client: "OpenAI", receiver: _Receiver, secret: str, job_id: str, stages: Stages) -> None:
    """Wait for it and verify it the way the SDK's documentation tells customers to."""
    with stages.timed("webhook, after the rest"):
        if not receiver.arrived.wait(WEBHOOK_SECONDS):
            raise DemoFailed("no webhook came")
    body, headers = receiver.received[0]
    event = client.webhooks.unwrap(body, headers, secret=secret)
    if event.type != "fine_tuning.job.succeeded" or event.data.id != job_id:
        raise DemoFailed(f"the webhook tells of something else: {event.type}")


def _questions(path: Path) -> list[Question]:
    chats = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return [Question(chat[:-1], json.loads(chat[-1]["content"])) for chat in chats]


def _ask(client: "OpenAI", model: str, questions: list[Question], console: "Console") -> list[bool]:
    """Whether each answer is exactly right: the reply must parse to the expected object."""

    def is_right(question: Question) -> bool:
        messages: Any = question.prompt
        reply = client.chat.completions.create(model=model, messages=messages, max_tokens=96, temperature=0)
        try:
            return bool(json.loads(reply.choices[0].message.content or "") == question.answer)
        except ValueError:
            return False

    with console.status(f"asking {model}"), ThreadPoolExecutor(ASKERS) as pool:
        return list(pool.map(is_right, questions))


def _outcome(job: "FineTuningJob", of_base: list[bool], of_tuned: list[bool], size_bytes: int) -> Outcome:
    from app.core import statistics

    pairs = list(zip(of_base, of_tuned, strict=True))
    p = statistics.mcnemar_p(gained=pairs.count((False, True)), lost=pairs.count((True, False)))
    base_rate, tuned_rate = (sum(answers) / len(answers) for answers in (of_base, of_tuned))
    return Outcome(str(job.fine_tuned_model), base_rate, tuned_rate, p, job.trained_tokens, size_bytes)


def _report(console: "Console", outcome: Outcome, stages: Stages, questions: int) -> None:
    from rich.table import Table

    rates = Table("model", "exact answers", title=f"{questions} held-out questions, greedy")
    rates.add_row(BASE, f"{outcome.base_rate:.0%}")
    rates.add_row(outcome.model, f"{outcome.tuned_rate:.0%}")
    times = Table("stage", "seconds", title="Time of each stage")
    for name, seconds in stages.seconds.items():
        times.add_row(name, f"{seconds:.1f}")
    console.print(rates, times)
    console.print(f"Gain {outcome.gain_points:.0f} points, McNemar p = {outcome.p:.1e}")
    console.print(f"Trained tokens {outcome.trained_tokens}, adapter {outcome.adapter_bytes / 1e6:.1f} MB")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
