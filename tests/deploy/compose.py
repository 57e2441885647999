"""What `docker compose` would make of our files, as far as they use it: anchors, variables, a second file over the first."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
GPU, CPU = ("docker-compose.yml",), ("docker-compose.yml", "docker-compose.cpu.yml")
_RESET = object()


class _Loader(yaml.SafeLoader):
    """Knows Compose's own tag."""


_Loader.add_constructor("!reset", lambda *_: _RESET)


def load(files: tuple[str, ...], variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The merged project with these variables, and the defaults of all others."""
    project: dict[str, Any] = {}
    for file in files:
        text = yaml.load((ROOT / file).read_text(), Loader=_Loader)
        project = _merged(project, _filled(text, variables or {}))
    return project


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Name and argument of each in the last stage, which is the image, with continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^\s*#.*\n", "", (ROOT / dockerfile).read_text()))
    found = [(name, argument.strip()) for name, _, argument in (line.partition(" ") for line in text.splitlines() if line)]
    last = max(number for number, (name, _) in enumerate(found) if name == "FROM")
    return found[last:]


def dockerfile_of(project: dict[str, Any], service: str) -> str | None:
    """Of the image that the service runs; None for an image that is not ours."""
    image = project["services"][service]["image"]
    built = {each["image"]: each["build"]["dockerfile"] for each in project["services"].values() if "build" in each}
    found: str | None = built.get(image)
    return found


def command_of(project: dict[str, Any], service: str) -> list[str]:
    stated = project["services"][service].get("command")
    if stated is None:
        dockerfile = dockerfile_of(project, service)
        assert dockerfile
        stated = yaml.safe_load(dict(instructions(dockerfile))["CMD"])
    assert isinstance(stated, list)
    return [str(word) for word in stated]


def health_check_of(project: dict[str, Any], service: str) -> list[str]:
    """Its command: of the service, or else of its image."""
    if stated := project["services"][service].get("healthcheck"):
        kind, *words = stated["test"]
        assert kind in {"CMD", "CMD-SHELL"}
        return words if kind == "CMD" else ["sh", "-c", *words]
    dockerfile = dockerfile_of(project, service)
    assert dockerfile, f"{service} has no health check"
    _, _, words = dict(instructions(dockerfile))["HEALTHCHECK"].partition("CMD ")
    parsed: list[str] = yaml.safe_load(words)
    return parsed


def environment_of(project: dict[str, Any], service: str) -> dict[str, str]:
    """The image's variables, and the service's over them."""
    values: dict[str, str] = {}
    for name, argument in instructions(dockerfile_of(project, service) or "Dockerfile.api"):
        if name == "ENV":
            values |= dict(pair.split("=", 1) for pair in shlex.split(argument))
    return values | project["services"][service].get("environment", {})


def _merged(under: Any, over: Any) -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        both = {key: _merged(under.get(key), value) for key, value in over.items()}
        return {key: value for key, value in (under | both).items() if value is not _RESET}
    if isinstance(under, list) and isinstance(over, list):
        return under + over
    return over


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, variables) for each in value]
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1], found[2]), value)
    return value
