"""How a value is said here that another tool says otherwise."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from app.core.spec import TARGETS

# both tools take the trainer's names, of which these are AdamW's; Axolotl and TRL differ in nothing of it
OPTIMIZERS: Final = {
    "adamw_torch": "adamw_32bit",
    "adamw_torch_fused": "adamw_32bit",
    "adamw_torch_xla": "adamw_32bit",
    "adamw_torch_npu_fused": "adamw_32bit",
    "adamw_apex_fused": "adamw_32bit",
    "adamw_hf": "adamw_32bit",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "adamw_32bit",
}
SCHEDULERS: Final = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
}


class NotHere(Exception):
    """A value that has no counterpart. `instead` is the next best thing."""

    def __init__(self, why: str, instead: str) -> None:
        super().__init__(why)
        self.why, self.instead = why, instead


def _as_is(value: Any) -> Any:
    return value


def _number(value: Any) -> Any:
    """YAML 1.1 reads `2e-4` as text."""
    if isinstance(value, str):
        try:
            return _number(float(value))
        except ValueError:
            raise NotHere(f"{value!r} is no number", "a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise NotHere(f"{value!r} is no number", "a number")
    return value


def _whole(value: Any) -> Any:
    number = _number(value)
    if isinstance(number, float):
        if not number.is_integer():
            raise NotHere("it is counted in whole numbers here", f"{max(1, round(number))}")
        return int(number)
    return number


def _ratio(value: Any) -> Any:
    """Below 1 it is a part of all steps; above, it counts steps."""
    number = _number(value)
    if number >= 1:
        raise NotHere("the warm-up is a part of all steps here", "training.warmup_ratio")
    return float(number)


def _split(value: Any) -> Any:
    number = _number(value)
    return int(number) if number >= 1 else number or None


def _optimizer(value: Any) -> str:
    if isinstance(value, str) and value in OPTIMIZERS:
        return OPTIMIZERS[value]
    raise NotHere(f"the optimizer {value} is not offered", "training.optimizer: adamw_8bit, paged_adamw_8bit or adamw_32bit")


def _scheduler(value: Any) -> str:
    if isinstance(value, str) and value in SCHEDULERS:
        return SCHEDULERS[value]
    raise NotHere(f"the scheduler {value} is not offered", "training.scheduler: cosine, linear or constant")


def _long_rows(value: Any) -> str:
    if value == "drop":
        return "drop"
    raise NotHere("a row that is too long is left out, or loses its beginning", "training.long_rows: truncate")


def _truncation(value: Any) -> str:
    if value == "keep_end":
        return "truncate"
    raise NotHere("a row that is too long is left out, or loses its beginning", "training.long_rows: truncate")


def _initialisation(value: Any) -> Any:
    if value in (True, False, "gaussian", "orthogonal"):
        return value
    raise NotHere("it needs a pass over the base", "adapter.init_lora_weights: true, gaussian or orthogonal")


def targets(value: Any) -> Any:
    """Of `lora_target_modules`, a list or one name."""
    names = value if isinstance(value, list) else [value]
    if names in (["all-linear"], ["all_linear"], ["linear"]):
        return "all-linear"
    if strange := [name for name in names if name not in TARGETS]:
        raise NotHere(f"{', '.join(map(str, strange))}: not a linear module of a layer", f"some of {', '.join(TARGETS)}")
    return names


HOWS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "as is": _as_is,
    "number": _number,
    "whole": _whole,
    "ratio": _ratio,
    "split": _split,
    "optimizer": _optimizer,
    "scheduler": _scheduler,
    "long_rows": _long_rows,
    "truncation": _truncation,
    "initialisation": _initialisation,
}
