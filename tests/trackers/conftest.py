"""A real MLflow server: the package's own application and database, without its pages."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import make
from tests.embedded.patience import PATIENCE_SECONDS

SERVE = """
import sys
from mlflow.server import app, handlers
from werkzeug.serving import make_server
handlers._get_tracking_store()  # its tables, before anybody asks
make_server("127.0.0.1", int(sys.argv[1]), app, threaded=True).serve_forever()
"""


@pytest.fixture(scope="session")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory, port = tmp_path_factory.mktemp("mlflow"), make.free_port()
    environment = {
        **os.environ,
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{directory}/mlflow.db",  # what `mlflow server --backend-store-uri` sets
        "_MLFLOW_SERVER_ARTIFACT_ROOT": str(directory),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    url = f"http://127.0.0.1:{port}"
    with Path(directory / "log").open("w") as log:
        command = (sys.executable, "-c", SERVE, str(port))
        process = subprocess.Popen(command, env=environment, cwd=directory, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not _is_up(url):
                assert process.poll() is None and time.monotonic() < deadline, (directory / "log").read_text()[-3000:]
                time.sleep(0.05)
            yield url
        finally:
            process.kill()
            process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).is_success
    except httpx.HTTPError:
        return False
