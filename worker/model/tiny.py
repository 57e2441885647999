"""The random base: a Llama small enough for tests, drawn from a seed."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from app.core.catalog import Architecture, Base
from worker.model import bytewise


def write(base: Base, seed: int, folder: Path) -> str:
    """The 16-bit weights and config.json, as `save_pretrained` would leave them. Returns the sha256 of the weights."""
    tensors = _draw(base.architecture, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config_of(base).save_pretrained(folder)
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def config_of(base: Base) -> LlamaConfig:
    shape = base.architecture
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=base.context_length,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=bytewise.END_OF_TURN,
        pad_token_id=bytewise.END_OF_TURN,  # as SmolLM2 has it: padding cannot be told from an end by its id
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def _draw(shape: Architecture, seed: int) -> dict[str, Tensor]:
    """Layers that say as much as the embeddings do, so that greedy text varies instead of repeating its last token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, spread: float) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, dtype=torch.float32) * spread).to(torch.bfloat16)

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": normal(shape.vocab, shape.hidden, 0.2), "model.norm.weight": ones.clone()}
    names = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for name, (inside, outside) in zip(names, shape.linear_shapes, strict=True):
            tensors[f"{prefix}.{name}_proj.weight"] = normal(outside, inside, 1.5 * inside**-0.5)
        tensors[f"{prefix}.input_layernorm.weight"] = ones.clone()
        tensors[f"{prefix}.post_attention_layernorm.weight"] = ones.clone()
    if not shape.tied:
        tensors["lm_head.weight"] = normal(shape.vocab, shape.hidden, 0.2)
    return tensors
