"""The configuration described: every variable, as the documentation and `tunesmith config` show it."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr

from app.core.settings import CONFIG_FILE, PREFIX, SECRETS_DIR, Settings

HIDDEN = "(hidden)"
NO_SETTINGS = {CONFIG_FILE, SECRETS_DIR, f"{PREFIX}BASE_URL", f"{PREFIX}API_KEY"}  # the last two are of customers: docs/cli.md
PASSWORD = re.compile(r"(://[^:/@]*:).*@")  # of a URL

_HEAD = f"""\
# Configuration

*Written by `make docs`; a test compares it with the code.*

Every process reads the same settings once, when it starts. A value is taken from the first of these that has it:

1. an environment variable, as named below;
2. a file in the folder that `{SECRETS_DIR}` names: one called `storage__secret_key` sets `TUNESMITH_STORAGE__SECRET_KEY`
   (Docker and Kubernetes mount secrets like this);
3. the TOML file that `{CONFIG_FILE}` names: `bucket` in its table `[storage]` sets `TUNESMITH_STORAGE__BUCKET`;
4. the default.

Lists are written as JSON: `'["16", "24"]'`. `tunesmith config` shows what holds now, and names what sets nothing: a variable, a
file or a key that is misspelt.

`tunesmith up` makes the addresses and secrets of what it runs itself, whatever is set here: all of Storage, the URLs of Database,
broker and gateway, key pepper, the tokens of engines and metrics, and the ports of metrics. It runs an engine for each of
`TUNESMITH_TRAINING__QUANTIZATIONS`. Everything else counts there too, with two defaults of its own:
`TUNESMITH_WORK_DIR` is `work` in its data directory, and `TUNESMITH_WEBHOOKS__ALLOW_LOOPBACK` is `true`.
"""


@dataclass(frozen=True)
class Variable:
    """One setting. `path` leads to its value: `("storage", "bucket")`."""

    path: tuple[str, ...]
    kind: str
    default: str
    description: str
    is_secret: bool

    @property
    def name(self) -> str:
        return PREFIX + "__".join(self.path).upper()

    def value(self, settings: Settings) -> Any:
        value: Any = settings
        for part in self.path:
            value = getattr(value, part)
        return value.expanduser() if isinstance(value, Path) else value

    def shown(self, settings: Settings) -> str:
        """Its value for people; a secret only as whether it is set."""
        value = self.value(settings)
        if self.is_secret:
            return HIDDEN if value.get_secret_value() else "(empty)"
        return PASSWORD.sub(r"\1…@", _written(value))


def variables() -> Iterator[Variable]:
    """In the order they are declared, sections first."""
    return _of(Settings, ())


def unknown(environment: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """What looks like a setting and sets nothing, as it is written and where, each with the variable that was probably meant."""
    sections = set(Settings.model_fields)  # a whole one may be set as JSON
    known = {"__".join(variable.path) for variable in variables()} | sections
    found = {**_variables_in(environment), **_files_in(environment), **_keys_in(environment)}
    odd = {written: name for written, name in sorted(found.items()) if name not in known}
    return {written: _meant(name, known) for written, name in odd.items()}


def _meant(name: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.8)
    return PREFIX + close[0].upper() if close else None


def _variables_in(environment: Mapping[str, str]) -> dict[str, str]:
    """By variable: the setting's name, in the letters that settings have."""
    ours = (name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in NO_SETTINGS)
    return {name: name[len(PREFIX) :].lower() for name in ours}


def _files_in(environment: Mapping[str, str]) -> dict[str, str]:
    """Of the secrets' folder. Others keep their files there too: one that is nearly ours counts, and no stranger."""
    folder = environment.get(SECRETS_DIR)
    if not folder or not Path(folder).is_dir():
        return {}
    settings = ["__".join(variable.path) for variable in variables()]
    sections = tuple(f"{variable.path[0]}__" for variable in variables() if len(variable.path) > 1)
    names = {path.name: path.name.lower() for path in Path(folder).iterdir() if path.is_file()}
    return {
        f"{written} in {folder}": name
        for written, name in names.items()
        if name.startswith(sections) or _meant(name, settings) is not None
    }


def _keys_in(environment: Mapping[str, str]) -> dict[str, str]:
    """Of the TOML file; none if it cannot be read, which reading the settings has told."""
    file = environment.get(CONFIG_FILE)
    try:
        document = tomllib.loads(Path(file).read_text()) if file else {}
    except (OSError, ValueError):
        return {}
    return {f"{written} in {file}": name for written, name in _keys_of(document)}


def _keys_of(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in document.items():
        if not isinstance(value, dict):
            yield key, key
        elif key in Settings.model_fields:
            yield from ((f"[{key}] {inner}", f"{key}__{inner}") for inner in value)
        else:
            yield f"[{key}]", key


def markdown() -> str:
    """The whole of docs/configuration.md."""
    parts, section = [_HEAD], None
    for variable in sorted(variables(), key=lambda variable: len(variable.path)):
        if variable.path[:-1] != section:
            section = variable.path[:-1]
            title, about = _about(section)
            parts.append(f"\n## {title}\n\n{about}\n\n| variable | type | default | what it decides |\n|---|---|---|---|\n")
        kind, default = (text.replace("|", "\\|") for text in (variable.kind, variable.default))
        parts.append(f"| `{variable.name}` | {kind} | {default} | {variable.description} |\n")
    return "".join(parts)


def _of(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[Variable]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _of(kind, (*path, name))
            continue
        is_secret = kind is SecretStr
        default = "*secret*" if is_secret else f"`{written}`" if (written := _written(field.default)) else "*none*"
        yield Variable((*path, name), _kind(kind), default, field.description or "", is_secret)


def _about(section: tuple[str, ...]) -> tuple[str, str]:
    if not section:
        return "General", "What all processes share."
    model = Settings.model_fields[section[0]].annotation
    assert isinstance(model, type)
    return section[0].capitalize(), " ".join((model.__doc__ or "").split())


def _kind(annotation: Any) -> str:
    """The type in words that an operator knows."""
    match get_origin(annotation):
        case None:
            words = {"str": "text", "SecretStr": "text", "int": "integer", "float": "number", "bool": "true or false"}
            name: str = annotation.__name__
            return words.get(name, name.lower())
        case origin if origin is frozenset:
            return f"list of {_kind(get_args(annotation)[0])}"
        case origin if origin is Literal:
            return " or ".join(f"`{value}`" for value in get_args(annotation))
        case _:
            return " or ".join(_kind(part) for part in get_args(annotation) if part is not NoneType)


def _written(value: Any) -> str:
    match value:
        case None | "":
            return ""
        case bool():
            return str(value).lower()
        case frozenset() | tuple():
            return "[" + ", ".join(f'"{item}"' for item in sorted(value)) + "]"
        case float():
            return f"{value:g}"
        case _:
            return str(value)
