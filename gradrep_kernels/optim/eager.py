"""Methods that torch.compile must not trace."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def eager(method: Callable) -> Callable:
    """Keep torch.compile out of `method`, as torch.compiler.disable does.

    That decorator loads torch._dynamo, so in the body of a class it would cost every import of this package 3 s. Here
    it is applied when torch.compile traces a call, and torch._dynamo is there already.
    """

    @functools.wraps(method)
    def outside_graphs(*args, **kwargs):
        call = torch.compiler.disable(method) if torch.compiler.is_compiling() else method
        return call(*args, **kwargs)

    return outside_graphs
