from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsError

from app.core import reference
from app.core.settings import CONFIG_FILE, SECRETS_DIR, Settings

DOCUMENTED = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_reference_is_the_code() -> None:
    """`make docs` writes it."""
    assert DOCUMENTED.read_text() == reference.markdown()


def test_every_value_says_what_it_decides() -> None:
    names = [variable.name for variable in reference.variables()]

    assert len(names) == len(set(names)) > 40
    assert not [variable.name for variable in reference.variables() if not variable.description]


def test_a_variable_wins_over_a_secret_file_and_that_over_the_configuration_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "storage__secret_key").write_text("from a secret file\n")
    (tmp_path / "secrets" / "storage__bucket").write_text("from-a-secret-file")
    (tmp_path / "secrets" / "unrelated").write_text("x")
    (tmp_path / "tunesmith.toml").write_text('[storage]\nbucket = "from-toml"\nregion = "from-toml"\naccess_key = "from-toml"\n')
    monkeypatch.setenv(SECRETS_DIR, str(tmp_path / "secrets"))
    monkeypatch.setenv(CONFIG_FILE, str(tmp_path / "tunesmith.toml"))
    monkeypatch.setenv("TUNESMITH_STORAGE__REGION", "from-a-variable")
    storage = Settings().storage

    assert storage.secret_key.get_secret_value() == "from a secret file"
    assert (storage.bucket, storage.region, storage.access_key) == ("from-a-secret-file", "from-a-variable", "from-toml")


@pytest.mark.parametrize("variable", [SECRETS_DIR, CONFIG_FILE])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "gone"))

    with pytest.raises(SettingsError, match="gone"):
        Settings()


def test_toml_that_cannot_be_read_is_named_with_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.toml").write_text("[storage\nbucket = 1")
    monkeypatch.setenv(CONFIG_FILE, str(tmp_path / "broken.toml"))

    with pytest.raises(SettingsError, match=rf"{CONFIG_FILE} names {tmp_path}/broken.toml"):
        Settings()


@pytest.mark.parametrize("value", ["16", "cpu", "cpu,24", "{}", ""])
def test_a_list_that_is_none_is_named_and_told_how_to_be_written(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TUNESMITH_TRAINING__TIERS", value)

    with pytest.raises(ValidationError, match=r"training\.tiers\n.*must be a list, in a variable written as JSON"):
        Settings()


def test_a_receiver_has_no_longer_than_the_relay_hears_it_out_when_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_WEBHOOKS__TIMEOUT_SECONDS", "16")

    with pytest.raises(ValidationError, match=r"webhooks\.timeout_seconds\n.*less than or equal to 15"):
        Settings()


def test_a_list_is_read_wherever_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tunesmith.toml").write_text('[training]\ntiers = ["16", "24"]')
    monkeypatch.setenv(CONFIG_FILE, str(tmp_path / "tunesmith.toml"))
    monkeypatch.setenv("TUNESMITH_WEBHOOKS", '{"allowed_hosts": ["hooks.example"]}')
    settings = Settings()

    assert (settings.training.tiers, settings.webhooks.allowed_hosts) == ({"16", "24"}, {"hooks.example"})


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("STORAGE__ENDPOINT_URL", "localhost:9000", "http://"),
        ("DATABASE__API_URL", "garbage", "postgresql"),
        ("BROKER_URL", "localhost:6379", "redis://"),
        ("INFERENCE__GATEWAY_URL", "api:8000", "http://"),
        ("LOG_LEVEL", "LOUD", "WARNING"),
    ],
)
def test_an_address_or_a_level_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(f"TUNESMITH_{variable}", value)

    with pytest.raises(ValidationError, match=words) as refused:
        Settings()
    assert value not in str(refused.value)


def test_a_log_level_may_be_written_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_LOG_LEVEL", "debug")

    assert Settings().log_level == "DEBUG"


def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_LEASES__LEASE_SECONDS", "soon")

    with pytest.raises(ValidationError, match=r"leases\.lease_seconds"):
        Settings()


def test_a_variable_that_sets_nothing_is_named_with_the_one_that_was_meant() -> None:
    environment = {"TUNESMITH_STORAGE__BUKET": "b", "TUNESMITH_STORAGE__BUCKET": "b", "TUNESMITH_ELSEWHERE": "", "PATH": ""}

    assert reference.unknown(environment) == {
        "TUNESMITH_STORAGE__BUKET": "TUNESMITH_STORAGE__BUCKET",
        "TUNESMITH_ELSEWHERE": None,
    }


def test_a_misspelt_file_or_key_is_named_with_the_variable_that_was_meant(tmp_path: Path) -> None:
    secrets, file = tmp_path / "secrets", tmp_path / "tunesmith.toml"
    (secrets / "..data").mkdir(parents=True)
    for name in ("storage__sekret", "engine_tokn", "STORAGE__BUCKET", "hf_token", "valkey_configuration", "tls.crt"):
        (secrets / name).write_text("x")
    file.write_text('log_levl = "INFO"\n[storag]\nbucket = "b"\n[nosuch]\n[storage]\nbuket = "b"\nbucket = "b"\n')

    assert reference.unknown({SECRETS_DIR: str(secrets), CONFIG_FILE: str(file)}) == {
        f"storage__sekret in {secrets}": "TUNESMITH_STORAGE__SECRET_KEY",
        f"engine_tokn in {secrets}": "TUNESMITH_ENGINE_TOKEN",
        f"log_levl in {file}": "TUNESMITH_LOG_LEVEL",
        f"[storag] in {file}": "TUNESMITH_STORAGE",
        f"[nosuch] in {file}": None,
        f"[storage] buket in {file}": "TUNESMITH_STORAGE__BUCKET",
    }
