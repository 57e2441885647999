"""Every training option tried on the tiny base, as a table: docs/options.md holds it.

    PYTHONPATH=. python bench/options.py [--cache-dir DIR]

Trained straight, and stopped and resumed; then served, beside PEFT with the same files. Memory is the planner's, of an 8B
with 4,096 tokens at once. The tests of tests/training/test_options.py demand what is shown here.
"""

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from app.core import catalog, memory
from tests.training import matrix
from tests.training.matrix import CASES, Case

EIGHT, TOKENS = "llama-3.1-8b-instruct", 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tunesmith", metavar="DIR")
    cache_dir = parser.parse_args().cache_dir
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    torch.set_num_threads(1)
    print("| option | forward | learns | resumed: the same bits | served as PEFT computes it | an 8B, 4,096 tokens at once |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        print("| " + " | ".join(_cells(case, cache_dir)) + " |", flush=True)


def _cells(case: Case, cache_dir: Path) -> Iterator[str]:
    load = partial(matrix.load, cache_dir, case.asked().quantization)
    training, exact = load(torch.bfloat16), load(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        straight = matrix.trained(training, case.asked(), Path(folder) / "straight")
        again = matrix.resumed(training, case.asked(), Path(folder) / "resumed")
        is_same = again.weights == straight.weights
        shown = matrix.trained(exact, case.asked(), Path(folder) / "exact").paths.output
        theirs, ours = matrix.of_peft(load(torch.float32), shown), matrix.served(load(torch.float32), shown)
    yield case.option
    yield "written out" if case.quick else "transformers'"
    yield _said(matrix.is_learning(straight))
    yield _said(is_same)
    yield _said(torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4))
    yield f"{_peak_bytes(case) / memory.GIB:.1f} GiB"


def _peak_bytes(case: Case) -> int:
    """Of this option on a model that memory is planned for, at the rank it has here."""
    model, asked = catalog.load()[EIGHT].architecture, case.asked()
    trainer = memory.trainer_of(model, asked.lora, "cuda", asked.optimizer.kind)
    predicted = memory.predict(model, asked.lora, micro_batch_tokens=TOKENS, trainer=trainer, quantization=asked.quantization)
    return predicted.peak_bytes


def _said(is_so: bool) -> str:
    return "yes" if is_so else "NO"


if __name__ == "__main__":
    main()
