"""`tunesmith plan`: what a run would take, part by part, and where it fits. Nothing is downloaded."""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from cli.failure import Failed
from cli.options import AsJson
from cli.output import show

if TYPE_CHECKING:
    from app.core.catalog import Base, Size
    from app.core.planner import Plan, Remedy, Room, Run
    from app.core.settings import GpuSettings
    from app.core.spec import LoraSpec

BAR = 40
PARTS = {
    "weights": "weights of the base",
    "adapter": "adapter and its optimizer",
    "checkpoints": "inputs of layers computed again",
    "layers": "layers, kept for the backward",
    "passing": "one layer's backward",
    "head": "logits, a few rows at once",
    "dequantized": "one weight, made dense",
    "slack": "fragmentation",
    "context": "libraries and context",
}


class Beside(StrEnum):
    """Who else is on the card."""

    ENGINE = "engine"
    TRAINER = "trainer"


# app.core.spec has these words, and is not imported yet
Way = Annotated[Literal["nf4", "nf4-single", "fp4", "fp4-single", "int8", "none"], Option(help="How the base is held.")]
Model = Annotated[str, Argument(metavar="MODEL", help="A base model, its alias, or a plain size such as llama-65b.")]
Tier = Annotated[Literal["cpu", "16", "24", "40", "48", "80"] | None, Option(help="Where it shall fit, in GB of a GPU.")]
Length = Annotated[int, Option(min=1, metavar="TOKENS", help="Of the longest row.")]
BatchSize = Annotated[int, Option(min=1, metavar="ROWS", help="Of an optimizer step.")]
Rank = Annotated[int, Option(min=1, metavar="N", help="Of the adapter.")]
Dropout = Annotated[float, Option(metavar="P", help="Of the adapter.")]
Dora = Annotated[bool, Option("--dora", help="Train the length of each output's weights too.")]
Optimizer = Annotated[Literal["adamw_8bit", "paged_adamw_8bit", "adamw_32bit"], Option(help="How its states are held.")]
Besides = Annotated[list[Beside] | None, Option(help="Leave room for one on the card; may be repeated.")]


def plan(
    model: Model,
    tier: Tier = None,
    seq_length: Length = 2048,
    batch_size: BatchSize = 16,
    rank: Rank = 16,
    dropout: Dropout = 0.0,
    dora: Dora = False,
    quantization: Way = "nf4",
    optimizer: Optimizer = "adamw_8bit",
    beside: Besides = None,
    as_json: AsJson = False,
) -> int:
    """Say what a run would take, and the GPU it fits.

    Predicted from the model's architecture alone: nothing is downloaded. Without
    --tier the smallest that holds it is shown. The status is 1 where it does not fit;
    what would is said then. docs/planner.md has the formulas.
    """
    from app.core import planner, tiers
    from app.core.errors import NotFound
    from app.core.spec import QUANTIZATIONS
    from cli.doctor import configuration

    settings = configuration.require()
    known, besides = configuration.require_catalog(settings), beside or ()
    try:
        sized = known.sized(model)
        _require_possible(sized, tier, seq_length, optimizer, besides)
        asked = planner.Run(
            model=sized.architecture,
            lora=_lora(rank, dropout, dora),
            quantization=QUANTIZATIONS[quantization],
            optimizer=optimizer,
            longest_tokens=seq_length,
            mean_tokens=seq_length,
            batch_size=batch_size,
        )
    except (NotFound, ValueError) as error:
        raise Failed(error) from error
    made = planner.plan(asked, [_room(each, besides, asked, settings.gpu) for each in ((tier,) if tier else tiers.GPUS)])
    would_fit: tuple[Remedy, ...] = ()
    if not made.fits:
        larger = [_room(each, besides, asked, settings.gpu) for each in tiers.GPUS]
        would_fit = planner.remedies(asked, made.room, larger=larger, bases=known.values())
    show(_document(sized.id, made, would_fit), "\n".join(_table(sized.id, asked, made, would_fit)), as_json=as_json)
    return 0 if made.fits else 1


def _lora(rank: int, dropout: float, use_dora: bool) -> "LoraSpec":
    """Raises ValueError for what no job may ask."""
    from pydantic import ValidationError

    from app.core.spec import LoraSpec

    try:
        return LoraSpec(rank=rank, dropout=dropout, use_dora=use_dora)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--{first['loc'][0]} {first['input']}: {first['msg']}") from None


def _require_possible(sized: "Base | Size", tier: str | None, seq_length: int, optimizer: str, beside: Sequence[Beside]) -> None:
    """Raises ValueError for what no job may ask."""
    context = getattr(sized, "context_length", None)
    if beside and tier == "cpu":
        raise ValueError("--beside is for a GPU: memory is not planned on a CPU")
    if optimizer == "paged_adamw_8bit" and tier == "cpu":
        raise ValueError("--optimizer paged_adamw_8bit needs a GPU, whose driver pages the states")
    if context and seq_length > context:
        raise ValueError(f"--seq-length {seq_length}: {sized.id} reads at most {context} tokens")


def _room(tier: str, beside: Sequence[Beside], asked: "Run", gpu: "GpuSettings") -> "Room":
    from app.core import memory, tiers

    engine = tiers.shared_bytes(tier, gpu) if Beside.ENGINE in beside else 0
    trainer = memory.waiting_bytes(asked.model) if Beside.TRAINER in beside else 0
    return tiers.room(tier, gpu, beside_bytes=engine + trainer)


def _document(model: str, made: "Plan", would_fit: "tuple[Remedy, ...]") -> dict[str, object]:
    return {
        "model": model,
        **made.model_dump(mode="json"),
        "peak_bytes": made.memory.peak_bytes,
        "would_fit": [remedy.model_dump(mode="json") for remedy in would_fit],
    }


def _table(model: str, asked: "Run", made: "Plan", would_fit: "tuple[Remedy, ...]") -> Iterator[str]:
    from app.core.memory import GIB

    usable, peak = made.room.usable_bytes, made.memory.peak_bytes
    where = "a CPU" if made.room.tier == "cpu" else f"a GPU of {made.room.tier} GB"
    held = "in 16 bits" if asked.quantization.scheme == "none" else asked.quantization.name
    yield f"{model} on {where}: rows of up to {asked.longest_tokens:,} tokens, rank {asked.lora.rank}, {held}"
    yield ""
    scale = max(peak, usable or 0) / BAR
    unmet = min(("passing", "head"), key=lambda part: getattr(made.memory, part))
    for part, title in PARTS.items():
        size = getattr(made.memory, part)
        bar = "(not at the peak)" if part == unmet else "█" * round(size / scale)
        yield f"  {title:<32} {size / GIB:7.2f} GiB  {bar}".rstrip() if size else f"  {title:<32} {'—':>7}"
    yield f"  {'peak':<32} {peak / GIB:7.2f} GiB  {'█' * round(peak / scale)}"
    if usable is not None:
        has = f"  {'what a run may take there':<32} {usable / GIB:7.2f} GiB  {'░' * round(usable / scale)}"
        yield f"{has}  ({made.room.reserved_bytes / GIB:.1f} GiB are left to what shares the card)"
    yield ""
    layers = "computed again in the backward" if made.is_checkpointing else "kept"
    times = f"{made.accumulation} times in a step of {asked.batch_size} such rows"
    yield f"  {made.micro_batch_tokens:,} tokens at once, {times}; layers are {layers}"
    if made.fits:
        yield "  It fits." if usable is not None else "  It fits if this machine has so much: memory is not planned on a CPU."
    else:
        yield "  It does not fit. What would, each alone:"
        yield from (f"  - {remedy} ({remedy.peak_bytes / GIB:.1f} GiB)" for remedy in would_fit)
        if not would_fit:
            yield "  - nothing of what is known here"
