"""Functions on elements, each compiled to one pass over memory where a compiler is at hand, and run as written where not.

Eager torch goes over memory once per operation; the passes between a decoder layer's products then cost more than the products.
torch.compile makes them one: C++ on a CPU, Triton on a GPU. TORCH_COMPILE_DISABLE=1 turns it off.
"""

import hashlib
import inspect
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


_varying: set[str] = set()  # axes of parameters of all that is decorated, as torch's settings name them
_VARYING = "TtNBPS"  # axes as parameters' names say them: time, labelled positions, documents, their queries, their length


class Fused(Generic[P, T]):
    """A decorator for what runs within a forward or backward of ours: no gradient flows through it.

    Parameters' names carry their axes. Those of the model's widths are compiled as the numbers they are: the compiler joins
    loops only where it sees that they are of one length. What is compiled is kept on disk: see `keep_in`.
    """

    def __init__(self, function: Callable[P, T]) -> None:
        self.as_written = function
        self._compiled: Callable[P, T] | None = None
        for name in inspect.signature(function).parameters:
            _, _, axes = name.rpartition("_")
            _varying.update(f"L['{name}']:{position}" for position, axis in enumerate(axes) if axis in _VARYING)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._compiled is None:
            self._compiled = _compiled(self.as_written) if can_compile() else self.as_written
        return self._compiled(*args, **kwargs)


def keep_in(cache_dir: Path) -> None:
    """Where compiled functions lie between processes; says nothing if the environment has said it already.

    Machine code for one CPU must not meet another, so that its abilities are in the folder's name.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") == default_cache_dir():  # which torch's own modules set as they are imported
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
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


def _compiled(function: Callable[P, T]) -> Callable[P, T]:
    """For all sizes of varying axes at once: one for every length would compile for ever. 1 stays a case of its own."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor
    from torch.fx.experimental import _config as shapes

    settings: Any = shapes
    settings.use_duck_shape = False  # two sizes that happen to be equal are still two sizes
    torch.compiler.config.dynamic_sources = ",".join(sorted(_varying))
    dynamo.automatic_dynamic_shapes = False  # another width is another case, not a varying one
    dynamo.recompile_limit = 64  # types times widths times ones
    inductor.compile_threads = 1  # here, not in processes that would outlive a trainer that is killed
    return torch.compile(function, fullgraph=True)


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
