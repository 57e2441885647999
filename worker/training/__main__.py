"""`python -m worker.training SPEC.json DATA.jsonl OUT_DIR`: one run without any service. SPEC.json is a TrainSpec.

The first Ctrl-C ends it with a checkpoint, the second at once. The same command goes on from the newest checkpoint.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from app.core import catalog, data, events, manifest
from app.core.errors import AppError
from app.core.render import Renderer
from app.core.spec import Start, TrainSpec
from app.core.tokens.tokenise import tokenise_to
from worker.model import card
from worker.training import fused
from worker.training.failures import failed
from worker.training.loop import ShouldStop
from worker.training.run import Paths, run
from worker.training.workspace import keep_pages


def main() -> None:
    asked = _arguments()
    keep_pages()
    fused.keep_in(asked.cache_dir)
    try:
        with _interruptible() as should_stop:
            _train(asked, should_stop)
    except data.RowError as error:
        sys.exit(f"line {error.problem.line}: {error}")
    except (AppError, OSError, ValidationError, manifest.Damaged) as error:
        sys.exit(str(error))
    except Exception as error:
        said = failed(error)
        if said.code == events.INTERNAL_ERROR:
            raise
        sys.exit(f"{said.code}: {said.message}")


def _train(asked: argparse.Namespace, should_stop: ShouldStop) -> None:
    spec = TrainSpec.model_validate_json(asked.spec.read_bytes())
    if asked.continue_from:
        start = Start(model=str(asked.continue_from), digest=manifest.read(asked.continue_from).digest)
        spec = spec.model_copy(update={"continue_from": start})
    base = catalog.load(asked.catalog).resolve(spec.base)
    renderer = Renderer.open(card.prepared(base, asked.cache_dir))
    asked.out.mkdir(parents=True, exist_ok=True)
    paths = Paths(
        dataset=_tokenised(asked.data, asked.out / "training.safetensors", renderer, spec),
        validation=asked.validation and _tokenised(asked.validation, asked.out / "validation.safetensors", renderer, spec),
        start=asked.continue_from,
        output=asked.out / "adapter",
        checkpoints=asked.out / "checkpoints",
        cache=asked.cache_dir,
    )
    run(spec, paths, base, micro_batch_tokens=asked.micro_batch_tokens, on_event=_print, should_stop=should_stop)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m worker.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", type=Path, metavar="SPEC.json")
    parser.add_argument("data", type=Path, metavar="DATA.jsonl")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--validation", type=Path, metavar="DATA.jsonl")
    parser.add_argument("--continue-from", type=Path, metavar="ADAPTER_DIR", help="begin with its weights, of the spec's shape")
    parser.add_argument("--micro-batch-tokens", type=_positive, metavar="N", help="fewer than the spec's: less memory")
    parser.add_argument("--catalog", type=Path, metavar="FILE", help="an operator's catalog, laid over the built-in one")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tunesmith", metavar="DIR")
    return parser.parse_args()


def _positive(said: str) -> int:
    if not said.isdecimal() or int(said) < 1:
        raise argparse.ArgumentTypeError(f"{said!r} is no number of tokens")
    return int(said)


@contextmanager
def _interruptible() -> Iterator[ShouldStop]:
    """Whether Ctrl-C has been pressed. A second one is as rude as ever."""
    stopping = threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopping.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _tokenised(file: Path, into: Path, renderer: Renderer, spec: TrainSpec) -> Path:
    with file.open("rb") as lines:
        made = tokenise_to(into, data.read(lines), renderer, max_seq_length=spec.max_seq_length, long_rows="drop")
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
