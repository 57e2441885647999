"""Attention over pages: both ways of computing it, held to plain attention over what each row may see."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from worker.inference import cache
from worker.inference.cache import KeyValuePool, Step

ROWS, HEADS, KV_HEADS, WIDTH, SIZE, PAGES = 5, 6, 2, 8, 4, 40
LENGTHS = (1, 4, 5, 17, 23)
WAYS = [cache.decode_on_cpu, cache.decode_anywhere]


@pytest.fixture
def pages() -> tuple[Tensor, Tensor]:
    """Keys and values, NaN wherever nobody of this test has written."""
    torch.manual_seed(3)
    return torch.full((PAGES, KV_HEADS, SIZE, WIDTH), torch.nan), torch.full((PAGES, KV_HEADS, SIZE, WIDTH), torch.nan)


def written(pages: tuple[Tensor, Tensor]) -> tuple[Step, list[Tensor]]:
    """Rows of different lengths, in pages that lie anywhere; and what stands in them, as [2, K, S, D]."""
    free, longest = torch.randperm(PAGES).tolist(), -(-max(LENGTHS) // SIZE)
    tables, texts = torch.zeros((ROWS, longest), dtype=torch.int32), []
    for row, length in enumerate(LENGTHS):
        text = torch.randn(2, KV_HEADS, length, WIDTH)
        for place in range(-(-length // SIZE)):
            tables[row, place] = page = free.pop()
            part = text[:, :, place * SIZE : (place + 1) * SIZE]
            for pool, what in zip(pages, part, strict=True):
                pool[page, :, : what.shape[1]] = what
        texts.append(text)
    empty = torch.empty(0)
    return Step(empty, empty, tables, torch.tensor(LENGTHS, dtype=torch.int32), ()), texts


@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("decode", WAYS)
def test_each_row_sees_its_own_pages_and_nothing_else(
    pages: tuple[Tensor, Tensor], decode: Callable[..., Tensor], window: int | None
) -> None:
    step, texts = written(pages)
    query_BHD = torch.randn(ROWS, HEADS, WIDTH)
    found_BHD = decode(query_BHD, *pages, step, 0.3, window)

    for row, text in enumerate(texts):
        keys_HSD, values_HSD = text[:, :, -(window or 1000) :].repeat_interleave(HEADS // KV_HEADS, dim=1)
        expected_H1D = functional.scaled_dot_product_attention(query_BHD[row, :, None], keys_HSD, values_HSD, scale=0.3)
        torch.testing.assert_close(found_BHD[row], expected_H1D[:, 0])


@pytest.mark.parametrize("decode", WAYS)
def test_a_broken_row_is_broken_alone(pages: tuple[Tensor, Tensor], decode: Callable[..., Tensor]) -> None:
    step, _ = written(pages)
    pages[0][step.tables_BJ[2, 0], 0, 1] = torch.nan
    found_BHD = decode(torch.randn(ROWS, HEADS, WIDTH), *pages, step, 0.3, None)

    assert torch.isfinite(found_BHD).flatten(1).all(dim=1).tolist() == [True, True, False, True, True]


def test_a_page_takes_what_it_is_said_to_take() -> None:
    config = SimpleNamespace(num_hidden_layers=3, num_key_value_heads=2, num_attention_heads=4, hidden_size=32)
    pool = KeyValuePool(config, count=5, size=4, dtype=torch.float32, device=torch.device("cpu"))
    taken = sum(part.nbytes for layer in range(3) for part in pool.layer(layer))

    assert taken == 5 * cache.page_bytes(config, size=4, dtype=torch.float32)
