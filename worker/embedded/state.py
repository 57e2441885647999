"""What a stack remembers from one start to the next: its ports and its secrets."""

import random
import secrets
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field, ValidationError

from worker.embedded.errors import PortTaken, StackError
from worker.embedded.paths import write_private

# below the ports that kernels lend to outgoing connections, so that a kept port is rarely found taken
INTERNAL_PORTS = range(20_000, 32_000)


def secret() -> str:
    """256 random bits that need no quoting in URLs, configuration files and SQL."""
    return secrets.token_urlsafe(32)


class Ports(BaseModel):
    """Those of the servers, and those where relay and workers tell their metrics; 0 is one that is yet to be chosen."""

    postgres: int
    valkey: int
    s3: int
    relay: int = 0
    cpu: int = 0
    train: int = 0


class State(BaseModel):
    """The content of stack.json. A secret added in a later version is made when an older file is read."""

    ports: Ports | None = None
    superuser_password: str = Field(default_factory=secret)
    owner_password: str = Field(default_factory=secret)
    api_password: str = Field(default_factory=secret)
    system_password: str = Field(default_factory=secret)
    valkey_password: str = Field(default_factory=secret)
    s3_access_key: str = Field(default_factory=lambda: secrets.token_hex(10).upper())
    s3_secret_key: str = Field(default_factory=secret)
    key_pepper: str = Field(default_factory=secret)
    engine_token: str = Field(default_factory=secret)
    metrics_token: str = Field(default_factory=secret)
    api_key: str | None = None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises StackError if the file is there and unreadable: new secrets would not open the old data."""
        try:
            return cls.model_validate_json(path.read_bytes()) if path.exists() else cls()
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise StackError(f"{path} is damaged ({problem}); restore it, or use another --data-dir") from error

    def save(self, path: Path) -> None:
        write_private(path, self.model_dump_json(indent=2) + "\n")


def usable_ports(kept: Ports | None, *, avoid: Iterable[int] = ()) -> Ports:
    """The kept ports, each replaced by another if it is taken by now or among those to `avoid`."""
    used = set(avoid)
    chosen = {}
    for name in Ports.model_fields:
        port = getattr(kept, name, 0)
        while not port or port in used or not is_free("127.0.0.1", port):
            port = random.choice(INTERNAL_PORTS)
        chosen[name] = port
        used.add(port)
    return Ports(**chosen)


def require_free(host: str, port: int) -> None:
    """Raises PortTaken, saying what else one can do."""
    if not is_free(host, port):
        raise PortTaken(f"{host}:{port} is taken or not ours to use; choose another port with --port")


def is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # connections that linger after their server's end do not count, a listener does
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
