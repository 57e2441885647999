"""Functions on elements, each compiled to one pass over memory where a compiler is at hand, and run as written where not.

Eager torch goes over memory once per operation; the passes between a decoder layer's products then cost more than the products.
torch.compile makes them one: C++ on a CPU, Triton on a GPU. TORCH_COMPILE_DISABLE=1 turns it off.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import torch

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Fused(Generic[P, T]):
    """A decorator for what runs within a forward or backward of ours: no gradient flows through it.

    What is compiled is kept on disk: see `keep_in`.
    """

    def __init__(self, function: Callable[P, T]) -> None:
        self.as_written = function
        self._compiled: Callable[P, T] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._compiled is None:
            self._compiled = _compiled(self.as_written) if can_compile() else self.as_written
        return self._compiled(*map(_detached, args), **kwargs)


def keep_in(cache_dir: Path) -> None:
    """Where compiled functions lie between processes; says nothing if the environment has said it already.

    Machine code for one CPU must not meet another, so that its abilities are in the folder's name.
    """
    abilities = hashlib.sha256(f"{torch.__version__} {_cpu_flags()}".encode()).hexdigest()[:16]
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir / "kernels" / abilities))


@cache
def can_compile() -> bool:
    """Whether this machine has what torch.compile needs: a C++ compiler and Python's headers, or Triton's GPU."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        _compiled(_probe)(torch.zeros(8, device=device))
    except Exception as error:  # whatever it lacks
        log.warning("kernels are not compiled, training is slower: %s", str(error).partition("\n")[0])
        return False
    return True


def _probe(values_N: torch.Tensor) -> torch.Tensor:
    return values_N + 1


def _detached(value: Any) -> Any:
    """A tensor that wants a gradient would be another case to compile for."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def _compiled(function: Callable[P, T]) -> Callable[P, T]:
    """For all sizes at once: a size of its own for every length would compile for ever. 1 stays a case of its own."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor
    from torch.fx.experimental import _config as shapes

    settings: Any = shapes
    settings.use_duck_shape = False  # two sizes that happen to be equal are still two sizes
    dynamo.recompile_limit = 64  # types times ones
    inductor.compile_threads = 1  # here, not in processes that would outlive a trainer that is killed
    return torch.compile(function, dynamic=True, fullgraph=True)


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
