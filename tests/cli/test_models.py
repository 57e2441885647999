import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.main import main
from tests.embedded.patience import PATIENCE_SECONDS
from tests.model import hub as double
from tests.model.hub import Hub, Repository
from tests.model.test_base import STOCK, TINY, saved_base

ID = "hub-tiny"


@dataclass
class Said:
    status: int
    out: str
    err: str


@dataclass
class Command:
    """`tunesmith models` on a machine of its own, with a catalog that adds the tiny base from the hub."""

    folder: Path
    hub: Hub
    capture: pytest.CaptureFixture[str]

    @property
    def repository(self) -> Repository:
        return self.hub.repositories["org/tiny"]

    def __call__(self, *arguments: str, **variables: str) -> Said:
        """In this process: one that imports all that quantizes would take longer than what it is asked for."""
        ours = {
            "TUNESMITH_CATALOG_FILE": str(self.folder / "catalog.toml"),
            "TUNESMITH_CACHE_DIR": str(self.folder / "cache"),
            "HF_ENDPOINT": self.hub.url,
            "HF_TOKEN": "",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (ours | variables).items():
                patch.setenv(name, value)
            status = main(["models", *arguments])
        said = self.capture.readouterr()
        return Said(status, said.out, said.err)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tiny base as a repository holds it."""
    folder = tmp_path_factory.mktemp("saved")
    saved_base(folder, STOCK)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def models(files: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    architecture = ", ".join(f"{name} = {str(value).lower()}" for name, value in TINY.architecture.model_dump().items())
    catalog = f"""
        [[base]]
        id = "{ID}"
        name = "Tiny, from a hub"
        family = "chatml"
        licence = "apache-2.0"
        context_length = 512
        tier = "cpu"
        aliases = ["org/tiny"]
        source = {{ kind = "hub", id = "org/tiny", revision = "main" }}
        architecture = {{ {architecture} }}
    """
    tomllib.loads(catalog)
    (tmp_path / "catalog.toml").write_text(catalog)
    with double.running() as hub:
        hub.repositories["org/tiny"] = Repository(dict(files))
        yield Command(tmp_path, hub, capfd)


def row(said: Said, base: str) -> list[str]:
    return next(line.split() for line in said.out.splitlines() if line.startswith(base))


def test_a_pull_says_each_stage_shows_a_bar_and_where_the_base_lies(models: Command) -> None:
    pulled = models("pull", ID)

    assert pulled.status == 0, pulled.err
    stages = [line.split(": ")[1].split()[0] for line in pulled.out.splitlines() if line.startswith(f"{ID}: ")]
    assert stages == ["fetching", "verifying", "quantizing"]
    ready = re.search(rf"{ID} is ready: (\S+), (\d+) bytes", pulled.out)
    assert ready
    assert int(ready[2]) == sum(path.stat().st_size for path in Path(ready[1]).iterdir())
    assert "Download complete: 100%" in pulled.err


def test_a_second_pull_asks_nobody_and_a_listing_shows_the_base(models: Command) -> None:
    before = models("list")
    models("pull", ID)
    models.hub.requests.clear()

    again, after = models("pull", "org/tiny"), models("list")

    assert again.status == 0
    assert again.out.startswith(f"{ID} is here already: ")
    assert row(before, ID) == [ID, "cpu", "apache-2.0", "hub", "no", "no"]
    assert row(after, ID) == [ID, "cpu", "apache-2.0", "hub", "no", "yes"]
    assert models.hub.requests == []


def test_a_pull_that_quantizes_after_the_hub_went_away_takes_what_was_fetched(models: Command) -> None:
    models("pull", ID)
    for path in (models.folder / "cache" / "bases").glob("*.digest"):
        path.unlink()
    models.hub.is_down = True

    assert models("pull", ID).status == 0


def test_a_gated_base_is_pulled_with_a_token_only(models: Command) -> None:
    models.repository.is_gated = True
    without, wrong, good = (models("pull", ID, HF_TOKEN=token) for token in ("", "hf_wrong", double.TOKEN))

    assert (without.status, wrong.status, good.status) == (1, 1, 0)
    assert without.err.splitlines()[-1] == (
        f"tunesmith: org/tiny is gated: accept its licence at {models.hub.url}/org/tiny, then set HF_TOKEN to a token of the "
        "account that did"
    )
    assert "refuses the token" in wrong.err


def test_a_damaged_download_fails_and_the_next_pull_mends_it(models: Command) -> None:
    models.repository.corrupted = {"model.safetensors"}
    damaged = models("pull", ID)
    models.repository.corrupted = set()

    assert damaged.status == 1
    assert "model.safetensors of org/tiny" in damaged.err.splitlines()[-1]
    assert models("pull", ID).status == 0


def test_a_transfer_that_breaks_off_midway_is_taken_up(models: Command) -> None:
    models.repository.breaks = {"model.safetensors": 1}

    assert models("pull", ID).status == 0
    assert models.hub.transfers.count("model.safetensors") == 2


def test_a_base_that_needs_no_hub_is_pulled_without_one(models: Command) -> None:
    models.hub.is_down = True

    assert models("pull", "tiny-random-llama").status == 0
    assert models.hub.requests == []


@pytest.mark.parametrize("trouble", ["no repository", "answers 503", "only pytorch_model.bin"])
def test_what_the_hub_will_not_give_is_one_line_and_status_1(trouble: str, models: Command) -> None:
    match trouble:
        case "no repository":
            del models.hub.repositories["org/tiny"]
        case "answers 503":
            models.hub.is_down = True
        case _:
            models.hub.repositories["org/tiny"] = Repository({"pytorch_model.bin": b"a pickle", "config.json": b"{}"})

    refused = models("pull", ID)

    assert refused.status == 1
    assert refused.err.count("\n") == 1
    assert refused.err.startswith("tunesmith: ")
    assert trouble in refused.err


def test_an_unreachable_hub_is_one_line_and_status_1(models: Command) -> None:
    refused = models("pull", ID, HF_ENDPOINT="http://127.0.0.1:9")

    assert (refused.status, refused.err.count("\n")) == (1, 1)
    assert "http://127.0.0.1:9 is unreachable" in refused.err


def test_an_unknown_name_lists_what_there_is(models: Command) -> None:
    refused = models("pull", "gpt-9")

    assert refused.status == 1
    assert refused.err.startswith("tunesmith: the model 'gpt-9' is not in the catalog; base models: smollm2-135m-instruct, ")
    assert ID in refused.err


def test_a_catalog_that_cannot_be_read_is_told(models: Command) -> None:
    (models.folder / "catalog.toml").write_text("[[base]]\nid = 1")

    for action in (("list",), ("pull", ID)):
        refused = models(*action)
        assert (refused.status, refused.err.count("\n")) == (1, 1)
        assert f"TUNESMITH_CATALOG_FILE names {models.folder}/catalog.toml: base.0.id must be a valid string; " in refused.err


def test_a_wrong_setting_is_named(models: Command) -> None:
    refused = models("list", TUNESMITH_TRAINING__TIERS="cpu")

    assert (refused.status, refused.err.count("\n")) == (1, 1)
    assert refused.err.startswith("tunesmith: TUNESMITH_TRAINING__TIERS must be a list")


@pytest.mark.parametrize("arguments", [("models", "list"), ("config",)])
def test_a_reader_that_leaves_early_is_no_failure_to_tell_of(arguments: tuple[str, ...]) -> None:
    """As in `tunesmith models list | head -2`."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        command = [sys.executable, "-m", "cli.main", *arguments]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=PATIENCE_SECONDS)

    assert (done.returncode, done.stderr) == (141, "")
