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


def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_LEASES__LEASE_SECONDS", "soon")

    with pytest.raises(ValidationError, match=r"leases\.lease_seconds"):
        Settings()


def test_a_variable_that_sets_nothing_is_named_with_the_one_that_was_meant() -> None:
    environment = {"TUNESMITH_STORAGE__BUKET": "b", "TUNESMITH_STORAGE__BUCKET": "b", "TUNESMITH_ELSEWHERE": "", "PATH": ""}

    assert reference.unknown_variables(environment) == {
        "TUNESMITH_STORAGE__BUKET": "TUNESMITH_STORAGE__BUCKET",
        "TUNESMITH_ELSEWHERE": None,
    }
