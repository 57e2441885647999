"""`python -m worker.training SPEC.json DATA.jsonl OUT_DIR`: one run without any service. SPEC.json is a TrainSpec."""

import argparse
from pathlib import Path

from app.core import catalog, data, events
from app.core.render import Renderer
from app.core.spec import TrainSpec
from worker.model import card
from worker.training import fused
from worker.training.run import Paths, run
from worker.training.tokenise import tokenise
from worker.training.workspace import keep_pages


def main() -> None:
    asked = _arguments()
    keep_pages()
    fused.keep_in(asked.cache_dir)
    spec = TrainSpec.model_validate_json(asked.spec.read_bytes())
    base = catalog.load(asked.catalog).resolve(spec.base)
    renderer = Renderer.open(card.prepared(base, asked.cache_dir))
    asked.out.mkdir(parents=True, exist_ok=True)
    paths = Paths(
        dataset=_tokenised(asked.data, renderer, spec, asked.out / "training.safetensors"),
        validation=asked.validation and _tokenised(asked.validation, renderer, spec, asked.out / "validation.safetensors"),
        output=asked.out / "adapter",
        checkpoints=asked.out / "checkpoints",
        cache=asked.cache_dir,
    )
    run(spec, paths, base, on_event=_print, should_stop=lambda: False)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.training", description=__doc__)
    parser.add_argument("spec", type=Path, metavar="SPEC.json")
    parser.add_argument("data", type=Path, metavar="DATA.jsonl")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--validation", type=Path, metavar="DATA.jsonl")
    parser.add_argument("--catalog", type=Path, metavar="FILE", help="an operator's catalog, laid over the built-in one")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tunesmith", metavar="DIR")
    return parser.parse_args()


def _tokenised(file: Path, renderer: Renderer, spec: TrainSpec, into: Path) -> Path:
    with file.open("rb") as lines:
        made = tokenise(data.read(lines), renderer, max_seq_length=spec.max_seq_length)
    print(
        f"{file}: {made.examples} examples, {made.tokens} tokens, {made.labelled_tokens} labelled, {made.dropped_count} dropped"
    )
    for problem in made.dropped:
        print(f"  line {problem.line}: {problem.message}")
    made.write(into)
    return into


def _print(event: events.Event) -> None:
    match event:
        case events.Stepped():
            print(
                f"step {event.step}/{event.total_steps}  loss {event.train_loss:.4f}",
                f"accuracy {event.train_mean_token_accuracy:.3f}  norm {event.grad_norm:.2f}",
                f"rate {event.learning_rate:.2e}  {event.tokens_per_second:.0f} tokens/s",
                sep="  ",
                flush=True,
            )
        case _:
            print(event.model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
