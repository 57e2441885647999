"""A wall clock that jumps, for processes that are started with its environment."""

import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("clock.c")


class Clock:
    """What counts seconds goes on as it does. Where no C compiler is, the test is skipped."""

    environment: Mapping[str, str]

    def __init__(self, folder: Path) -> None:
        compiler, library = shutil.which("cc"), folder / "clock.so"
        if compiler is None:
            pytest.skip("moving the clock of a process takes a C compiler")
        subprocess.run([compiler, "-O", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
        self._offset = folder / "offset"
        self._offset.write_bytes(bytes(8))
        self.environment = {**os.environ, "LD_PRELOAD": str(library), "WALL_CLOCK_OFFSET": str(self._offset)}

    def jump(self, seconds: int) -> None:
        """To so far from the true time."""
        with self._offset.open("r+b") as file:
            file.write(struct.pack("=q", seconds))
