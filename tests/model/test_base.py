import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from app.core import catalog, memory
from app.core.catalog import Base, HubSource, PathSource, WheelSource
from app.core.render import Renderer
from app.core.spec import QUANTIZATIONS, QuantizationName, QuantizationSpec
from tests import make
from worker.model import base as bases
from worker.model import bytewise, card, hub, source
from worker.model.base import BaseRefused, LoadedBase
from worker.model.source import Weights
from worker.training.linear import Projection

TINY = catalog.load()[make.TINY]
STOCK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokens_of(base: LoadedBase) -> torch.Tensor:
    return torch.arange(40).reshape(2, 20) % base.model.config.vocab_size


def saved_base(folder: Path, template: str) -> Base:
    """A base in a folder, as `save_pretrained` leaves one."""
    with source.weights(TINY, "", folder) as weights:
        for path in weights.folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise.tokenizer(320), eos_token="<|im_end|>", chat_template=template)
    tokenizer.save_pretrained(folder)
    return TINY.model_copy(update={"id": "saved", "source": PathSource(kind="path", path=folder, revision="r1")})


def test_a_base_whose_template_has_no_tools_gets_none_though_its_family_has_them(tmp_path: Path) -> None:
    folder, cache = tmp_path / "saved", tmp_path / "cache"
    folder.mkdir()
    with_tools = source.vocabulary(TINY, cache).template
    for template, has_tools in ((STOCK, False), (with_tools, True)):
        renderer = Renderer.open(card.prepared(saved_base(folder, template), cache))
        assert (renderer.tools_template is not None) == has_tools


def test_what_the_cache_gives_back_is_the_fresh_quantization_bit_for_bit(tiny: LoadedBase, bases_dir: Path) -> None:
    with source.weights(TINY, "", bases_dir) as weights:
        fresh = bases.quantized(weights.folder, QuantizationSpec(), "cpu")
    bases.keep_weights_unpacked(fresh)

    ours, theirs = tiny.model.state_dict(), fresh.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(tiny.model(tokens_of(tiny)).logits, fresh(tokens_of(tiny)).logits)


def test_decoder_layers_are_4_bit_and_nothing_is_kept_in_32(tiny: LoadedBase) -> None:
    layers = [module for name, module in tiny.model.named_modules() if name.endswith("_proj")]

    assert len(layers) == 7 * TINY.architecture.layers
    assert all(isinstance(layer, Linear4bit) and layer.weight.quant_type == "nf4" for layer in layers)
    assert {parameter.dtype for parameter in tiny.model.parameters()} == {torch.uint8, torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    assert tiny.model.lm_head.weight is tiny.model.model.embed_tokens.weight


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_base_takes_what_the_planner_says_and_loses_what_its_bits_lose(name: QuantizationName, bases_dir: Path) -> None:
    lost = {"nf4": 0.1, "nf4-single": 0.1, "fp4": 0.13, "fp4-single": 0.13, "int8": 0.01, "none": 0.0}  # of the norm, at most
    held = QUANTIZATIONS[name]
    base = bases.load(TINY, bases_dir, quantization=held, device="cpu", for_training=False)
    with source.weights(TINY, "", bases_dir) as weights:
        published = load_file(weights.folder / "model.safetensors")

    assert sum(map(_bytes_of, map(base.model.get_submodule, base.linear_shapes))) == pytest.approx(
        memory.linear_bytes(TINY.architecture, held), rel=0.002
    )
    for layer in base.linear_shapes:
        (dense_OI,) = (weights.dense_OI(torch.float32) for weights in Projection(base.model.get_submodule(layer))._weights)
        theirs = published[f"{layer}.weight"].float()
        error = float((dense_OI - theirs).norm() / theirs.norm())
        assert lost[name] / 2 <= error <= lost[name]
        rows = torch.randn(3, dense_OI.shape[1])
        with torch.inference_mode():  # the engine's product, beside training's
            torch.testing.assert_close(
                base.model.get_submodule(layer)(rows.bfloat16()).float(), rows @ dense_OI.T, atol=0.05, rtol=0.05
            )


def _bytes_of(layer: Any) -> int:
    """Of the weights and their scales. A second level's table of 256 numbers is the same for all layers, and is not counted."""
    state, tensors = getattr(layer.weight, "quant_state", None), [layer.weight.data]
    if state is not None:
        tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
    tensors += [layer.weight.SCB] if hasattr(layer.weight, "SCB") else []
    return sum(tensor.nbytes for tensor in tensors)


def test_weights_lose_no_more_than_nf4_loses(tiny: LoadedBase, bases_dir: Path) -> None:
    with source.weights(TINY, "", bases_dir) as weights:
        exact = load_file(weights.folder / "model.safetensors")

    for name in tiny.linear_shapes:
        weight = tiny.model.get_submodule(name).weight
        ours, theirs = dequantize_4bit(weight.data, weight.quant_state).float(), exact[f"{name}.weight"].float()
        assert (ours - theirs).norm() / theirs.norm() < 0.1  # of a normal distribution: 0.09


def test_no_cpu_repacks_a_base_s_weights(bases_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU has AVX512-BF16, bitsandbytes would; then no gradient passes (tests/training shows it on such a CPU)."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    base = bases.load(TINY, bases_dir, device="cpu", for_training=True)

    assert not any(module.support_avx512bf16_for_cpu for module in base.model.modules() if isinstance(module, Linear4bit))


def test_a_base_in_fp16_is_computed_in_bf16(tmp_path: Path) -> None:
    """fp16 overflows where bf16 does not."""
    (tmp_path / "saved").mkdir()
    saved = saved_base(tmp_path / "saved", STOCK)
    weights, config = tmp_path / "saved" / "model.safetensors", tmp_path / "saved" / "config.json"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    base = bases.load(saved, tmp_path / "cache", device="cpu", for_training=True)

    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.uint8, torch.bfloat16}
    layers = [module for module in base.model.modules() if isinstance(module, Linear4bit)]
    assert {(layer.compute_dtype, layer.weight.quant_state.dtype) for layer in layers} == {(torch.bfloat16, torch.bfloat16)}
    assert base.model(tokens_of(base)).logits.dtype == torch.bfloat16


def test_several_processes_starting_at_once_prepare_the_base_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(bases, "quantized", lambda *args, fresh=bases.quantized: made.append(1) or fresh(*args))

    with ThreadPoolExecutor(3) as starters:
        loads = [starters.submit(bases.load, TINY, tmp_path, device="cpu", for_training=True) for _ in range(3)]
    digests = {load.result().entry.digest for load in loads}

    assert (len(made), len(digests)) == (1, 1)


def test_the_digest_tells_weights_and_settings_apart_and_nothing_else(tiny: LoadedBase, tmp_path: Path) -> None:
    again = bases.load(TINY, tmp_path, device="cpu", for_training=False)
    single = bases.load(TINY, tmp_path, quantization=QuantizationSpec(double_quant=False), device="cpu", for_training=False)
    other_source = TINY.source.model_copy(update={"seed": 7})
    other = bases.load(TINY.model_copy(update={"source": other_source}), tmp_path, device="cpu", for_training=False)

    assert again.entry == tiny.entry
    assert len({base.entry.digest for base in (tiny, single, other)}) == 3


def test_a_base_from_a_folder_is_the_same_model(tiny: LoadedBase, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    base = bases.load(saved_base(tmp_path / "saved", STOCK), tmp_path / "cache", device="cpu", for_training=True)

    assert torch.equal(base.model(tokens_of(base)).logits, tiny.model(tokens_of(tiny)).logits)
    assert base.renderer.stop_ids == {bytewise.END_OF_TURN}


def test_a_base_whose_template_disagrees_with_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseRefused, match="differently from templates/chatml"):
        card.prepared(saved_base(tmp_path, STOCK.replace("'\n' + m", "'\n\n' + m")), tmp_path / "cache")


def test_a_card_is_made_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "weights", lambda *_: pytest.fail("the weights were asked for"))

    renderer = Renderer.open(card.prepared(TINY, tmp_path))

    assert renderer.context_length == TINY.context_length
    assert not (tmp_path / "bases").exists()


def test_the_wheel_s_tokenizer_is_read_without_importing_the_wheel(bases_dir: Path) -> None:
    renderer = Renderer.open(card.prepared(catalog.load()["smollm2-135m-instruct"], bases_dir))

    assert renderer.plain("Hello") == [19556]
    assert renderer.stop_ids == {2}


def test_a_missing_wheel_and_a_wrong_catalog_are_refused(tmp_path: Path) -> None:
    absent = WheelSource(kind="wheel", package="no_such_package", file="a.gguf", revision="1")
    wrong = TINY.architecture.model_copy(update={"mlp": 256})
    (tmp_path / "saved").mkdir()
    saved = saved_base(tmp_path / "saved", STOCK)

    with pytest.raises(BaseRefused, match="no_such_package is not installed"):
        card.prepared(TINY.model_copy(update={"source": absent}), tmp_path)
    with pytest.raises(BaseRefused, match=r"mlp = 256, its config.json says 128"):
        bases.load(saved.model_copy(update={"architecture": wrong}), tmp_path, device="cpu", for_training=True)
    assert not list((tmp_path / "bases").glob("*/weights.safetensors"))


def test_weights_from_a_hub_are_asked_for_at_the_card_s_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    local = saved_base(snapshot, STOCK)

    def fetched(of: HubSource, revision: str, cache_dir: Path, patterns: Sequence[str]) -> Path:
        asked.append((of.id, revision, "*.safetensors" in patterns))
        return snapshot

    monkeypatch.setattr(hub, "snapshot", fetched)
    on_hub = {"kind": "hub", "id": "org/model", "revision": "main"}
    base = Base.model_validate(local.model_dump() | {"source": on_hub})

    loaded = bases.load(base, tmp_path / "cache", device="cpu", for_training=True)

    assert asked == [("org/model", "main", False), ("org/model", "c0ffee", True)]
    assert loaded.entry.revision == "c0ffee"


def test_weights_are_named_by_bytes_not_by_where_they_lie(tmp_path: Path) -> None:
    found: list[Weights] = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with source.weights(saved_base(tmp_path / name, STOCK), "r1", tmp_path) as weights:
            found.append(weights)

    assert found[0].sha256 == found[1].sha256


def test_nothing_is_said_as_bitsandbytes_is_loaded() -> None:
    """On CPUs with AVX512-BF16 it warns of kernels that nobody needs, before anybody can tell it not to."""
    done = subprocess.run([sys.executable, "-c", "import worker.model.base"], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
