"""AdamW with 8-bit states on fp32 masters, and the schedule of its rate."""

import math
from collections.abc import Sequence

import bitsandbytes
import torch
from torch import Tensor, nn

from app.core.spec import OptimizerSpec

_STATE = ("state1", "state2", "absmax1", "absmax2")  # what of bitsandbytes' state a step changes


def learning_rate(step: int, total_steps: int, spec: OptimizerSpec) -> float:
    """Of a step counted from 1: a linear warm-up, then a cosine that would reach zero one step after the last."""
    warmup = math.ceil(spec.warmup_ratio * total_steps)
    if step <= warmup:
        return spec.learning_rate * step / warmup
    progress = (step - 1 - warmup) / (total_steps - warmup)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizer:
    """Holds all trained parameters in one flat fp32 master, of which the model's own become views.

    One tensor makes one update, one norm and one state instead of hundreds, and none is too small for 8-bit states. The state
    is plain memory: bitsandbytes never frees the paged kind within a process.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], spec: OptimizerSpec) -> None:
        self._master = nn.Parameter(torch.cat([parameter.detach().float().flatten() for parameter in parameters]))
        self._gradient = torch.zeros_like(self._master)
        self._master.grad = self._gradient
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.data = self._master.data[start:end].view(parameter.shape)
            parameter.grad = self._gradient[start:end].view(parameter.shape)
            start = end
        self._adamw = bitsandbytes.optim.AdamW8bit([self._master], lr=spec.learning_rate, weight_decay=spec.weight_decay)
        self._max_norm = spec.max_grad_norm

    @property
    def parameters(self) -> int:
        return self._master.numel()

    @property
    def device(self) -> torch.device:
        return self._master.device

    def clip(self) -> float:
        """Scale the gradients down to the spec's norm; returns the norm they had, not finite if any of them was not."""
        norm = float(self._gradient.norm())
        if norm > self._max_norm:
            self._gradient.mul_(self._max_norm / norm)
        return norm

    def step(self, rate: float) -> None:
        self._adamw.param_groups[0]["lr"] = rate
        self._adamw.step()

    def zero_grad(self) -> None:
        self._gradient.zero_()  # in place: the model's gradients are views of it

    def state(self) -> dict[str, Tensor]:
        """What must be kept to go on, beside the parameters themselves."""
        held = self._adamw.state[self._master]
        tensors = {name: held[name] for name in _STATE if name in held}
        return {**tensors, "updates": torch.tensor(held.get("step", 0))}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave. Raises KeyError or RuntimeError when it is another optimizer's."""
        updates = int(state["updates"])
        if not updates:
            return
        self._adamw.init_state(self._adamw.param_groups[0], self._master, 0, 0)
        held = self._adamw.state[self._master]
        for name in _STATE:
            if name in held:
                held[name].copy_(state[name])
        held["step"] = updates
