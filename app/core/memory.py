"""How much memory a run needs, before it runs. Pure arithmetic, explained and checked in docs/planner.md."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from app.core.catalog import Architecture
from app.core.spec import TARGETS, LoraSpec, OptimizerKind, QuantizationSpec

GIB = 1024**3

Device = Literal["cpu", "cuda"]

# with and without double quantization: 1/2, 1/64 and 4/(64·256), or 1/2 and 4/64
BYTES_PER_4_BIT = {True: 0.515869, False: 0.5625}
LOGITS_AT_ONCE = 2**25  # of the chunked cross-entropy: worker/training/loss.py
_LOGITS_ALIVE = 4 * 2  # 16-bit logits, their gradient, and as much again that the compiler may need between them


_EIGHT_BITS = 2 + 8 / 256  # two moments and the scales of their blocks
# paged ones are counted as if they were on the card: while a step is made they are
_MOMENTS: dict[OptimizerKind, float] = {"adamw_8bit": _EIGHT_BITS, "paged_adamw_8bit": _EIGHT_BITS, "adamw_32bit": 8}


class PerToken(NamedTuple):
    """Bytes that a layer has for each token, by unit of width: of the model, of all queries, of all keys, of the MLP."""

    hidden: float
    queries: float
    keys: float
    mlp: float

    def of(self, model: Architecture) -> float:
        widths = (model.hidden, model.query_width, model.kv_width, model.mlp)
        return sum(each * width for each, width in zip(self, widths, strict=True))


@dataclass(frozen=True)
class Trainer:
    """What a training program has in memory for any model. `kept`: what a layer keeps for its backward; `passing`: what comes and
    goes in that backward. `logits` are bytes for each token and entry of the vocabulary; None where they are never all there."""

    kept: PerToken
    passing: PerToken
    logits: float | None
    slack: float  # part of what comes and goes that fragmentation adds
    context_bytes: float  # libraries, compiled kernels, CUDA's context
    is_last_kept: bool = False  # where layers are computed again, the last one, with which the backward begins, is not
    state_bytes: float = 4 + 4 + _MOMENTS["adamw_8bit"]  # for each parameter of the adapter: fp32 master, gradient, moments
    embedding_bytes: int = 2


_WRITTEN_OUT = PerToken(4, 4, 4, 4)  # x twice, q, what attention gave, k, v, gate, up: worker/training/decoder.py
_HEAD_NORMS = PerToken(0, 2, 4, 0)  # q, k and v before them
_STOCK = PerToken(18, 10, 0, 8)  # transformers' and PEFT's modules: worker/training/stock.py, counted by a hook
_STOCK_HEAD_NORMS = PerToken(0, 4, 4, 0)
_STOCK_MORE_NORMS = PerToken(8, 0, 0, 0)  # Gemma's, behind attention and MLP
_STOCK_DROPOUT = PerToken(20, 4, 0, 4)  # inputs and masks of every adapted layer
_STOCK_DORA = PerToken(8, 4, 8, 8)  # of each adapted layer's outputs two in 16 bits: the base's and the product's
_PASSING = PerToken(8, 0, 0, 8)
_DORA_DENSE = 2 + 2 + 2  # bytes of a weight's B A, that scaled, and their sum with what is dense: PEFT measures rows by it
_ON = {"cuda": (0.05, 1e9), "cpu": (0.35, 0.8e9)}  # slack and context; the CPU's are measured: bench/memory.py


class Memory(BaseModel):
    """Predicted peak of one training process, in bytes, and what it is made of.

    `checkpoints` are the inputs of layers that are computed again, `layers` what is kept of those that are not. `passing`, of a
    layer's backward, and `head` are never there together: the larger counts.
    """

    model_config = ConfigDict(frozen=True)

    weights: int
    adapter: int
    checkpoints: int
    layers: int
    passing: int
    head: int
    dequantized: int
    slack: int
    context: int

    @property
    def tensor_bytes(self) -> int:
        """What torch would count: without fragmentation and without what is no tensor."""
        kept = self.checkpoints + self.layers + self.dequantized
        return self.weights + self.adapter + kept + max(self.passing, self.head)

    @property
    def peak_bytes(self) -> int:
        return self.tensor_bytes + self.slack + self.context


def trainer_of(model: Architecture, lora: LoraSpec, device: Device, optimizer: OptimizerKind = "adamw_8bit") -> Trainer:
    """Ours: the decoder written out where it knows the model, else transformers' own."""
    slack, context_bytes = _ON[device]
    if is_written_out(model, lora):
        kept = [_WRITTEN_OUT, *[_HEAD_NORMS] * model.head_norms]
    else:
        optional = (
            (model.head_norms, _STOCK_HEAD_NORMS),
            (model.more_norms, _STOCK_MORE_NORMS),
            (lora.dropout, _STOCK_DROPOUT),
            (lora.use_dora, _STOCK_DORA),
        )
        kept = [_STOCK, *(part for is_there, part in optional if is_there)]
    return Trainer(
        _sum(kept),
        _PASSING,
        None,
        slack,
        context_bytes,
        is_last_kept=is_written_out(model, lora),
        state_bytes=4 + 4 + _MOMENTS[optimizer],
    )


def is_written_out(model: Architecture, lora: LoraSpec) -> bool:
    """Whether training takes worker/training/decoder.py."""
    return not (model.stock or lora.dropout or lora.use_dora)


def predict(
    model: Architecture,
    lora: LoraSpec,
    *,
    micro_batch_tokens: int,
    trainer: Trainer | None = None,
    quantization: QuantizationSpec = QuantizationSpec(),
    is_checkpointing: bool = False,
    keeps_start: bool = False,
) -> Memory:
    """The peak of a training step with micro-batches of so many tokens; of ours on a GPU, unless another trainer is named.

    `keeps_start`: the adapter that the run began with stays beside the one that is trained.
    """
    trainer = trainer or trainer_of(model, lora, "cuda")
    tokens = micro_batch_tokens
    of_layer = (trainer.kept.of(model) + _kept_of_adapter(model, lora)) * tokens
    checkpoints, layers = 0, of_layer * model.layers
    passing, head = trainer.passing.of(model) * tokens, _head_bytes(model, tokens, trainer.logits)
    if is_checkpointing:
        checkpoints, layers = 2 * model.layers * model.hidden * tokens, of_layer if trainer.is_last_kept else 0
        passing += 0 if trainer.is_last_kept else of_layer
    made_dense = 2 * (quantization.scheme != "none") + _DORA_DENSE * lora.use_dora
    dequantized = made_dense * max(i * o for i, o in model.linear_shapes)
    coming_and_going = checkpoints + layers + max(passing, head) + dequantized
    return Memory(
        weights=round(weights_bytes(model, quantization, embedding_bytes=trainer.embedding_bytes)),
        adapter=round(adapter_parameters(model, lora) * (trainer.state_bytes + 4 * keeps_start)),
        checkpoints=checkpoints,
        layers=round(layers),
        passing=round(passing),
        head=round(head),
        dequantized=dequantized,
        slack=round(trainer.slack * coming_and_going),
        context=round(trainer.context_bytes),
    )


def weights_bytes(model: Architecture, quantization: QuantizationSpec = QuantizationSpec(), *, embedding_bytes: int = 2) -> float:
    """The resident base: quantized decoder, 16-bit embeddings, head and norms."""
    norms = (2 * model.layers + 1) * model.hidden
    embeddings = model.vocab * model.hidden * (1 if model.tied else 2)
    return linear_bytes(model, quantization) + embedding_bytes * embeddings + 2 * norms


def linear_bytes(model: Architecture, quantization: QuantizationSpec) -> float:
    """The decoder's linear layers."""
    match quantization.scheme:
        case "nf4" | "fp4":
            return BYTES_PER_4_BIT[quantization.double_quant] * model.linear_parameters
        case "int8":
            return model.linear_parameters + 4 * model.layers * sum(outputs for _, outputs in model.linear_shapes)
        case "none":
            return 2 * model.linear_parameters


def waiting_bytes(model: Architecture, device: Device = "cuda") -> int:
    """A trainer that has loaded the base and waits for a job."""
    return round(weights_bytes(model) + _ON[device][1])


def adapter_parameters(model: Architecture, lora: LoraSpec) -> int:
    """Trainable parameters of LoRA: r·(in + out) for each linear layer that it changes; with DoRA a length for each output."""
    shapes = zip(TARGETS, model.linear_shapes, strict=True)
    return model.layers * sum(lora.rank * (i + o) + lora.use_dora * o for name, (i, o) in shapes if name in lora.targets)


def _kept_of_adapter(model: Architecture, lora: LoraSpec) -> int:
    """x Aᵀ in 16 bits of each adapted module; and, in 32, two norms' scales and what attention's softmax was divided by."""
    return 2 * lora.rank * len(lora.targets) + 8 + 4 * model.heads


def _head_bytes(model: Architecture, tokens: int, logits: float | None) -> float:
    if logits is not None:
        return logits * model.vocab * tokens
    rows = min(tokens, max(1, LOGITS_AT_ONCE // model.vocab))
    return _LOGITS_ALIVE * model.vocab * rows + 8 * model.hidden * tokens  # hidden states, normed, and their gradient twice


def _sum(parts: list[PerToken]) -> PerToken:
    return PerToken(*map(sum, zip(*parts, strict=True)))
