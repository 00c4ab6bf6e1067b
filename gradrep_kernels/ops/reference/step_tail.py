"""What the steps of all optimizers share around their update: the gradient on its way in, states and the average.

Each step op takes, behind the arguments of its own, those of the tail: `clip`, `averages`, `numbers`, `elements` and
`tail`, the numbers of `COLUMNS`, which hold for all groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradrep_kernels.ops.reference.rounding_rule import element_numbers, random_bits, rounded

COLUMNS = ("ema_decay", "stochastic", "seed", "step")
"""The numbers of a step's tail. A step without averages, and without states in bfloat16, does not look at them."""


class Tail(NamedTuple):
    """The numbers of a step's tail, as the table has them  # [4] float64"""

    ema_decay: float  # of the averages, in [0, 1]
    stochastic: bool  # whether states in bfloat16 are rounded by the rule of rounding_rule.py, else to the nearest
    seed: int
    step: int

    @classmethod
    def of(cls, numbers: Tensor | Sequence[float] | None) -> Tail:
        given = numbers.tolist() if isinstance(numbers, Tensor) else numbers
        decay, stochastic, seed, step = given or (0.0, 0.0, 0, 0)
        return cls(decay, stochastic != 0, int(seed), int(step))


def one_each(
    count: int, averages: Sequence | None, numbers: Sequence | None, elements: Sequence | None
) -> tuple[Sequence, Sequence, Sequence]:
    """The columns that a call may leave out, with one entry for each parameter."""
    nothing = [None] * count
    return averages or nothing, numbers or range(count), elements or nothing


def incoming(grad: Tensor, dtype: torch.dtype, grad_scale: Tensor | None, clip: Tensor | None) -> Tensor:
    """g as an update takes it, in `dtype`: unscaled in place where there is a grad_scale, then clipped elsewhere."""
    g = grad.to(dtype)
    real = g.real.dtype if g.is_complex() else dtype
    if grad_scale is not None:
        g = g / grad_scale.reshape(()).to(device=g.device, dtype=real)
        grad.copy_(g)
    return g if clip is None else g * clip.reshape(()).to(device=g.device, dtype=real)


def store_state(state: Tensor, value: Tensor, tail: Tail, number: int, elements: Tensor | None, which: int = 0) -> None:
    """Round a new value into a state: by random bits where the state is bfloat16 and the tail says so.

    Args:
        number:   the parameter's position in its optimizer
        elements: see `element_numbers`
        which:    the number of the state among those of its update
    """
    if tail.stochastic and state.dtype == torch.bfloat16:
        bits = random_bits(element_numbers(state, elements), tail.seed, tail.step, number, which)
        value = rounded(value, bits)
    state.copy_(value)


def update_average(average: Tensor | None, param: Tensor, tail: Tail) -> None:
    """e <- e + (1 - decay) (W - e), with the weight as it is stored. None: there is no average."""
    if average is not None:
        average.copy_(average + (param.to(average.dtype) - average) * (1 - tail.ema_decay))
