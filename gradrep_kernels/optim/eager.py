"""Methods that torch.compile must not trace."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_marked: set[Callable] = set()


def eager(method: Callable) -> Callable:
    """Mark a method that torch.compile must not trace. `keep_out_of_graphs` sees to it.

    torch.compiler.disable as a decorator would load torch._dynamo, at a cost of 3 s to every import of this package.
    """
    _marked.add(method)
    return method


@functools.cache
def keep_out_of_graphs(cls: type) -> None:
    """Apply torch.compiler.disable to the marked methods of a class and its bases, once.

    An optimizer calls this when it is made: torch's own constructor has loaded torch._dynamo by then. Later would be
    too late, for a wrapper that is made within a traced call is a new function each time, which costs two more breaks
    of the graph and recompilations.
    """
    for base in cls.__mro__:
        for name, method in list(vars(base).items()):
            if isinstance(method, Callable) and method in _marked:
                setattr(base, name, torch.compiler.disable(method))
