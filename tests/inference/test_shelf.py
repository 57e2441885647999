"""Where active adapters lie side by side, and the two ways of computing with them."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from worker.inference.lora import LoraWeights
from worker.inference.lora_layers import Grouped, Masked, Products
from worker.inference.shelf import Shelf

CPU, INSIDE, OUTSIDE = torch.device("cpu"), 24, 40
MODULES = ("q_proj", "v_proj")


def adapter(number: int, *, rank: int, modules: Sequence[str] = MODULES) -> LoraWeights:
    noise = torch.Generator().manual_seed(number)
    made = {name: tuple(torch.randn(rank, width, generator=noise) for width in (INSIDE, OUTSIDE)) for name in modules}
    return LoraWeights(rank, {name: (a_RI, b_RO) for name, (a_RI, b_RO) in made.items()}, {})


ADAPTERS = [adapter(number, rank=rank, modules=MODULES[: 1 + number % 2]) for number, rank in enumerate((1, 2, 3, 4, 5, 8, 13))]


@given(some.lists(some.sets(some.sampled_from(range(len(ADAPTERS))), min_size=1), min_size=1, max_size=20))
def test_whoever_comes_and_goes_each_lies_in_ranks_of_its_own(batches: list[set[int]]) -> None:
    shelf = Shelf(torch.float32, CPU)
    for batch in batches:
        active = [ADAPTERS[number] for number in sorted(batch)]
        shelf.hold(active)
        taken = np.zeros(shelf.end, int)
        for weights, start in shelf.starts.items():
            taken[start : start + weights.rank] += 1
            for name in MODULES:
                if (pair := shelf.matrices(name)) is None:
                    assert name not in weights.modules
                    continue
                for whole, part in zip(pair, weights.modules.get(name, (torch.zeros(1), torch.zeros(1))), strict=True):
                    lies = whole[start : start + weights.rank]
                    assert torch.equal(lies, part.expand_as(lies))
        assert set(active) <= shelf.starts.keys() and taken.max() == 1
        assert shelf.end <= 2 * sum(weights.rank for weights in active), "most of the work would be for nobody"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [Masked, Grouped])
def test_rows_get_what_their_own_adapters_add(way: type[Products], dtype: torch.dtype) -> None:
    shelf = Shelf(torch.float32, CPU)
    shelf.hold(ADAPTERS)
    shares_TA = torch.zeros(40, len(ADAPTERS))
    for row in range(30):  # the others are the base's
        shares_TA[row, row % 5] = 1
    shares_TA[4], shares_TA[17] = torch.tensor([0.5, 0, 0, -0.25, 0, 0, 1]), torch.tensor([0, 0, 2, 0, 0, 0, 0.0])
    x_TI, before_TO = torch.randn(40, INSIDE).to(dtype), torch.randn(40, OUTSIDE).to(dtype)
    expected_TO = before_TO.double()
    for weights, shares_T in zip(ADAPTERS, shares_TA.T, strict=True):
        a_RI, b_RO = (part.double() for part in weights.modules["q_proj"])
        expected_TO += shares_T[:, None].double() * (x_TI.double() @ a_RI.T @ b_RO)
    pair = shelf.matrices("q_proj")
    assert pair is not None

    after_TO, error = before_TO.clone(), 1e-5 if dtype == torch.float32 else 2**-7
    way(shares_TA, shelf).add(x_TI, after_TO, *pair)
    torch.testing.assert_close(after_TO, expected_TO.to(dtype), rtol=error, atol=10 * error)
    assert torch.equal(after_TO[30:], before_TO[30:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [Masked, Grouped])
def test_an_overflow_stays_with_the_rows_that_have_it(way: type[Products], dtype: torch.dtype) -> None:
    shelf = Shelf(torch.float32, CPU)
    broken = LoraWeights(2, {"q_proj": (torch.full((2, INSIDE), 1e38), torch.ones(2, OUTSIDE))}, {})  # finite, as all served
    shelf.hold([ADAPTERS[0], broken])
    shares_TA = torch.tensor([[1.0, 0], [0, 1], [0, 0], [1, 0]])
    pair = shelf.matrices("q_proj")
    assert pair is not None
    x_TI, out_TO = torch.ones(4, INSIDE, dtype=dtype), torch.zeros(4, OUTSIDE, dtype=dtype)
    x_TI[3] = torch.inf
    way(shares_TA, shelf).add(x_TI, out_TO, *pair)
    assert out_TO[[0, 2]].isfinite().all()
    assert not out_TO[[1, 3]].isfinite().any()
