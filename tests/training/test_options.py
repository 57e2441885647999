"""Each option trains, is resumed to the same bits, and is served as PEFT computes it."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from app.core.spec import QUANTIZATIONS, QuantizationSpec, TrainSpec
from tests.training import make, matrix
from tests.training.matrix import CASES, Case
from worker.model import adapter
from worker.model.adapter import AdapterRefused
from worker.model.base import LoadedBase
from worker.training.decoder import Decoder
from worker.training.trainee import adapted

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks by it


FORWARD = {True: "written out", False: "transformers'"}


Load = Callable[[QuantizationSpec, torch.dtype], LoadedBase]


@pytest.fixture(scope="session")
def fresh(bases_dir: Path) -> Load:
    """A base that no other test hooks into."""
    return partial(matrix.load, bases_dir)


@pytest.fixture(scope="session")
def shared(fresh: Load) -> Load:
    """One that is left as it was."""
    return cache(fresh)


@pytest.fixture(scope="session")
def usual(tiny: LoadedBase, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What comes of a run without options."""
    return matrix.trained(tiny, CASES[0].asked(), tmp_path_factory.mktemp("usual")).weights


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.option)
def test_an_option_trains_resumes_and_is_served(case: Case, usual: bytes, shared: Load, fresh: Load, tmp_path: Path) -> None:
    held = case.asked().quantization
    base, exact = shared(held, torch.bfloat16), shared(held, torch.float32)
    straight = matrix.trained(base, case.asked(), tmp_path / "straight")
    assert matrix.is_learning(straight)
    assert (straight.weights == usual) == (case is CASES[0])
    with adapted(base, case.asked()) as trainee:
        assert isinstance(trainee.decoder, Decoder) == case.quick

    assert matrix.resumed(base, case.asked(), tmp_path / "resumed").weights == straight.weights

    exactly = matrix.trained(exact, case.asked(), tmp_path / "exact") if case.asked().lora.use_dora else straight
    theirs = matrix.of_peft(exact, exactly.paths.output)  # with DoRA it asks how long its own weights are, in fp32
    torch.testing.assert_close(matrix.served(fresh(held, torch.float32), exactly.paths.output), theirs, atol=1e-4, rtol=1e-4)
    assert (matrix.of_base(exact) - theirs).abs().max() > 0.01  # the adapter says something


def test_a_base_held_in_another_way_is_refused_with_both_ways(shared: Load, tmp_path: Path) -> None:
    for name, held in QUANTIZATIONS.items():
        asked: TrainSpec = make.spec(quantization=held, n_epochs=1)
        directory = matrix.trained(shared(held, torch.bfloat16), asked, tmp_path / name).paths.output
        for other, held_otherwise in QUANTIZATIONS.items():
            base = shared(held_otherwise, torch.bfloat16)
            if other == name:
                assert adapter.open(directory, base=base, max_rank=16).rank == 4
                continue
            with pytest.raises(AdapterRefused, match=rf"in {name} \(\w+\), than {base.entry.id} in {other} \("):
                adapter.open(directory, base=base, max_rank=16)


def test_the_document_shows_every_case() -> None:
    document = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    rows = [f"| {case.option} | {FORWARD[case.quick]} | yes | yes | yes |" for case in CASES]

    assert [row for row in rows if row not in document] == []
