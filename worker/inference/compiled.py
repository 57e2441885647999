"""Loops that PyTorch has no operator for, compiled by numba for the processor that runs them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numba


def compiled(signature: str | list[str], loops: Callable[..., None]) -> Any:
    """The function, compiled now. What was compiled is kept beside its file or in the user's cache.

    Sums go in any order; infinities and NaN stay what they are: a broken row must be seen as such.
    """
    compile_with = partial(numba.njit, signature, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
    try:
        return compile_with(cache=True)(loops)
    except RuntimeError:  # no folder to keep it in
        return compile_with()(loops)
