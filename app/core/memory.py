"""How much memory a run needs, before it runs. Pure arithmetic; checked against published peaks in the tests."""

from dataclasses import dataclass

from app.core.catalog import Architecture
from app.core.spec import TARGETS, LoraSpec

GIB = 1024**3

BYTES_PER_NF4 = {True: 0.515869, False: 0.5625}  # with and without double quantization
_STATE_BYTES = 4 + 4 + 2 + 8 / 256  # fp32 master, gradient, two 8-bit moments and their scales
_CHUNKED_HEAD_BYTES = 0.3e9  # cross-entropy in chunks of rows: about constant
_FULL_HEAD_BYTES = 14  # per token and vocabulary entry: logits in 16 and 32 bits, and their gradients
_CONTEXT_BYTES = 1e9  # CUDA context and the libraries' workspaces
_SLACK = 1.05


@dataclass(frozen=True)
class Memory:
    """Predicted peak of one training process, in bytes, and what it is made of."""

    weights: float
    adapter: float
    checkpoints: float
    layers: float
    head: float
    context: float

    @property
    def peak_bytes(self) -> int:
        return int((self.weights + self.adapter + self.checkpoints + max(self.layers, self.head)) * _SLACK + self.context)


def weights_bytes(model: Architecture, *, double_quant: bool = True) -> float:
    """The resident base: 4-bit decoder, 16-bit embeddings, head and norms."""
    norms = (2 * model.layers + 1) * model.hidden
    embeddings = model.vocab * model.hidden * (1 if model.tied else 2)
    return BYTES_PER_NF4[double_quant] * model.linear_parameters + 2 * (embeddings + norms)


def adapter_parameters(model: Architecture, lora: LoraSpec) -> int:
    """Trainable parameters of LoRA: r·(in + out) for each linear layer that it changes."""
    targets = TARGETS if lora.target_modules == "all-linear" else lora.target_modules
    shapes = zip(TARGETS, model.linear_shapes, strict=True)
    return model.layers * sum(lora.rank * (i + o) for name, (i, o) in shapes if name in targets)


def predict(
    model: Architecture,
    lora: LoraSpec,
    *,
    micro_batch_tokens: int,
    double_quant: bool = True,
    is_checkpointing: bool = False,
    is_loss_chunked: bool = True,
) -> Memory:
    """A training step. Ours keeps every layer's activations and chunks the loss; other trainers do neither."""
    tokens, h, kv, f = micro_batch_tokens, model.hidden, model.kv_width, model.mlp
    saved, transient = (16 * h + 4 * kv + 8 * f) * tokens, (4 * h + 4 * f) * tokens
    live: float = saved + transient if is_checkpointing else saved * model.layers + transient
    if lora.dropout:
        live *= 1.6
    return Memory(
        weights=weights_bytes(model, double_quant=double_quant) + 2 * h * f,
        adapter=adapter_parameters(model, lora) * _STATE_BYTES,
        checkpoints=2 * model.layers * h * tokens if is_checkpointing else 0,
        layers=live,
        head=_CHUNKED_HEAD_BYTES if is_loss_chunked else _FULL_HEAD_BYTES * model.vocab * tokens,
        context=_CONTEXT_BYTES,
    )
