import weakref
from typing import Any

import pytest
import torch
from bitsandbytes.functional import GlobalPageManager
from torch import nn

from tests.training import make
from worker.training.failures import OptimizerUnsupported
from worker.training.optim import Optimizer, learning_rate


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(40, 100)), nn.Parameter(torch.randn(60, 50))]


def test_the_rate_warms_up_and_then_falls_to_nothing() -> None:
    asked = make.spec(optimizer={"learning_rate": 1.0, "warmup_ratio": 0.1}).optimizer
    rates = [learning_rate(step, 100, asked) for step in range(1, 101)]

    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"scheduler": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"scheduler": "linear", "min_rate_ratio": 0.2}, [1.0, 0.8, 0.6, 0.4]),
        ({"scheduler": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"scheduler": "cosine"}, [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        ({"scheduler": "cosine", "min_rate_ratio": 0.2}, [1.0, 0.6 + 0.8 * 0.5**1.5, 0.6, 0.6 - 0.8 * 0.5**1.5]),
    ],
)
def test_after_the_warm_up_the_rate_falls_as_its_scheduler_says(asked: dict[str, Any], expected: list[float]) -> None:
    spec = make.spec(optimizer={"learning_rate": 1.0, "warmup_ratio": 0.2, **asked}).optimizer

    assert [learning_rate(step, 5, spec) for step in range(2, 6)] == pytest.approx(expected)


def test_a_run_of_one_step_trains() -> None:
    assert learning_rate(1, 1, make.spec(optimizer={"learning_rate": 1.0}).optimizer) == 1.0
    assert learning_rate(1, 1, make.spec(optimizer={"learning_rate": 1.0, "warmup_ratio": 0}).optimizer) == 1.0


@pytest.mark.parametrize(("kind", "tolerance"), [("adamw_8bit", 0.05), ("adamw_32bit", 1e-5)])
@pytest.mark.parametrize("ratio", [1, 16])
def test_it_steps_like_adamw_but_for_the_rounding_of_its_states(kind: str, tolerance: float, ratio: int) -> None:
    """With a ratio the second one learns faster, as in LoRA+."""
    ours, theirs = parameters(), parameters()
    asked = {"learning_rate": 0.01, "weight_decay": 0.1, "kind": kind, "lora_plus_ratio": ratio}
    optimizer = Optimizer(ours, make.spec(optimizer=asked).optimizer, faster=ours[1:])
    groups = [{"params": theirs[:1], "lr": 0.01}, {"params": theirs[1:], "lr": 0.01 * ratio}]
    reference = torch.optim.AdamW(groups, weight_decay=0.1)
    start = [parameter.detach().clone() for parameter in theirs]

    for _ in range(10):
        for parameter in (*ours, *theirs):
            (parameter**2).sum().mul(0.001).backward()
        optimizer.clip()
        optimizer.step(0.01)
        optimizer.zero_grad()
        reference.step()
        reference.zero_grad()

    for our, their, before in zip(ours, theirs, start, strict=True):
        assert (our - their).norm() / (their - before).norm() < tolerance


@pytest.mark.parametrize("ratio", [1, 16])
def test_gradients_are_clipped_together(ratio: int) -> None:
    held = parameters()
    asked = make.spec(optimizer={"max_grad_norm": 0.5, "lora_plus_ratio": ratio}).optimizer
    optimizer = Optimizer(held, asked, faster=held[1:])
    sum((parameter**2).sum() for parameter in held).backward()

    norm = optimizer.clip()

    assert norm == pytest.approx(float(torch.cat([2 * parameter.detach().flatten() for parameter in held]).norm()))
    assert float(torch.cat([parameter.grad.flatten() for parameter in held]).norm()) == pytest.approx(0.5)


def test_states_take_8_bits_and_are_freed_with_the_optimizer() -> None:
    optimizer = Optimizer(parameters(), make.spec().optimizer)
    optimizer.step(0.1)
    assert {tensor.dtype for name, tensor in optimizer.state().items() if name.startswith("state")} == {torch.uint8}

    state = weakref.ref(optimizer.state()["state1"])
    del optimizer
    assert state() is None
    assert GlobalPageManager.get_instance().paged_tensors == []


def test_paged_states_are_refused_where_nothing_can_page_them() -> None:
    with pytest.raises(OptimizerUnsupported, match="use adamw_8bit"):
        Optimizer(parameters(), make.spec(optimizer={"kind": "paged_adamw_8bit"}).optimizer)
