"""Updates from the training batches themselves, at every n-th step of the optimizer."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gradrep_kernels.sgs.gathering import Binning, Ranges, gather_map
from gradrep_kernels.sgs.layers import Layer
from gradrep_kernels.sgs.learning import Learning, Options


class ForwardWatch:
    """Forward pre-hook of a convolution for `every_steps`.

    Copies and pickles of the model carry an idle one: a copy, such as an average of the weights, must not bring a
    second optimizer with it.
    """

    def __init__(self, updates: TrainingUpdates | None, layer: Layer | None):
        self.updates, self.layer = updates, layer

    def __call__(self, conv: nn.Conv2d, args: tuple, kwargs: dict | None = None) -> None:
        # torch.ao moves hooks to the modules that it puts in, and forgets that they want keyword arguments.
        if self.updates is not None:
            self.updates.watch(self.layer, conv, args, kwargs or {})

    def __reduce__(self):  # copy.deepcopy uses it too
        return ForwardWatch, (None, None)


def _remove_idle(conv: nn.Conv2d) -> None:
    hooks, with_kwargs = (vars(conv)[name] for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"))
    for key in [key for key, hook in hooks.items() if isinstance(hook, ForwardWatch) and hook.updates is None]:
        del hooks[key]
        with_kwargs.pop(key, None)


class TrainingUpdates:
    """Gathers from the forwards of each due step, and learns from them in that step.

    Maps are seen once, so their bins lie within the ranges of the update before.
    """

    def __init__(self, learning: Learning, options: Options):
        self._learning, self._options = learning, options
        self.steps = 0  # of the optimizer
        self.paused = False
        self.binnings: dict[Layer, Binning] = {}  # for the next update
        self.forget()

    def register(self, layers: Iterable[Layer], seen: Container[nn.Conv2d] = ()) -> list[RemovableHandle]:
        """Watch the forwards of the convolutions of `layers`, except for those `seen`.

        Idle hooks that a copy or a pickle brought go.
        """
        handles = []
        for layer in layers:
            for conv in layer.convs.values():
                if conv not in seen:
                    _remove_idle(conv)
                    handles.append(conv.register_forward_pre_hook(ForwardWatch(self, layer), with_kwargs=True))
        return handles

    @property
    def due(self) -> bool:
        """Whether the step that is under way, or whose forward is, is one of the n-th. Without layers none is."""
        every = self._options.every_steps
        if every is None or self.paused or not self._learning.layers:
            return False
        return (self.steps + 1) % every == 0

    def watch(self, layer: Layer, conv: nn.Conv2d, args: tuple, kwargs: dict) -> None:
        """Gather from one call of a convolution, if it is part of the training forward of a due step."""
        if self.due and conv.training and torch.is_grad_enabled():
            if torch._C._current_graph_task_id() == -1:
                self._called.add(conv)
            elif conv in self._called:  # backward recomputes a checkpoint, whose forward has been seen
                return
            with torch.no_grad():
                gather_map((self._ranges, self._tables), self._options.remove_near, layer, conv, args, kwargs)

    def learn(self) -> tuple[bool, list[Layer]]:
        """Learn from what was gathered. Returns whether a G was, and the layers whose maps are not finite."""
        ranges, tables = self._ranges, self._tables
        self.forget()
        with torch.no_grad():
            binnings, not_finite_layers = self._learning.bin(ranges, drawn=1)
            learned = self._learning.learn(tables, binnings)
        self.binnings.update(binnings)
        self._tables.place_binnings()  # now, so that no forward has to
        return learned, not_finite_layers

    def restore(self, steps: int, paused: bool, binnings: dict[Layer, Binning]) -> None:
        self.steps, self.paused, self.binnings = steps, paused, binnings
        self.forget()
        self._tables.place_binnings()

    def forget(self) -> None:
        """Drop what was gathered since the last update."""
        self._ranges, self._tables = Ranges(self._learning.layers), self._learning.new_tables(self.binnings)
        self._called: set[nn.Conv2d] = set()  # in forwards
