"""Each option trains, is resumed to the same bits, and is served as PEFT computes it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app.core import catalog
from tests.make import TINY
from tests.training import matrix
from tests.training.matrix import CASES, Case
from worker.model import base as bases
from worker.model.base import LoadedBase
from worker.training.decoder import Decoder
from worker.training.trainee import adapted

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks by it


FORWARD = {True: "written out", False: "transformers'"}


@pytest.fixture(scope="session")
def plain(bases_dir: Path) -> LoadedBase:
    """A base in fp32 that no other test hooks into."""
    return bases.load(catalog.load()[TINY], bases_dir, device="cpu", dtype=torch.float32, for_training=False)


@pytest.fixture
def fresh(bases_dir: Path) -> Callable[[], LoadedBase]:
    return lambda: bases.load(catalog.load()[TINY], bases_dir, device="cpu", dtype=torch.float32, for_training=False)


@pytest.fixture(scope="session")
def usual(tiny: LoadedBase, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What comes of a run without options."""
    return matrix.trained(tiny, CASES[0].asked(), tmp_path_factory.mktemp("usual")).weights


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.option)
def test_an_option_trains_resumes_and_is_served(
    case: Case,
    usual: bytes,
    tiny: LoadedBase,
    exact: LoadedBase,
    plain: LoadedBase,
    fresh: Callable[[], LoadedBase],
    tmp_path: Path,
) -> None:
    straight = matrix.trained(tiny, case.asked(), tmp_path / "straight")
    assert matrix.is_learning(straight)
    assert (straight.weights == usual) == (case is CASES[0])
    with adapted(tiny, case.asked()) as trainee:
        assert isinstance(trainee.decoder, Decoder) == case.quick

    assert matrix.resumed(tiny, case.asked(), tmp_path / "resumed").weights == straight.weights

    exactly = matrix.trained(exact, case.asked(), tmp_path / "exact") if case.asked().lora.use_dora else straight
    theirs = matrix.of_peft(plain, exactly.paths.output)  # with DoRA it asks how long its own weights are, in fp32
    torch.testing.assert_close(matrix.served(fresh(), exactly.paths.output), theirs, atol=1e-4, rtol=1e-4)
    assert (matrix.of_base(plain) - theirs).abs().max() > 0.01  # the adapter says something


def test_the_document_shows_every_case() -> None:
    document = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    rows = [f"| {case.option} | {FORWARD[case.quick]} | yes | yes | yes |" for case in CASES]

    assert [row for row in rows if row not in document] == []
