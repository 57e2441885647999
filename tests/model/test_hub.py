import json
import shutil
import socket
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from app.core.catalog import Base, HubSource
from tests.model import hub as double
from tests.model.hub import Hub, Repository
from tests.model.test_base import STOCK, TINY, saved_base
from worker.model import base as bases
from worker.model import card, hub, pointer
from worker.model.refused import BaseRefused, HubUnavailable

FILES = {"config.json": b"{}", "tokenizer.json": b"[1]", "model.safetensors": bytes(range(256)) * 64, "README.md": b"read me"}
ALL = ("*.json", "*.safetensors")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the repository org/model, to which HF_ENDPOINT points."""
    with double.running() as running:
        running.repositories["org/model"] = Repository(dict(FILES))
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")  # a developer may be logged in to the real one
        yield running


@pytest.fixture
def model(served: Hub) -> Repository:
    return served.repositories["org/model"]


def source(repository: str = "org/model", revision: str = "main") -> HubSource:
    return HubSource(kind="hub", id=repository, revision=revision)


def snapshot(cache_dir: Path, of: HubSource = source(), patterns: tuple[str, ...] = ALL) -> Path:
    return hub.snapshot(of, of.revision, cache_dir, patterns)


def test_a_snapshot_holds_the_files_asked_for_and_is_named_by_its_commit(model: Repository, tmp_path: Path) -> None:
    folder = snapshot(tmp_path)

    assert folder.name == model.commit
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {n: b for n, b in FILES.items() if n != "README.md"}


def test_weights_in_folders_below_are_left_alone(model: Repository, tmp_path: Path) -> None:
    model.files["onnx/model.safetensors"] = b"the same in another format"

    assert not (snapshot(tmp_path) / "onnx").exists()


def test_a_commit_that_lies_here_is_not_asked_for(served: Hub, model: Repository, tmp_path: Path) -> None:
    snapshot(tmp_path)
    served.requests.clear()

    assert snapshot(tmp_path, source(revision=model.commit)).name == model.commit
    assert served.requests == []


def test_what_was_verified_is_neither_fetched_nor_hashed_again(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = snapshot(tmp_path, patterns=("*.json",))
    monkeypatch.setattr(hub._File, "is_at", lambda file, path, real=hub._File.is_at: hashed.append(path.name) or real(file, path))
    hashed: list[str] = []

    assert snapshot(tmp_path) == snapshot(tmp_path) == first
    assert hashed == ["model.safetensors"]
    assert sorted(served.transfers) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_what_another_program_put_into_the_cache_is_verified_before_it_is_used(served: Hub, tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    (tmp_path / "hub" / "models--org--model" / "verified.json").unlink()
    (folder / "model.safetensors").resolve().write_bytes(b"something else")

    with pytest.raises(BaseRefused, match=r"^model\.safetensors of org/model"):
        snapshot(tmp_path)


def test_a_file_that_was_deleted_is_fetched_again(served: Hub, tmp_path: Path) -> None:
    (snapshot(tmp_path) / "tokenizer.json").resolve().unlink()

    assert (snapshot(tmp_path) / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
    assert served.transfers.count("model.safetensors") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_deleted_and_mended_by_the_next_try(name: str, served: Hub, model: Repository, tmp_path: Path) -> None:
    model.corrupted = {name}
    with pytest.raises(BaseRefused, match=rf"{name} of org/model .*the next try fetches it anew"):
        snapshot(tmp_path)
    model.corrupted = set()

    assert (snapshot(tmp_path) / name).read_bytes() == FILES[name]
    assert [served.transfers.count(other) for other in (name, "tokenizer.json")] == [2, 1]


def test_a_file_whose_digest_the_hub_does_not_tell_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")

    assert not hub._File("config.json", 2, sha256=None, blob_id=None).is_at(tmp_path / "config.json")


def test_a_transfer_that_breaks_off_goes_on_where_it_stopped(served: Hub, model: Repository, tmp_path: Path) -> None:
    model.breaks = {"model.safetensors": 1}

    assert (snapshot(tmp_path) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert served.transfers.count("model.safetensors") == 2


def test_a_transfer_that_breaks_off_for_good_is_temporary_trouble(
    model: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    model.breaks = {"model.safetensors": 1000}
    with pytest.raises(HubUnavailable, match="broke off while org/model was fetched"):
        snapshot(tmp_path)
    model.breaks = {}

    assert (snapshot(tmp_path) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not list((tmp_path / "hub").rglob("*.incomplete"))


def test_a_gated_repository_says_where_to_accept_its_licence(
    served: Hub, model: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.is_gated = True
    with pytest.raises(
        BaseRefused, match=rf"org/model is gated: accept its licence at {served.url}/org/model, then set HF_TOKEN"
    ):
        snapshot(tmp_path)
    monkeypatch.setenv("HF_TOKEN", double.TOKEN)

    assert snapshot(tmp_path).name == model.commit


def test_a_wrong_token_is_named(model: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")

    with pytest.raises(BaseRefused, match=r"refuses the token for org/model \(401\); set HF_TOKEN"):
        snapshot(tmp_path)


@pytest.mark.parametrize("token", [None, double.TOKEN])
def test_an_unknown_repository_is_named(token: str | None, served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)

    with pytest.raises(BaseRefused, match=rf"{served.url} has no repository org/absent, or it is private"):
        snapshot(tmp_path, source("org/absent"))


def test_an_unknown_revision_is_named(served: Hub, tmp_path: Path) -> None:
    with pytest.raises(BaseRefused, match=r"org/model has no revision 'v9'; correct the catalog"):
        snapshot(tmp_path, source(revision="v9"))


def test_a_name_that_is_none_is_refused(served: Hub, tmp_path: Path) -> None:
    with pytest.raises(BaseRefused, match="'not a name' is not a repository's name"):
        snapshot(tmp_path, source("not a name"))


def test_pickled_weights_are_never_fetched(served: Hub, model: Repository, tmp_path: Path) -> None:
    del model.files["model.safetensors"]
    model.files["pytorch_model.bin"] = b"a pickle"

    with pytest.raises(BaseRefused, match=r"no safetensors at 'main', only pytorch_model\.bin; pickled weights are never loaded"):
        snapshot(tmp_path, patterns=("tokenizer*",))
    assert served.transfers == []


def test_a_hub_that_is_down_is_temporary_trouble(served: Hub, tmp_path: Path) -> None:
    served.is_down = True

    with pytest.raises(HubUnavailable, match=rf"{served.url} answers 503 for org/model at the moment"):
        snapshot(tmp_path)


def test_an_unreachable_hub_is_temporary_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:  # bound, but nobody listens
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        with pytest.raises(HubUnavailable, match=rf"{url} is unreachable .* HF_ENDPOINT"):
            snapshot(tmp_path)


def test_an_endpoint_that_is_no_url_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")

    with pytest.raises(BaseRefused, match=r"HF_ENDPOINT is not a URL: hub\.example"):
        snapshot(tmp_path)


def test_offline_mode_is_named(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE forbids"):
        snapshot(tmp_path)


def test_a_complete_snapshot_serves_while_the_hub_is_down(served: Hub, tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    served.is_down = True

    assert snapshot(tmp_path) == folder


def test_an_incomplete_snapshot_does_not(served: Hub, tmp_path: Path) -> None:
    snapshot(tmp_path, patterns=("*.json",))
    served.is_down = True

    with pytest.raises(HubUnavailable):
        snapshot(tmp_path)


def test_too_small_a_disk_is_told_before_anything_is_fetched(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))

    with pytest.raises(BaseRefused, match=r"org/model needs 0\.0 MB in .* 0\.0 MB are free; make room"):
        snapshot(tmp_path)
    assert served.transfers == []


def test_a_disk_that_fills_up_is_told(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", full)

    with pytest.raises(BaseRefused, match="filled up while org/model was fetched") as refused:
        snapshot(tmp_path)
    assert not isinstance(refused.value, HubUnavailable)


def hub_base(served: Hub, folder: Path) -> Base:
    """The tiny base, served by the hub."""
    folder.mkdir()
    saved = saved_base(folder, STOCK)
    served.repositories["org/tiny"] = Repository({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    on_hub = {"kind": "hub", "id": "org/tiny", "revision": "main"}
    return Base.model_validate(json.loads(saved.model_dump_json()) | {"source": on_hub})


def test_a_base_from_a_hub_loads_and_afterwards_needs_none(served: Hub, tmp_path: Path) -> None:
    base = hub_base(served, tmp_path / "saved")
    cache = tmp_path / "cache"
    assert pointer.find(base, cache) is None
    first = bases.load(base, cache, device="cpu", for_training=False)
    served.requests.clear()

    again = bases.load(base, cache, device="cpu", for_training=False)

    assert first.entry == again.entry
    assert first.entry.revision == served.repositories["org/tiny"].commit
    assert pointer.find(base, cache) == cache / "bases" / first.entry.digest
    assert served.requests == []


def test_a_card_is_made_anew_while_the_hub_is_down(served: Hub, tmp_path: Path) -> None:
    base = hub_base(served, tmp_path / "saved")
    card.prepared(base, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "cards")
    served.is_down = True

    assert card.revision_of(card.prepared(base, tmp_path / "cache")) == served.repositories["org/tiny"].commit


def test_the_base_is_the_same_model_as_from_a_folder(served: Hub, tmp_path: Path) -> None:
    base = hub_base(served, tmp_path / "saved")

    loaded = bases.load(base, tmp_path / "cache", device="cpu", for_training=False)
    local = bases.load(saved_base(tmp_path / "saved", STOCK), tmp_path / "other", device="cpu", for_training=False)

    assert loaded.entry.digest == local.entry.digest
    assert TINY.architecture.layers == len(loaded.model.model.layers)
