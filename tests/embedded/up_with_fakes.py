"""`up` with real servers, the real schema and fake processes: `python -m tests.embedded.up_with_fakes DATA_DIR PORT`."""

import sys
from pathlib import Path

from app.core.settings import Settings
from worker.embedded import stack
from worker.embedded.programs import Process


def processes(_: Settings, host: str, port: int) -> tuple[Process, ...]:
    fake = ("-m", "tests.embedded.fake_process")
    return Process("api", (*fake, "api", host, str(port)), ()), Process("engine", (*fake, "engine"), ("ENGINE_TOKEN",))


if __name__ == "__main__":
    data_dir, port = Path(sys.argv[1]), int(sys.argv[2])
    stack.up(data_dir, Settings(), host="127.0.0.1", port=port, console=sys.stdout, processes=processes)
