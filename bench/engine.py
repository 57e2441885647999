"""The serving engine as benchmarks drive it: in this process, adapters in a real S3 server; what is found and what is asked."""

import contextlib
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rivals import Rivals, random_adapter

from app.core import catalog, ids
from app.core.engine import AdapterRef, Chunk, GenerateRequest, Sampling
from app.core.render import Renderer
from app.core.settings import InferenceSettings, Settings
from app.core.storage import Storage, open_storage
from tests.inference import make
from worker.embedded import Servers
from worker.inference import native
from worker.inference.native import NativeDriver
from worker.model import base as bases
from worker.model.base import LoadedBase

BASE, RANKS, MAX_BATCH = "smollm2-135m-instruct", (16, 8), 64


@dataclass
class Report:
    """Lines as they come, and what the issue asks for at the end."""

    targets: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def told(self, name: str, value: float, unit: str = "") -> float:
        self.figures[name] = value
        print(f"{name:70} {value:10.2f} {unit}", flush=True)
        return value

    def target(self, name: str, value: float, target: float, *, at_most: bool = False) -> None:
        is_met = value <= target if at_most else value >= target
        self.targets.append({"name": name, "value": value, "target": target, "ok": is_met})

    def missed(self, name: str, target: float, reason: str) -> None:
        """Nothing could be measured."""
        self.targets.append({"name": name, "value": None, "target": target, "ok": False, "reason": reason})

    def end(self, file: Path | None) -> None:
        for target in self.targets:
            verdict = "met" if target["ok"] else "MISSED"
            value = "none" if target["value"] is None else f"{target['value']:.2f}"
            print(f"{target['name']:60} {value:>8}   target {target['target']}: {verdict}")
        if file:
            file.write_text(json.dumps({"targets": self.targets, "figures": self.figures}, indent=2) + "\n")


@dataclass(frozen=True)
class Bench:
    """What the parts share."""

    driver: NativeDriver
    renderer: Renderer
    adapters: list[AdapterRef]
    folder: Path
    report: Report
    is_quick: bool

    @property
    def prompt(self) -> list[int]:
        """Goes on counting, so that no answer ends early."""
        return self.count_to(12)

    def count_to(self, number: int) -> list[int]:
        return list(self.renderer.plain(" ".join(map(str, range(1, number + 1)))))

    def request(
        self, adapter: AdapterRef | None, *, tokens: int, tenant: str = "", prompt: Sequence[int] = ()
    ) -> GenerateRequest:
        """Of a tenant of its own, so that nothing is found in the prefix cache, unless it names one."""
        sampling = Sampling(max_tokens=tokens, temperature=0)
        return GenerateRequest(
            request_id=ids.new("req_"),
            tenant=tenant or ids.new("org_"),
            prompt=tuple(prompt or self.prompt),
            sampling=sampling,
            adapter=adapter,
        )


async def timed(driver: NativeDriver, wanted: GenerateRequest) -> list[float]:
    """Seconds from the request to each of its chunks."""
    began_at, times = time.perf_counter(), []
    async with answering(driver, wanted) as chunks:
        async for _ in chunks:
            times.append(time.perf_counter() - began_at)
    return times


@contextlib.asynccontextmanager
async def answering(driver: NativeDriver, wanted: GenerateRequest) -> AsyncIterator[AsyncIterator[Chunk]]:
    async with driver.holding(wanted) as leases, contextlib.aclosing(driver.stream(wanted, leases)) as chunks:
        yield chunks


@dataclass(frozen=True)
class Published:
    """Adapters in an S3 server that was started for them. `settings` say how to reach it; `folder` goes with it."""

    settings: Settings
    storage: Storage
    adapters: list[AdapterRef]
    folder: Path


def load_base(cache_dir: Path, dtype: torch.dtype | None = None) -> LoadedBase:
    """As an engine loads it. A fresh copy each time: drivers and PEFT change theirs."""
    return bases.load(catalog.load()[BASE], cache_dir, dtype=dtype or bases.fastest_dtype(), device="cpu", for_training=False)


@contextlib.contextmanager
def published(cache_dir: Path, count: int) -> Iterator[Published]:
    """As training writes them, with noise for what was learnt, of different ranks by turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        servers = Servers(folder).start()
        try:
            storage = open_storage(servers.settings.storage)
            made, base = list[AdapterRef](), load_base(cache_dir)
            models = [make.peft_model(load_base(cache_dir), rank=rank, seed=rank) for rank in RANKS]
            for number in range(count):
                model = models[number % len(RANKS)]
                random_adapter(model, seed=number)
                made.append(make.publish(storage, base, model, folder / f"made-{number}"))
                shutil.rmtree(folder / f"made-{number}")
            yield Published(servers.settings, storage, made, folder)
        finally:
            servers.stop()


@contextlib.contextmanager
def opened(cache_dir: Path, report: Report, *, is_quick: bool) -> Iterator[tuple[Bench, Rivals]]:
    with published(cache_dir, 24 if is_quick else 64) as made:
        settings = InferenceSettings(base=BASE, max_batch=MAX_BATCH, max_adapters=64, max_waiting_of_tenant=256)
        base = load_base(cache_dir)
        driver = native.open_driver(base, made.storage, cache_dir=made.folder, settings=settings)
        try:
            bench = Bench(driver, base.renderer, made.adapters, made.folder, report, is_quick)
            yield bench, Rivals(partial(load_base, cache_dir))
        finally:
            driver.close()


def gaps(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def percentile(values: Sequence[float], share: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * share // 100)]
