"""One API process with Postgres, Valkey and S3, for a benchmark."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from stack import wait

from app import db
from app.accounts import keys
from app.accounts.caller import Caller
from app.accounts.people import create_organization
from app.core.settings import Settings
from migrations.upgrade import upgrade
from tests.make import free_port
from worker.embedded import Servers
from worker.embedded.programs import as_program, service


@dataclass(frozen=True)
class Api:
    """`key` is `caller`'s. If the process dies, another one is started in its place."""

    settings: Settings
    url: str
    key: str
    caller: Caller

    def process(self) -> psutil.Process:
        """The one that serves just now."""
        (found,) = (child for child in psutil.Process().children(recursive=True) if "app.main:create_app" in child.cmdline())
        return found

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", trust_env=False).is_success
        except httpx.HTTPError:
            return False


@contextmanager
def api(data_dir: Path) -> Iterator[Api]:
    """Until the block ends, with an organization of its own."""
    servers, port = Servers(data_dir).start(), free_port()
    try:
        upgrade(servers.settings.database.owner_url.get_secret_value())
        servers.supervisor.start(
            as_program(service(servers.settings, "127.0.0.1", port)[0], servers.settings, servers.state.ports)
        )
        running = Api(servers.settings, f"http://127.0.0.1:{port}", *_customer(servers.settings))
        wait(running.answers)
        yield running
    finally:
        servers.stop()


def _customer(settings: Settings) -> tuple[str, Caller]:
    pepper = settings.key_pepper.get_secret_value().encode()
    with db.open_sessions(settings.database.system_url).begin() as session:
        organization, project = create_organization(session, name="Bench", slug="bench")
        owner = {"organization_id": organization.id, "project_id": project.id}
        key = keys.create(session, **owner, name="bench", pepper=pepper)
        return key, Caller("key_bench", **owner, organization_slug=organization.slug)
