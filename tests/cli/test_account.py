"""Which service, and with whose key: what is kept, what goes before what, and what is said if it does not work."""

import json
import stat
from pathlib import Path

import pytest
from openai import OpenAI

from app.core import catalog
from cli import account
from cli.account import OURS, SDKS
from cli.failure import Failed
from tests import make
from tests.cli.conftest import Home, Tunesmith


def kept(home: Home) -> Path:
    return home.folder / "config" / "tunesmith" / "credentials.json"


def log_out(home: Home) -> None:
    for name in OURS:
        home.patch.delenv(name)


def test_a_login_is_tried_kept_for_its_owner_alone_and_used(tunesmith: Tunesmith, home: Home, client: OpenAI) -> None:
    log_out(home)
    address = str(client.base_url).rstrip("/")
    said = tunesmith("login", address.removesuffix("/v1"), "--api-key", client.api_key)

    assert said.status == 0, said.err
    assert said.out == f"{address} knows the key: {len(catalog.load())} models, 0 of them yours. Kept in {kept(home)}\n"
    assert json.loads(kept(home).read_text()) == {"base_url": address, "api_key": client.api_key}
    assert stat.S_IMODE(kept(home).stat().st_mode) == 0o600 and stat.S_IMODE(kept(home).parent.stat().st_mode) == 0o700
    assert tunesmith("jobs", "list").out == "none\n"
    assert tunesmith("logout").status == 0 and not kept(home).exists()
    assert "no service is known" in tunesmith("jobs", "list").err


def test_a_wrong_key_is_not_kept(tunesmith: Tunesmith, home: Home, client: OpenAI) -> None:
    said = tunesmith("login", client.base_url, "--api-key", "ts-wrong")

    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert "`tunesmith login` takes another key" in said.err
    assert not kept(home).exists()


def test_who_is_logged_in_elsewhere_by_a_variable_is_told(tunesmith: Tunesmith, client: OpenAI) -> None:
    said = tunesmith("login", client.base_url, "--api-key", client.api_key)

    assert (said.status, said.err) == (0, "tunesmith: TUNESMITH_BASE_URL is set, and goes before what was kept\n")


def test_a_stranger_sees_nothing_of_mine(
    tunesmith: Tunesmith, home: Home, client: OpenAI, stranger: OpenAI, file_id: str
) -> None:
    job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id)
    assert job.id in tunesmith("jobs", "list").out and file_id in tunesmith("files", "list").out

    home.log_in(str(stranger.base_url), stranger.api_key)
    assert tunesmith("jobs", "list").out == tunesmith("files", "list").out == "none\n"
    for action in ("watch", "pause", "cancel"):
        said = tunesmith("jobs", action, job.id)
        assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
        assert job.id in said.err


def test_a_service_that_is_away_is_told_in_a_line(tunesmith: Tunesmith, home: Home) -> None:
    address = f"http://127.0.0.1:{make.free_port()}/v1"
    home.log_in(address, "ts-any")
    said = tunesmith("models", "--json")

    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert said.err.startswith(f"tunesmith: {address} does not answer (") and "from TUNESMITH_BASE_URL" in said.err


def test_what_is_no_service_of_ours_is_told_in_a_line(tunesmith: Tunesmith, home: Home, api_url: str, client: OpenAI) -> None:
    home.log_in(api_url, client.api_key)  # without /v1
    said = tunesmith("jobs", "list")

    assert (said.status, said.err.count("\n")) == (1, 1)
    assert "Traceback" not in said.err


def test_address_and_key_come_from_one_place(home: Home) -> None:
    def credentials(folder: Path, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "credentials.json").write_text(json.dumps({"base_url": f"http://{name}/v1", "api_key": "ts-x"}))
        return folder

    def found(data_dir: Path | None = None) -> str:
        return account.find(data_dir).base_url

    with pytest.raises(Failed, match="no service is known"):
        found()
    credentials(Path(".tunesmith"), "here")
    assert found() == "http://here/v1"
    credentials(kept(home).parent, "kept")
    assert found() == "http://kept/v1"
    home.patch.setenv("OPENAI_API_KEY", "sk-of-another-service")  # alone: it is never sent to us
    assert found() == "http://kept/v1"
    home.patch.setenv("OPENAI_BASE_URL", "http://sdk/v1/")
    assert (found(), account.find(None).source) == ("http://sdk/v1", SDKS[0])
    home.patch.setenv(OURS[0], "http://ours/v1")
    with pytest.raises(Failed, match="one is set alone"):
        found()
    home.patch.setenv(OURS[1], "ts-x")
    assert found() == "http://ours/v1"
    assert found(credentials(home.folder / "stack", "stack")) == "http://stack/v1"
    with pytest.raises(Failed, match="holds no credentials"):
        found(home.folder / "nowhere")


def test_our_variables_are_no_misspelt_settings(tunesmith: Tunesmith) -> None:
    said = tunesmith("config", "--json")

    assert (said.status, said.err) == (0, "")
    assert json.loads(said.out)["TUNESMITH_STORAGE__BUCKET"] == "tunesmith"


def test_models_are_those_of_the_account(tunesmith: Tunesmith) -> None:
    said = tunesmith("models")

    assert said.out.splitlines()[0].split() == ["ID", "BASE", "WHOSE", "CREATED"]
    assert [model["id"] for model in json.loads(tunesmith("models", "--json").out)] == list(catalog.load())
