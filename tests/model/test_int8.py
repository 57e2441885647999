import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from torch import Tensor, nn
from torch.nn import functional

from worker.model import int8
from worker.model.int8 import Int8Linear


@pytest.fixture
def layer() -> Int8Linear:
    """As a base's: with a bias, and frozen."""
    torch.manual_seed(1)
    like = nn.Linear(64, 32)
    weight_OI, absmax_O, _ = int8_vectorwise_quant(like.weight.data.half())
    made = Int8Linear(like, weight_OI, absmax_O)
    made.bias = like.bias
    return made.requires_grad_(False)


def gradient(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.square().sum(), x)[0]


@pytest.mark.parametrize("is_training", [True, False])
def test_a_layer_computes_with_its_dense_weights_there_and_back_in_either_mode(layer: Int8Linear, is_training: bool) -> None:
    layer.train(is_training)
    x = torch.randn(2, 5, 64, requires_grad=True)
    dense_OI = int8.dense(layer.weight.data, layer.weight.SCB, torch.float32)
    y, expected = layer(x), functional.linear(x, dense_OI, layer.bias)

    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient(y, x), gradient(expected, x))


def test_the_weights_are_not_kept_dense_for_the_way_back(layer: Int8Linear) -> None:
    kept = list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(torch.randn(5, 64, requires_grad=True))

    assert y.requires_grad and not kept


def test_under_autocast_it_computes_as_a_plain_layer_does(layer: Int8Linear) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 64)).dtype == nn.Linear(64, 32)(torch.randn(5, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_few_rows_and_many_are_computed_alike(layer: Int8Linear, rows: int) -> None:
    x = torch.randn(1, rows, 64).bfloat16()
    exact = functional.linear(x.float(), int8.dense(layer.weight.data, layer.weight.SCB, torch.float32), layer.bias)
    y = layer(x)

    assert (y.shape, y.dtype) == ((1, rows, 32), torch.bfloat16)
    torch.testing.assert_close(y.float(), exact, atol=0.02, rtol=0.02)  # outputs of about 1, in 8 bits of mantissa
