"""bitsandbytes, imported without torch's compiler: import it from here.

It decorates functions with torch.compile, which imports all of the compiler: a quarter of what an engine imports, and it compiles
nothing. So decorated, a function is compiled when it is first called, as it would be anyway.
"""

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any
from unittest import mock

import torch

_compile = torch.compile


def _compiled_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """As torch.compile is called: with a function, or with options for what it then decorates."""
    if function is None:
        return partial(_compiled_later, **options)
    compiled = cache(partial(_compile, function, **options))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


with mock.patch.object(torch, "compile", _compiled_later):
    from bitsandbytes import functional, nn, optim

__all__ = ["functional", "nn", "optim"]
