"""`tunesmith login` and `tunesmith logout`: which service the other commands speak to."""

import sys
from typing import Annotated
from urllib.parse import urlsplit

import typer
from typer import Argument, Option

from cli import account
from cli.account import Account
from cli.failure import Failed, say
from cli.options import AsJson, Stack
from cli.output import busy, show

Address = Annotated[str | None, Argument(metavar="URL", help="Of the API, such as http://127.0.0.1:8000/v1.")]
Key = Annotated[
    str | None, Option("--api-key", metavar="KEY", help="Else it is asked for, or read from stdin: others see commands.")
]


def login(base_url: Address = None, api_key: Key = None, data_dir: Stack = None, as_json: AsJson = False) -> None:
    """Keep the address of a service and a key for it.

    What is not given is asked for. Both are tried before they are kept, in tunesmith/credentials.json of your configuration
    folder, readable by you alone. With --data-dir they are those of a stack that `tunesmith up` runs.
    """
    from cli.api import Api

    wanted = account.find(data_dir) if data_dir else _typed(base_url, api_key)
    with Api(wanted) as api, busy(f"asking {wanted.base_url}"):
        models = api.get("/models")["data"]
    path = account.keep(wanted)
    mine = sum(model["owned_by"] != "base" for model in models)
    told = f"{wanted.base_url} knows the key: {len(models)} models, {mine} of them yours. Kept in {path}"
    document = {"base_url": wanted.base_url, "kept_in": str(path), "models": len(models), "of_yours": mine}
    show(document, told, as_json=as_json)
    if (holds := account.find(None)) != account.find_kept():
        say(f"{holds.source} is set, and goes before what was kept")


def logout(as_json: AsJson = False) -> None:
    """Forget what `tunesmith login` has kept."""
    path = account.kept_at()
    was_there = path.exists()
    path.unlink(missing_ok=True)
    show({"forgotten": was_there}, f"{path} is removed" if was_there else "nothing was kept", as_json=as_json)


def _typed(base_url: str | None, api_key: str | None) -> Account:
    """Raises Failed."""
    url = base_url or typer.prompt("Address of the API", default="http://127.0.0.1:8000/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise Failed(f"{url!r} is no address; one is like http://127.0.0.1:8000/v1")
    if parts.path in ("", "/"):
        url = f"{parts.scheme}://{parts.netloc}/v1"
    key = api_key or (typer.prompt("API key", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline())
    if not key.strip():
        raise Failed("no key was given; --api-key KEY, or on stdin")
    return Account(url.rstrip("/"), key.strip(), "what was given")
