"""What a trainer's memory peaks at, beside what the planner predicts (docs/planner.md).

    python bench/memory.py [--quick] [--json FILE] [--base NAME] [--tokens N …] [--cache-dir DIR]

Each run is a trainer process as a worker starts it, warm before its job comes. On a CPU all of its memory counts; on a GPU what
torch has allocated, which is compared with the prediction less fragmentation and context.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from app.core import catalog, events, memory
from app.core.catalog import Base
from app.core.chat import Chat, Message
from app.core.render import Renderer
from app.core.spec import OptimizerSpec, TrainSpec
from app.core.tokens.tokenise import tokenise
from worker import wire
from worker.model import base as bases
from worker.model import card

TOLERANCE = 0.15
LONGEST = 1024


@dataclass(frozen=True)
class Cell:
    """One run and what became of it."""

    tokens: int
    is_checkpointing: bool
    predicted_bytes: int
    measured_bytes: int
    measured_as: str

    @property
    def apart(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,048 tokens at once only, fewer rows")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--base", default="smollm2-135m-instruct", metavar="NAME")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096], metavar="N", help="at once")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tunesmith", metavar="DIR")
    asked = parser.parse_args()
    base, cells = catalog.load().resolve(asked.base), list[Cell]()
    bases.prepare(base, asked.cache_dir)
    print(f"{'tokens at once':>14}  {'layers':<14}  {'predicted':>9}  {'measured':>9}  {'apart':>6}  as")
    for tokens in [2048] if asked.quick else asked.tokens:
        for is_checkpointing in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                job = _job(Path(folder), base, asked.cache_dir, tokens, is_checkpointing, rows=96 if asked.quick else 256)
                cell = _measured(job, asked.cache_dir)
            cells.append(cell)
            layers = "computed again" if is_checkpointing else "kept"
            sizes = f"{cell.predicted_bytes / 1e9:6.2f} GB  {cell.measured_bytes / 1e9:6.2f} GB  {cell.apart:+6.0%}"
            print(f"{tokens:14,}  {layers:<14}  {sizes}  {cell.measured_as}", flush=True)
    worst = max(abs(cell.apart) for cell in cells)
    target = {"name": "prediction apart from measurement", "value": worst, "target": TOLERANCE, "ok": worst <= TOLERANCE}
    print(f"at most {worst:.0%} apart, target {TOLERANCE:.0%}: {'met' if target['ok'] else 'MISSED'}")
    if asked.json:
        asked.json.write_text(json.dumps({"targets": [target], "runs": [asdict(cell) for cell in cells]}, indent=2) + "\n")


def _job(folder: Path, base: Base, cache_dir: Path, tokens: int, is_checkpointing: bool, *, rows: int) -> wire.TrainerJob:
    """Chats of one to twelve turns, of all lengths up to LONGEST."""
    lines = (Path(__file__).parents[1] / "cli" / "orders" / "train.jsonl").read_text().splitlines()
    said, rng = [json.loads(line)["messages"] for line in lines], random.Random(1)
    picks = (rng.sample(said, min(12, max(1, round(rng.lognormvariate(1.1, 0.7))))) for _ in range(rows))
    turns = ([Message(m["role"], m["content"]) for row in pick for m in row if m["role"] != "system"] for pick in picks)
    chats = (Chat(tuple(messages), line) for line, messages in enumerate(turns, 1))
    renderer = Renderer.open(card.prepared(base, cache_dir))
    tokenise(chats, renderer, max_seq_length=LONGEST).write(folder / "training.safetensors")
    spec = TrainSpec(
        base=base.id,
        n_epochs=1,
        batch_size=rows // 3,
        seed=1,
        max_seq_length=LONGEST,
        micro_batch_tokens=tokens,
        checkpoint_every_steps=1000,
        optimizer=OptimizerSpec(learning_rate=1e-4),
    )
    return wire.TrainerJob(
        spec=spec,
        base=base,
        dataset=folder / "training.safetensors",
        output_dir=folder / "adapter",
        checkpoints_dir=folder / "checkpoints",
        micro_batch_tokens=tokens,
        is_checkpointing=is_checkpointing,
    )


def _measured(job: wire.TrainerJob, cache_dir: Path) -> Cell:
    *_, last = _words(job, cache_dir)
    if not isinstance(last, events.Finished):
        raise SystemExit(f"the trainer did not finish: {last}")
    found = last.memory
    predicted = memory.predict(
        job.base.architecture,
        job.spec.lora,
        micro_batch_tokens=found.micro_batch_tokens,
        trainer=memory.trainer_of(job.base.architecture, job.spec.lora, "cuda" if found.measured_as == "cuda" else "cpu"),
        is_checkpointing=found.is_checkpointing,
    )
    predicted_bytes = predicted.tensor_bytes if found.measured_as == "cuda" else predicted.peak_bytes
    return Cell(found.micro_batch_tokens, found.is_checkpointing, predicted_bytes, found.peak_bytes, found.measured_as)


def _words(job: wire.TrainerJob, cache_dir: Path) -> Iterator[events.Event]:
    command = [sys.executable, "-m", "worker.trainer", "--cache-dir", str(cache_dir), "--warm", job.base.id]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != wire.READY:
            raise SystemExit("the trainer did not get ready; its words are above")
        process.stdin.write(job.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        yield from map(events.parse, process.stdout)


if __name__ == "__main__":
    main()
