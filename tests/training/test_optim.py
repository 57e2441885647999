import weakref

import pytest
import torch
from bitsandbytes.functional import GlobalPageManager
from torch import nn

from tests.training import make
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


def test_a_run_of_one_step_trains() -> None:
    assert learning_rate(1, 1, make.spec(optimizer={"learning_rate": 1.0}).optimizer) == 1.0
    assert learning_rate(1, 1, make.spec(optimizer={"learning_rate": 1.0, "warmup_ratio": 0}).optimizer) == 1.0


def test_it_steps_like_adamw_but_for_the_rounding_of_its_states() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(ours, make.spec(optimizer={"learning_rate": 0.01, "weight_decay": 0.1}).optimizer)
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
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
        assert (our - their).norm() / (their - before).norm() < 0.05


def test_gradients_are_clipped_together() -> None:
    held = parameters()
    optimizer = Optimizer(held, make.spec(optimizer={"max_grad_norm": 0.5}).optimizer)
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
