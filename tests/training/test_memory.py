"""What a forward keeps for its backward, beside what the planner says of it."""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from app.core import memory
from app.core.catalog import Architecture
from app.core.spec import LoraSpec, QuantizationSpec
from worker.model import base as bases
from worker.training import decoder, workspace
from worker.training.decoder import Decoder
from worker.training.stock import StockDecoder
from worker.training.workspace import Kept

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks transformers by it
    pytest.mark.filterwarnings("ignore:.*gemm_4bit_forward.*"),
]

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 120,
    "max_position_embeddings": 4096,
}
PLAIN = Architecture(layers=0, hidden=256, heads=4, kv_heads=2, head_dim=64, mlp=768, vocab=120, tied=True)
NORMED = PLAIN.model_copy(update={"head_norms": True})
GEMMA = NORMED.model_copy(update={"more_norms": True, "stock": True})
LENGTH = 64  # of each document: a multiple of what buckets are rounded up to

Of = Callable[[Any], Decoder | StockDecoder]


def config(kind: type[PreTrainedConfig], layers: int) -> PreTrainedConfig:
    return kind(**SHAPE, num_hidden_layers=layers, **({"sliding_window": 2 * LENGTH} if kind is Gemma3TextConfig else {}))


def model_of(kind: type[PreTrainedConfig], lora: LoraSpec, layers: int, folder: Path) -> Any:
    """In NF4, as training holds it."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config(kind, layers), dtype=torch.bfloat16).save_pretrained(folder)
    model = bases.quantized(folder, QuantizationSpec(), "cpu").requires_grad_(False)
    bases.keep_weights_unpacked(model)
    asked = peft.LoraConfig(
        r=lora.rank, lora_dropout=lora.dropout, use_dora=lora.use_dora, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, asked).train()


def kept_bytes(model: Any, of: Of, tokens: int) -> int:
    """By a forward, parameters aside; a tensor that is kept twice counts once."""
    made, kept = of(model.get_decoder()), list[Tensor]()
    positions_T = torch.arange(tokens) % LENGTH
    lengths = (LENGTH,) * (tokens // LENGTH)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        _, backward = made.forward(positions_T, tokens_T=positions_T, positions_T=positions_T, lengths=lengths)
    if isinstance(made, Decoder):
        kept = list(held_by(backward))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = dict[int, int]()
    for tensor in kept:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # in a workspace tensors lie side by side in large blocks; elsewhere a view keeps all of its storage
            is_in_block = storage.nbytes() >= workspace._BLOCK_BYTES
            where, size = (tensor.data_ptr(), tensor.nbytes) if is_in_block else (storage.data_ptr(), storage.nbytes())
            sizes[where] = max(sizes.get(where, 0), size)
    return sum(sizes.values())


def held_by(way_back: Callable[..., object]) -> Iterator[Tensor]:
    """Every tensor that a function can reach by what it closes over."""
    seen, found = set[int](), [way_back]
    while found:
        held = found.pop()
        if id(held) in seen or isinstance(held, type | ModuleType | Kept):
            continue
        seen.add(id(held))
        if isinstance(held, Tensor):
            yield held
        elif isinstance(held, FunctionType):
            found += [cell.cell_contents for cell in held.__closure__ or ()]
        else:
            found += gc.get_referents(held)


def measured(kind: type[PreTrainedConfig], lora: LoraSpec, of: Of, folder: Path) -> float:
    """Bytes a token and layer: what two layers more and a thousand tokens more add."""
    few, many = (model_of(kind, lora, layers, folder / str(layers)) for layers in (2, 4))
    grown = [kept_bytes(model, of, 1024) - kept_bytes(model, of, 512) for model in (few, many)]
    return (grown[1] - grown[0]) / 2 / 512


def predicted(model: Architecture, lora: LoraSpec, **options: bool) -> float:
    few, many = (
        memory.predict(model.model_copy(update={"layers": layers}), lora, micro_batch_tokens=1024, **options) for layers in (2, 4)
    )
    return (many.layers + many.checkpoints - few.layers - few.checkpoints) / 2 / 1024


@pytest.mark.parametrize(
    ("kind", "model", "of", "dropout"),
    [
        (LlamaConfig, PLAIN, Decoder, 0.0),
        (Qwen3Config, NORMED, Decoder, 0.0),
        (LlamaConfig, PLAIN.model_copy(update={"stock": True}), StockDecoder, 0.0),
        (LlamaConfig, PLAIN, StockDecoder, 0.1),
        (Qwen3Config, NORMED, StockDecoder, 0.1),
        (Gemma3TextConfig, GEMMA, StockDecoder, 0.0),
        (Gemma3TextConfig, GEMMA, StockDecoder, 0.1),
    ],
)
def test_layers_keep_what_the_planner_says(
    kind: type[PreTrainedConfig], model: Architecture, of: Of, dropout: float, tmp_path: Path
) -> None:
    lora = LoraSpec(rank=8, dropout=dropout)

    assert memory.is_written_out(model, lora) == (of is Decoder)
    assert measured(kind, lora, of, tmp_path) == pytest.approx(predicted(model, lora), rel=0.02)


def test_dora_keeps_what_the_planner_says(tmp_path: Path) -> None:
    lora = LoraSpec(rank=8, use_dora=True)

    assert not memory.is_written_out(PLAIN, lora)
    assert measured(LlamaConfig, lora, StockDecoder, tmp_path) == pytest.approx(predicted(PLAIN, lora), rel=0.02)


@pytest.mark.parametrize("of", [Decoder, StockDecoder])
def test_layers_that_are_computed_again_keep_their_input_alone(of: Of, tmp_path: Path) -> None:
    lora, again = LoraSpec(rank=8, dropout=0.0), partial(of, is_checkpointing=True)

    found = measured(LlamaConfig, lora, again, tmp_path)
    assert found == pytest.approx(predicted(PLAIN, lora, is_checkpointing=True), rel=0.02) == 2 * PLAIN.hidden


@pytest.mark.parametrize(("kind", "model"), [(LlamaConfig, PLAIN), (Qwen3Config, NORMED), (Gemma3TextConfig, GEMMA)])
def test_the_planner_knows_which_models_the_decoder_knows(kind: type[PreTrainedConfig], model: Architecture) -> None:
    made = AutoModelForCausalLM.from_config(config(kind, 1)).get_decoder()

    assert decoder.knows(made, longest=LENGTH) == memory.is_written_out(model, LoraSpec())
    assert not memory.is_written_out(model, LoraSpec(dropout=0.1))
