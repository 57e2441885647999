"""How an engine's process shares its processors among the forward and everything beside it."""

import os
import sys

import torch

SWITCH_SECONDS = 2e-4


def share() -> None:
    """Leave half the cores to others, unless OMP_NUM_THREADS says how many; let no thread that runs Python hold up the forward.

    Two threads that wait for each other on a busy core are slower than one. And the forward gives Python's lock away at every
    operator: while an adapter is loaded it would get it back after 5 ms, as the interpreter is set by default.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    if torch.get_num_threads() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(torch.get_num_threads() // 2)
