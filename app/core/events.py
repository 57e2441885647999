"""What the training engine says while it works. It does not know who listens."""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

OUT_OF_MEMORY: Final = "out_of_memory"  # the code of a failure that fewer tokens at once may mend
DISK_FULL: Final = "disk_full"  # of one that the operator has to mend
INTERNAL_ERROR: Final = "internal_error"  # of one that nobody has thought of

Split = Literal["training", "validation"]
Reason = Literal["outlier", "worse_than_base", "misranked"]


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True)


class Started(_Event):
    """The base is loaded, the data is open, the first forward comes next. `resumed_from` is 0 for a fresh run.

    `evaluation_tokens` are those of one evaluation: each checkpoint has one, and the end; 0 without a validation file.
    `examination_tokens` those of the look at its examples that comes last.
    """

    kind: Literal["started"] = "started"
    total_steps: int
    resumed_from: int
    trainable_parameters: int
    checkpoint_every_steps: int
    evaluation_tokens: int
    examination_tokens: int = 0


class Stepped(_Event):
    """One optimizer step. Loss is the mean over the step's labelled tokens, in nats, over its pairs or its rated answers: of what
    tokens accuracy is told then is in docs/methods.md, as are the names of `rewards`. `tokens_left` come in later steps.
    """

    kind: Literal["stepped"] = "stepped"
    step: int
    total_steps: int
    train_loss: float
    train_mean_token_accuracy: float
    learning_rate: float
    grad_norm: float
    tokens: int
    labelled_tokens: int
    tokens_left: int
    tokens_per_second: float
    rewards: dict[str, float] = {}


class Evaluated(_Event):
    """Loss on the validation file, over all of its labelled tokens, pairs or rated answers."""

    kind: Literal["evaluated"] = "evaluated"
    step: int
    valid_loss: float
    valid_mean_token_accuracy: float
    rewards: dict[str, float] = {}


class Checkpointed(_Event):
    """A committed checkpoint lies in `directory`: its manifest was written last, so all of it is there.

    The run deletes it when it needs it no more: whoever wants it for longer takes it before this event's listener returns.
    """

    kind: Literal["checkpointed"] = "checkpointed"
    step: int
    directory: str
    metrics: dict[str, float]


class Scores(_Event):
    """Over all labelled tokens of some examples, in nats; of pairs, over those of the preferred answers.

    `ranking_accuracy`, of pairs alone: the part of them whose preferred answer is the likelier one.
    """

    loss: float
    mean_token_accuracy: float
    ranking_accuracy: float | None = Field(default=None, exclude_if=lambda value: value is None)


class HeldOut(_Event):
    """The base and the published adapter on the same validation rows. `tokens` are the labelled ones."""

    examples: int
    tokens: int
    base: Scores
    adapter: Scores


class ExaminedExample(_Event):
    """Means over the labelled tokens of one example, of a pair over its preferred answer. The base's only where it was asked.

    `reasons` tell why it may not be what was meant: docs/metrics.md.
    """

    split: Split
    line: int
    tokens: int
    loss: float
    base_loss: float | None
    token_accuracy: float
    base_token_accuracy: float | None
    rejected_loss: float | None = Field(default=None, exclude_if=lambda value: value is None)
    base_rejected_loss: float | None = Field(default=None, exclude_if=lambda value: value is None)
    reasons: tuple[Reason, ...] = ()


class Examined(_Event):
    """What the run has come to: held-out rows, and `training_examples` of those that it learnt from.

    `hardest` and `suspicious` list at most 20 of each split, the highest loss first.
    """

    kind: Literal["examined"] = "examined"
    held_out: HeldOut | None
    training_examples: int
    training: Scores
    hardest: tuple[ExaminedExample, ...]
    suspicious: tuple[ExaminedExample, ...]
    suspicious_count: int


class Noted(_Event):
    """Something the customer should know; customers read `message` as it is."""

    kind: Literal["noted"] = "noted"
    level: Literal["info", "warn", "error"]
    message: str


class MeasuredMemory(_Event):
    """The most that a trainer process has had, and how it trained then.

    `rss` counts all of its memory; `cuda` what torch had allocated on the card, which is less than the card had lost.
    """

    peak_bytes: int
    measured_as: Literal["rss", "cuda"]
    micro_batch_tokens: int
    is_checkpointing: bool


class Finished(_Event):
    """The run is over: `directory` holds the adapter, `table` is a CSV file with every example that was examined."""

    kind: Literal["finished"] = "finished"
    step: int
    trained_tokens: int
    directory: str
    table: str
    memory: MeasuredMemory


class Stopped(_Event):
    """The run ended early because it was told to; the newest checkpoint is that of `step`."""

    kind: Literal["stopped"] = "stopped"
    step: int


class Failed(_Event):
    """The run cannot go on. `is_user_error`: the same data and spec would fail again on any machine.

    `path` is what could not be written, for the operator's log: customers do not see it.
    """

    kind: Literal["failed"] = "failed"
    code: str
    message: str
    is_user_error: bool
    path: str | None = None


Event = Annotated[
    Started | Stepped | Evaluated | Checkpointed | Examined | Noted | Finished | Stopped | Failed, Field(discriminator="kind")
]
_adapter: TypeAdapter[Event] = TypeAdapter(Event)


def parse(line: bytes) -> Event:
    """An event from its line of JSON. Raises pydantic's ValidationError."""
    return _adapter.validate_json(line)
