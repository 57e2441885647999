"""`python -m worker.training SPEC.json DATA.jsonl OUT_DIR`: one run without any service. SPEC.json is a TrainSpec."""

import argparse
from pathlib import Path

from app.core import catalog, data, events
from app.core.render import Renderer
from app.core.spec import TrainSpec
from worker.model import card
from worker.training import fused
from worker.training.run import Paths, run
from worker.training.split import split
from worker.training.token_file import TokenReader
from worker.training.tokenise import tokenise_to
from worker.training.workspace import keep_pages


def main() -> None:
    asked = _arguments()
    keep_pages()
    fused.keep_in(asked.cache_dir)
    spec = TrainSpec.model_validate_json(asked.spec.read_bytes())
    base = catalog.load(asked.catalog).resolve(spec.base)
    renderer = Renderer.open(card.prepared(base, asked.cache_dir))
    asked.out.mkdir(parents=True, exist_ok=True)
    training = _tokenised(asked.data, asked.out / "training.safetensors", renderer, spec)
    validation = _tokenised(asked.validation, asked.out / "validation.safetensors", renderer, spec) if asked.validation else None
    if spec.validation_split is not None:
        whole, training, validation = training, asked.out / "kept.safetensors", asked.out / "held_back.safetensors"
        with TokenReader(whole) as examples:
            split(examples, spec.validation_split, seed=spec.seed, kept=training, held_back=validation)
    paths = Paths(
        dataset=training,
        validation=validation,
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


def _tokenised(file: Path, into: Path, renderer: Renderer, spec: TrainSpec) -> Path:
    with file.open("rb") as lines:
        made = tokenise_to(into, data.read(lines), renderer, max_seq_length=spec.max_seq_length, long_rows=spec.long_rows)
    print(
        f"{file}: {made.examples} examples, {made.tokens} tokens, {made.trained_tokens} labelled,",
        f"{made.left_out_count} dropped, {made.rows_cut} truncated",
    )
    for problem in (*made.problems, *made.cut):
        print(f"  line {problem.line}: {problem.message}")
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
