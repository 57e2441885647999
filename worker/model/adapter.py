"""Adapter directories: written once, whole and with a manifest; opened only if nothing in them could mislead.

adapter_model.safetensors   LoRA matrices in fp32, and DoRA's magnitudes, named as PEFT names them
adapter_config.json         what PEFT needs to load them, and nothing else
dora_norms.safetensors      of DoRA alone: by output the length of W + s B A, which its magnitude replaces; PEFT asks its own base
manifest.json               see app.core.manifest; written last

Engines cannot compute those lengths: their weights may be packed for good. The manifest binds them to the base that they are of.
"""

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.core import manifest
from app.core.manifest import BaseEntry, Manifest
from app.core.render import Renderer
from app.core.spec import LoraSpec, QuantizationSpec, TrainSpec, scaling
from worker.model.base import LoadedBase
from worker.model.directory import written_whole

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
NORMS: Final = "dora_norms.safetensors"
_MAGNITUDE = ".lora_magnitude_vector"
_PREFIX = "base_model.model."  # PEFT's name for the model inside its own


class AdapterRefused(Exception):
    """This directory must not be served or trained on; the message says why."""


class AdapterConfig(BaseModel):
    """PEFT's adapter_config.json, reduced to what our adapters are. Anything else in a file is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    peft_type: str = Field(default="LORA", pattern="^LORA$")
    task_type: str = Field(default="CAUSAL_LM", pattern="^CAUSAL_LM$")
    base_model_name_or_path: str
    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(ge=0, lt=1)
    target_modules: list[str] = Field(min_length=1)
    bias: str = Field(default="none", pattern="^none$")
    use_rslora: bool = Field(default=False, exclude_if=operator.not_)
    use_dora: bool = Field(default=False, exclude_if=operator.not_)
    inference_mode: bool = True

    @property
    def scaling(self) -> float:
        return scaling(self.lora_alpha, self.r, use_rslora=self.use_rslora)


@dataclass(frozen=True)
class Dora:
    """What DoRA adds to a linear layer: its outputs are multiplied by magnitude over norm, in fp32."""

    magnitude_O: Tensor
    norm_O: Tensor


@dataclass(frozen=True)
class AdapterWeights:
    """A checked adapter. `modules` maps a linear layer's name to A [R, I] and B [O, R], unscaled, in fp32; `dora` the same names,
    or none, to what DoRA adds."""

    rank: int
    scaling: float
    modules: Mapping[str, tuple[Tensor, Tensor]]
    dora: Mapping[str, Dora]

    def is_shaped_as(self, lora: LoraSpec) -> bool:
        """Whether an adapter of this spec has the same layers, rank and scaling, and lengths or none."""
        targets = {name.rpartition(".")[2] for name in self.modules}
        asked = (lora.rank, lora.scaling, lora.use_dora, set(lora.targets))
        return (self.rank, self.scaling, bool(self.dora), targets) == asked


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The trained tensors of a PEFT model, by the names they have in files."""
    return {
        name.replace(".lora_magnitude_vector.default.weight", _MAGNITUDE).replace(".default.", "."): _plain(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def norms_of(model: Any) -> dict[str, Tensor]:
    """The lengths of the rows of W + s B A, by layer; none without DoRA."""
    from peft.utils.integrations import dequantize_module_weight  # engines, which measure none, do without PEFT

    found = dict[str, Tensor]()
    for name, layer in model.named_modules():
        if getattr(layer, "lora_magnitude_vector", None):
            a_RI, b_OR = (part["default"].weight.float() for part in (layer.lora_A, layer.lora_B))
            dense_OI = dequantize_module_weight(layer.get_base_layer()).float()
            found[name] = _plain(torch.linalg.norm(dense_OI + layer.scaling["default"] * (b_OR @ a_RI), dim=1))
    return found


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()


def write(
    directory: Path,
    model: Any,
    *,
    base: BaseEntry,
    spec: TrainSpec,
    renderer: Renderer,
    dataset_sha256: str,
    step: int,
    metrics: Mapping[str, float],
    kind: str = "adapter",
) -> Manifest:
    """Write what a PEFT `model` has learnt. Readers see the whole directory or none. Raises AdapterRefused if not finite."""
    tensors, norms = tensors_of(model), norms_of(model)
    _require_finite(tensors)
    with written_whole(directory) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        if norms:
            save_file(norms, partial / NORMS)
        (partial / CONFIG).write_text(_config_of(base, spec.lora).model_dump_json(indent=2))
        written = Manifest(
            kind=kind,
            files={name: manifest.entry_of(partial / name) for name in (WEIGHTS, CONFIG, *[NORMS] * bool(norms))},
            base=base,
            dataset_sha256=dataset_sha256,
            template_sha256=renderer.template_sha256,
            token_vectors=renderer.vectors(),
            spec=spec.model_dump(mode="json"),
            code_version=version("tunesmith"),
            step=step,
            metrics=dict(metrics),
        )
        (partial / manifest.NAME).write_bytes(written.to_bytes())
    return written


def open(directory: Path, *, base: LoadedBase, max_rank: int) -> AdapterWeights:
    """Check everything that can be checked before these weights answer anyone. Raises AdapterRefused."""
    said = _check_manifest(directory, base)
    config = _read_config(directory)
    if (NORMS in said.files) != config.use_dora:
        raise AdapterRefused(f"{CONFIG}: use_dora does not agree with {NORMS}, which is {'not ' if config.use_dora else ''}there")
    if config.r > max_rank:
        raise AdapterRefused(f"its rank is {config.r}; at most {max_rank} is allowed")
    shapes = {name: shape for name, shape in base.linear_shapes.items() if name.rpartition(".")[2] in config.target_modules}
    tensors = _read_tensors(directory / WEIGHTS, _expected_shapes(config, shapes))
    norms = {}
    if config.use_dora:
        norms = _read_tensors(directory / NORMS, {f"{_PREFIX}{name}": (outside,) for name, (_, outside) in shapes.items()})
    if not all((norm_O > 0).all() for norm_O in norms.values()):
        raise AdapterRefused(f"{NORMS} holds a length of zero")
    return AdapterWeights(
        config.r,
        config.scaling,
        {name: (tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"]) for name in shapes},
        {name: Dora(tensors[f"{_PREFIX}{name}{_MAGNITUDE}"], norms[f"{_PREFIX}{name}"]) for name in shapes if norms},
    )


def _read_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Exactly those expected, and finite. Raises AdapterRefused."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise AdapterRefused(f"{path.name} cannot be read: {error}") from error
    if problem := _difference(tensors, expected):
        raise AdapterRefused(problem)
    _require_finite(tensors)
    return tensors


def _config_of(base: BaseEntry, lora: LoraSpec) -> AdapterConfig:
    return AdapterConfig(
        base_model_name_or_path=base.id,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def _check_manifest(directory: Path, base: LoadedBase) -> Manifest:
    """That the directory is what its manifest says, and that the manifest speaks of this base and this template."""
    try:
        said = manifest.read(directory)
    except manifest.Damaged as error:
        raise AdapterRefused(str(error)) from error
    if unexpected := (said.files.keys() - {NORMS}) ^ {WEIGHTS, CONFIG}:
        raise AdapterRefused(f"it must hold {WEIGHTS} and {CONFIG} and nothing else, and differs in {min(unexpected)}")
    if said.base.digest != base.entry.digest:
        held = f"{base.entry.id} in {base.quantization.name} ({base.entry.digest[:12]})"
        raise AdapterRefused(f"it was trained on other weights, {_trained_on(said)}, than {held} has")
    if said.template_sha256 != base.renderer.template_sha256:
        raise AdapterRefused("it was trained with another chat template")
    if base.renderer.differs_from(said.token_vectors):
        raise AdapterRefused("the tokenizer gives other tokens than it was trained with")
    return said


def _trained_on(said: Manifest) -> str:
    quantization = QuantizationSpec.model_validate(said.spec.get("quantization", {}))
    return f"{said.base.id} in {quantization.name} ({said.base.digest[:12]})"


def _read_config(directory: Path) -> AdapterConfig:
    try:
        return AdapterConfig.model_validate(json.loads((directory / CONFIG).read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterRefused(f"{CONFIG}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise AdapterRefused(f"{CONFIG} is not JSON") from error


def _expected_shapes(config: AdapterConfig, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    expected = dict[str, tuple[int, ...]]()
    for name, (inside, outside) in shapes.items():
        expected[f"{_PREFIX}{name}.lora_A.weight"] = (config.r, inside)
        expected[f"{_PREFIX}{name}.lora_B.weight"] = (outside, config.r)
        if config.use_dora:
            expected[f"{_PREFIX}{name}{_MAGNITUDE}"] = (outside,)
    return expected


def _difference(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> str | None:
    """In what the tensors are not exactly those expected: a name that is merely ignored would answer as the plain base."""
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            return f"the tensor {name} is missing"
        if name not in expected:
            return f"the tensor {name} belongs to no layer that this adapter may change"
        if tuple(tensors[name].shape) != expected[name]:
            return f"the tensor {name} has shape {tuple(tensors[name].shape)} instead of {expected[name]}"
        if tensors[name].dtype != torch.float32:
            return f"the tensor {name} is {tensors[name].dtype}, not float32"
    return None


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterRefused(f"the tensor {name} holds values that are not finite")
