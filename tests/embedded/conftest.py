from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.embedded import Servers, servers
from worker.embedded.output import Output
from worker.embedded.processes import Supervisor


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Postgres, Valkey and S3, shared by all tests here."""
    with servers(tmp_path_factory.mktemp("stack"), durable=False) as env:
        yield env


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    """One whose children's lines are in tmp_path/NAME.log."""
    output = Output(tmp_path, console=None)
    supervisor = Supervisor(output)
    yield supervisor
    supervisor.stop()
    output.close()
