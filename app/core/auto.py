"""What every `auto` of a request became, and why: told with the job and with a dry run. The rules are those of spec.resolve."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from app.core import spec
from app.core.catalog import Base
from app.core.methods import REFERRING, Preferring
from app.core.planner import Plan
from app.core.spec import AUTO, Requested, TrainSpec

_PAPERS: dict[Preferring, str] = {"dpo": "arXiv:2305.18290", "orpo": "arXiv:2403.07691", "kto": "arXiv:2402.01306"}


class Chosen(BaseModel):
    """A value that nobody asked for, and the rule that gave it, in words for the job's owner."""

    model_config = ConfigDict(frozen=True)

    value: int | float
    reason: str


def explain(
    requested: Requested, resolved: TrainSpec, base: Base, plan: Plan, *, examples: int, good: int = 0
) -> dict[str, Chosen]:
    """By the API's names, those alone that were `auto`; and the tokens at once, which are always chosen here."""
    asked: dict[str, Any] = {**dict(requested.hyperparameters), **dict(requested.training)}
    chosen = {
        "n_epochs": Chosen(value=resolved.n_epochs, reason=_epochs(requested, examples)),
        "batch_size": Chosen(value=resolved.batch_size, reason=_batch(requested, examples)),
        "learning_rate_multiplier": Chosen(value=1.0, reason="the learning rate is taken as it is"),
        "learning_rate": Chosen(value=resolved.optimizer.learning_rate, reason=_rate(requested, base)),
        "max_seq_length": Chosen(value=resolved.max_seq_length, reason=_length(base)),
        "checkpoint_every_steps": Chosen(
            value=resolved.checkpoint_every_steps, reason=_checkpoints(requested, resolved.total_steps(examples))
        ),
    }
    if resolved.preference:
        chosen["beta"] = Chosen(value=resolved.preference.beta, reason=f"as in the paper ({_PAPERS[resolved.preference.method]})")
        asked["beta"] = requested.beta
    if resolved.preference and requested.method == "kto":
        for name in ("desirable_weight", "undesirable_weight"):
            asked[name] = getattr(requested, name)
            chosen[name] = Chosen(value=getattr(resolved.preference, name), reason=_weight(requested, good, examples - good))
    tokens = Chosen(value=plan.micro_batch_tokens, reason=_tokens(plan))
    return {name: choice for name, choice in chosen.items() if asked[name] == AUTO} | {"micro_batch_tokens": tokens}


def _epochs(requested: Requested, examples: int) -> str:
    seen = spec.EXAMPLES_SEEN
    most = spec.MOST_EPOCHS_REFERRING if requested.method in REFERRING else spec.MOST_EPOCHS
    return f"so that about {seen} examples are seen, in 1 to {most} epochs: {seen} / {examples} is {seen / examples:.1f}"


def _batch(requested: Requested, examples: int) -> str:
    steps, most = spec.STEPS_OF_EPOCH, spec.LARGEST_BATCH
    least, why = (spec.LEAST_BATCH_RATED, ", of which each step estimates its KL") if requested.method == "kto" else (1, "")
    about = f"so that an epoch has about {steps} steps, with {least} to {most} rows{why}"
    return f"{about}: {examples} / {steps} is {examples / steps:.1f}"


def _rate(requested: Requested, base: Base) -> str:
    large, small = spec.RATE_OF_LARGE, spec.RATE_OF_SMALL
    if spec.is_large(base):
        reason = f"{large:g} as in the QLoRA paper, for bases over a billion parameters"
    else:
        reason = f"{small:g} for bases under a billion parameters, which move less per step than the QLoRA paper's ({large:g})"
    if requested.method in REFERRING:
        reason = f"{spec.RATE_REFERRING:g} times that of supervised training where the base judges answers, which is {reason}"
    multiplier = requested.hyperparameters.learning_rate_multiplier
    return reason if multiplier == AUTO else f"{reason}; times learning_rate_multiplier {multiplier:g}"


def _weight(requested: Requested, good: int, bad: int) -> str:
    if requested.desirable_weight != AUTO or requested.undesirable_weight != AUTO:
        return "the other weight was given"
    return f"so that {good} good and {bad} bad answers weigh the same, up to {spec.LARGEST_WEIGHT:g} for the rarer kind"


def _length(base: Base) -> str:
    return f"what the base can read, {base.context_length:,} tokens, but no more than {spec.LONGEST_UNASKED:,}"


def _checkpoints(requested: Requested, total_steps: int) -> str:
    if requested.training.judges:
        why = "because their evaluations decide when to stop or what to publish"
        return f"{spec.JUDGED_CHECKPOINTS} in the {total_steps} steps, {why}"
    return f"{spec.CHECKPOINTS} in the {total_steps} steps"


def _tokens(plan: Plan) -> str:
    again = ", with layers computed again in the backward" if plan.is_checkpointing else ""
    if plan.room.usable_bytes is None:
        return f"what goes fastest on a CPU, or the longest row if that is longer{again}"
    return f"what goes fastest of what fits a GPU of {plan.room.tier} GB, or the longest row if that is longer{again}"
