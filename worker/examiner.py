"""The examiner process: `python -m worker.examiner SECONDS BYTES [PURPOSE]` reads a file from stdin, writes its report to stdout.

A stranger's file is read here and nowhere else before it is known to be valid: a process without any secret, which the
kernel ends when it takes more memory or processor time than reading takes.
"""

import resource
import sys
from collections.abc import Iterator
from typing import BinaryIO

from app.core import data, limited

MEMORY_BYTES = 384 * 2**20  # of address space, as it is usually told to it; less is resident: bench/data.py measures it
CHUNK_BYTES = 256 * 1024


def main() -> int:
    seconds, memory_bytes = map(int, sys.argv[1:3])
    examine = data.examine_evaluation if sys.argv[3:] == [data.TO_EVALUATE] else data.examine
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))  # at the first SIGXCPU, at the second SIGKILL
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        report = examine(data.split_lines(_chunks(sys.stdin.buffer)))
    except MemoryError:
        return limited.OUT_OF_MEMORY
    sys.stdin.close()  # whoever still writes is not waited for: see worker.tasks.validate
    sys.stdout.write(report.model_dump_json())
    return 0


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


if __name__ == "__main__":
    sys.exit(main())
