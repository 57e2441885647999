"""Our training loop beside TRL's SFTTrainer: same machine, base, data, LoRA, optimizer, examples a step (docs/performance.md).

    python bench/training.py [--quick] [--json FILE] [--rounds N] [--steps N] [--cache-dir DIR]

Every run is a process of its own; rounds are interleaved, ratios are taken round by round, the first step of a run is not
counted. TRL is given its own best: packing with and without gradient checkpointing beside its default. `limit` is what one step
would take if nothing stood between its own matrix products, timed in the process that has just run the step.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from app.core import catalog
from app.core.chat import Chat, Message
from app.core.render import Renderer
from app.core.spec import TARGETS, OptimizerSpec, TrainSpec
from app.core.tokens.tokenise import TokenisedSet, tokenise
from worker.model import base as bases
from worker.model import card
from worker.trainers import LARGE_PAGES
from worker.training import fused
from worker.training.data import TrainData, micro_batches
from worker.training.decoder import Decoder
from worker.training.evaluate import evaluate
from worker.training.optim import Optimizer, learning_rate
from worker.training.trainee import Trainee, adapted
from worker.training.workspace import keep_pages

BASE, EXAMPLES, BATCH, LONGEST, SEED, RATE = "smollm2-135m-instruct", 512, 16, 1024, 1, 5e-4
CELLS = {
    "TRL default": "SFTTrainer, 8 rows padded, two to a step",
    "TRL packed": "packing bfd to 1,024 tokens, gradient checkpointing as by default",
    "TRL packed, kept": "the same without gradient checkpointing",
    "ours, same batches": "micro-batches of 1,024 tokens",
    "ours": "micro-batches of 2,048 tokens, as the service trains",
}
END = "<|im_end|>"
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_"}


def main() -> None:
    asked = _arguments()
    if asked.cell:
        print(json.dumps(_run_cell(asked.cell, asked.folder, asked.steps, asked.cache_dir, started_at=asked.started_at)))
        return
    rounds, steps = (1, 4) if asked.quick else (asked.rounds, asked.steps)
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder), asked.cache_dir)
        _in_process("ours", Path(folder), 2, asked.cache_dir)  # what is compiled once on a machine is not measured
        results: dict[str, list[dict[str, Any]]] = {cell: [] for cell in CELLS}
        for number in range(rounds):
            for cell in CELLS:
                results[cell].append(_in_process(cell, Path(folder), steps, asked.cache_dir))
                print(
                    f"round {number + 1}/{rounds}  {cell:20} {results[cell][-1]['tokens_per_second']:6.0f} tokens/s", flush=True
                )
    targets = _report(results)
    if asked.json:
        asked.json.write_text(json.dumps({"targets": targets, "runs": results}, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of four steps")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="of each run; the first is not counted")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tunesmith", metavar="DIR")
    parser.add_argument("--cell", choices=CELLS, help=argparse.SUPPRESS)
    parser.add_argument("--started-at", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_process(cell: str, folder: Path, steps: int, cache_dir: Path) -> dict[str, Any]:
    command: list[Any] = [
        sys.executable,
        __file__,
        "--cell",
        cell,
        "--folder",
        folder,
        "--steps",
        str(steps),
        "--cache-dir",
        cache_dir,
    ]
    command += ["--started-at", str(time.time())]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    if cell.startswith("ours"):
        environment = LARGE_PAGES | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{cell} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _report(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    def median(cell: str, figure: str) -> float:
        return statistics.median(run[figure] for run in results[cell])

    print(
        f"\n{'':20} {'tokens/s':>8} {'range':>11} {'labelled/s':>10} "
        f"{'peak GB':>8} {'1st step s':>10} {'limit':>6} {'held-out loss':>13}"
    )
    for cell, runs in results.items():
        speeds = [run["tokens_per_second"] for run in runs]
        print(
            f"{cell:20} {median(cell, 'tokens_per_second'):8.0f} {min(speeds):5.0f}–{max(speeds):5.0f}",
            f"{median(cell, 'labelled_per_second'):10.0f} {median(cell, 'peak_rss_bytes') / 1e9:8.2f}",
            f"{median(cell, 'first_step_seconds'):10.1f} {median(cell, 'share_of_limit'):8.0%}",
            f"{median(cell, 'held_out_loss'):13.4f}",
        )
    best = max(("TRL packed", "TRL packed, kept"), key=lambda cell: median(cell, "tokens_per_second"))

    def ratio(cell: str, other: str, figure: str = "tokens_per_second") -> float:
        pairs = zip(results[cell], results[other], strict=True)
        return statistics.median(one[figure] / two[figure] for one, two in pairs)

    print(f"\nours over TRL default: {ratio('ours', 'TRL default'):.2f}; over its best, {best}: {ratio('ours', best):.2f}")
    loss = abs(ratio("ours", "TRL default", "held_out_loss") - 1)  # the same examples a step; packed rows hold others
    found = [
        (f"tokens/s over {best}", ratio("ours", best), 2.0, True),
        ("share of the limit", median("ours", "share_of_limit"), 0.6, True),
        (f"peak RSS over {best}", ratio("ours", best, "peak_rss_bytes"), 1.0, False),
        ("peak RSS over TRL default", ratio("ours", "TRL default", "peak_rss_bytes"), 0.6, False),
        ("held-out loss, difference from TRL default", loss, 0.01, False),
    ]
    targets = [
        {"name": name, "value": value, "target": target, "ok": value >= target if is_floor else value <= target}
        for name, value, target, is_floor in found
    ]
    for target in targets:
        print(f"{target['name']:45} {target['value']:6.3f}   target {target['target']}: {'met' if target['ok'] else 'MISSED'}")
    return targets


def _prepare(folder: Path, cache_dir: Path) -> None:
    """Chats of one to twelve turns (log-normal: about 200 tokens, half of them trained on), cut once for all cells."""
    base = catalog.load().resolve(BASE)
    bases.prepare(base, cache_dir)
    renderer = Renderer.open(card.prepared(base, cache_dir))
    orders = Path(__file__).parents[1] / "cli" / "orders"
    for name, source, count in (("train", "train", EXAMPLES), ("heldout", "heldout", 48)):
        rows = [json.loads(line)["messages"] for line in (orders / f"{source}.jsonl").read_text().splitlines()]
        rng, chats = random.Random(SEED), []
        for line in range(1, count + 1):
            turns = min(12, max(1, round(rng.lognormvariate(1.1, 0.7))))
            said = [message for row in rng.sample(rows, turns) for message in row if message["role"] != "system"]
            chats.append(Chat(tuple(Message(message["role"], message["content"]) for message in said), line))
        tokenise(chats, renderer, max_seq_length=LONGEST).write(folder / f"{name}.safetensors")


def _run_cell(cell: str, folder: Path, steps: int, cache_dir: Path, *, started_at: float) -> dict[str, Any]:
    is_ours = cell.startswith("ours")
    if is_ours:
        keep_pages()
    fused.keep_in(cache_dir)
    base = bases.load(catalog.load().resolve(BASE), cache_dir, for_training=True)
    examples, heldout = (TokenisedSet.read(folder / f"{name}.safetensors") for name in ("train", "heldout"))
    spec = TrainSpec(
        base=BASE,
        n_epochs=1,
        batch_size=BATCH,
        seed=SEED,
        max_seq_length=LONGEST,
        micro_batch_tokens=1024 if cell == "ours, same batches" else 2048,
        checkpoint_every_steps=10_000,
        optimizer=OptimizerSpec(learning_rate=RATE, warmup_ratio=0.0),
    )
    times = Times()
    with ExitStack() as stack:
        if is_ours:
            model, again = _ours(stack.enter_context(adapted(base, spec)), examples, spec, steps, times)
        else:
            model, again = _trl(cell, base, examples, spec, steps, times)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        batches = micro_batches(heldout, range(heldout.examples), max_tokens=2048)
        judged = Trainee(model, base, Decoder(base.model.get_decoder()))
        held_out = evaluate(judged, batches, step=steps, should_stop=lambda: False)
        assert held_out is not None
        with Products() as products, torch.compiler.set_stance("force_eager"):
            again()
    counted = times.steps[1:]
    seconds = sum(step["seconds"] for step in counted)
    limit = times.steps[-1]["tokens"] / products.seconds()
    speed = sum(step["tokens"] for step in counted) / seconds
    return {
        "tokens_per_second": speed,
        "labelled_per_second": sum(step["labelled"] for step in counted) / seconds,
        "first_step_seconds": times.first_at - started_at,
        "peak_rss_bytes": peak,
        "limit_tokens_per_second": limit,
        "share_of_limit": speed / limit,
        "held_out_loss": held_out.valid_loss,
        "steps": times.steps,
    }


class Times:
    """What each step took."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.first_at = 0.0
        self._began_at, self._tokens, self._labelled = 0.0, 0, 0

    def begin(self) -> None:
        self._began_at, self._tokens, self._labelled = time.perf_counter(), 0, 0

    def count(self, *, tokens: int, labelled: int) -> None:
        self._tokens, self._labelled = self._tokens + tokens, self._labelled + labelled

    def end(self) -> None:
        seconds = time.perf_counter() - self._began_at
        self.first_at = self.first_at or time.time()
        self.steps.append({"seconds": seconds, "tokens": self._tokens, "labelled": self._labelled})


def _ours(trainee: Trainee, examples: Any, spec: Any, steps: int, times: Times) -> tuple[Any, Callable[[], None]]:
    """The loop's own step, without its events."""
    optimizer, data = Optimizer(trainee.parameters, spec.optimizer), TrainData(examples, spec)

    def run(step: Any) -> None:
        for batch in step.micro_batches:
            trainee.backward(batch, of=step.totals)
        optimizer.clip()
        optimizer.step(learning_rate(step.number, steps, spec.optimizer))
        optimizer.zero_grad()

    for step in islice(data.steps_after(0), steps):
        times.begin()
        run(step)
        times.count(tokens=step.tokens, labelled=step.labelled_tokens)
        times.end()
    return trainee.model, lambda: run(step)


def _trl(cell: str, base: Any, examples: Any, spec: Any, steps: int, times: Times) -> tuple[Any, Callable[[], None]]:
    torch.manual_seed(spec.seed)
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = peft.get_peft_model(base.model, config)
    batching: dict[str, Any] = {
        "TRL default": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": BATCH // 8},
        "TRL packed": {"packing": True},
        "TRL packed, kept": {"packing": True, "gradient_checkpointing": False},
    }[cell]
    if batching.get("packing"):  # about as many examples a step as the others have
        rows = round(BATCH * examples.tokens / examples.examples / LONGEST)
        batching |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": max(1, rows)}

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.end()

    last: list[Any] = []

    class Watched(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            last.append(inputs)
            mask, labels = inputs.get("attention_mask"), inputs["labels"]
            tokens = int(mask.sum()) if mask is not None else labels.numel()
            times.count(tokens=tokens, labelled=int((labels != -100).sum()))
            return super().training_step(model, inputs, *more, **named)  # type: ignore[no-untyped-call]  # as TRL has it

    trainer = Watched(
        model=model,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=steps,
            max_length=LONGEST,
            learning_rate=spec.optimizer.learning_rate,
            lr_scheduler_type="cosine",
            optim="adamw_8bit",
            use_cpu=True,
            seed=spec.seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **batching,
        ),
        train_dataset=Dataset.from_list(list(_rows(examples))),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=base.renderer.tokenizer, pad_token=END, eos_token=END),
        callbacks=[Watch()],
    )
    trainer.train()
    of_last_step = last[-trainer.args.gradient_accumulation_steps :]

    def again() -> None:
        for inputs in of_last_step:
            SFTTrainer.training_step(trainer, model, inputs)  # type: ignore[no-untyped-call]

    return model, again


def _rows(examples: Any) -> Iterator[dict[str, list[int]]]:
    for start, end in zip(examples.offsets_E1, examples.offsets_E1[1:], strict=False):
        tokens, is_trained = examples.tokens_N[start:end].tolist(), examples.is_trained_N[start:end]
        yield {
            "input_ids": tokens,
            "labels": [token if flag else -100 for token, flag in zip(tokens, is_trained, strict=True)],
        }


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]  # as torch has it
    """Within, notes every matrix product; `seconds` times the same ones alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in PRODUCTS:
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
            self._seen[tuple((tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors)] += 1
        return function(*args, **(kwargs or {}))

    def seconds(self) -> float:
        total = 0.0
        for operands, count in self._seen.items():
            one, two = (torch.empty_strided(shape, stride, dtype=kind).normal_() for shape, stride, kind in operands)
            product = torch.bmm if one.ndim == 3 else torch.mm
            product(one, two)
            timings = []
            for _ in range(5):
                began_at = time.perf_counter()
                product(one, two)
                timings.append(time.perf_counter() - began_at)
            total += count * statistics.median(timings)
        return total


if __name__ == "__main__":
    main()
