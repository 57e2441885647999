"""The price book: what an operator asks for training, as data."""

import tomllib
from decimal import ROUND_HALF_UP, Decimal
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PerMillion = Annotated[Decimal, Field(ge=0, allow_inf_nan=False)]
_MILLION, _CENTS = Decimal(1_000_000), Decimal("0.01")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Price(_Frozen):
    """`amount` is in `currency`, rounded to hundredths; `tokens` are those of all epochs."""

    currency: str
    per_million_tokens: float
    tokens: int
    amount: float


class PriceBook(_Frozen):
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")]
    per_million_tokens: PerMillion
    bases: dict[str, PerMillion] = {}

    def price(self, base: str, tokens: int) -> Price:
        per_million = self.bases.get(base, self.per_million_tokens)
        amount = (per_million * tokens / _MILLION).quantize(_CENTS, ROUND_HALF_UP)
        return Price(currency=self.currency, per_million_tokens=float(per_million), tokens=tokens, amount=float(amount))


def load(file: Path | None = None) -> PriceBook:
    """The operator's book, or ours, by which everything is free. Raises ValueError with the file's name for one that is none."""
    try:
        text = file.read_text() if file else (files("app.core") / "prices.toml").read_text()
        return PriceBook.model_validate(tomllib.loads(text, parse_float=Decimal))
    except (OSError, ValueError) as error:  # pydantic's and tomllib's are ValueErrors
        raise ValueError(f"{file or 'prices.toml'} is no price book: {error}") from None
