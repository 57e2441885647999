"""What is done to the service, and how long it takes to be whole again."""

import contextlib
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import psutil
import redis

from bench.chaos.house import LEASE_SECONDS, House, Stuck, eventually, with_children
from bench.chaos.proxy import Weather

FROZEN_SECONDS = 2 * LEASE_SECONDS
WEATHER_SECONDS = (2.0, 6.0)
RECOVERY_SECONDS = 90.0
FROZEN_SHARE, FLUSHED_SHARE = 0.25, 0.5
VICTIMS = {"trainer": 27, "train": 20, "cpu": 3, "engine": 2, "api": 15, "relay": 10, "valkey": 7, "postgres": 4, "s3": 4}
WEATHERS = {"postgres": 3, "valkey": 3, "s3": 2}


@dataclass(frozen=True)
class Struck:
    """A fault that is over: seconds from its end until what it struck works again, and jobs it struck go on."""

    fault: str
    service_seconds: float
    job_seconds: float | None = None


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Callable[[House, random.Random], Struck] = field(repr=False)


def draw(rng: random.Random) -> Fault:
    """The next, by the weights above."""
    weights = {("process", name): weight for name, weight in VICTIMS.items()}
    weights |= {("weather", name): weight for name, weight in WEATHERS.items()}
    (kind, name), *_ = rng.choices(list(weights), list(weights.values()))
    if kind == "weather":
        weather = rng.choice(["reset", Weather.LATE, Weather.SLOW, Weather.BLACK_HOLE])
        return Fault(f"{name}: {weather}", partial(_under_weather, name, str(weather)))
    if name == "valkey" and rng.random() < FLUSHED_SHARE:
        return Fault("valkey: FLUSHALL", _flushed)
    if name in ("trainer", "train", "relay", "api", "cpu") and rng.random() < FROZEN_SHARE:
        return Fault(f"{name}: SIGSTOP", partial(_frozen, name))
    return Fault(f"{name}: SIGKILL", partial(killed, name))


def killed(name: str, house: House, rng: random.Random) -> Struck:
    found = house.processes(name)
    if not found:
        return Struck(f"{name}: SIGKILL", 0.0)
    victim, running = rng.choice(found), _running(house) if name in ("trainer", "train") else []
    # a server dies with all its processes, as of a power cut; of a worker that dies its trainers must die by themselves
    for process in with_children([victim]) if name in ("postgres", "valkey", "s3") else [victim]:
        _send(process, signal.SIGKILL)
    return _recovered(f"{name}: SIGKILL", house, running)


def _frozen(name: str, house: House, rng: random.Random) -> Struck:
    """Longer than its lease; then it goes on as if nothing had been, and must find out that it holds nothing any more."""
    found = house.processes(name)
    if not found:
        return Struck(f"{name}: SIGSTOP", 0.0)
    victim, running = rng.choice(found), _running(house) if name in ("trainer", "train") else []
    _send(victim, signal.SIGSTOP)
    time.sleep(FROZEN_SECONDS)
    _send(victim, signal.SIGCONT)
    return _recovered(f"{name}: SIGSTOP", house, running if name == "train" else [])


def _flushed(house: House, _: random.Random) -> Struck:
    with redis.Redis.from_url(house.valkey_url) as client:
        client.flushall()
    return _recovered("valkey: FLUSHALL", house, [])


def _under_weather(name: str, weather: str, house: House, rng: random.Random) -> Struck:
    proxy = house.proxies[name]
    if weather == "reset":
        proxy.reset()
    else:
        proxy.weather = Weather(weather)
        time.sleep(rng.uniform(*WEATHER_SECONDS))
        proxy.clear()
    return _recovered(f"{name}: {weather}", house, [])


def _recovered(fault: str, house: House, running: list[dict[str, Any]]) -> Struck:
    """Raises Stuck."""
    began_at = time.monotonic()
    eventually(lambda: _is_whole(house), f"the service is whole after {fault}", seconds=RECOVERY_SECONDS)
    service_seconds = time.monotonic() - began_at
    if not running:
        return Struck(fault, service_seconds)
    # of those that ran, whoever was struck is taken by a worker again, or has ended; the others go on
    eventually(lambda: _have_gone_on(house, running), f"jobs go on after {fault}", seconds=RECOVERY_SECONDS)
    return Struck(fault, service_seconds, time.monotonic() - began_at)


def _is_whole(house: House) -> bool:
    """All processes are there, and the API says that it is ready."""
    if not all(house.processes(name) for name in ("api", "relay", "cpu", "engine", "valkey", "postgres", "s3")):
        return False
    if len(house.processes("train")) < 2:
        return False
    try:
        return httpx.get(f"{house.base_url.removesuffix('/v1')}/readyz", timeout=10, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _running(house: House) -> list[dict[str, Any]]:
    return house.rows("SELECT id, attempt, event_count FROM jobs WHERE state = 'running'")


def _have_gone_on(house: House, running: list[dict[str, Any]]) -> bool:
    """Each has ended or waits for its owner, or its worker has said something since."""
    said = {row["id"]: row["event_count"] for row in running}
    now = house.rows("SELECT id, state, event_count, attempt_step FROM jobs WHERE id = ANY(%s)", list(said))
    return all(
        row["state"] in ("succeeded", "failed", "cancelled", "paused")
        or (row["state"] == "running" and row["attempt_step"] is not None and row["event_count"] > said[row["id"]])
        for row in now
    )


def _send(process: psutil.Process, sent: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(sent)


__all__ = ["Fault", "Struck", "Stuck", "draw"]
