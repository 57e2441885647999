"""A loop as everybody writes it, with transformers, PEFT and bitsandbytes, beside a whole run of ours in fp32: the same curve."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from app.core.events import Stepped
from app.core.spec import TARGETS, TrainSpec
from tests.training import make
from tests.training.make import Runner
from worker.model import adapter
from worker.model.base import LoadedBase
from worker.training import run
from worker.training.optim import Optimizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks by it
# rank 16: every matrix then is whole blocks of the 8-bit states, whether they lie side by side as ours or each alone
SPEC = make.spec(
    lora={"rank": 16, "alpha": 16},
    optimizer={"learning_rate": 5e-3, "weight_decay": 0.1, "max_grad_norm": 0.5},
)


@contextmanager
def plain_loop(base: LoadedBase, spec: TrainSpec) -> Iterator[tuple[Any, Iterator[tuple[float, Tensor]]]]:
    """A model, and the loss and gradient of each step that is taken on it."""
    torch.manual_seed(spec.seed)
    lora = peft.LoraConfig(r=spec.lora.rank, lora_alpha=spec.lora.alpha, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    base.model.config._attn_implementation = "sdpa"
    model = peft.get_peft_model(base.model, lora)
    yield model, plain_steps(model, base, spec)
    model.unload()


def plain_steps(model: Any, base: LoadedBase, spec: TrainSpec) -> Iterator[tuple[float, Tensor]]:
    examples, settings = [base.renderer.example(chat.messages) for chat in make.chats()], spec.optimizer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(
        parameters, settings.learning_rate, weight_decay=settings.weight_decay, min_8bit_size=1
    )
    total = spec.total_steps(len(examples))
    warmup = math.ceil(settings.warmup_ratio * total)

    def share_of_rate(done: int) -> float:
        return (done + 1) / warmup if done < warmup else (1 + math.cos(math.pi * (done - warmup) / (total - warmup))) / 2

    rate = LambdaLR(optimizer, share_of_rate)
    for epoch in range(spec.n_epochs):
        order = np.random.default_rng([spec.seed, epoch]).permutation(len(examples))
        for chosen in order.reshape(-1, spec.batch_size):
            loss_sum, labelled = torch.zeros(()), 0
            for example in (examples[index] for index in chosen):
                labels_T = torch.tensor([t if flag else -100 for t, flag in zip(example.tokens, example.is_trained, strict=True)])
                logits_TV = model(input_ids=torch.tensor([example.tokens])).logits[0]
                loss_sum = loss_sum + functional.cross_entropy(logits_TV[:-1], labels_T[1:], reduction="sum")
                labelled += int((labels_T[1:] != -100).sum())
            loss = loss_sum / labelled
            loss.backward()
            gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            yield float(loss.detach()), gradient


def weights_of(model: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in adapter.tensors_of(model).values()])


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 8])
def test_a_whole_run_is_that_of_a_plain_loop(
    exact: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_tokens: int
) -> None:
    """With all documents of a step at once, and with each alone."""
    gradients = []

    class Noting(Optimizer):
        def clip(self) -> float:
            (master,) = self._masters  # without LoRA+ there is one
            gradients.append(master.gradient.clone())
            return super().clip()

    monkeypatch.setattr(run, "Optimizer", Noting)
    runner = Runner(exact, tmp_path)
    runner.go(SPEC.model_copy(update={"micro_batch_tokens": micro_batch_tokens}))
    with plain_loop(exact, SPEC) as (model, steps):
        start = weights_of(model)
        theirs = list(steps)
        their_weights = weights_of(model)

    ours = runner.of(Stepped)
    assert len(ours) == len(theirs) == 6
    for step, gradient, (loss, their_gradient) in zip(ours, gradients, theirs, strict=True):
        assert step.train_loss == pytest.approx(loss, rel=1e-5)
        assert step.grad_norm == pytest.approx(float(their_gradient.norm()), rel=1e-3)
        assert functional.cosine_similarity(gradient, their_gradient, dim=0) > 0.9999
    opened = adapter.open(runner.paths.output, base=exact, max_rank=16)
    our_weights = torch.cat([tensor.flatten() for pair in opened.modules.values() for tensor in pair])
    assert float((our_weights - their_weights).norm() / (their_weights - start).norm()) < 5e-3  # 8-bit states round
