"""The serving engine: many adapters on one NF4 base, beside `model.generate` and PEFT's mixed batches (docs/performance.md).

    PYTHONPATH=. python bench/serving.py [--quick] [--json FILE] [--only PART …] [--cache-dir DIR]

Everything runs in this process on as many threads as an engine takes, adapters come from a real S3 server, rounds are interleaved
and ratios taken round by round. `succeeded` starts a whole stack. Parts: throughput, latency, cold, memory, prefix, fairness,
succeeded.
"""

import argparse
import asyncio
import gc
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil
from engine import BASE, MAX_BATCH, Bench, Report, answering, gaps, opened, percentile, timed
from rivals import Rivals
from stack import ROOT, stack, wait

from app.core import logging
from app.core.engine import AdapterRef, GenerateRequest
from worker.inference import threads
from worker.inference.native import NativeDriver

PARTS = ("throughput", "latency", "cold", "memory", "prefix", "fairness", "succeeded")
ROWS = 32
SIZES = (1, 8, 16, ROWS)


def throughput(bench: Bench, rivals: Rivals) -> None:
    """Tokens a second of whole batches, prompts included."""
    tokens, rounds = (16, 2) if bench.is_quick else (32, 5)
    cells: dict[str, list[float]] = {}
    prompt = bench.prompt
    for _ in range(rounds):
        for name, adapters in _mixes(bench).items():
            cells.setdefault(name, []).append(asyncio.run(_tokens_per_second(bench, adapters, tokens)))
        for rows in SIZES:
            name = f"generate, {rows} rows"
            cells.setdefault(name, []).append(rivals.generate(prompt, rows=rows, tokens=tokens))
        cells.setdefault("generate, unpacked", []).append(rivals.generate_unpacked(prompt, rows=ROWS, tokens=tokens))
        cells.setdefault("PEFT, 8 adapters", []).append(rivals.peft(prompt, rows=ROWS, tokens=tokens))
    print(f"generate and PEFT compute in {rivals.dtype}, which is the faster one here")
    for name, speeds in cells.items():
        bench.report.told(f"tokens/s, {name}", statistics.median(speeds), "tokens/s")
    base, mixed = f"ours, {ROWS} rows, base", f"ours, {ROWS} rows, 8 adapters"
    bench.report.target(f"base-only at {ROWS} rows over generate", _ratio(cells, base, f"generate, {ROWS} rows"), 1.3)
    bench.report.target(f"8 adapters over {ROWS} rows against our base-only", _ratio(cells, mixed, base), 0.7)
    bench.report.target(f"8 adapters over {ROWS} rows over PEFT's mixed batch", _ratio(cells, mixed, "PEFT, 8 adapters"), 3.0)


def _mixes(bench: Bench) -> dict[str, list[AdapterRef | None]]:
    """The adapter of each row."""
    mixes: dict[str, list[AdapterRef | None]] = {f"ours, {rows} rows, base": [None] * rows for rows in SIZES}
    for count in (1, 4, 8, 16):
        mixes[f"ours, {ROWS} rows, {count} adapters"] = [bench.adapters[row % count] for row in range(ROWS)]
    if not bench.is_quick:
        mixes["ours, 64 rows, base"] = [None] * 64
        mixes["ours, 64 rows, 64 adapters"] = list(bench.adapters[:64])
    weights = [1 / (place + 1) for place in range(16)]
    mixes[f"ours, {ROWS} rows, 16 adapters by Zipf"] = list(random.Random(1).choices(bench.adapters[:16], weights, k=ROWS))
    return mixes


def _ratio(cells: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(cells[one], cells[other], strict=True))


async def _tokens_per_second(bench: Bench, adapters: Sequence[AdapterRef | None], tokens: int) -> float:
    await _load(bench, {one.digest: one for one in adapters if one}.values())  # which is measured elsewhere
    began_at = time.perf_counter()
    told = await asyncio.gather(*(timed(bench.driver, bench.request(one, tokens=tokens)) for one in adapters))
    assert all(len(times) == tokens for times in told), "an answer ended early"
    return len(adapters) * tokens / (time.perf_counter() - began_at)


def latency(bench: Bench, _rivals: Rivals) -> None:
    """Of one request at a time and of eight, with and without an adapter."""
    repeats = 4 if bench.is_quick else 12
    for name, adapter in (("base", None), ("an adapter", bench.adapters[0])):
        for rows in (1, 8):
            asyncio.run(_latency(bench, f"{name}, {rows} at once", adapter, rows, repeats))
    for rows in (1, 8):
        one, other = (bench.report.figures[f"ITL p50, {name}, {rows} at once"] for name in ("an adapter", "base"))
        bench.report.told(f"ITL p50 of an adapter over the base's, {rows} at once", one / other)


async def _latency(bench: Bench, name: str, adapter: AdapterRef | None, rows: int, repeats: int) -> None:
    await timed(bench.driver, bench.request(adapter, tokens=2))
    first, between = list[float](), list[float]()
    for _ in range(repeats):
        for times in await asyncio.gather(*(timed(bench.driver, bench.request(adapter, tokens=16)) for _ in range(rows))):
            first.append(times[0])
            between += gaps(times)
    for what, values in (("TTFT", first), ("ITL", between)):
        for share in (50, 95, 99):
            bench.report.told(f"{what} p{share}, {name}", 1e3 * percentile(values, share), "ms")


def cold(bench: Bench, _rivals: Rivals) -> None:
    """The first token of an adapter that lies in each of the tiers, and what others notice of its loading."""
    asyncio.run(_cold_by_tier(bench))
    asyncio.run(_beside_cold_loads(bench))


async def _cold_by_tier(bench: Bench) -> None:
    took: dict[str, list[float]] = {}
    for adapter in bench.adapters[:24]:
        for tier in ("S3", "slot", "RAM", "disk", "S3"):
            _leave_in(bench, adapter, tier)
            took.setdefault(tier, []).append((await timed(bench.driver, bench.request(adapter, tokens=1)))[0])
    for tier, values in took.items():
        for share in (50, 95):
            bench.report.told(f"TTFT p{share}, adapter in {tier}", 1e3 * percentile(values, share), "ms")
    over = 1e3 * (percentile(took["S3"], 95) - statistics.median(took["slot"]))
    bench.report.target("cold from S3, p95 over warm, ms", over, 300, at_most=True)


def _leave_in(bench: Bench, adapter: AdapterRef, tier: str) -> None:
    """In this tier and those below it, and in no faster one."""
    if tier == "slot":
        return
    bench.driver.evict(adapter.digest, keep_in_memory=tier == "RAM")
    if tier == "S3":
        shutil.rmtree(bench.folder / "adapters" / adapter.digest, ignore_errors=True)


async def _beside_cold_loads(bench: Bench) -> None:
    """Time between tokens of eight running answers, rounds with and without an adapter loaded from S3 every 300 ms."""
    growth = []
    for number in range(3 if bench.is_quick else 7):
        quiet = await _gaps_of_eight(bench)
        loading = asyncio.create_task(_load_for_ever(bench, number))
        busy = await _gaps_of_eight(bench)
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        growth.append(100 * (percentile(busy, 95) / percentile(quiet, 95) - 1))
    bench.report.told("ITL p95 grows during cold loads by", statistics.median(growth), "%")
    bench.report.target("others' ITL p95 grows during cold loads, %", statistics.median(growth), 20, at_most=True)


async def _gaps_of_eight(bench: Bench) -> list[float]:
    wanted = [bench.request(adapter, tokens=24) for adapter in (None, *bench.adapters[:7])]
    return [gap for times in await asyncio.gather(*(timed(bench.driver, one) for one in wanted)) for gap in gaps(times)]


async def _load_for_ever(bench: Bench, number: int) -> None:
    at = number
    while True:
        adapter = bench.adapters[8 + at % 8]
        _leave_in(bench, adapter, "S3")
        bench.driver.release(await bench.driver.ensure(adapter))
        at += 1
        await asyncio.sleep(0.3)


def memory(bench: Bench, _rivals: Rivals) -> None:
    """What an adapter takes in each tier, by the engine's own count and by what the process grows when all are loaded."""
    for adapter in bench.adapters:
        _leave_in(bench, adapter, "S3")
    gc.collect()
    before = psutil.Process().memory_info().rss
    asyncio.run(_load(bench, bench.adapters))
    grown = psutil.Process().memory_info().rss - before
    for tier, stats in bench.driver.stats().tiers.items():
        if stats.held:
            bench.report.told(f"MB per adapter, {tier} ({stats.held} held)", stats.size_bytes / stats.held / 1e6, "MB")
    bench.report.told("MB of resident memory per adapter loaded", grown / len(bench.adapters) / 1e6, "MB")


async def _load(bench: Bench, adapters: Iterable[AdapterRef]) -> None:
    for adapter in adapters:
        bench.driver.release(await bench.driver.ensure(adapter))


def prefix(bench: Bench, _rivals: Rivals) -> None:
    """The first token of a long prompt with an adapter, new and known."""
    prompt = bench.count_to(300)[:400]
    first, again, known = list[float](), list[float](), list[int]()
    for adapter in bench.adapters[: 4 if bench.is_quick else 12]:
        wanted = bench.request(adapter, tokens=1, prompt=prompt)
        for times in (first, again):
            times.append(asyncio.run(timed(bench.driver, wanted))[0])
        known.append(asyncio.run(_cached_tokens(bench.driver, wanted)))
    bench.report.told("TTFT p50, 400 tokens and an adapter, new", 1e3 * statistics.median(first), "ms")
    bench.report.told("TTFT p50, 400 tokens and an adapter, known", 1e3 * statistics.median(again), "ms")
    bench.report.told("of 400 tokens, found in the cache", statistics.median(known), "tokens")


async def _cached_tokens(driver: NativeDriver, wanted: GenerateRequest) -> int:
    async with answering(driver, wanted) as chunks:
        return [chunk async for chunk in chunks][-1].cached_tokens


def fairness(bench: Bench, _rivals: Rivals) -> None:
    """Three quiet tenants, each asking one thing at a time, beside one that keeps sixty requests waiting."""
    alone = asyncio.run(_quiet(bench, is_noisy=False))
    beside = asyncio.run(_quiet(bench, is_noisy=True))
    for share in (50, 95):
        bench.report.told(f"TTFT p{share}, quiet tenants alone", 1e3 * percentile(alone, share), "ms")
        bench.report.told(f"TTFT p{share}, quiet tenants beside a noisy one", 1e3 * percentile(beside, share), "ms")
    bench.report.told("Jain's index of four tenants that keep 60, 20, 20, 20 requests going", asyncio.run(_jain(bench)))


async def _quiet(bench: Bench, *, is_noisy: bool) -> list[float]:
    async def ask(tenant: str) -> list[float]:
        return [(await timed(bench.driver, bench.request(None, tokens=4, tenant=tenant)))[0] for _ in range(4)]

    noise = [  # a full batch, and sixty that wait
        asyncio.create_task(timed(bench.driver, bench.request(None, tokens=32, tenant="noisy")))
        for _ in range((MAX_BATCH + 60) * is_noisy)
    ]
    await asyncio.sleep(0.5)
    told = await asyncio.gather(*(ask(f"quiet-{number}") for number in range(3)))
    for task in noise:
        task.cancel()
    await asyncio.gather(*noise, return_exceptions=True)
    return [first for of_tenant in told for first in of_tenant]


async def _jain(bench: Bench) -> float:
    """(Σx)² / (n Σx²) of the tokens that each was given while all of them had more to ask (Jain, Chiu and Hawe, 1984)."""
    given = {"one": 0, "two": 0, "three": 0, "four": 0}

    async def ask(tenant: str) -> None:
        while True:
            async with answering(bench.driver, bench.request(None, tokens=24, tenant=tenant)) as chunks:
                async for _ in chunks:
                    given[tenant] += 1

    asking = [asyncio.create_task(ask(name)) for name, many in zip(given, (60, 20, 20, 20), strict=True) for _ in range(many)]
    await _given(given, 24)  # whoever came first has had the whole batch until now
    before = list(given.values())
    await _given(given, min(before) + 200)
    shares = [after - earlier for after, earlier in zip(given.values(), before, strict=True)]
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


async def _given(given: Mapping[str, int], least: int) -> None:
    while min(given.values()) < least:
        await asyncio.sleep(0.05)


def succeeded(report: Report, cache_dir: Path, *, jobs: int) -> None:
    """From the status `succeeded`, asked for every 20 ms, to the first token of the new model, through the public API."""
    took = []
    with tempfile.TemporaryDirectory() as folder, stack(Path(folder), BASE, cache_dir) as client:
        rows = (ROOT / "cli" / "orders" / "train.jsonl").read_bytes().splitlines()[:16]
        file = client.files.create(file=("16.jsonl", b"\n".join(rows)), purpose="fine-tune")
        for _ in range(jobs):
            job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, hyperparameters={"n_epochs": 1})
            wait(lambda job=job: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded", pause_seconds=0.02)
            began_at = time.perf_counter()
            model = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
            with client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=4, stream=True
            ) as chunks:
                next(chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content)
            took.append(time.perf_counter() - began_at)
    report.told(f"succeeded to first token, worst of {jobs}", max(took), "s")
    report.target("succeeded to first token, s", max(took), 2, at_most=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of five, 24 adapters instead of 64")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tunesmith", metavar="DIR")
    asked = parser.parse_args()
    threads.share()
    logging.configure("bench", level="WARNING")  # not a line for every adapter that comes and goes
    report = Report()
    parts = {"throughput": throughput, "latency": latency, "cold": cold, "memory": memory, "prefix": prefix, "fairness": fairness}
    if set(asked.only) & parts.keys():
        with opened(asked.cache_dir, report, is_quick=asked.quick) as (bench, rivals):
            for name, measure in parts.items():
                if name in asked.only:
                    measure(bench, rivals)
    if "succeeded" in asked.only:
        succeeded(report, asked.cache_dir, jobs=1 if asked.quick else 4)
    report.end(asked.json)


if __name__ == "__main__":
    main()
