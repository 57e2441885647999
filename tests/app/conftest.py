"""The API as a real server, spoken to by the real SDK."""

import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from openai import OpenAI
from sqlalchemy import orm

from app.accounts.caller import Caller
from app.core.settings import Settings
from app.main import create_app
from tests.conftest import make_key, make_organization


@pytest.fixture(scope="session")
def api_url(settings: Settings) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=port, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def client(
    api_url: str, settings: Settings, system_sessions: orm.sessionmaker[orm.Session], organization: Caller
) -> Iterator[OpenAI]:
    """The SDK with a key of a fresh organization."""
    with OpenAI(base_url=f"{api_url}/v1", api_key=make_key(system_sessions, settings, organization), max_retries=0) as made:
        yield made


@pytest.fixture
def stranger(api_url: str, settings: Settings, system_sessions: orm.sessionmaker[orm.Session]) -> Iterator[OpenAI]:
    """The SDK with a key of another organization."""
    key = make_key(system_sessions, settings, make_organization(system_sessions))
    with OpenAI(base_url=f"{api_url}/v1", api_key=key, max_retries=0) as made:
        yield made


@pytest.fixture
def http(api_url: str, client: OpenAI) -> Iterator[httpx.Client]:
    """Plain HTTP with the client's key, for what the SDK would not send."""
    with httpx.Client(base_url=api_url, headers={"Authorization": f"Bearer {client.api_key}"}) as made:
        yield made
