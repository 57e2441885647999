"""What a run is told: what was asked for, and the frozen value it resolves to, stored with the job and in the manifest."""

import math
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.core.catalog import Base
from app.core.methods import REFERRING, MethodName, Preferring

LongRows = Literal["drop", "truncate"]
Part = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(strict=True, ge=1)]  # of all rows, or rows

Scheme = Literal["nf4", "fp4", "int8", "none"]
FOUR_BIT = ("nf4", "fp4")
OptimizerKind = Literal["adamw_8bit", "paged_adamw_8bit", "adamw_32bit"]
Scheduler = Literal["cosine", "linear", "constant"]
Publish = Literal["last", "best"]
Initialisation = Annotated[bool, Field(strict=True)] | Literal["gaussian", "orthogonal"]
Beta = Annotated[float, Field(gt=0, le=10)]
RatedWeight = Annotated[float, Field(gt=0, le=100)]

AUTO: Final = "auto"
Auto = Literal["auto"]
Number = TypeVar("Number", int, float)

OF_ANSWERS: Final = ("beta", "desirable_weight", "undesirable_weight")  # hyperparameters of methods that compare or rate

# the rules of `auto`: see resolve, and app.core.auto for their reasons
EXAMPLES_SEEN, MOST_EPOCHS = 800, 10
MOST_EPOCHS_REFERRING, RATE_REFERRING = 3, 0.1  # of methods that judge by the base
USUAL_BETA, LEAST_BATCH_RATED, LARGEST_WEIGHT = 0.1, 8, 10.0
STEPS_OF_EPOCH, LARGEST_BATCH = 32, 16
RATE_OF_LARGE, RATE_OF_SMALL = 2e-4, 1e-3
LONGEST_UNASKED = 4096
CHECKPOINTS, JUDGED_CHECKPOINTS = 4, 10

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _later(default: Any, **limits: Any) -> Any:
    """A field that came after the first release: told only where it says something else than its default.

    So what an old spec is known by stays (worker/training/checkpoint.py: Identity), and an old release reads a new spec that asks
    for nothing new.
    """
    return Field(default=default, exclude_if=lambda value: value == default, **limits)


class LoraSpec(_Frozen):
    """The adapter's shape. `all-linear` is every linear layer of the decoder: what decides quality in the QLoRA paper.

    `use_rslora`: its product is scaled by alpha / √rank (arXiv:2312.03732), not by alpha / rank. `use_dora`: the length of each
    output's weights is trained apart from their direction (arXiv:2402.09353). `init_lora_weights` is as in PEFT: true draws A as
    linear layers are drawn, "gaussian" from a normal distribution, both with B zero; "orthogonal" draws A and B with B A = 0;
    false draws both, so that training starts beside the base.
    """

    rank: int = Field(default=16, ge=1, le=128)
    alpha: float = Field(default=32, gt=0, le=512)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | Annotated[tuple[Target, ...], Field(min_length=1)] = "all-linear"
    use_rslora: bool = _later(False)
    use_dora: bool = _later(False)
    init_lora_weights: Initialisation = _later(True)

    @model_validator(mode="after")
    def _halves(self) -> "LoraSpec":
        if self.init_lora_weights == "orthogonal" and self.rank % 2:
            raise ValueError("have an even rank with init_lora_weights 'orthogonal', which gives half of it to A and half to B")
        return self

    @property
    def scaling(self) -> float:
        return scaling(self.alpha, self.rank, use_rslora=self.use_rslora)

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules of a layer that it changes, by name."""
        return TARGETS if self.target_modules == "all-linear" else self.target_modules


def scaling(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """What the product of B and A is multiplied with."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


class QuantizationSpec(_Frozen):
    """How the linear layers of the frozen base are held; all else is 16-bit.

    `nf4` and `fp4`: 4 bits, and a scale for each block of 64 weights; with `double_quant` the scales are quantized too
    (arXiv:2305.14314). `int8`: 8 bits, and a scale for each output (arXiv:2208.07339). `none`: 16 bits, as published.
    """

    scheme: Scheme = "nf4"
    double_quant: bool = Field(default_factory=lambda said: said.get("scheme") in FOUR_BIT)

    @model_validator(mode="after")
    def _has_blocks(self) -> "QuantizationSpec":
        if self.double_quant and not self.is_4_bit:
            raise ValueError(f"leave out double_quant with {self.scheme!r}: it is for the blocks of nf4 and fp4")
        return self

    @property
    def is_4_bit(self) -> bool:
        return self.scheme in FOUR_BIT

    @property
    def name(self) -> "QuantizationName":
        """The word for it in settings, and in what engines announce."""
        return next(name for name, quantization in QUANTIZATIONS.items() if quantization == self)


QuantizationName = Literal["nf4", "nf4-single", "fp4", "fp4-single", "int8", "none"]
QUANTIZATIONS: Final[dict[QuantizationName, QuantizationSpec]] = {
    "nf4": QuantizationSpec(),
    "nf4-single": QuantizationSpec(double_quant=False),
    "fp4": QuantizationSpec(scheme="fp4"),
    "fp4-single": QuantizationSpec(scheme="fp4", double_quant=False),
    "int8": QuantizationSpec(scheme="int8"),
    "none": QuantizationSpec(scheme="none"),
}
USUAL: Final[QuantizationName] = "nf4"


class OptimizerSpec(_Frozen):
    """AdamW on fp32 masters; a linear warm-up to `learning_rate`, then down to `min_rate_ratio` of it, or not at all.

    B learns `lora_plus_ratio` times as fast as A (LoRA+, arXiv:2402.12354).
    """

    learning_rate: float = Field(gt=0, le=1)
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    kind: OptimizerKind = _later("adamw_8bit")
    scheduler: Scheduler = _later("cosine")
    min_rate_ratio: float = _later(0.0, ge=0, lt=1)
    lora_plus_ratio: float = _later(1.0, ge=1, le=1000)


class EarlyStopping(_Frozen):
    """A run ends when `patience` evaluations in a row have not brought the validation loss down by more than `min_delta`."""

    patience: int = Field(ge=1, le=1000, strict=True)
    min_delta: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class Judging(_Frozen):
    """What evaluations decide; each checkpoint has one. `publish`: the adapter of the last step, or that with the lowest loss."""

    early_stopping: EarlyStopping | None = _later(None)
    publish: Publish = _later("last")

    @property
    def judges(self) -> bool:
        """Whether they decide anything."""
        return self.early_stopping is not None or self.publish == "best"


class PreferenceSpec(_Frozen):
    """Answers are compared or rated, not only copied. `beta`: how much it costs to leave the base; with ORPO, which has no such
    cost, how much the comparison weighs beside what is copied. The weights are those of rated answers, good and bad.
    """

    method: Preferring
    beta: Beta
    desirable_weight: RatedWeight = _later(1.0)
    undesirable_weight: RatedWeight = _later(1.0)

    @property
    def has_reference(self) -> bool:
        """Whether answers are judged by what the base says of them without the adapter."""
        return self.method in REFERRING

    @property
    def copies_preferred(self) -> bool:
        """Whether the preferred conversation is learnt too, all of it up to the end of its answer."""
        return self.method == "orpo"


class Start(_Frozen):
    """A model whose weights a run begins with, in place of a fresh adapter's. `digest` is that of its manifest."""

    model: str
    digest: str


class TrainSpec(Judging):
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
    neftune_noise_alpha: float = _later(0.0, ge=0, le=100)
    preference: PreferenceSpec | None = _later(None)
    continue_from: Start | None = _later(None)

    @property
    def keeps_start(self) -> bool:
        """Whether the weights that it begins with are in memory to its end: answers are compared with theirs."""
        return self.preference is not None and self.preference.has_reference and self.continue_from is not None

    @property
    def method(self) -> MethodName:
        return self.preference.method if self.preference else "supervised"

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run: the last batch of an epoch may be smaller."""
        return self.n_epochs * math.ceil(examples / self.batch_size)


class Hyperparameters(_Frozen):
    """The API's three, each `auto` or a value."""

    n_epochs: Auto | Annotated[int, Field(strict=True, ge=1, le=100)] = AUTO
    batch_size: Auto | Annotated[int, Field(strict=True, ge=1, le=256)] = AUTO
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=100)] = AUTO


class TrainingOptions(Judging):
    """What the API does not know and we offer. `long_rows` and `validation_split` decide the data, and so are in no TrainSpec."""

    max_seq_length: Auto | Annotated[int, Field(strict=True, ge=8, le=1_048_576)] = AUTO
    long_rows: LongRows = "drop"
    validation_split: Part | None = None
    learning_rate: Auto | Annotated[float, Field(gt=0, le=1)] = AUTO
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    optimizer: OptimizerKind = _later("adamw_8bit")
    scheduler: Scheduler = _later("cosine")
    min_learning_rate_ratio: float = _later(0.0, ge=0, lt=1)
    lora_plus_ratio: float = _later(1.0, ge=1, le=1000)
    neftune_noise_alpha: float = _later(0.0, ge=0, le=100)
    checkpoint_every_steps: Auto | Annotated[int, Field(strict=True, ge=1)] = AUTO

    @model_validator(mode="after")
    def _falls(self) -> "TrainingOptions":
        if self.scheduler == "constant" and self.min_learning_rate_ratio:
            raise ValueError("leave out min_learning_rate_ratio with a constant scheduler: its rate does not fall")
        return self


class Requested(_Frozen):
    """A job's settings as its owner asked for them."""

    method: MethodName = "supervised"
    hyperparameters: Hyperparameters = Hyperparameters()
    beta: Auto | Beta = AUTO  # of methods that compare or rate answers
    desirable_weight: Auto | RatedWeight = _later(AUTO)  # of those that rate them
    undesirable_weight: Auto | RatedWeight = _later(AUTO)
    adapter: LoraSpec = LoraSpec()
    quantization: QuantizationSpec = QuantizationSpec()
    training: TrainingOptions = TrainingOptions()
    continue_from: Start | None = _later(None)


def max_seq_length(requested: Requested, base: Base) -> int:
    """Longer rows are left out, or lose their beginning (`long_rows`). `auto` is what the base can hold, up to 4,096 tokens."""
    return min(base.context_length, _given(requested.training.max_seq_length, LONGEST_UNASKED))


def resolve(requested: Requested, base: Base, *, seed: int, examples: int, longest: int, good: int = 0) -> TrainSpec:
    """Turn every `auto` into a number. `longest` is the longest example's length in tokens; `good` are those rated so.

    Epochs: about 800 examples seen, between 1 and 10 epochs, or 3 with methods that judge by the base. Batch: a 1/32 of the
    examples, between 1 and 16, and from 8 where rows are rated. Rate: 2e-4 as in the QLoRA paper, and more for bases under a
    billion parameters, which move less per step; a tenth of it with methods that judge by the base. Beta: 0.1, as in the papers.
    Weights: 1, and more for the rarer rating, so that both kinds weigh the same (KTO's equation 8), up to 10.
    """
    asked, options = requested.hyperparameters, requested.training
    most_epochs = MOST_EPOCHS_REFERRING if requested.method in REFERRING else MOST_EPOCHS
    least_batch = LEAST_BATCH_RATED if requested.method == "kto" else 1
    n_epochs = _given(asked.n_epochs, min(most_epochs, max(1, round(EXAMPLES_SEEN / examples))))
    batch_size = _given(asked.batch_size, min(LARGEST_BATCH, max(least_batch, examples // STEPS_OF_EPOCH)))
    total_steps = n_epochs * math.ceil(examples / batch_size)
    checkpoints = JUDGED_CHECKPOINTS if options.judges else CHECKPOINTS
    return TrainSpec(
        base=base.id,
        n_epochs=n_epochs,
        batch_size=batch_size,
        seed=seed,
        max_seq_length=max_seq_length(requested, base),
        micro_batch_tokens=max(longest, 2048),  # an example is never spread over two
        checkpoint_every_steps=_given(options.checkpoint_every_steps, math.ceil(total_steps / checkpoints)),
        lora=requested.adapter,
        quantization=requested.quantization,
        optimizer=OptimizerSpec(
            learning_rate=_learning_rate(requested, base),
            warmup_ratio=options.warmup_ratio,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            kind=options.optimizer,
            scheduler=options.scheduler,
            min_rate_ratio=options.min_learning_rate_ratio,
            lora_plus_ratio=options.lora_plus_ratio,
        ),
        early_stopping=options.early_stopping,
        publish=options.publish,
        neftune_noise_alpha=options.neftune_noise_alpha,
        preference=_preference(requested, good, examples - good),
        continue_from=requested.continue_from,
    )


def is_large(base: Base) -> bool:
    """Whether it has more than a billion parameters."""
    return base.architecture.linear_parameters > 1e9


def _preference(requested: Requested, good: int, bad: int) -> PreferenceSpec | None:
    if requested.method == "supervised":
        return None
    desirable, undesirable = _weights(requested, good, bad) if requested.method == "kto" else (1.0, 1.0)
    return PreferenceSpec(
        method=requested.method,
        beta=_given(requested.beta, USUAL_BETA),
        desirable_weight=desirable,
        undesirable_weight=undesirable,
    )


def _weights(requested: Requested, good: int, bad: int) -> tuple[float, float]:
    """Where one is given, nobody but its owner knows what the other is to balance."""
    asked = requested.desirable_weight, requested.undesirable_weight
    if asked != (AUTO, AUTO) or not (good and bad):
        return _given(asked[0], 1.0), _given(asked[1], 1.0)
    return min(LARGEST_WEIGHT, max(1.0, bad / good)), min(LARGEST_WEIGHT, max(1.0, good / bad))


def _learning_rate(requested: Requested, base: Base) -> float:
    usual = RATE_OF_LARGE if is_large(base) else RATE_OF_SMALL
    usual *= RATE_REFERRING if requested.method in REFERRING else 1.0
    multiplier = _given(requested.hyperparameters.learning_rate_multiplier, 1.0)
    return min(1.0, _given(requested.training.learning_rate, usual) * multiplier)


def _given(asked: Auto | Number, otherwise: Number) -> Number:
    return otherwise if isinstance(asked, str) else asked
