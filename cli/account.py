"""Which service is spoken to, and with whose key: an address and a key that belong together, never one of each."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from cli.failure import Failed
from cli.options import DATA_DIR

OURS, SDKS = ("TUNESMITH_BASE_URL", "TUNESMITH_API_KEY"), ("OPENAI_BASE_URL", "OPENAI_API_KEY")
NOBODY = (
    "no service is known: `tunesmith login URL` keeps an address and a key, as do the variables "
    f"{' and '.join(OURS)}; --data-dir names a stack of `tunesmith up`"
)


@dataclass(frozen=True)
class Account:
    """`base_url` ends with /v1, as the SDK has it; `source` says in words where it comes from."""

    base_url: str
    api_key: str
    source: str


def find(data_dir: Path | None) -> Account:
    """The first of: the stack that is named, our variables, the SDK's, what `login` keeps, the stack in this folder.

    Raises Failed.
    """
    if data_dir is not None:
        named = _read(data_dir / "credentials.json", f"--data-dir {data_dir}")
        if named is None:
            raise Failed(f"{data_dir} holds no credentials.json: no stack is ready there; `tunesmith up --data-dir {data_dir}`")
        return named
    if any(map(os.environ.get, OURS)) and not all(map(os.environ.get, OURS)):
        raise Failed(f"of {' and '.join(OURS)} one is set alone; set both, or none")
    for variables in (OURS, SDKS):  # of the SDK's, one alone is for somebody else's service
        if all(map(os.environ.get, variables)):
            return Account(os.environ[variables[0]].rstrip("/"), os.environ[variables[1]], variables[0])
    found = find_kept() or _read(DATA_DIR / "credentials.json", f"{DATA_DIR}/credentials.json")
    if found is None:
        raise Failed(NOBODY)
    return found


def find_kept() -> Account | None:
    """What `tunesmith login` has kept."""
    return _read(kept_at(), "`tunesmith login`")


def kept_at() -> Path:
    return folder("XDG_CONFIG_HOME", ".config") / "credentials.json"


def folder(variable: str, usual: str) -> Path:
    """Ours below one of the folders that the XDG specification names."""
    return Path(os.environ.get(variable) or Path.home() / usual) / "tunesmith"


def keep(account: Account) -> Path:
    """For the next commands, and for nobody else's eyes. Raises Failed."""
    path = kept_at()
    document = {name: value for name, value in asdict(account).items() if name != "source"}
    write_private(path, json.dumps(document, indent=2) + "\n")
    return path


def write_private(path: Path, text: str) -> None:
    """Whole or not at all, and readable by its owner alone. Raises Failed."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, written = tempfile.mkstemp(dir=path.parent)  # 0600
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(written).replace(path)
    except OSError as error:
        raise Failed(error) from error


def _read(path: Path, source: str) -> Account | None:
    """None if there is no such file. Raises Failed for one that is no account."""
    try:
        document = json.loads(path.read_text())
        return Account(document["base_url"], document["api_key"], source)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Failed(
            f"{path} cannot be read as an address and a key ({error!r}); remove it, or `tunesmith login` anew"
        ) from error
