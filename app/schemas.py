"""What the bodies of several rooms have in common."""

from pydantic import BaseModel, ConfigDict


class Request(BaseModel):
    """A body that clients send: what it does not know is refused, never ignored."""

    model_config = ConfigDict(extra="forbid")


class Failure(BaseModel):
    """Why a job or an evaluation has failed."""

    code: str
    message: str
    param: str | None


def without_nul(text: str) -> str:
    """For fields that Postgres stores, which knows no NUL. Raises ValueError."""
    if "\x00" in text:
        raise ValueError("must not hold a NUL character")
    return text
