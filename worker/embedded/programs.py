"""Our own processes, as data: what is run, which secrets it gets, how long it may take to stop."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from app.core.settings import PREFIX, Settings
from app.core.spec import USUAL
from worker.embedded import environment
from worker.embedded.processes import Program
from worker.embedded.state import Ports
from worker.train import celery_arguments

WORKER_GRACE_SECONDS = 20.0
# where our packages lie: run from there, `-m worker.relay` is ours whatever the user's folder holds
CODE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Process:
    """Arguments for our own Python, and the secrets it needs, named as in `environment.of`. `variables` are its own settings."""

    name: str
    arguments: tuple[str, ...]
    secrets: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    grace_seconds: float = WORKER_GRACE_SECONDS


Processes = Callable[[Settings, str, int], tuple[Process, ...]]


def service(settings: Settings, host: str, port: int) -> tuple[Process, ...]:
    """What makes up Tunesmith, with its API on `host` and `port`."""
    work = ("DATABASE__SYSTEM_URL", "STORAGE", "BROKER_URL")
    trackers = ("WANDB", "MLFLOW")
    serve = ("DATABASE__API_URL", "STORAGE", "KEY_PEPPER", "ENGINE_TOKEN", "METRICS__TOKEN", *trackers)
    # a client that never reads would else hold it until it is killed, and with it the usage that is yet to be written down
    uvicorn = ("-m", "uvicorn", "app.main:create_app", "--factory", "--no-access-log", "--timeout-graceful-shutdown", "8")
    return (
        Process("api", (*uvicorn, "--host", host, "--port", str(port)), serve, grace_seconds=15),
        Process("relay", ("-m", "worker.relay"), (*work, "ENGINE_TOKEN", *trackers)),
        Process("cpu", ("-m", "celery", "-A", "worker.celery", *celery_arguments("cpu", "cpu")), (*work, "ENGINE_TOKEN")),
        Process("train", ("-m", "worker.train"), work),
        *_engines(settings),
    )


def _engines(settings: Settings) -> Iterator[Process]:
    """One for each way in which jobs may have their base held. The first listens where it is told to, the others anywhere."""
    first, *others = sorted(settings.training.quantizations, key=lambda quantization: (quantization != USUAL, quantization))
    yield _engine(first)
    yield from (_engine(quantization, port="0") for quantization in others)


def _engine(quantization: str, **changes: str) -> Process:
    variables = {f"{PREFIX}INFERENCE__{name.upper()}": value for name, value in {"quantization": quantization, **changes}.items()}
    name = "engine" if quantization == USUAL else f"engine-{quantization}"
    return Process(name, ("-m", "worker.inference.server"), ("STORAGE", "ENGINE_TOKEN", "METRICS__TOKEN"), variables)


def as_program(process: Process, settings: Settings, ports: Ports) -> Program:
    metrics = {f"{PREFIX}METRICS__PORT": str(getattr(ports, process.name, 0))}  # API and engines have one port for everything
    return Program(
        name=process.name,
        command=(sys.executable, *process.arguments),
        environment=environment.of(settings, secrets=process.secrets) | metrics | process.variables,
        cwd=CODE,
        grace_seconds=process.grace_seconds,
    )
