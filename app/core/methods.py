"""How an adapter may be trained, and the rows each way reads. docs/methods.md is for those who choose."""

from typing import Final, Literal, get_args

Preferring = Literal["dpo", "orpo", "kto"]
MethodName = Literal["supervised", Preferring]

METHODS: Final[tuple[MethodName, ...]] = ("supervised", *get_args(Preferring))
FORMATS: Final[dict[MethodName, tuple[str, ...]]] = {
    "supervised": ("chat", "sharegpt", "alpaca", "completion", "text"),
    "dpo": ("preference",),
    "orpo": ("preference",),
    "kto": ("rated",),
}
REFERRING: Final[tuple[MethodName, ...]] = ("dpo", "kto")  # judge answers by what the base says of them
# what a token of a step takes, in forwards, of which a backward is two: DPO and KTO ask the base as well, and KTO asks both once
# more about mismatched rows
_FORWARDS: Final[dict[MethodName, int]] = {"supervised": 3, "dpo": 4, "orpo": 3, "kto": 6}
# what those that compare answers tell of a step beside its loss, each of some of them: docs/methods.md
METRICS: Final = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracy",
    "rewards/margin",
    "nll_loss",
    "log_odds_chosen",
    "kl",
)


def work(method: MethodName) -> float:
    """How much longer it takes than supervised training on as many tokens."""
    return _FORWARDS[method] / _FORWARDS["supervised"]


def reading(row_format: str) -> tuple[MethodName, ...]:
    """The methods that train on rows of this format."""
    return tuple(method for method, formats in FORMATS.items() if row_format in formats)
