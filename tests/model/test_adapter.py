import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.core import manifest
from app.core.manifest import BaseEntry, Manifest
from app.core.render import Renderer
from app.core.spec import TrainSpec
from tests.training import make as training
from worker.model import adapter
from worker.model.adapter import CONFIG, NORMS, WEIGHTS, AdapterRefused
from worker.model.base import LoadedBase
from worker.training.trainee import adapted

SOME_A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.fixture(scope="module")
def written(tiny: LoadedBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as it leaves training. Do not change it: copy it."""
    directory = tmp_path_factory.mktemp("adapters") / "one"
    with adapted(tiny, training.spec()) as trainee:
        write(directory, tiny, trainee.model)
    return directory


@pytest.fixture(scope="module")
def written_with_dora(tiny: LoadedBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, asked = tmp_path_factory.mktemp("adapters") / "dora", training.spec(lora={"use_dora": True})
    with adapted(tiny, asked) as trainee:
        write(directory, tiny, trainee.model, asked)
    return directory


def write(directory: Path, base: LoadedBase, model: object, asked: TrainSpec | None = None) -> Manifest:
    facts = {"dataset_sha256": "0" * 64, "step": 3, "metrics": {"train_loss": 0.5}}
    return adapter.write(directory, model, base=base.entry, spec=asked or training.spec(), renderer=base.renderer, **facts)


def resigned(directory: Path) -> None:
    """Make the manifest agree with the files again, as whoever forges an adapter would."""
    said = Manifest.model_validate_json((directory / manifest.NAME).read_bytes())
    files = {name: manifest.entry_of(directory / name) for name in said.files}
    (directory / manifest.NAME).write_bytes(said.model_copy(update={"files": files}).to_bytes())


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def change_manifest(directory: Path, **changes: object) -> None:
    said = Manifest.model_validate_json((directory / manifest.NAME).read_bytes())
    (directory / manifest.NAME).write_bytes(said.model_copy(update=changes).to_bytes())


def change_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / CONFIG).read_bytes())
    (directory / CONFIG).write_text(json.dumps(config | changes))


def test_a_written_adapter_opens_with_every_module_and_its_scale(written: Path, tiny: LoadedBase) -> None:
    opened = adapter.open(written, base=tiny, max_rank=4)

    assert (opened.rank, opened.scaling) == (4, 2.0)
    assert opened.modules.keys() == tiny.linear_shapes.keys()
    a_RI, b_OR = opened.modules["model.layers.0.mlp.down_proj"]
    assert (a_RI.shape, b_OR.shape, a_RI.dtype) == ((4, 128), (64, 4), torch.float32)


def test_an_untrained_dora_adapter_opens_and_changes_nothing(written_with_dora: Path, tiny: LoadedBase) -> None:
    opened = adapter.open(written_with_dora, base=tiny, max_rank=4)

    assert opened.dora.keys() == opened.modules.keys() == tiny.linear_shapes.keys()
    for dora in opened.dora.values():
        torch.testing.assert_close(dora.magnitude_O, dora.norm_O, rtol=2**-8, atol=0)  # PEFT draws it in 16 bits


def test_scales_of_rslora_are_by_the_root_of_the_rank(tiny: LoadedBase, tmp_path: Path) -> None:
    asked = training.spec(lora={"use_rslora": True})
    with adapted(tiny, asked) as trainee:
        write(tmp_path / "one", tiny, trainee.model, asked)

    assert adapter.open(tmp_path / "one", base=tiny, max_rank=4).scaling == 8 / 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda norms: norms.popitem(), "is missing"),
        (lambda norms: next(iter(norms.values())).zero_(), "a length of zero"),
        (lambda norms: next(iter(norms.values())).fill_(float("nan")), "not finite"),
        (lambda norms: norms.update({next(iter(norms)): torch.ones(3)}), r"has shape \(3,\)"),
    ],
)
def test_lengths_that_could_mislead_are_refused(
    written_with_dora: Path, tiny: LoadedBase, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], reason: str
) -> None:
    copy = Path(shutil.copytree(written_with_dora, tmp_path / "copy"))
    norms = load_file(copy / NORMS)
    change(norms)
    save_file(norms, copy / NORMS)
    resigned(copy)

    with pytest.raises(AdapterRefused, match=reason):
        adapter.open(copy, base=tiny, max_rank=4)


def test_dora_without_its_lengths_is_never_served_as_plain_lora(
    written_with_dora: Path, written: Path, tiny: LoadedBase, tmp_path: Path
) -> None:
    without, beside = (Path(shutil.copytree(one, tmp_path / str(n))) for n, one in enumerate((written_with_dora, written)))
    (without / NORMS).unlink()
    said = Manifest.model_validate_json((without / manifest.NAME).read_bytes())
    change_manifest(without, files={name: entry for name, entry in said.files.items() if name != NORMS})
    change_config(beside, use_dora=True)
    resigned(beside)

    for copy in (without, beside):
        with pytest.raises(AdapterRefused, match="does not agree"):
            adapter.open(copy, base=tiny, max_rank=4)


def test_the_manifest_names_base_template_and_tokens(written: Path, tiny: LoadedBase) -> None:
    said = Manifest.model_validate_json((written / manifest.NAME).read_bytes())

    assert manifest.problems_in(written, said) == []
    assert (said.base, said.step, said.kind) == (tiny.entry, 3, "adapter")
    assert said.template_sha256 == tiny.renderer.template_sha256
    assert not tiny.renderer.differs_from(said.token_vectors)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.update({SOME_A: t[SOME_A] * float("nan")}), "not finite"),
        (lambda t: t.update({SOME_A: t[SOME_A][:, :-1].contiguous()}), r"has shape \(4, 63\) instead of \(4, 64\)"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "extra belongs to no layer"),
        (lambda t: t.pop(SOME_A), "up_proj.lora_A.weight is missing"),
        (lambda t: t.update({SOME_A: t[SOME_A].half()}), "not float32"),
    ],
    ids=["nan", "shape", "extra key", "missing key", "dtype"],
)
def test_weights_that_could_mislead_are_refused(
    written: Path, tiny: LoadedBase, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], reason: str
) -> None:
    forged = Path(shutil.copytree(written, tmp_path / "forged"))
    change_weights(forged, change)
    resigned(forged)

    with pytest.raises(AdapterRefused, match=reason):
        adapter.open(forged, base=tiny, max_rank=16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: (d / "adapter_model.bin").write_bytes(b"pickle"), "adapter_model.bin is not in the manifest"),
        (lambda d: (d / WEIGHTS).write_bytes(b"short"), "differs from its digest"),
        (lambda d: (d / CONFIG).unlink(), "adapter_config.json is missing"),
        (lambda d: (d / manifest.NAME).unlink(), "no manifest"),
        (lambda d: (d / manifest.NAME).write_text("{}"), "manifest cannot be read"),
        (lambda d: change_manifest(d, base=BaseEntry(id="b", revision="r", digest="f" * 64)), "trained on other weights"),
        (lambda d: change_manifest(d, template_sha256="f" * 64), "another chat template"),
        (lambda d: change_config(d, use_dora=True) or resigned(d), "use_dora"),
        (lambda d: change_config(d, r=99) or resigned(d), "its rank is 99"),
        (lambda d: (d / CONFIG).write_text("[") and resigned(d), "not JSON"),
        (lambda d: (d / WEIGHTS).write_bytes(b"short") and resigned(d), "cannot be read"),
    ],
)
def test_directories_that_could_mislead_are_refused(
    written: Path, tiny: LoadedBase, tmp_path: Path, change: Callable[[Path], object], reason: str
) -> None:
    forged = Path(shutil.copytree(written, tmp_path / "forged"))
    change(forged)

    with pytest.raises(AdapterRefused, match=reason):
        adapter.open(forged, base=tiny, max_rank=16)


def test_a_pickle_listed_in_the_manifest_is_refused_too(written: Path, tiny: LoadedBase, tmp_path: Path) -> None:
    forged = Path(shutil.copytree(written, tmp_path / "forged"))
    (forged / "adapter_model.bin").write_bytes(b"pickle")
    said = Manifest.model_validate_json((forged / manifest.NAME).read_bytes())
    change_manifest(forged, files={**said.files, "adapter_model.bin": manifest.entry_of(forged / "adapter_model.bin")})

    with pytest.raises(AdapterRefused, match=r"nothing else, and differs in adapter_model\.bin"):
        adapter.open(forged, base=tiny, max_rank=16)


def test_another_tokenizer_is_noticed_by_its_tokens(written: Path, tiny: LoadedBase) -> None:
    renderer = tiny.renderer
    tokenizer = type(renderer.tokenizer).from_str(renderer.tokenizer.to_str())
    tokenizer.add_tokens(["Hello"])
    other = replace(tiny, renderer=Renderer(tokenizer, renderer.template, renderer.stop_ids, renderer.context_length))

    with pytest.raises(AdapterRefused, match="other tokens"):
        adapter.open(written, base=other, max_rank=16)


def test_values_that_are_not_finite_are_never_written(tiny: LoadedBase, tmp_path: Path) -> None:
    with adapted(tiny, training.spec()) as trainee:
        trainee.parameters[0].data[0, 0] = float("inf")
        with pytest.raises(AdapterRefused, match="not finite"):
            write(tmp_path / "one", tiny, trainee.model)

    assert list(tmp_path.iterdir()) == []
