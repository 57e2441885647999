"""Where a run fits, and how: tokens at once, accumulation, layers kept or computed again, the memory that it takes.

One function for all who ask: the job that is admitted, the dry run, `tunesmith plan`, and the trainer about the card that it has.
"""

import math
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from app.core import memory
from app.core.catalog import Architecture, Base
from app.core.memory import Device, Memory
from app.core.spec import LoraSpec, OptimizerKind, QuantizationSpec

# At 4,096 tokens at once an 8B spends 4 % of its time on making 4-bit weights dense, at 512 it is 23 %; computing layers again is
# half as much work again. So tokens are given up first, down to FEWEST_KEPT, and only then layers are computed again.
PREFERRED_TOKENS: dict[Device, int] = {"cpu": 2048, "cuda": 4096}
FEWEST_KEPT, FEWEST = 512, 128
_RANKS = (64, 32, 16, 8, 4)

Param = Literal[
    "tier", "model", "adapter.dropout", "adapter.use_dora", "adapter.rank", "quantization.scheme", "training.max_seq_length"
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Run(_Frozen):
    """What of a run decides its memory. Rows are never cut: at least `longest_tokens` are in memory at once. Where answers are
    compared, these are of `documents` that lie in memory together, each of at most `training.max_seq_length`.

    `micro_batch_tokens` is for who has no choice any more: a job that has been prepared.
    """

    model: Architecture
    lora: LoraSpec
    quantization: QuantizationSpec = QuantizationSpec()
    optimizer: OptimizerKind = "adamw_8bit"
    keeps_start: bool = False
    longest_tokens: int
    documents: int = 1
    mean_tokens: float
    batch_size: int
    micro_batch_tokens: int | None = None

    @property
    def needs_gpu(self) -> bool:
        """Paged states are a service of the card's driver."""
        return self.optimizer == "paged_adamw_8bit"


class Room(_Frozen):
    """A place to train in. `usable_bytes` is what a run may be predicted to take; None where memory is not planned.

    `reserved_bytes` are left to what shares the place: fragmentation, an engine, a trainer that waits.
    """

    tier: str
    device: Device
    usable_bytes: int | None
    reserved_bytes: int


class Plan(_Frozen):
    """A run in a room. `accumulation` is the usual number of micro-batches in a step."""

    room: Room
    fits: bool
    micro_batch_tokens: int
    accumulation: int
    is_checkpointing: bool
    memory: Memory


class Remedy(_Frozen):
    """One change that makes a run fit, alone: of the API's parameter of this name, or of the worker's tier."""

    param: Param
    value: str
    peak_bytes: int

    def __str__(self) -> str:
        match self.param:
            case "tier":
                return f"a worker of {self.value} GB"
            case "training.max_seq_length":
                return f"training.max_seq_length of {self.value}, which leaves longer rows out"
            case "model":
                return f"the model {self.value}"
            case _:
                return f"{self.param} of {self.value}"


def plan(run: Run, rooms: Sequence[Room]) -> Plan:
    """In the first room that holds the run: put the smallest first.

    Where none does, `fits` is false, and the plan is the leanest for the last of them: see `remedies`.
    """
    for room in rooms:
        for micro_batch_tokens, is_checkpointing in _choices(run, room.device):
            made = _planned(run, room, micro_batch_tokens, is_checkpointing)
            if made.fits:
                return made
    return made


def remedies(run: Run, room: Room, *, larger: Iterable[Room] = (), bases: Iterable[Base] = ()) -> tuple[Remedy, ...]:
    """What would fit into `room`, the most welcome first, and the first of `larger` rooms that would do. Each is enough alone.

    `bases` are what else could be tuned.
    """
    in_nf4 = run.model_copy(update={"quantization": QuantizationSpec()})
    found = [
        *_first_fitting(room, "adapter.dropout", ((0, _with_lora(run, dropout=0.0)) for _ in range(bool(run.lora.dropout)))),
        *_first_fitting(room, "adapter.use_dora", (("false", _with_lora(run, use_dora=False)) for _ in range(run.lora.use_dora))),
        *_first_fitting(room, "quantization.scheme", (("nf4", in_nf4) for _ in range(not run.quantization.is_4_bit))),
        *_shorter(run, room),
        *_first_fitting(room, "adapter.rank", ((r, _with_lora(run, rank=r)) for r in _RANKS if r < run.lora.rank)),
    ]
    for other in larger:
        if (made := plan(run, (other,))).fits:
            found.append(Remedy(param="tier", value=other.tier, peak_bytes=made.memory.peak_bytes))
            break
    smaller = sorted(bases, key=lambda base: -base.architecture.linear_parameters)
    candidates = ((base.id, run.model_copy(update={"model": base.architecture})) for base in smaller if _is_smaller(base, run))
    return (*found, *_first_fitting(room, "model", candidates))


def _choices(run: Run, device: Device) -> Iterator[tuple[int, bool]]:
    """Tokens at once and whether layers are computed again, the fastest first."""
    longest = run.longest_tokens
    if run.micro_batch_tokens is not None:
        given = max(longest, run.micro_batch_tokens)
        yield from ((given, False), (given, True))
        return
    wanted = max(longest, PREFERRED_TOKENS[device])
    for fewest, is_checkpointing in ((FEWEST_KEPT, False), (FEWEST, True)):
        yield from ((tokens, is_checkpointing) for tokens in _halved(wanted, at_least=max(longest, fewest)))


def _halved(tokens: int, *, at_least: int) -> Iterator[int]:
    yield tokens
    while tokens > at_least:
        tokens = max(tokens // 2, at_least)
        yield tokens


def _planned(run: Run, room: Room, micro_batch_tokens: int, is_checkpointing: bool) -> Plan:
    predicted = memory.predict(
        run.model,
        run.lora,
        micro_batch_tokens=micro_batch_tokens,
        trainer=memory.trainer_of(run.model, run.lora, room.device, run.optimizer),
        quantization=run.quantization,
        is_checkpointing=is_checkpointing,
        keeps_start=run.keeps_start,
    )
    return Plan(
        room=room,
        fits=room.usable_bytes is None or predicted.peak_bytes <= room.usable_bytes,
        micro_batch_tokens=micro_batch_tokens,
        accumulation=max(1, math.ceil(run.batch_size * run.mean_tokens / micro_batch_tokens)),
        is_checkpointing=is_checkpointing,
        memory=predicted,
    )


def _shorter(run: Run, room: Room) -> Iterator[Remedy]:
    """The longest rows that fit, in steps of 64 tokens; none where their length is not what hurts."""
    lengths = range(FEWEST, run.longest_tokens, 64)
    fitting = bisect(lengths, False, key=lambda length: not plan(_with_length(run, length), (room,)).fits)
    yield from _first_fitting(
        room, "training.max_seq_length", ((n // run.documents, _with_length(run, n)) for n in lengths[:fitting][-1:])
    )


def _first_fitting(room: Room, param: Param, tried: Iterable[tuple[object, Run]]) -> Iterator[Remedy]:
    for value, run in tried:
        made = plan(run, (room,))
        if made.fits:
            yield Remedy(param=param, value=str(value), peak_bytes=made.memory.peak_bytes)
            return


def _with_length(run: Run, tokens: int) -> Run:
    changes = {"longest_tokens": tokens, "mean_tokens": min(run.mean_tokens, tokens), "micro_batch_tokens": None}
    return run.model_copy(update=changes)


def _with_lora(run: Run, **changes: float) -> Run:
    return run.model_copy(update={"lora": run.lora.model_copy(update=changes)})


def _is_smaller(base: Base, run: Run) -> bool:
    return base.architecture.linear_parameters < run.model.linear_parameters
