"""How well a job's finish is foretold: the error of the time that is left, at each tenth of a run.

    python bench/estimate.py [--quick] [--json FILE] [--cache-dir DIR]

Whole runs of the engine, heard by what a worker tells `estimated_finish` by (worker.heart.Pace): rows of very different lengths,
few steps and many, with and without a validation file. The error is that of the seconds left, as a share of what they were.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.core import catalog
from app.core.chat import Chat, Message
from app.core.events import Event, Stepped
from app.core.render import Renderer
from app.core.spec import OptimizerSpec, TrainSpec
from app.core.tokens.tokenise import tokenise
from worker.heart import Pace
from worker.model import base as bases
from worker.model import card
from worker.model.base import LoadedBase
from worker.training import fused
from worker.training.run import Paths, run
from worker.training.trainee import warm_up
from worker.training.workspace import keep_pages

TARGET, TENTHS = 0.2, range(1, 10)


@dataclass(frozen=True)
class Shape:
    """A job: examples to train on, to evaluate on, in a step; checkpoints come four times, as by default."""

    examples: int
    validation: int
    batch_size: int
    n_epochs: int = 1


SHAPES = {
    "many steps": Shape(examples=240, validation=0, batch_size=4),
    "many steps, evaluated": Shape(examples=200, validation=25, batch_size=4),
    "few steps": Shape(examples=160, validation=0, batch_size=8),
    "few steps, evaluated on as much": Shape(examples=120, validation=120, batch_size=6),
    "three epochs": Shape(examples=64, validation=16, batch_size=4, n_epochs=3),
}
QUICK = ("few steps", "few steps, evaluated on as much")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two runs instead of five")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tunesmith", metavar="DIR")
    asked = parser.parse_args()
    keep_pages()
    fused.keep_in(asked.cache_dir)
    base = catalog.load().resolve("smollm2-135m-instruct")
    loaded = bases.load(base, asked.cache_dir, for_training=True)
    warm_up(loaded)
    renderer = Renderer.open(card.prepared(base, asked.cache_dir))
    print(f"{'':32} {'steps':>5} {'seconds':>7}  error of the time left after each tenth")
    runs: dict[str, Any] = {}
    for name in QUICK if asked.quick else SHAPES:
        heard = _heard(SHAPES[name], base, loaded, renderer)
        runs[name] = heard
        print(f"{name:32} {heard['steps']:5} {heard['seconds']:7.1f} ", *(f"{error:+5.0%}" for error in heard["errors"]))
    targets = [
        {"name": f"{name}: {what}", "value": value, "target": TARGET, "ok": value <= TARGET}
        for name, heard in runs.items()
        for what, value in (("after a tenth", abs(heard["errors"][0])), ("worst of all tenths", max(map(abs, heard["errors"]))))
    ]
    for target in targets:
        print(f"{target['name']:55} {target['value']:5.0%}   target {TARGET:.0%}: {'met' if target['ok'] else 'MISSED'}")
    if asked.json:
        asked.json.write_text(json.dumps({"targets": targets, "runs": runs}, indent=2) + "\n")


def _heard(shape: Shape, base: catalog.Base, loaded: LoadedBase, renderer: Renderer) -> dict[str, Any]:
    """One run, and what was foretold of it."""
    pace, told, steps = Pace(), dict[int, tuple[float, float | None]](), list[Stepped]()

    def hear(event: Event) -> None:
        pace.note(event)
        if isinstance(event, Stepped):
            steps.append(event)
            told[event.step] = (time.monotonic(), pace.seconds_left)

    with tempfile.TemporaryDirectory() as folder:
        paths = _prepared(shape, renderer, Path(folder))
        began_at = time.monotonic()
        run(_spec(base.id, shape), paths, base, base_model=loaded, on_event=hear, should_stop=lambda: False)
    ended_at, total = time.monotonic(), steps[-1].total_steps
    errors = []
    for tenth in TENTHS:
        at, seconds_left = told[max(2, round(total * tenth / 10))]
        assert seconds_left is not None
        errors.append(seconds_left / (ended_at - at) - 1)
    return {"steps": total, "seconds": ended_at - began_at, "errors": errors}


def _spec(base: str, shape: Shape) -> TrainSpec:
    steps = shape.n_epochs * -(-shape.examples // shape.batch_size)
    return TrainSpec(
        base=base,
        n_epochs=shape.n_epochs,
        batch_size=shape.batch_size,
        seed=1,
        max_seq_length=1024,
        micro_batch_tokens=2048,
        checkpoint_every_steps=-(-steps // 4),
        optimizer=OptimizerSpec(learning_rate=1e-4),
    )


def _prepared(shape: Shape, renderer: Renderer, folder: Path) -> Paths:
    """Chats of one to twelve turns (log-normal), a few times as long as each other."""
    rng, turns = random.Random(1), _turns()
    for name, count in (("training", shape.examples), ("validation", shape.validation)):
        said = [rng.sample(turns, min(12, max(1, round(rng.lognormvariate(0.8, 0.9))))) for _ in range(count)]
        chats = [Chat(tuple(message for turn in chat for message in turn), line) for line, chat in enumerate(said, 1)]
        tokenise(chats, renderer, max_seq_length=1024).write(folder / f"{name}.safetensors")
    return Paths(
        dataset=folder / "training.safetensors",
        validation=folder / "validation.safetensors" if shape.validation else None,
        output=folder / "adapter",
        checkpoints=folder / "checkpoints",
        cache=folder,
    )


def _turns() -> list[tuple[Message, ...]]:
    """Questions with their answers."""
    lines = (Path(__file__).parents[1] / "cli" / "orders" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    return [tuple(Message(m["role"], m["content"]) for m in row if m["role"] != "system") for row in rows]


if __name__ == "__main__":
    main()
