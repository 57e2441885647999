"""`tunesmith up`: the servers, the schema, the first key, our processes; then credentials.json, which means ready."""

import json
import os
import time
from collections.abc import Set
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TextIO

import httpx

from app.accounts import bootstrap
from app.core.settings import Settings
from migrations.upgrade import upgrade
from worker.embedded.paths import write_private
from worker.embedded.processes import signals
from worker.embedded.programs import Processes, as_program, service
from worker.embedded.servers import Servers
from worker.embedded.state import require_free

READY_SECONDS = 900.0  # the first engine fetches and quantizes its base model


def up(data_dir: Path, chosen: Settings, *, host: str, port: int, console: TextIO | None, processes: Processes = service) -> None:
    """Run everything until Ctrl-C or SIGTERM, then stop it in order; a second one kills. Main thread only.

    Raises StackError for what can be expected to go wrong, with nothing left running.
    """
    servers = Servers(data_dir, chosen, console=console)
    try:
        servers.claim()
        servers.paths.require_finished()
        require_free(host, port)
        servers.paths.credentials.unlink(missing_ok=True)
        with suppress(KeyboardInterrupt), signals(_interrupt):
            _run(servers, host, port, processes)
    finally:
        servers.stop()


def _run(servers: Servers, host: str, port: int, processes: Processes) -> None:
    try:
        _start(servers, host, port, processes)
        _announce(servers, host, port)
        while True:
            time.sleep(3600)
    finally:
        with signals(servers.supervisor.hurry):
            servers.paths.credentials.unlink(missing_ok=True)
            servers.output.say("stopping; Ctrl-C again kills")
            servers.stop()


def _interrupt() -> None:
    raise KeyboardInterrupt


def _start(servers: Servers, host: str, port: int, processes: Processes) -> None:
    say = servers.output.say
    servers.start(avoid_port=port)
    say("Postgres, Valkey and S3 answer; bringing the database up to date")
    upgrade(servers.settings.database.owner_url.get_secret_value())
    ensure_key(servers)
    url = _local_url(host, port)
    inference = servers.settings.inference.model_copy(update={"gateway_url": url})
    settings = servers.settings.model_copy(update={"inference": inference})
    ports = servers.state.ports
    assert ports is not None, "the servers have started on them"
    servers.supervisor.start(*(as_program(process, settings, ports) for process in processes(settings, host, port)))
    say("the API, the workers and the engine are starting; the first time takes longest")
    ask = partial(_require_ready, url, settings.training.quantizations)
    servers.supervisor.wait_for("api", ask, failures=(_NotReady,), seconds=READY_SECONDS, pause_seconds=0.5)


def _announce(servers: Servers, host: str, port: int) -> None:
    base_url, paths = f"{_local_url(host, port)}/v1", servers.paths
    credentials = {"base_url": base_url, "api_key": servers.state.api_key}
    write_private(paths.credentials, json.dumps(credentials, indent=2) + "\n")
    lines = (
        "Tunesmith is ready.",
        f"  dashboard    {_local_url(host, port)}{bootstrap.sign_in_link(servers.settings)}",
        "               (signs you in once; `tunesmith sign-in` prints another)",
        f"  API          {base_url}",
        f"  credentials  {paths.credentials}",
        f"  logs         {paths.logs}",
        f"  to stop      Ctrl-C here, or kill {os.getpid()}",
    )
    for line in lines:
        servers.output.say(line)


def ensure_key(servers: Servers) -> None:
    """Remember the first key in stack.json: the database holds only its hash."""
    created = bootstrap.ensure_first_key(servers.settings)
    if created is None and servers.state.api_key is None:  # killed after the database took it and before stack.json did
        created = bootstrap.another_key(servers.settings)
    if created is not None:
        servers.remember(api_key=created)


class _NotReady(Exception):
    """The API does not answer, or says what it waits for."""


def _require_ready(url: str, quantizations: Set[str]) -> None:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5, trust_env=False)
        body = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise _NotReady(f"no answer: {error}") from error
    if answer.status_code != httpx.codes.OK or not quantizations <= set(body.get("quantizations", ())):
        raise _NotReady(answer.text.strip())


def _local_url(host: str, port: int) -> str:
    """How this machine reaches a server that listens on `host`."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reached}:{port}"
