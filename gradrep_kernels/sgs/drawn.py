"""Updates from batches that are drawn for them, in two passes of their own."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from torch import nn

from gradrep_kernels.dtensor import is_dtensor
from gradrep_kernels.sgs.batches import Forward, call_of, draw
from gradrep_kernels.sgs.gathering import Ranges, Tables, gather_map
from gradrep_kernels.sgs.layers import Layer
from gradrep_kernels.sgs.learning import Learning, Options
from gradrep_kernels.sgs.passes import run, undisturbed
from gradrep_kernels.sgs.ranks import attempt

__all__ = ["Outcome", "learn_from"]


class Outcome(NamedTuple):
    drawn: int  # batches of this rank
    counted: int  # layers that had pairs
    learned: bool  # whether some G was set
    not_finite: list[Layer]


def learn_from(
    batches: Iterable, most: int, forward: Forward | None, model: nn.Module, learning: Learning, options: Options
) -> Outcome:
    """Learn the scalings from up to `most` batches.

    They are drawn once and kept. The first pass finds the ranges, the second counts. Between and after them the model
    and the random states are as before.

    Raises:
        ValueError:   no batch at all, on any rank. Under FSDP2: none on one of the ranks.
        TypeError:    a batch that the model cannot be given.
        RuntimeError: the update failed on another rank.
    """
    layers, ranks = learning.layers, learning.ranks
    kept: list = []
    with undisturbed(model, batches) as begin_pass:

        def pass_over(layers: Iterable[Layer], statistics: Ranges | Tables) -> None:
            hooks = [
                (conv, partial(gather_map, (statistics,), options.remove_near, layer))
                for layer in layers
                for conv in layer.convs.values()
            ]
            begin_pass()
            run(model, kept, call_of(model, forward), hooks, calls)

        failure = attempt(lambda: draw(batches, most, forward, kept))
        calls = len(kept)
        if ranks.many and any(is_dtensor(p) for p in model.parameters()):
            calls = ranks.calls_of_each(calls, failure, layers[0].weight.device)
        ranges = Ranges(layers)
        failure = failure or attempt(lambda: pass_over(layers, ranges))
        binnings, not_finite = learning.bin(ranges, len(kept), failure)
        tables = learning.new_tables(binnings)
        failure = attempt(tables.place_binnings) or attempt(lambda: pass_over(binnings, tables))
        learned = learning.learn(tables, binnings, failure)
    return Outcome(len(kept), len(binnings), learned, not_finite)
