"""Adapter directories: written once, whole and with a manifest; opened only if nothing in them could mislead.

adapter_model.safetensors   LoRA matrices in fp32, named as PEFT names them
adapter_config.json         what PEFT needs to load them, and nothing else
manifest.json               see app.core.manifest; written last
"""

import json
import math
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
from app.core.spec import LoraSpec, TrainSpec
from worker.model.base import LoadedBase
from worker.model.directory import written_whole

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
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
    inference_mode: bool = True

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True)
class AdapterWeights:
    """A checked adapter. `modules` maps a linear layer's name to A [R, I] and B [O, R], unscaled, in fp32."""

    rank: int
    scaling: float
    modules: Mapping[str, tuple[Tensor, Tensor]]


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The trained tensors of a PEFT model, by the names they have in files."""
    return {
        name.replace(".default.", "."): parameter.detach().float().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


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
    tensors = tensors_of(model)
    _require_finite(tensors)
    with written_whole(directory) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(_config_of(base, spec.lora).model_dump_json(indent=2))
        written = Manifest(
            kind=kind,
            files={name: manifest.entry_of(partial / name) for name in (WEIGHTS, CONFIG)},
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
    _check_manifest(directory, base)
    config = _read_config(directory)
    if config.r > max_rank:
        raise AdapterRefused(f"its rank is {config.r}; at most {max_rank} is allowed")
    try:
        tensors = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise AdapterRefused(f"{WEIGHTS} cannot be read: {error}") from error
    expected = _expected_shapes(config, base.linear_shapes)
    if problem := _difference(tensors, expected):
        raise AdapterRefused(problem)
    _require_finite(tensors)
    names = [name for name in base.linear_shapes if f"{_PREFIX}{name}.lora_A.weight" in tensors]
    modules = {name: (tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"]) for name in names}
    return AdapterWeights(config.r, config.scaling, modules)


def _config_of(base: BaseEntry, lora: LoraSpec) -> AdapterConfig:
    return AdapterConfig(
        base_model_name_or_path=base.id,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        use_rslora=lora.use_rslora,
    )


def _check_manifest(directory: Path, base: LoadedBase) -> None:
    """That the directory is what its manifest says, and that the manifest speaks of this base and this template."""
    try:
        said = manifest.read(directory)
    except manifest.Damaged as error:
        raise AdapterRefused(str(error)) from error
    if unexpected := said.files.keys() ^ {WEIGHTS, CONFIG}:
        raise AdapterRefused(f"it must hold {WEIGHTS} and {CONFIG} and nothing else, and differs in {min(unexpected)}")
    if said.base.digest != base.entry.digest:
        raise AdapterRefused(f"it was trained on other weights ({said.base.id} {said.base.digest[:12]}) than {base.entry.id} has")
    if said.template_sha256 != base.renderer.template_sha256:
        raise AdapterRefused("it was trained with another chat template")
    if base.renderer.differs_from(said.token_vectors):
        raise AdapterRefused("the tokenizer gives other tokens than it was trained with")


def _read_config(directory: Path) -> AdapterConfig:
    try:
        return AdapterConfig.model_validate(json.loads((directory / CONFIG).read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterRefused(f"{CONFIG}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise AdapterRefused(f"{CONFIG} is not JSON") from error


def _expected_shapes(config: AdapterConfig, linear_shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    expected = dict[str, tuple[int, ...]]()
    for name, (inside, outside) in linear_shapes.items():
        if name.rpartition(".")[2] in config.target_modules:
            expected[f"{_PREFIX}{name}.lora_A.weight"] = (config.r, inside)
            expected[f"{_PREFIX}{name}.lora_B.weight"] = (outside, config.r)
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
