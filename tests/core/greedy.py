"""`python -m tests.core.greedy`: takes as much as it is ordered to, under `app.core.limited`."""

import sys
import time

from app.core import limited


def main() -> int:
    order = limited.accept()
    taken = []
    try:
        while order == "memory":
            taken.append(bytes(1 << 20) + b"1")
    except MemoryError:
        return limited.OUT_OF_MEMORY
    while order == "time":
        taken = [*range(1000)]
    if order == "sleep":
        time.sleep(60)
    if order == "fail":
        raise ValueError("a customer's words")
    print(order)
    return 0


if __name__ == "__main__":
    sys.exit(main())
