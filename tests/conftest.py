"""Real Postgres, Valkey and S3, started once for all tests; each test makes an organization of its own.

The API is a real server, spoken to by the real SDK.
"""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import hypothesis
import pytest
import uvicorn
from openai import DefaultHttpxClient, OpenAI
from sqlalchemy import orm
from xdist.scheduler import LoadScopeScheduling

from app import db
from app.accounts import keys
from app.accounts.caller import Caller
from app.accounts.people import create_organization
from app.core import ids
from app.core.data import Report
from app.core.settings import Settings
from app.core.storage import Storage, open_storage
from app.files import service as files
from app.main import create_app
from migrations.upgrade import upgrade
from tests import make
from tests.embedded.patience import PATIENCE_SECONDS
from worker.embedded import Servers

hypothesis.settings.register_profile("here", deadline=None)  # a machine may be busy
hypothesis.settings.load_profile("here")

# each of the many processes that tests start would compile all of our code again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["OMP_NUM_THREADS"] = make.UNHURRIED["OMP_NUM_THREADS"]

CACHE = Path(__file__).parent.parent / ".tunesmith" / "test-cache"  # quantized bases and kernels, kept between runs
TOGETHER = ("tests/flow/", "tests/training/", "tests/observability/")  # one stack for all, and kernels that are compiled once


class ByFixture(LoadScopeScheduling):
    """Tests that share what takes long to make stay in one process: those of a module, and of some folders."""

    def _split_scope(self, nodeid: str) -> str:
        return next(filter(nodeid.startswith, TOGETHER), nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFixture:
    return ByFixture(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Of tests with one id xdist runs one, and nobody hears of the others."""
    counted = Counter(item.nodeid for item in session.items)
    if repeated := [nodeid for nodeid, count in counted.items() if count > 1]:
        raise pytest.UsageError(f"these ids stand for several tests each: {repeated[:5]}")


@pytest.fixture(scope="session", autouse=True)
def bases_dir() -> Iterator[Path]:
    """Where prepared base models lie; also those of a stack that a test starts, which else takes the home of who runs it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE_DIR", str(CACHE))
        yield CACHE


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Postgres, Valkey and S3, migrated."""
    running = Servers(tmp_path_factory.mktemp("servers"), durable=False).start()
    try:
        upgrade(running.settings.database.owner_url.get_secret_value())
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def settings(servers: Servers, bases_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    changes = {"cache_dir": bases_dir, "work_dir": tmp_path_factory.mktemp("work")}
    return servers.settings.model_copy(update=changes)


@pytest.fixture(scope="session")
def system_sessions(settings: Settings) -> Iterator[orm.sessionmaker[orm.Session]]:
    sessions = db.open_sessions(settings.database.system_url)
    yield sessions
    sessions.kw["bind"].dispose()


@pytest.fixture(scope="session")
def api_sessions(settings: Settings) -> Iterator[orm.sessionmaker[orm.Session]]:
    sessions = db.open_sessions(settings.database.api_url)
    yield sessions
    sessions.kw["bind"].dispose()


@pytest.fixture(scope="session")
def storage(settings: Settings) -> Storage:
    return open_storage(settings.storage)


@pytest.fixture
def organization(system_sessions: orm.sessionmaker[orm.Session]) -> Caller:
    """A fresh organization, seen as one of its callers."""
    return make_organization(system_sessions)


def make_organization(sessions: orm.sessionmaker[orm.Session]) -> Caller:
    with sessions.begin() as session:
        organization, project = create_organization(session, name="Test", slug=ids.new("t"))
        return Caller(ids.new("key_"), organization.id, project.id, organization.slug)


def make_key(sessions: orm.sessionmaker[orm.Session], settings: Settings, caller: Caller) -> str:
    """A working API key of this organization."""
    with sessions.begin() as session:
        return keys.create(
            session,
            organization_id=caller.organization_id,
            project_id=caller.project_id,
            name="test",
            pepper=settings.key_pepper.get_secret_value().encode(),
        )


@pytest.fixture(scope="session")
def api_url(settings: Settings) -> Iterator[str]:
    """Of an API that is as patient with its database as tests are."""
    with ExitStack() as running:
        with pytest.MonkeyPatch.context() as patched:  # it reads them when it starts
            for name in ("POOL_SECONDS", "CONNECT_SECONDS", "REQUEST_TIMEOUT_SECONDS"):
                patched.setattr(db, name, int(PATIENCE_SECONDS))
            url = running.enter_context(serving_api(settings))
        yield url


@contextmanager
def serving_api(settings: Settings) -> Iterator[str]:
    """Its address."""
    port = make.free_port()
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=port, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def sdk(api_url: str, key: str) -> OpenAI:
    """The SDK. It reads no certificates, which takes longer than most tests do: nothing here speaks TLS."""
    return OpenAI(
        base_url=f"{api_url}/v1",
        api_key=key,
        max_retries=0,
        http_client=DefaultHttpxClient(verify=False, timeout=PATIENCE_SECONDS),
    )


@pytest.fixture
def client(
    api_url: str, settings: Settings, system_sessions: orm.sessionmaker[orm.Session], organization: Caller
) -> Iterator[OpenAI]:
    """The SDK with a key of a fresh organization."""
    with sdk(api_url, make_key(system_sessions, settings, organization)) as made:
        yield made


@pytest.fixture
def file_id(client: OpenAI, system_sessions: orm.sessionmaker[orm.Session]) -> str:
    """A valid file of the client."""
    file = client.files.create(file=("a.jsonl", make.chat_file()), purpose="fine-tune")
    with system_sessions.begin() as session:
        files.finish_validation(session, file.id, Report(rows=12, problem_count=0))
    return file.id


@pytest.fixture
def stranger(api_url: str, settings: Settings, system_sessions: orm.sessionmaker[orm.Session]) -> Iterator[OpenAI]:
    """The SDK with a key of another organization."""
    with sdk(api_url, make_key(system_sessions, settings, make_organization(system_sessions))) as made:
        yield made


@pytest.fixture
def http(api_url: str, client: OpenAI) -> Iterator[httpx.Client]:
    """Plain HTTP with the client's key, for what the SDK would not send."""
    with httpx.Client(
        base_url=api_url, headers={"Authorization": f"Bearer {client.api_key}"}, verify=False, timeout=PATIENCE_SECONDS
    ) as made:
        yield made
