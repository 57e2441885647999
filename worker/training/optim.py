"""AdamW on fp32 masters, and the schedule of its rate."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from app.core.spec import OptimizerKind, OptimizerSpec
from worker.model import bnb
from worker.training.failures import OptimizerUnsupported

_STATE = ("state1", "state2", "absmax1", "absmax2")  # what of bitsandbytes' state a step changes
_UPDATES = "updates"
_KINDS: dict[OptimizerKind, type[bnb.optim.optimizer.Optimizer2State]] = {
    "adamw_8bit": bnb.optim.AdamW8bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    "adamw_32bit": bnb.optim.AdamW32bit,
}


def learning_rate(step: int, total_steps: int, spec: OptimizerSpec) -> float:
    """Of a step counted from 1: a linear warm-up, then a fall that would reach its end one step after the last."""
    warmup = math.ceil(spec.warmup_ratio * total_steps)
    if step <= warmup:
        return spec.learning_rate * step / warmup
    progress = (step - 1 - warmup) / (total_steps - warmup)
    height = _height(progress, spec)
    return spec.learning_rate * (spec.min_rate_ratio + (1 - spec.min_rate_ratio) * height)


def _height(progress: float, spec: OptimizerSpec) -> float:
    """How much is left between the highest rate and the lowest."""
    match spec.scheduler:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - progress
        case "constant":
            return 1.0


class Optimizer:
    """Holds all trained parameters in a flat fp32 master, of which the model's own become views; two, where B learns faster.

    One tensor makes one update, one norm and one state instead of hundreds, and none is too small for 8-bit states. The state
    is plain memory unless paged states are asked for: bitsandbytes never frees those within a process. Raises
    OptimizerUnsupported for paged states without a GPU.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], spec: OptimizerSpec, *, faster: Iterable[nn.Parameter] = ()) -> None:
        """`faster` are those of `parameters` that learn `spec.lora_plus_ratio` times as fast."""
        if spec.kind == "paged_adamw_8bit" and parameters[0].device.type == "cpu":
            raise OptimizerUnsupported("paged optimizer states need a GPU, whose driver pages them; use adamw_8bit on a CPU")
        quick = {id(parameter) for parameter in faster} if spec.lora_plus_ratio != 1 else set[int]()
        slow, fast = ([one for one in parameters if (id(one) in quick) == is_fast] for is_fast in (False, True))
        masters = [_Master(slow, spec, ratio=1.0), *([_Master(fast, spec, ratio=spec.lora_plus_ratio)] if fast else [])]
        self._masters, self._max_norm = masters, spec.max_grad_norm

    @property
    def parameters(self) -> int:
        return sum(master.values.numel() for master in self._masters)

    @property
    def device(self) -> torch.device:
        return self._masters[0].values.device

    def clip(self) -> float:
        """Scale the gradients down to the spec's norm; returns the norm they had, not finite if any of them was not."""
        norm = math.hypot(*(float(master.gradient.norm()) for master in self._masters))
        if norm > self._max_norm:
            for master in self._masters:
                master.gradient.mul_(self._max_norm / norm)
        return norm

    def step(self, rate: float) -> None:
        for master in self._masters:
            master.step(rate)

    def zero_grad(self) -> None:
        for master in self._masters:
            master.gradient.zero_()  # in place: the model's gradients are views of it

    def state(self) -> dict[str, Tensor]:
        """What must be kept to go on, beside the parameters themselves."""
        return {f"{_of(index)}{name}": part for index, one in enumerate(self._masters) for name, part in one.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave. Raises KeyError or RuntimeError when it is another optimizer's."""
        for index, master in enumerate(self._masters):
            master.restore({name: state[f"{_of(index)}{name}"] for name in (*_STATE, _UPDATES) if f"{_of(index)}{name}" in state})


def _of(index: int) -> str:
    """Of the first master's state the names are bare: there was only one once."""
    return f"{index}." if index else ""


class _Master:
    """Parameters that learn at one rate, `ratio` times the schedule's."""

    def __init__(self, parameters: Sequence[nn.Parameter], spec: OptimizerSpec, *, ratio: float) -> None:
        self.values = nn.Parameter(torch.cat([parameter.detach().float().flatten() for parameter in parameters]))
        self.gradient = torch.zeros_like(self.values)
        self.values.grad = self.gradient
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.data = self.values.data[start:end].view(parameter.shape)
            parameter.grad = self.gradient[start:end].view(parameter.shape)
            start = end
        self._ratio = ratio
        self._adamw = _KINDS[spec.kind]([self.values], lr=spec.learning_rate, weight_decay=spec.weight_decay)

    def step(self, rate: float) -> None:
        self._adamw.param_groups[0]["lr"] = self._ratio * rate
        self._adamw.step()

    def state(self) -> dict[str, Tensor]:
        held = self._adamw.state[self.values]
        tensors = {name: held[name] for name in _STATE if name in held}
        return {**tensors, _UPDATES: torch.tensor(held.get("step", 0))}

    def restore(self, state: dict[str, Tensor]) -> None:
        updates = int(state[_UPDATES])
        if not updates:
            return
        self._adamw.init_state(self._adamw.param_groups[0], self.values, 0, 0)
        held = self._adamw.state[self.values]
        for name in _STATE:
            if name in held:
                held[name].copy_(state[name])
        held["step"] = updates
