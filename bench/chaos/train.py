"""The train worker with the toy trainer: `python -m bench.chaos.train`."""

import sys

from worker import train, trainers

if __name__ == "__main__":
    trainers.PROGRAM = "bench.chaos.toy_trainer"
    sys.exit(train.main())
