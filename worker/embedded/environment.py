"""Settings as environment variables: each process is given the secrets it works with, and no others."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping

from pydantic import SecretStr

from app.core.settings import PREFIX, Settings

# what begins like this is a secret or leads to one
PRIVATE = (
    "DATABASE",
    "STORAGE",
    "BROKER_URL",
    "KEY_PEPPER",
    "ENGINE_TOKEN",
    "WANDB",
    "MLFLOW",
    "METRICS__TOKEN",
    "SECRETS_DIR",
    "CONFIG_FILE",
)


def inherited() -> dict[str, str]:
    """What any child may see: our own environment without our secrets, and no proxy between neighbours."""
    private = tuple(PREFIX + name for name in PRIVATE)
    ours = {name: value for name, value in os.environ.items() if not name.upper().startswith(private)}
    for name in ("NO_PROXY", "no_proxy"):
        ours[name] = ",".join(filter(None, (ours.get(name), "127.0.0.1", "localhost")))
    # threads that wait by spinning take the cores from whom they wait for: see docs/decisions/0007
    return {"OMP_WAIT_POLICY": "PASSIVE", **ours, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}


def of(settings: Settings, *, secrets: Iterable[str]) -> dict[str, str]:
    """An environment in which `Settings()` reads these settings, but for the private ones not among `secrets`.

    A secret is named as its variable is, without the prefix, or by the start of it: `DATABASE__API_URL`, `STORAGE`.
    """
    granted = tuple(secrets)
    values = {
        PREFIX + name: value
        for name, value in _variables(settings.model_dump())
        if not name.startswith(PRIVATE) or name.startswith(granted)
    }
    return inherited() | values


def _variables(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = prefix + key.upper()
        if isinstance(value, Mapping):
            yield from _variables(value, f"{name}__")
        elif isinstance(value, SecretStr):
            yield name, value.get_secret_value()
        elif isinstance(value, (frozenset, tuple, list)):
            yield name, json.dumps(list(value))
        elif value is not None:
            yield name, str(value)
