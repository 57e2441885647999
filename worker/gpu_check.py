"""Walks through what only a GPU can show: `python -m worker.gpu_check`. docs/gpu.md says what each row covers."""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from app.core import catalog, logging, memory, spec, tiers
from app.core.catalog import Base
from app.core.chat import Chat, Message
from app.core.engine import GenerateRequest, Sampling
from app.core.events import Event, Finished, Stepped, Stopped
from app.core.render import Renderer
from app.core.settings import Settings
from app.core.spec import Hyperparameters, Requested, TrainingOptions, TrainSpec
from app.core.tokens.tokenise import TokenisedSet, tokenise
from worker import gpu
from worker.inference import lora
from worker.inference.native import PAGE_TOKENS
from worker.inference.pages import Pages
from worker.inference.runner import ModelRunner
from worker.inference.sequence import Sequence, Slice
from worker.inference.vocabulary import Vocabulary
from worker.model import adapter, bnb, card
from worker.model import base as bases
from worker.training.run import Paths, run
from worker.training.trainee import adapted

_ROWS, _BATCH = 64, 16  # rows of about 130 tokens: a batch fills the micro-batch that the plan is made for
_BLOCK = 64
# Between the trainer's and the engine's path on one adapter, as root mean square over the logits' own spread; see also packed.py
_LOGITS_TOLERANCE = 0.1
_RESUME_TOLERANCE = 0.02  # relative, of the adapter's weights: on a GPU two runs of one program differ, on a CPU they do not

Numbers = dict[str, Any]


class CheckFailed(Exception):
    """What was measured is not what it should be."""

    def __init__(self, message: str, numbers: Numbers) -> None:
        super().__init__(message)
        self.numbers = numbers


class NotHere(Exception):
    """This row says nothing on this device."""


@dataclass(frozen=True)
class Row:
    name: str
    result: str
    seconds: float
    numbers: Numbers
    reason: str = ""


@dataclass
class Bench:
    """What the checks share. Training fills `folder` with what serving reads."""

    settings: Settings
    base: Base
    device: str
    epochs: int
    folder: Path

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    def load(self, *, for_training: bool) -> bases.LoadedBase:
        return bases.load(self.base, self.settings.cache_dir, device=self.device, for_training=for_training)

    def paths(self, name: str) -> Paths:
        return Paths(
            dataset=self.folder / "training.safetensors",
            output=self.folder / name / "adapter",
            checkpoints=self.folder / name / "checkpoints",
            cache=self.settings.cache_dir,
        )


def main() -> int:
    asked = _arguments()
    settings = Settings()
    logging.configure("gpu-check", format="console", level="WARNING")
    try:
        found = gpu.pin(os.environ)
    except gpu.CardRefused as error:
        print(error, file=sys.stderr)
        return 2
    if asked.device is None and not torch.cuda.is_available():
        print("no GPU that CUDA can use; --device cpu runs the same rows without one", file=sys.stderr)
        return 2
    device = asked.device or "cuda"
    known = catalog.load(settings.catalog_file)
    with TemporaryDirectory(prefix="gpu-check-") as folder:
        bench = Bench(settings, known.resolve(asked.base), device, asked.epochs, Path(folder))
        templates = [known.resolve(name) for name in asked.templates or [asked.base]]
        rows = [_run(name, check) for name, check in _checks(bench, found, templates)]
    _print(rows)
    if asked.json:
        said = {"device": device, "base": bench.base.id, "rows": [asdict(row) for row in rows]}
        asked.json.write_text(json.dumps(said, indent=2) + "\n")
    return int(any(row.result == "fail" for row in rows))


def _checks(bench: Bench, found: gpu.Card | None, templates: list[Base]) -> list[tuple[str, Callable[[], Numbers]]]:
    return [
        ("card", lambda: _card(bench, found)),
        ("memory-limit", lambda: _memory_limit(bench)),
        *((f"template {base.family}", lambda base=base: _template(bench, base)) for base in templates),
        ("nf4", lambda: _nf4(bench)),
        ("load", lambda: _load(bench)),
        ("train", lambda: _train(bench)),
        ("resume", lambda: _resume(bench)),
        ("serve", lambda: _serve(bench)),
    ]


def _run(name: str, check: Callable[[], Numbers]) -> Row:
    """Whatever goes wrong in one row, the next one is run."""
    started_at, result, reason = time.monotonic(), "pass", ""
    numbers: Numbers = {}
    try:
        numbers = check()
    except NotHere as error:
        result, reason = "skip", str(error)
    except CheckFailed as error:
        result, reason, numbers = "fail", str(error), error.numbers
    except Exception as error:
        result, reason = "fail", f"{type(error).__name__}: {error}"
    row = Row(name, result, round(time.monotonic() - started_at, 1), numbers, reason)
    print(f"{row.name}: {row.result} {row.reason}", file=sys.stderr, flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return row


def _card(bench: Bench, found: gpu.Card | None) -> Numbers:
    """Which card, what driver, and which queues a worker on it would serve."""
    if not bench.is_cuda:
        raise NotHere("no GPU is asked for")
    seen = torch.cuda.get_device_properties(0)
    if found is None:
        raise CheckFailed("CUDA has a card and NVML shows none: is nvidia-ml-py installed?", {"cuda": seen.name})
    numbers = {
        "name": found.name,
        "driver": found.driver,
        "reported_mib": found.total_bytes // 2**20,
        "cuda_mib": seen.total_memory // 2**20,
        "tiers": ",".join(tiers.of_card(found.total_bytes, bench.settings.gpu)),
    }
    return _require(numbers["tiers"] != "", "the card is too small for any tier", numbers)


def _memory_limit(bench: Bench) -> Numbers:
    """A trainer's limit holds: more than its part of the card cannot be had."""
    if not bench.is_cuda:
        raise NotHere("only CUDA has such a limit")
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    allowed_bytes = tiers.trainer_bytes(total_bytes, bench.settings.gpu)
    gpu.limit_trainer(bench.settings.gpu)
    try:
        torch.empty(allowed_bytes + 2**28, dtype=torch.uint8, device=bench.device)
    except torch.OutOfMemoryError:
        return {"limit_mib": allowed_bytes // 2**20}
    raise CheckFailed("more could be allocated than the limit", {"limit_mib": allowed_bytes // 2**20})


def _template(bench: Bench, base: Base) -> Numbers:
    """Our marked template and the base's own one write the same tokens: else its card is refused."""
    card.prepared(base, bench.settings.cache_dir)
    return {"base": base.id}


def _nf4(bench: Bench) -> Numbers:
    """bitsandbytes on this device against the definition: per block, the nearest of 16 levels times the largest magnitude."""
    torch.manual_seed(0)
    weights_OI = torch.randn(1024, 1024, dtype=torch.bfloat16)
    packed, state = bnb.functional.quantize_4bit(weights_OI.to(bench.device), blocksize=_BLOCK, quant_type="nf4")
    found_OI = bnb.functional.dequantize_4bit(packed, state).float().cpu()
    levels = bnb.functional.get_4bit_type("nf4", device="cpu", blocksize=_BLOCK)
    blocks = weights_OI.float().reshape(-1, _BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    nearest = ((blocks / scales)[..., None] - levels).abs().argmin(dim=-1)
    expected_OI = (levels[nearest] * scales).reshape(weights_OI.shape)
    apart = ((found_OI - expected_OI).reshape(-1, _BLOCK) / scales).abs() > 0.01  # levels are 0.07 apart and more
    rms_error = (found_OI - weights_OI.float()).square().mean().sqrt()
    numbers = {"differing": float(apart.float().mean()), "rms_error": round(float(rms_error), 4)}
    return _require(numbers["differing"] < 1e-4, "dequantized weights are not those of NF4", numbers)


def _load(bench: Bench) -> Numbers:
    """The base is fetched, quantized, and loaded; on the card it takes what the planner says."""
    before_bytes = torch.cuda.memory_allocated() if bench.is_cuda else 0
    loaded = bench.load(for_training=True)
    predicted_bytes = memory.weights_bytes(bench.base.architecture)
    numbers = {"digest": loaded.entry.digest[:12], "predicted_mib": _mib(predicted_bytes)}
    if not bench.is_cuda:
        return numbers
    taken_bytes = torch.cuda.memory_allocated() - before_bytes
    numbers["allocated_mib"] = _mib(taken_bytes)
    return _require(taken_bytes < 1.1 * predicted_bytes, "the weights take more than the planner says", numbers)


def _train(bench: Bench) -> Numbers:
    """A run of some steps: the loss falls, and the peak stays under the plan's."""
    data = _dataset(bench)
    losses, finished = _go(bench, "straight")
    asked = _spec(bench)
    predicted = memory.predict(bench.base.architecture, asked.lora, micro_batch_tokens=asked.micro_batch_tokens).peak_bytes
    quarter = max(1, len(losses) // 4)
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    numbers: Numbers = {"steps": finished.step, "tokens": data.tokens * bench.epochs}
    numbers |= {"first_loss": round(first, 3), "last_loss": round(last, 3), "predicted_mib": _mib(predicted)}
    if bench.is_cuda:
        numbers["peak_mib"] = _mib(torch.cuda.max_memory_reserved())
        _require(torch.cuda.max_memory_reserved() < predicted, "the peak is over the plan's", numbers)
    return _require(last < first, "the loss does not fall", numbers)


def _resume(bench: Bench) -> Numbers:
    """Stopped half-way and gone on with: the same adapter as without the stop."""
    half = _spec(bench).total_steps(_ROWS) // 2
    _go(bench, "resumed", stop_after=half)
    _go(bench, "resumed")
    straight, resumed = (load_file(bench.paths(name).output / adapter.WEIGHTS) for name in ("straight", "resumed"))
    apart = sum(float((straight[name] - resumed[name]).square().sum()) for name in straight)
    size = sum(float(tensor.square().sum()) for tensor in straight.values())
    numbers = {"stopped_after": half, "relative_difference": (apart / size) ** 0.5}
    return _require(numbers["relative_difference"] <= (_RESUME_TOLERANCE if bench.is_cuda else 0), "the adapters differ", numbers)


def _serve(bench: Bench) -> Numbers:
    """The engine's logits with the trained adapter against the trainer's, at the end of one row."""
    tokens = tuple(int(token) for token in _dataset(bench).tokens_N[:64])
    expected_V, served_V = _trained_logits(bench, tokens), _served_logits(bench, tokens)
    difference = float((served_V - expected_V).square().mean().sqrt() / expected_V.std())
    numbers = {"difference": round(difference, 4), "same_first_choice": bool(served_V.argmax() == expected_V.argmax())}
    return _require(difference < _LOGITS_TOLERANCE, "the engine and the trainer disagree", numbers)


def _trained_logits(bench: Bench, tokens: tuple[int, ...]) -> Tensor:
    loaded = bench.load(for_training=True)
    found = adapter.open(bench.paths("straight").output, base=loaded, max_rank=128)
    with adapted(loaded, _spec(bench)) as trainee, torch.no_grad(), torch.autocast(bench.device, torch.bfloat16):
        trainee.load(found)
        ids_1T = torch.tensor([tokens], device=bench.device)
        hidden_1TD = loaded.model.get_decoder()(input_ids=ids_1T, use_cache=False, documents=(len(tokens),)).last_hidden_state
        logits_V: Tensor = loaded.model.get_output_embeddings()(hidden_1TD[0, -1]).float().cpu()
    return logits_V


def _served_logits(bench: Bench, tokens: tuple[int, ...]) -> Tensor:
    loaded = bench.load(for_training=False)
    found = adapter.open(bench.paths("straight").output, base=loaded, max_rank=128)
    pages = Pages(count=-(-len(tokens) // PAGE_TOKENS), size=PAGE_TOKENS)
    runner = ModelRunner(loaded.model, page_count=pages.count, page_size=pages.size)
    weights = lora.prepare(found, dtype=runner.lora_dtype).to(runner.device)
    request = GenerateRequest(request_id="gpu-check", prompt=tokens, sampling=Sampling(max_tokens=1, temperature=0))
    size = loaded.model.get_input_embeddings().num_embeddings
    vocabulary = Vocabulary(loaded.renderer.tokenizer, size=size, stop_ids=loaded.renderer.stop_ids)
    sequence = Sequence(request, vocabulary=vocabulary, max_tokens=1, emit=lambda _: None, adapters=((weights, 1.0),))
    sequence.pages = pages.take(pages.count)
    logits_BV, _ = runner.forward([Slice(sequence, 0, len(tokens))])
    return logits_BV[0].float().cpu()


def _go(bench: Bench, name: str, *, stop_after: int | None = None) -> tuple[list[float], Finished | Stopped]:
    """One run, or what is left of it: its losses and how it ended."""
    losses: list[float] = []

    def hear(event: Event) -> None:
        if isinstance(event, Stepped):
            losses.append(event.train_loss)

    should_stop = (lambda: False) if stop_after is None else (lambda: len(losses) >= stop_after)
    loaded = bench.load(for_training=True)
    result = run(_spec(bench), bench.paths(name), bench.base, base_model=loaded, on_event=hear, should_stop=should_stop)
    return losses, result


def _dataset(bench: Bench) -> TokenisedSet:
    """Rows that count on from a number; written where the runs read them."""
    renderer = Renderer.open(card.prepared(bench.base, bench.settings.cache_dir))
    chats = [
        Chat((Message("user", f"Count on from {n}."), Message("assistant", " ".join(map(str, range(n + 1, n + 31))))), n)
        for n in range(1, _ROWS + 1)
    ]
    made = tokenise(chats, renderer, max_seq_length=spec.max_seq_length(Requested(), bench.base))
    made.write(bench.paths("").dataset)
    return made


def _spec(bench: Bench) -> TrainSpec:
    asked = Requested(
        hyperparameters=Hyperparameters(n_epochs=bench.epochs, batch_size=_BATCH),
        training=TrainingOptions(checkpoint_every_steps=1_000_000),
    )
    longest = TokenisedSet.read(bench.paths("").dataset).longest
    return spec.resolve(asked, bench.base, seed=1, examples=_ROWS, longest=longest)


def _require(is_right: bool, message: str, numbers: Numbers) -> Numbers:
    """Raises CheckFailed."""
    if not is_right:
        raise CheckFailed(message, numbers)
    return numbers


def _mib(size_bytes: float) -> int:
    return round(size_bytes / 2**20)


def _print(rows: list[Row]) -> None:
    for row in rows:
        said = row.reason or "  ".join(f"{name}={value}" for name, value in row.numbers.items())
        print(f"{row.name:<18} {row.result:<5} {row.seconds:>7.1f} s  {said}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.gpu_check", description=__doc__)
    parser.add_argument("--base", default="qwen2.5-0.5b-instruct", help="what is trained and served")
    parser.add_argument("--templates", nargs="+", default=[], metavar="BASE", help="bases whose chat templates are compared")
    parser.add_argument("--epochs", type=int, default=6, help="each of 4 steps")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
