"""The deployment's files agree with each other and with the code."""

import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from app.core.settings import Settings
from tests.deploy import compose

OURS = {"migrate", "api", "relay", "cpu", "train", "engine"}
OBSERVING = {"prometheus", "grafana"}  # only where the profile is asked for
LASTING = {"postgres", "valkey", "s3"} | OBSERVING | OURS - {"migrate"}
NEEDED = {
    "postgres": {"postgres_password", "owner_password", "api_password", "system_password"},
    "valkey": {"valkey_configuration"},
    "s3": {"s3_configuration"},
    "migrate": {"database__owner_url", "database__system_url", "key_pepper", "storage__secret_key"},
    "api": {"database__api_url", "key_pepper", "engine_token", "metrics__token", "storage__secret_key"},
    "relay": {"database__system_url", "broker_url", "engine_token", "storage__secret_key"},
    "cpu": {"database__system_url", "broker_url", "engine_token", "hf_token", "storage__secret_key"},
    "train": {"database__system_url", "broker_url", "hf_token", "storage__secret_key"},
    "engine": {"engine_token", "hf_token", "metrics__token", "storage__secret_key"},
    "prometheus": {"metrics__token"},
    "grafana": {"grafana_password"},
}
OUTSIDE_SETTINGS = {"TUNESMITH_SECRETS_DIR", "TUNESMITH_CONFIG_FILE"}
# passwords that reach our own services inside a URL, the others' configuration, and the hub's token
NOT_SETTINGS = {"hf_token", "grafana_password", "valkey_configuration", "s3_configuration"} | {
    f"{name}_password" for name in ("postgres", "owner", "api", "system")
}


@pytest.fixture(params=[compose.GPU, compose.CPU], ids=["gpu", "cpu"])
def project(request: pytest.FixtureRequest) -> dict[str, Any]:
    return compose.load(request.param)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "secrets"
    subprocess.run([compose.ROOT / "deploy/make-secrets.sh", folder], check=True)
    return folder


def test_it_is_these_services(project: dict[str, Any]) -> None:
    assert set(project["services"]) == LASTING | OURS


def test_every_lasting_service_is_watched_and_restarted(project: dict[str, Any]) -> None:
    for name in LASTING:
        assert compose.health_check_of(project, name)
        assert project["services"][name]["restart"] == "unless-stopped"
    assert project["services"]["migrate"]["restart"] == "no"


def test_every_service_has_an_init_and_logs_that_end(project: dict[str, Any]) -> None:
    for service in project["services"].values():
        assert service["init"] is True
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}


def test_no_image_is_whatever_is_latest(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        is_ours = compose.dockerfile_of(project, name) is not None
        assert is_ours == (name in OURS)
        assert is_ours or (not service["image"].endswith(":latest") and ":" in service["image"])


def test_only_api_and_grafana_are_published_and_only_here(project: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in project["services"].items() if "ports" in service}

    assert published == {"api": ["127.0.0.1:8000:8000"], "grafana": ["127.0.0.1:3000:3000"]}


def test_who_observes_comes_only_when_asked_for(project: dict[str, Any]) -> None:
    profiled = {name: service["profiles"] for name, service in project["services"].items() if "profiles" in service}

    assert profiled == {name: ["observability"] for name in OBSERVING}


def test_a_service_waits_for_what_reports_that_it_is_there(project: dict[str, Any]) -> None:
    for service in project["services"].values():
        for other, wait in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if other == "migrate" else "service_healthy"
            assert wait["condition"] == expected


def test_a_service_gets_the_secrets_that_it_needs_and_no_others(project: dict[str, Any]) -> None:
    assert {name: set(service["secrets"]) for name, service in project["services"].items()} == NEEDED


def test_whoever_is_granted_the_hubs_token_is_told_where_it_lies(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        path = service.get("environment", {}).get("HF_TOKEN_PATH")
        assert path == ("/run/secrets/hf_token" if "hf_token" in NEEDED[name] else None), name


def test_every_secret_is_a_file_that_the_script_makes(project: dict[str, Any], secrets: Path) -> None:
    declared = project["secrets"]

    assert set(declared) == set().union(*NEEDED.values())
    for name, secret in declared.items():
        assert secret == {"file": f"./deploy/secrets/{name}"}
        assert (secrets / name).is_file()


def test_secrets_are_for_containers_but_not_for_neighbours(secrets: Path) -> None:
    assert secrets.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in secrets.iterdir()} == {0o444}


def test_making_secrets_again_changes_none(secrets: Path) -> None:
    before = {file.name: file.read_bytes() for file in secrets.iterdir()}
    (secrets / "key_pepper").unlink()
    subprocess.run([compose.ROOT / "deploy/make-secrets.sh", secrets], check=True)
    after = {file.name: file.read_bytes() for file in secrets.iterdir()}

    assert len(after["key_pepper"]) == 48 and after["key_pepper"] != before.pop("key_pepper")
    assert {name: after[name] for name in before} == before


def test_every_variable_and_every_secret_is_a_setting(project: dict[str, Any]) -> None:
    known = {f"TUNESMITH_{name}" for name in _settings(Settings)} | OUTSIDE_SETTINGS
    for name in OURS:
        used = {variable for variable in compose.environment_of(project, name) if variable.startswith("TUNESMITH_")}
        granted = {f"TUNESMITH_{secret.upper()}" for secret in NEEDED[name] - NOT_SETTINGS}
        assert used | granted <= known


def test_no_secret_is_a_variable(project: dict[str, Any]) -> None:
    for service in project["services"].values():
        for variable in service.get("environment", {}):
            assert variable.endswith(("_FILE", "_PATH", "_DIR")) or not any(
                word in variable for word in ("PASSWORD", "SECRET", "TOKEN", "PEPPER", "DATABASE", "BROKER")
            ), variable


def test_every_path_is_there_and_reaches_the_builder(project: dict[str, Any]) -> None:
    allowed = [line[1:] for line in (compose.ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for dockerfile in {compose.dockerfile_of(project, name) for name in OURS}:
        assert dockerfile
        copied = [paths for name, paths in compose.instructions(dockerfile) if name == "COPY" and not paths.startswith("--from")]
        for source in (path for paths in copied for path in paths.split()[:-1]):
            assert (compose.ROOT / source).exists(), source
            assert any(fnmatch(source, pattern) for pattern in allowed), source
    for service in project["services"].values():
        for source, *_ in (volume.split(":") for volume in service.get("volumes", ())):
            assert source in project["volumes"] or (compose.ROOT / source).exists()


def test_the_builder_gets_nothing_by_default() -> None:
    assert "*" in (compose.ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize("dockerfile", ["Dockerfile.api", "Dockerfile.worker"])
def test_an_image_runs_unprivileged_and_its_commands_parse(dockerfile: str) -> None:
    steps = compose.instructions(dockerfile)

    assert ("USER", "tunesmith") in steps
    for name, argument in steps:
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", argument], check=True)
        if name in {"CMD", "HEALTHCHECK"}:
            words = yaml.safe_load(argument[argument.index("[") :])
            assert words and all(isinstance(word, str) for word in words)


@pytest.mark.parametrize("script", ["make-secrets.sh", "postgres-roles.sh"])
def test_a_script_parses_and_may_be_run(script: str) -> None:
    path = compose.ROOT / "deploy" / script
    subprocess.run(["bash", "-n", path], check=True)

    assert path.stat().st_mode & 0o111 == 0o111


def test_the_example_holds_choices_with_the_defaults_of_compose() -> None:
    lines = (compose.ROOT / ".env.example").read_text().splitlines()
    chosen = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))

    assert compose.load(compose.GPU, chosen) == compose.load(compose.GPU)
    text = (compose.ROOT / "docker-compose.yml").read_text()
    assert all(f"${{{name}:-" in text for name in chosen)


def test_one_card_is_reserved_where_there_is_one() -> None:
    with_gpu, without = compose.load(compose.GPU)["services"], compose.load(compose.CPU)["services"]
    for name in ("train", "engine"):
        (device,) = with_gpu[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
        assert with_gpu[name]["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
        assert "deploy" not in without[name]
        assert without[name]["environment"]["CUDA_VISIBLE_DEVICES"] == ""
        assert without[name]["build"]["args"]["TORCH_INDEX"].endswith("/whl/cpu")


def _settings(model: type[BaseModel], prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names |= _settings(kind, f"{prefix}{name.upper()}__")
        else:
            names.add(prefix + name.upper())
    return names
