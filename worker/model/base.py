"""Base models, quantized: prepared once on a machine, then loaded from that copy in about a second."""

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from app.core.catalog import Base
from app.core.manifest import BaseEntry
from app.core.render import Renderer
from app.core.spec import QuantizationSpec
from worker.model import bnb, card, pointer, source
from worker.model.directory import locked, written_whole
from worker.model.int8 import Int8Linear
from worker.model.source import BaseRefused

__all__ = ["BaseRefused", "LoadedBase", "keep_weights_unpacked", "load", "prepare", "quantized"]

_BLOCK = 64
_SCALES = (".weight.absmax", ".weight.SCB")  # of a layer in 4 and in 8 bits, in our files
_WEIGHTS, _ENTRY = "weights.safetensors", "entry.json"


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base in memory: decoder layers as `quantization` says, everything else 16-bit, no gradient anywhere."""

    model: Any  # transformers' PreTrainedModel, whose types are not ours to check
    renderer: Renderer
    entry: BaseEntry
    quantization: QuantizationSpec

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of every linear layer that an adapter may change, also while PEFT has wrapped them."""
        return {
            name.removesuffix(".base_layer"): (module.in_features, module.out_features)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head" and ".lora_" not in name
        }


def load(
    base: Base,
    cache_dir: Path,
    *,
    quantization: QuantizationSpec = QuantizationSpec(),
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    for_training: bool,
) -> LoadedBase:
    """Load the base onto one device, preparing it first if this machine never did. Raises BaseRefused.

    `dtype` is that of everything but quantized weights, and of computation; float32 serves comparisons. `for_training` leaves
    the model in train mode, otherwise it is in eval mode; it is frozen either way.
    """
    device = device or _device()
    written_card = card.prepared(base, cache_dir)
    revision = card.revision_of(written_card)
    directory, digest = _prepared(base, revision, cache_dir, quantization, device)
    model = _assemble(directory, device, dtype).train(for_training)
    keep_weights_unpacked(model)
    entry = BaseEntry(id=base.id, revision=revision, digest=digest)
    return LoadedBase(model, Renderer.open(written_card), entry, quantization)


def prepare(base: Base, cache_dir: Path, *, quantization: QuantizationSpec = QuantizationSpec()) -> Path:
    """What `load` does at first use, without loading: the folder of the quantized weights. Raises BaseRefused."""
    revision = card.revision_of(card.prepared(base, cache_dir))
    return _prepared(base, revision, cache_dir, quantization, _device())[0]


def fastest_dtype() -> torch.dtype:
    """What this machine multiplies fastest in: 16 bits, but on CPUs without instructions for these 32."""
    return torch.bfloat16 if _device() == "cuda" or bnb.functional.has_avx512bf16() else torch.float32


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def keep_weights_unpacked(model: nn.Module) -> None:
    """Forbid bitsandbytes' repacking of 4-bit weights on CPUs with AVX512-BF16.

    There, one forward in eval mode repacks them for good; afterwards the layer passes no gradient on and its weights can no
    longer be read back (seen in 0.50.2).
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _prepared(base: Base, revision: str, cache_dir: Path, quantization: QuantizationSpec, device: str) -> tuple[Path, str]:
    """The directory of the quantized weights and its digest: the directory's name.

    The digest covers the source's weights and the settings, not the quantized bytes: GPU and CPU may round a scale differently.
    """
    bases = cache_dir / "bases"
    pointed = pointer.path(base, revision, cache_dir, quantization)
    with locked(pointed.with_suffix(".lock")):
        if folder := pointer.weights(pointed):
            return folder, folder.name
        with source.weights(base, revision, cache_dir) as weights:
            settings = {"format": pointer.FORMAT, "weights_sha256": weights.sha256, **quantization.model_dump()}
            if quantization.is_4_bit:
                settings["block"] = _BLOCK
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
            if not (bases / digest).exists():
                _write(quantized(weights.folder, quantization, device), base, settings, bases / digest)
        partial = pointed.with_suffix(".partial")
        partial.write_text(digest)
        partial.rename(pointed)
    return bases / digest, digest


def quantized(folder: Path, quantization: QuantizationSpec, device: str) -> Any:
    """The model of 16-bit safetensors, its decoder's linear layers quantized as they are read."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=_bitsandbytes(quantization),
        dtype=torch.bfloat16,
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )


def _bitsandbytes(quantization: QuantizationSpec) -> transformers.BitsAndBytesConfig | None:
    match quantization.scheme:
        case "nf4" | "fp4":
            return transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quantization.scheme,
                bnb_4bit_use_double_quant=quantization.double_quant,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        case "int8":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        case "none":
            return None


def _write(model: Any, base: Base, settings: dict[str, Any], directory: Path) -> None:
    _check_architecture(base, model.config)
    tensors = {
        re.sub(r"\.SCB$", ".weight.SCB", name): tensor.cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith(".weight_format")  # of 8-bit layers: there is one
    }
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    with written_whole(directory) as partial:
        save_file(tensors, partial / _WEIGHTS)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # else transformers would quantize again what it builds from this
        model.config.save_pretrained(partial)
        (partial / _ENTRY).write_text(json.dumps(settings, sort_keys=True))


def _check_architecture(base: Base, config: Any) -> None:
    """The memory planner believes the catalog: a wrong number there must not wait for an out-of-memory."""
    said = base.architecture
    found = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "mlp": config.intermediate_size,
        "vocab": config.vocab_size,
        "tied": config.tie_word_embeddings,
    }
    for name, value in found.items():
        if getattr(said, name) != value:
            raise BaseRefused(f"the catalog says that {base.id} has {name} = {getattr(said, name)}, its config.json says {value}")


def _assemble(directory: Path, device: str, dtype: torch.dtype) -> Any:
    """The model around the stored tensors. transformers' own loading goes over each of them several times: 10 times slower."""
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):  # dtype: transformers makes it the whole process's default meanwhile, for other threads too
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.config.dtype = dtype
    plain, quantized_parts = _by_kind(load_file(directory / _WEIGHTS, device=device))
    for name, parts in quantized_parts.items():
        model.set_submodule(name, _linear(model.get_submodule(name), parts, device, dtype))
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in plain.items()}, strict=False, assign=True)
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config).to(device))  # rotary tables: made from the config, never stored
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), f"{directory} lacks tensors"
    layers = {type(module) for module in model.modules()}
    # PEFT chooses its own layers by it
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bnb.nn.Linear4bit in layers, Int8Linear in layers
    return model.requires_grad_(False)


def _by_kind(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Those that are parameters as they are, and those that belong to a quantized layer, by layer."""
    plain, parts = dict[str, Tensor](), defaultdict[str, dict[str, Tensor]](dict)
    quantized_names = {name.removesuffix(scales) for name in tensors for scales in _SCALES if name.endswith(scales)}
    for name, tensor in tensors.items():
        layer, is_weight, part = name.partition(".weight")
        if is_weight and layer in quantized_names:
            parts[layer][part.removeprefix(".")] = tensor
        else:
            plain[name] = tensor
    return plain, parts


def _linear(like: Any, parts: dict[str, Tensor], device: str, dtype: torch.dtype) -> Any:
    data = parts.pop("")
    if data.dtype == torch.int8:
        return Int8Linear(like, data, parts["SCB"])
    with torch.device("meta"):
        made = bnb.nn.Linear4bit(like.in_features, like.out_features, bias=like.bias is not None, compute_dtype=dtype)
    made.weight = bnb.nn.Params4bit.from_prequantized(data, parts, requires_grad=False, device=device, module=made)
    made.weight.quant_state.dtype = dtype  # what bitsandbytes' own backward computes in
    return made
