"""What a forward keeps for its backward, counted by a hook on saved tensors, beside what the planner says of it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
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
from worker.training import decoder
from worker.training.decoder import Decoder
from worker.training.stock import StockDecoder

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
    asked = peft.LoraConfig(r=lora.rank, lora_dropout=lora.dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, asked).train()


def kept_bytes(model: Any, of: Of, tokens: int) -> int:
    """By a forward, parameters aside; a tensor that is saved twice counts once."""
    made, held = of(model.get_decoder()), dict[int, int]()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # ours lie side by side in blocks of a workspace, transformers' each in a storage that a view may not let go of
            own = isinstance(made, Decoder)
            where, size = (tensor.data_ptr(), tensor.nbytes) if own else (storage.data_ptr(), storage.nbytes())
            held[where] = max(held.get(where, 0), size)
        return tensor

    positions_T = torch.arange(tokens) % LENGTH
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made.hidden_at(positions_T, tokens_T=positions_T, positions_T=positions_T, lengths=(LENGTH,) * (tokens // LENGTH))
    return sum(held.values())


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
