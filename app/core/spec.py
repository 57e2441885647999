"""What a run is told: what was asked for, and the frozen value it resolves to, stored with the job and in the manifest."""

import math
from typing import Annotated, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from app.core.catalog import Base
from app.core.methods import MethodName, Preferring

LongRows = Literal["drop", "truncate"]
Part = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(strict=True, ge=1)]  # of all rows, or rows

Beta = Annotated[float, Field(gt=0, le=10)]

AUTO: Final = "auto"
Auto = Literal["auto"]
Number = TypeVar("Number", int, float)

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraSpec(_Frozen):
    """The adapter's shape. `all-linear` is every linear layer of the decoder: what decides quality in the QLoRA paper."""

    rank: int = Field(default=16, ge=1, le=128)
    alpha: float = Field(default=32, gt=0, le=512)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | Annotated[tuple[Target, ...], Field(min_length=1)] = "all-linear"

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules of a layer that it changes, by name."""
        return TARGETS if self.target_modules == "all-linear" else self.target_modules


class QuantizationSpec(_Frozen):
    """How the frozen base is held."""

    scheme: Literal["nf4"] = "nf4"
    double_quant: bool = True


class OptimizerSpec(_Frozen):
    """AdamW with 8-bit states on fp32 masters; a linear warm-up, then a cosine to zero."""

    learning_rate: float = Field(gt=0, le=1)
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class PreferenceSpec(_Frozen):
    """Answers are compared, not copied. `beta`: how much it costs to leave the base."""

    method: Preferring
    beta: Beta


class TrainSpec(_Frozen):
    """Everything that decides the weights, given base and data.

    `batch_size` counts examples per optimizer step, a pair as one; `micro_batch_tokens` bounds the tokens of one forward.
    Without `preference` the run is supervised, and its spec says as much as it did before there was anything else.
    """

    base: str
    n_epochs: int = Field(ge=1, le=100)
    batch_size: int = Field(ge=1, le=4096)
    seed: int = Field(ge=0, le=2**31 - 1)
    max_seq_length: int = Field(ge=8)
    micro_batch_tokens: int = Field(ge=8)
    checkpoint_every_steps: int = Field(ge=1)
    lora: LoraSpec = LoraSpec()
    quantization: QuantizationSpec = QuantizationSpec()
    optimizer: OptimizerSpec
    preference: PreferenceSpec | None = Field(default=None, exclude_if=lambda value: value is None)

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run: the last batch of an epoch may be smaller."""
        return self.n_epochs * math.ceil(examples / self.batch_size)


class Hyperparameters(_Frozen):
    """The API's three, each `auto` or a value."""

    n_epochs: Auto | Annotated[int, Field(strict=True, ge=1, le=100)] = AUTO
    batch_size: Auto | Annotated[int, Field(strict=True, ge=1, le=256)] = AUTO
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=100)] = AUTO


class TrainingOptions(_Frozen):
    """What the API does not know and we offer. `long_rows` and `validation_split` decide the data, and so are in no TrainSpec."""

    max_seq_length: Auto | Annotated[int, Field(strict=True, ge=8, le=1_048_576)] = AUTO
    long_rows: LongRows = "drop"
    validation_split: Part | None = None
    learning_rate: Auto | Annotated[float, Field(gt=0, le=1)] = AUTO
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    checkpoint_every_steps: Auto | Annotated[int, Field(strict=True, ge=1)] = AUTO


class Requested(_Frozen):
    """A job's settings as its owner asked for them."""

    method: MethodName = "supervised"
    hyperparameters: Hyperparameters = Hyperparameters()
    beta: Auto | Beta = AUTO  # of methods that compare answers
    adapter: LoraSpec = LoraSpec()
    quantization: QuantizationSpec = QuantizationSpec()
    training: TrainingOptions = TrainingOptions()


def max_seq_length(requested: Requested, base: Base) -> int:
    """Longer rows are left out, or lose their beginning (`long_rows`). `auto` is what the base can hold, up to 4,096 tokens."""
    return min(base.context_length, _given(requested.training.max_seq_length, 4096))


def resolve(requested: Requested, base: Base, *, seed: int, examples: int, longest: int) -> TrainSpec:
    """Turn every `auto` into a number. `longest` is the longest example's length in tokens.

    Epochs: about 800 examples seen, between 1 and 10 epochs, or 3 where answers are compared. Batch: a 1/32 of the examples,
    between 1 and 16. Rate: 2e-4 as in the QLoRA paper, and more for bases under a billion parameters, which move less per step;
    a tenth of it where answers are compared. Beta: 0.1, as in the papers.
    """
    asked, options = requested.hyperparameters, requested.training
    most_epochs = 10 if requested.method == "supervised" else 3
    n_epochs = _given(asked.n_epochs, min(most_epochs, max(1, round(800 / examples))))
    batch_size = _given(asked.batch_size, min(16, max(1, examples // 32)))
    total_steps = n_epochs * math.ceil(examples / batch_size)
    return TrainSpec(
        base=base.id,
        n_epochs=n_epochs,
        batch_size=batch_size,
        seed=seed,
        max_seq_length=max_seq_length(requested, base),
        micro_batch_tokens=max(longest, 2048),  # an example is never spread over two
        checkpoint_every_steps=_given(options.checkpoint_every_steps, math.ceil(total_steps / 4)),
        lora=requested.adapter,
        quantization=requested.quantization,
        optimizer=OptimizerSpec(
            learning_rate=_learning_rate(requested, base),
            warmup_ratio=options.warmup_ratio,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
        ),
        preference=_preference(requested),
    )


def _preference(requested: Requested) -> PreferenceSpec | None:
    if requested.method == "supervised":
        return None
    return PreferenceSpec(method=requested.method, beta=_given(requested.beta, 0.1))


def _learning_rate(requested: Requested, base: Base) -> float:
    usual = 2e-4 if base.architecture.linear_parameters > 1e9 else 1e-3
    usual *= 1.0 if requested.method == "supervised" else 0.1
    multiplier = _given(requested.hyperparameters.learning_rate_multiplier, 1.0)
    return min(1.0, _given(requested.training.learning_rate, usual) * multiplier)


def _given(asked: Auto | Number, otherwise: Number) -> Number:
    return otherwise if isinstance(asked, str) else asked
