import os

import pytest
from pydantic import SecretStr

from app.core.settings import DatabaseSettings, InferenceSettings, Settings, TrainingSettings, WebhookSettings
from worker.embedded import environment
from worker.embedded.programs import as_program, service
from worker.embedded.state import Ports

SETTINGS = Settings(
    database=DatabaseSettings(api_url=SecretStr("postgresql://api"), system_url=SecretStr("postgresql://system")),
    webhooks=WebhookSettings(allow_loopback=True, allowed_hosts=frozenset({"hooks.example"})),
    key_pepper=SecretStr("pepper"),
    engine_token=SecretStr("token"),
)
PORTS = Ports(postgres=1, valkey=2, s3=3, relay=4, cpu=5, train=6)


def test_settings_survive_the_way_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = environment.of(SETTINGS, secrets=environment.PRIVATE)
    monkeypatch.setattr(os, "environ", everything)

    assert Settings() == SETTINGS


def test_no_process_inherits_our_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_DATABASE__OWNER_URL", "leak")
    monkeypatch.setenv("tunesmith_storage", '{"secret_key": "leak"}')
    monkeypatch.setenv("TUNESMITH_LIMITS__BODY_BYTES", "17")
    inherited = environment.inherited()

    assert "leak" not in "".join(inherited.values())
    assert inherited["TUNESMITH_LIMITS__BODY_BYTES"] == "17"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("api", {"DATABASE__API_URL", "STORAGE", "KEY_PEPPER", "ENGINE_TOKEN", "METRICS__TOKEN", "WANDB", "MLFLOW"}),
        ("relay", {"DATABASE__SYSTEM_URL", "STORAGE", "BROKER_URL", "ENGINE_TOKEN", "WANDB", "MLFLOW"}),
        ("cpu", {"DATABASE__SYSTEM_URL", "STORAGE", "BROKER_URL", "ENGINE_TOKEN"}),
        ("train", {"DATABASE__SYSTEM_URL", "STORAGE", "BROKER_URL"}),
        ("engine", {"STORAGE", "ENGINE_TOKEN", "METRICS__TOKEN"}),
    ],
)
def test_each_process_gets_the_secrets_it_works_with(name: str, expected: set[str]) -> None:
    process = next(process for process in service(SETTINGS, "127.0.0.1", 8000) if process.name == name)
    given = environment.of(SETTINGS, secrets=process.secrets)
    private = {key.removeprefix("TUNESMITH_") for key in given if key.startswith("TUNESMITH_")}
    private = {key for key in private if key.startswith(environment.PRIVATE)}

    groups = ("STORAGE", "WANDB", "MLFLOW")  # of which a process gets all or nothing
    assert {next((group for group in groups if key.startswith(group)), key) for key in private} == expected


def test_an_engine_is_run_for_each_way_to_hold_a_base(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"training": TrainingSettings(quantizations={"int8", "nf4", "fp4"}), "inference": InferenceSettings(port=9000)}
    settings = SETTINGS.model_copy(update=chosen)
    found = {}
    for process in service(settings, "127.0.0.1", 8000):
        if process.arguments == ("-m", "worker.inference.server"):
            monkeypatch.setattr(os, "environ", as_program(process, settings, PORTS).environment)
            held = Settings().inference
            found[process.name] = (held.quantization, held.port)

    assert found == {"engine": ("nf4", 9000), "engine-fp4": ("fp4", 0), "engine-int8": ("int8", 0)}
