"""The judges an operator offers: models behind OpenAI-compatible endpoints, by the name that graders call them.

A request names a judge and never an address, so that no customer chooses where this server connects.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, TypeAdapter


class Judge(BaseModel):
    """`base_url` is that of the API, `https://api.example.com/v1`; `model` the name over there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: Annotated[str, StringConstraints(pattern=r"^https?://[^/@]+(/[^?#]*)?$")]
    model: Annotated[str, StringConstraints(min_length=1)]
    api_key: SecretStr = SecretStr("")
    timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 60.0

    @property
    def url(self) -> str:
        return f"{self.base_url.rstrip('/')}/chat/completions"


_judges: TypeAdapter[dict[str, Judge]] = TypeAdapter(dict[str, Judge])


def load(file: Path | None) -> Mapping[str, Judge]:
    """The operator's judges, none without a file. Raises ValueError with the file's name for one that lists no judges."""
    try:
        return _judges.validate_python(tomllib.loads(file.read_text())) if file else {}
    except ValueError as error:  # pydantic's and tomllib's are
        raise ValueError(f"{file} lists no judges: {error}") from None
