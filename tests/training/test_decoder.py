"""The decoder written out, beside transformers' own with PEFT's layers: the same numbers, forward and backward."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from worker.training import attention, decoder, fused, kernels
from worker.training.attention import Documents
from worker.training.decoder import Decoder
from worker.training.fused import Fused
from worker.training.stock import StockDecoder

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks by it

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 120,
    "max_position_embeddings": 1024,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama, longer context": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2, with biases": Qwen2Config(**SHAPE),
    "qwen3, with norms in heads": Qwen3Config(**SHAPE),
}
LENGTHS = (300, 290, 40, 41, 7, 2)  # more queries than one block holds; like and unlike neighbours


def model_of(config: PreTrainedConfig, targets: list[str] | str = "all-linear") -> Any:
    """Drawn at random, biases, norms and B of LoRA too: none is zero or one."""
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    model = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "norm" in name or name.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def computed(model: Any, of: Callable[[Any], Decoder | StockDecoder], lengths: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Hidden states of every third position, and the gradients of a sum over them."""
    tokens_T = torch.randint(0, 120, (sum(lengths),), generator=torch.Generator().manual_seed(7))
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    rows_N = torch.arange(0, len(tokens_T), 3)
    hidden_ND, backward = of(model.get_decoder()).forward(rows_N, tokens_T=tokens_T, positions_T=positions_T, lengths=lengths)
    backward(torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(8)))
    return hidden_ND, taken_gradients(model)


def taken_gradients(model: Any) -> list[Tensor]:
    """Of all trained parameters, which have none afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    return gradients


def assert_same(model: Any, lengths: tuple[int, ...] = LENGTHS) -> None:
    require_equal(computed(model, Decoder, lengths), computed(model, StockDecoder, lengths))


def require_equal(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    """Gradients as a whole: how far one of their numbers is off, where a sum nearly cancels, depends on the CPU."""
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        assert float((one - other).norm() / other.norm()) < 2e-5


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_known_family_gives_what_transformers_gives(family: str) -> None:
    model = model_of(FAMILIES[family])

    assert decoder.knows(model.get_decoder(), longest=max(LENGTHS))
    assert_same(model)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj"], ["gate_proj"], ["down_proj"]])
def test_layers_without_an_adapter_are_passed_through(targets: list[str]) -> None:
    assert_same(model_of(FAMILIES["llama"], targets))


@pytest.mark.parametrize("lengths", [(600,), (2, 2, 2, 2), (64, 64), (5, 128, 3, 257)])
def test_any_mix_of_documents(lengths: tuple[int, ...]) -> None:
    assert_same(model_of(FAMILIES["llama"]), lengths)


def test_a_second_forward_does_not_take_what_the_first_one_keeps() -> None:
    model = model_of(FAMILIES["llama"])
    both = Decoder(model.get_decoder())
    tokens_T, positions_T, rows_N = torch.arange(60) % 120, torch.arange(60), torch.arange(60)

    def forward(shift: int) -> tuple[Tensor, Callable[[Tensor], None]]:
        return both.forward(rows_N, tokens_T=(tokens_T + shift) % 120, positions_T=positions_T, lengths=(60,))

    hidden_ND, backward = forward(0)
    backward(hidden_ND)
    alone = taken_gradients(model)
    (_, backward), _other = forward(0), forward(50)
    backward(hidden_ND)

    assert all(map(torch.equal, taken_gradients(model), alone))


def test_gradients_are_added_to_those_that_are_there() -> None:
    model = model_of(FAMILIES["llama"])
    _, once = computed(model, Decoder, (20, 9))
    for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), once, strict=True):
        parameter.grad = gradient.clone()
    _, twice = computed(model, Decoder, (20, 9))

    torch.testing.assert_close(twice, [2 * gradient for gradient in once])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("family", ["llama", "qwen3, with norms in heads"])
def test_layers_computed_again_in_the_backward_change_no_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, honest = model_of(FAMILIES[family]), [], decoder.Layer.forward

    def counted(*args: Any, **named: Any) -> Any:
        calls.append(1)
        return honest(*args, **named)

    monkeypatch.setattr(decoder.Layer, "forward", counted)
    kept = computed(model, Decoder, LENGTHS)
    again = computed(model, partial(Decoder, is_checkpointing=True), LENGTHS)

    assert torch.equal(kept[0], again[0])
    assert all(map(torch.equal, kept[1], again[1]))
    assert len(calls) == 2 + 2 * 2


def test_transformers_layers_computed_again_change_no_bit() -> None:
    model, calls = model_of(FAMILIES["llama"]), []
    counted = model.get_decoder().layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    kept = computed(model, StockDecoder, LENGTHS)
    again = computed(model, partial(StockDecoder, is_checkpointing=True), LENGTHS)
    counted.remove()

    assert torch.equal(kept[0], again[0])
    assert all(map(torch.equal, kept[1], again[1]))
    assert len(calls) == 1 + 2


def test_what_it_does_not_know_is_left_to_transformers() -> None:
    gemma = AutoModelForCausalLM.from_config(Gemma3TextConfig(**SHAPE, sliding_window=16))
    windowed = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=100))
    activated = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, hidden_act="gelu"))

    assert not decoder.knows(gemma.get_decoder(), longest=10)
    assert not decoder.knows(activated.get_decoder(), longest=10)
    assert decoder.knows(windowed.get_decoder(), longest=100)
    assert not decoder.knows(windowed.get_decoder(), longest=101)


def test_documents_of_like_lengths_share_a_bucket_and_nothing_is_lost() -> None:
    lengths = (300, 290, 280, 100, 90, 5, 5, 5, 90)
    documents = Documents(lengths, torch.zeros(sum(lengths), 1, 4), torch.zeros(sum(lengths), 1, 4))
    rows = [row for bucket in documents.buckets for row in bucket.rows_BS.flatten()[bucket.slots_t].tolist()]

    assert rows == list(range(sum(lengths)))
    assert [len(bucket.rows_BS) for bucket in documents.buckets] == [3, 2, 3, 1]


def of_module(module: Any) -> Iterator[Fused[..., Any]]:
    return (value for value in vars(module).values() if isinstance(value, Fused))


@pytest.mark.usefixtures("compiled")
def test_compiled_is_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused.can_compile():
        pytest.skip("no C++ compiler here: everything runs as it is written")
    model = model_of(FAMILIES["llama"])
    compiled = computed(model, Decoder, LENGTHS)
    for function in (*of_module(kernels), *of_module(attention)):
        monkeypatch.setattr(function, "_compiled", function.as_written)
    written = computed(model, Decoder, LENGTHS)

    require_equal(compiled, written)
    assert not torch.equal(compiled[0], torch.zeros_like(compiled[0]))


def test_compiled_functions_are_kept_where_they_are_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as it is once torch._dynamo is imported
    fused.keep_in(tmp_path)
    assert Path(cache_dir()).parent == tmp_path / "kernels"

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "chosen"))
    fused.keep_in(tmp_path)
    assert cache_dir() == str(tmp_path / "chosen")


def test_without_a_compiler_functions_run_as_they_are_written(tmp_path: Path) -> None:
    program = (
        "import torch; from worker.training import fused; double = fused.Fused(lambda values: values * 2); "
        "print(fused.can_compile(), double(torch.ones(2)).tolist())"
    )
    lacking = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | lacking, capture_output=True, text=True, check=True)

    assert done.stdout == "False [2.0, 2.0]\n"
    assert "kernels are not compiled" in done.stderr
