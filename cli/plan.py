"""`tunesmith plan`: what a run would take, part by part, and where it fits. Nothing is downloaded."""

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cli.failure import failed

if TYPE_CHECKING:
    from app.core.catalog import Base, Catalog, Size
    from app.core.planner import Plan, Remedy, Room, Run
    from app.core.settings import GpuSettings

ABOUT = """\
Predict what fine-tuning a model takes, from its architecture alone: nothing is downloaded. Without --tier the smallest
that holds it is shown. The status is 1 where it does not fit; what would is said then. docs/planner.md has the formulas.

MODEL is a base model, its alias, or a plain size such as llama-65b."""
BAR = 40
WAYS = ("nf4", "nf4-single", "fp4", "fp4-single", "int8", "none")  # app.core.spec has them, and is not imported yet
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


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "plan",
        help="what a run would take, and the GPU it fits",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--tier", choices=("cpu", "16", "24", "40", "48", "80"), help="where it shall fit, in GB of a GPU")
    parser.add_argument(
        "--seq-length", type=_positive, default=2048, metavar="TOKENS", help="of the longest row; by default 2048"
    )
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="ROWS", help="of an optimizer step; by default 16")
    parser.add_argument("--rank", type=_positive, default=16, help="of the adapter; by default 16")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapter; by default 0")
    parser.add_argument("--dora", action="store_true", help="train the length of each output's weights too")
    parser.add_argument("--quantization", choices=WAYS, default="nf4", help="of the base; by default nf4")
    parser.add_argument(
        "--optimizer",
        choices=("adamw_8bit", "paged_adamw_8bit", "adamw_32bit"),
        default="adamw_8bit",
        help="by default adamw_8bit",
    )
    parser.add_argument(
        "--beside",
        choices=("engine", "trainer"),
        action="append",
        default=[],
        help="leave room for one on the card; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="write the plan as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from app.core import planner, tiers
    from app.core.errors import NotFound
    from cli.doctor import configuration

    settings = configuration.read_or_say()
    if settings is None:
        return 1
    known, finding = configuration.read_catalog(settings)
    if not configuration.is_fit(finding) or known is None:
        return 1
    try:
        model, asked = _asked(options, known)
    except (NotFound, ValueError) as error:
        return failed(error)
    rooms = [_room(tier, options.beside, asked, settings.gpu) for tier in ((options.tier,) if options.tier else tiers.GPUS)]
    made = planner.plan(asked, rooms)
    would_fit: tuple[Remedy, ...] = ()
    if not made.fits:
        larger = [_room(tier, options.beside, asked, settings.gpu) for tier in tiers.GPUS]
        would_fit = planner.remedies(asked, made.room, larger=larger, bases=known.values())
    if options.json:
        print(json.dumps(_json(model.id, made, would_fit), indent=2))
    else:
        print("\n".join(_table(model.id, asked, made, would_fit)))
    return 0 if made.fits else 1


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _asked(options: argparse.Namespace, known: "Catalog") -> "tuple[Base | Size, Run]":
    """Raises NotFound; ValueError for what no job may ask."""
    from pydantic import ValidationError

    from app.core.planner import Run
    from app.core.spec import QUANTIZATIONS, LoraSpec

    model = known.sized(options.model)
    try:
        lora = LoraSpec(rank=options.rank, dropout=options.dropout, use_dora=options.dora)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--{first['loc'][0]} {first['input']}: {first['msg']}") from None
    context = getattr(model, "context_length", None)
    if options.beside and options.tier == "cpu":
        raise ValueError("--beside is for a GPU: memory is not planned on a CPU")
    if options.optimizer == "paged_adamw_8bit" and options.tier == "cpu":
        raise ValueError("--optimizer paged_adamw_8bit needs a GPU, whose driver pages the states")
    if context and options.seq_length > context:
        raise ValueError(f"--seq-length {options.seq_length}: {model.id} reads at most {context} tokens")
    length = options.seq_length
    return model, Run(
        model=model.architecture,
        lora=lora,
        quantization=QUANTIZATIONS[options.quantization],
        optimizer=options.optimizer,
        longest_tokens=length,
        mean_tokens=length,
        batch_size=options.batch_size,
    )


def _room(tier: str, beside: list[str], asked: "Run", gpu: "GpuSettings") -> "Room":
    from app.core import memory, tiers

    engine = tiers.shared_bytes(tier, gpu) if "engine" in beside else 0
    trainer = memory.waiting_bytes(asked.model) if "trainer" in beside else 0
    return tiers.room(tier, gpu, beside_bytes=engine + trainer)


def _json(model: str, made: "Plan", would_fit: "tuple[Remedy, ...]") -> dict[str, object]:
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
