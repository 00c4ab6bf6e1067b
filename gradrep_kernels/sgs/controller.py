"""Spatial gradient scaling during training: when the scalings are learned, from which batches, on how many ranks."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from types import FrameType
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradrep_kernels.sgs.dependence import check_k, normalize, not_finite, spatial_dependence
from gradrep_kernels.sgs.gradient_hooks import GradientScaling, UpdateScaling, closure_of
from gradrep_kernels.sgs.layers import (
    DEPENDENCES,
    Layer,
    Plan,
    find_layers,
    gather_ranges,
    gather_table,
    named_root,
    unwrapped,
)
from gradrep_kernels.sgs.passes import run, undisturbed
from gradrep_kernels.sgs.ranks import Ranks, on_host

logger = logging.getLogger(__name__)

_controllers: WeakSet[SpatialGradientScaling] = (
    WeakSet()
)  # that were not removed: hooks scale again what another one scales


class SpatialGradientScaling:
    """Learns a spatial gradient scaling G for each k x k convolution and has the optimizer use it.

    Source: Detkov et al., "Reparameterization through Spatial Gradient Scaling", sections 3.1, 3.3, 4 and Algorithm 1.

        sgs = SpatialGradientScaling(model, optimizer)
        for epoch in range(epochs):
            sgs.update_if_due(epoch, train_loader)
            train_one_epoch(...)

    An optimizer with `set_spatial_scaling(param, G | None)` is told each G and does the rest. With any other torch
    optimizer, step hooks put a scaled copy into `.grad` for the time of the step and the caller's tensor back after it.

    Args:
        model:         may be wrapped (DistributedDataParallel, torch.compile); names are those of the model inside
        optimizer:     torch.optim.Optimizer; convolutions whose weight it does not hold are skipped. Of two controllers of
                       one weight in an optimizer with `set_spatial_scaling` the last update wins; where hooks scale there
                       can be only one
        k:             of the transform (Eq. 8); positive, 5 is the paper's
        every, warmup: an update is due at epoch `warmup` and after it at each epoch that `every` divides
        batches:       drawn for an update, on each rank
        every_steps:   update from the training batches themselves, at every n-th step of the optimizer. A departure from
                       the paper: the maps are those of the training forward (train mode, the weights of that step), seen
                       once, so bins lie where the ranges of the update before put them, and the first one only finds
                       ranges. `batches` and `every` then mean nothing, and `update_if_due`, if it is called, pauses the
                       updates up to epoch `warmup`. In torch.compile the hooks break the graph at each convolution. What
                       torch.utils.checkpoint recomputes is counted once; but of a convolution that is called within a
                       reentrant checkpoint and outside of it, only the calls outside count.
                       A step that a GradScaler skips looks like one more forward before the next step: its maps pool with
                       that one's, and if they are not finite, the scalings stay as they were, with the warning. (Where the
                       optimizer itself is called and skips, as fused ones are, the step is counted like any other.)
        remove_near:   the paper's ImageNet setting: pairs with a zero and pairs of equal bin numbers do not count
        dependence:    'nmi', or 'autocorrelation' (section 4.3): |Pearson's r| over the same pairs, in float64, with the
                       same k-transform (it has a pole at a negative r, hence the magnitude). Pairs of equal bin numbers
                       stay, for there are no bins. The last digits depend on the order of the batches.
        apply_to:      'gradient' (Eq. 2), or 'update': scale the change that the step makes to the weight (the paper's
                       Adagrad*, appendix A.2)
        process_group: of torch.distributed, whose ranks pool ranges and counts; None: the default group, if there is one.
                       G is the same on every rank, to the bit, however the batches are dealt. Every rank must call for
                       an update at the same time; numbers of batches may differ.

    Tied weights, and convolutions that are called more than once, pool all their maps. A convolution that is not called
    during an update keeps its G; so does one whose map is not finite (with a warning) or whose dependence is undefined.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range; an optimizer that hooks would scale twice.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        k: float = 5.0,
        every: int = 5,
        warmup: int = 1,
        batches: int = 2,
        every_steps: int | None = None,
        remove_near: bool = False,
        dependence: str = "nmi",
        apply_to: str = "gradient",
        process_group: dist.ProcessGroup | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
            raise TypeError(
                f"process_group must be a torch.distributed.ProcessGroup or None, got {type(process_group).__name__}"
            )
        for name, value, least in (
            ("every", every, 1),
            ("warmup", warmup, 0),
            ("batches", batches, 1),
            ("every_steps", every_steps, 1),
        ):
            if not _is_int(value, least) and not (name == "every_steps" and value is None):
                raise ValueError(f"{name} must be an int, {least} or more, got {value!r}")
        for name, value, choices in (
            ("dependence", dependence, tuple(DEPENDENCES)),
            ("apply_to", apply_to, ("gradient", "update")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        by_hooks = apply_to == "update" or not hasattr(optimizer, "set_spatial_scaling")
        if any(other.optimizer is optimizer and (by_hooks or other._scaler is not None) for other in _controllers):
            raise ValueError("optimizer is scaled by another SpatialGradientScaling already; call its remove() first")
        self.k = check_k(k)
        self.every, self.warmup, self.batches, self.every_steps = every, warmup, batches, every_steps
        self.remove_near, self.apply_to, self.dependence = bool(remove_near), apply_to, dependence
        self.optimizer = optimizer
        self._dependence = DEPENDENCES[dependence]
        self._model = unwrapped(model)
        self._layers, self._skipped = find_layers(named_root(model), optimizer)
        if not self._layers:
            _warn("SpatialGradientScaling found no convolution to scale; .skipped says why")
        self._ranks = Ranks(process_group)
        self._steps = 0  # of the optimizer, counted with every_steps only
        self._paused = False
        self._seen: set[nn.Conv2d] = set()  # in forwards since the last update, with every_steps only
        self._step_frame: FrameType | None = None  # of the optimizer's step that is under way, or that raised
        self._steps_inside = 0
        self._scaler: GradientScaling | UpdateScaling | None = None
        if by_hooks:
            self._scaler = UpdateScaling() if apply_to == "update" else GradientScaling()
        self._handles = []
        if every_steps is not None:
            for layer in self._layers:
                for conv in layer.convs.values():
                    self._handles.append(conv.register_forward_pre_hook(_Watch(self, layer), with_kwargs=True))
        if by_hooks or every_steps is not None:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        _controllers.add(self)

    # -- what it knows

    @property
    def scalings(self) -> dict[str, Tensor]:
        """{module name: G float32 [kh, kw]}, copies on the CPU; ones before the first update."""
        return {name: layer.scaling() for layer in self._layers for name in layer.convs}

    @property
    def skipped(self) -> dict[str, str]:
        """{module name: why this nn.Conv2d is not scaled}"""
        return dict(self._skipped)

    def state_dict(self) -> dict:
        """Scalings and, for `every_steps`, the steps taken and the ranges for the next update. Loads with weights_only=True."""
        planned = [layer for layer in self._layers if layer.plan is not None]
        return {
            "scalings": self.scalings,
            "steps": self._steps,
            "paused": self._paused,
            "ranges": {layer.name: (layer.plan.ranges.clone(), layer.plan.n.clone()) for layer in planned},
        }

    def load_state_dict(self, state_dict: Mapping) -> None:
        """Restore what `state_dict()` gave, and tell the optimizer.

        Raises:
            ValueError: anything else: names, shapes or dtypes that do not fit this model, scalings that are negative or not
                finite. Nothing is changed then.
        """
        if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("scalings"), Mapping):
            raise ValueError("state_dict must be what state_dict() gave: it has no 'scalings'")
        saved, live = state_dict["scalings"], self.scalings
        for what, names in (("missing", live.keys() - saved.keys()), ("unexpected", saved.keys() - live.keys())):
            if names:
                raise ValueError(f"scalings do not fit the model: {what} {_first_few(names)}")
        for name, g in saved.items():
            _check_tensor(f"scalings: {name}", g, live[name].shape, torch.is_floating_point, "floating point")
            if not bool(torch.isfinite(g).all() and (g >= 0).all()):
                raise ValueError(f"scalings: {name} must be finite and not negative, got {g.tolist()}")
        plans = self._plans_of(state_dict.get("ranges", {}))
        steps, paused = state_dict.get("steps", 0), state_dict.get("paused", False)
        if not _is_int(steps, 0) or not isinstance(paused, bool):
            raise ValueError(f"steps must be an int, 0 or more, and paused a bool, got {steps!r} and {paused!r}")
        self._steps, self._paused = steps, paused
        for layer in self._layers:
            g = saved[layer.name].detach().to("cpu", torch.float32, copy=True)
            self._set(layer, None if bool((g == 1).all()) else g)
            layer.plan = plans.get(layer.name)
        self._forget()

    def _plans_of(self, ranges: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Plan]:
        """The plans that `state_dict()` wrote as (ranges, n), copied; by name."""
        if not isinstance(ranges, Mapping):
            raise ValueError(f"ranges must be a dict by layer, got {type(ranges).__name__}")
        layers, plans = {layer.name: layer for layer in self._layers}, {}
        if ranges.keys() - layers.keys():
            raise ValueError(f"ranges do not fit the model: unexpected {_first_few(ranges.keys() - layers.keys())}")
        for name, parts in ranges.items():
            if not isinstance(parts, (tuple, list)) or len(parts) != 2:
                raise ValueError(f"ranges: {name} must be a pair (ranges, n), got {type(parts).__name__}")
            shape = layers[name].statistics_shape
            _check_tensor(f"ranges: {name}", parts[0], (*shape, 2, 2), torch.is_floating_point, "floating point")
            _check_tensor(f"ranges: n of {name}", parts[1], shape, lambda n: n.dtype == torch.int64, "int64")
            if (parts[1] < 0).any():
                raise ValueError(f"ranges: n of {name} must not be negative")
            plans[name] = Plan(*(part.detach().to("cpu", copy=True) for part in parts))
        return plans

    def remove(self) -> None:
        """Take all hooks off, leave the optimizer unscaled, and let go of what was gathered for the next update."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            self._set(layer, None)
        self._forget()
        _controllers.discard(self)

    # -- updates from batches of a loader, in two passes

    def update_if_due(self, epoch: int, loader: Iterable, forward: Callable | None = None) -> bool:
        """`update(loader)` if it is due before the training of `epoch` (from 0): at `warmup`, then where `every` divides it.

        Returns whether it updated. With `every_steps` it never does, but pauses those updates while epoch < warmup.
        """
        if self.every_steps is not None:
            self._paused = epoch < self.warmup
            return False
        if epoch != self.warmup and (epoch < self.warmup or epoch % self.every != 0):
            return False
        self.update(loader, forward)
        return True

    def update(self, batches: Iterable, forward: Callable[[nn.Module, object], object] | None = None) -> None:
        """Learn G from up to `self.batches` batches, drawn once, in two passes without autograd in eval mode.

        Args:
            batches: iterable (a DataLoader). A Tensor goes to model(b), a tuple or list to model(b[0]), a dict to
                     model(**b), copied to the device of the parameters
            forward: forward(model, batch) instead, with the model free of its wrappers and the whole batch copied there

        One map is alive at a time: hooks take its statistics and let it go. The passes run under the caller's autocast, and
        a map is what the convolution is given, before it casts it. Modes, buffers, hooks and random states (of torch, numpy,
        Python, and the generators of the loader and its samplers) are afterwards as before, also if a pass raises.

        Warns where there are fewer batches than asked for, and with the names of layers whose map is not finite.

        Raises:
            ValueError:   no batch at all, on any rank.
            TypeError:    a batch of another kind, and no `forward`.
            RuntimeError: the update failed on another rank.
        """
        if not self._layers:
            return
        start, self._ranks.bytes = time.perf_counter(), 0
        kept: list = []

        def draw() -> None:
            for batch in islice(batches, self.batches):
                kept.append(batch[0] if forward is None and isinstance(batch, (tuple, list)) else batch)

        def pass_over(gather: Callable, layers: Iterable[Layer]) -> None:
            hooks = [(conv, partial(gather, layer)) for layer in layers for conv in layer.convs.values()]
            run(self._model, kept, forward, hooks)

        self._forget()
        try:
            with undisturbed(self._model, batches):
                failure = _attempt(draw) or _attempt(lambda: pass_over(self._gather_ranges, self._layers))
                plans, bad = self._pool_ranges(len(kept), failure)
                failure = _attempt(
                    lambda: pass_over(lambda layer, *call: self._gather_table(layer, plans[layer], *call), plans)
                )
                self._learn(plans, _most_pairs(plans), failure)
        finally:
            self._forget()
        if len(kept) < self.batches:
            _warn(f"asked for {self.batches} batches, there were {len(kept)}")
        _warn_not_finite(bad)
        counts = len(plans), len(self._layers), len(kept), time.perf_counter() - start, self._ranks.bytes
        logger.debug("counted for %d of %d layers over %d batches in %.3f s, %d bytes to other ranks", *counts)

    # -- updates from the training batches, in one

    @property
    def _due_now(self) -> bool:
        """Whether the step that is under way, or whose forward is, is one of the n-th."""
        return self.every_steps is not None and not self._paused and (self._steps + 1) % self.every_steps == 0

    def _watch(self, layer: Layer, conv: nn.Conv2d, args: tuple, kwargs: dict) -> None:
        if self._due_now and conv.training and torch.is_grad_enabled():
            if torch._C._current_graph_task_id() == -1:
                self._seen.add(conv)
            elif conv in self._seen:  # a checkpoint recomputes in backward what the forward showed
                return
            with torch.no_grad():
                self._gather_ranges(layer, conv, args, kwargs)
                if layer.plan is not None:
                    self._gather_table(layer, layer.plan, conv, args, kwargs)

    def _learn_from_training(self) -> None:
        with torch.no_grad():
            plans, bad = self._pool_ranges(1, None)
            self._learn({layer: layer.plan for layer in plans if layer.plan is not None}, _most_pairs(plans), None)
        for layer, plan in plans.items():
            layer.plan = plan
        _warn_not_finite(bad)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if _is_running(self._step_frame):
            self._steps_inside += 1
            return None
        self._step_frame, self._steps_inside = sys._getframe(1), 0
        if self._due_now and closure_of(args, kwargs) is None:
            self._learn_from_training()
        return None if self._scaler is None else self._scaler.before_step(args, kwargs)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._steps_inside > 0:
            self._steps_inside -= 1
            return
        self._step_frame = None
        if self._scaler is not None:
            self._scaler.after_step()
        if self._due_now and closure_of(args, kwargs) is not None:  # its forward ran inside the step
            self._learn_from_training()
        if self.every_steps is not None:
            self._steps += 1

    # -- from maps to G

    def _gather_ranges(self, layer: Layer, conv: nn.Conv2d, args: tuple, kwargs: dict) -> None:
        gather_ranges(layer, conv, args, kwargs, self.remove_near)

    def _gather_table(self, layer: Layer, plan: Plan, conv: nn.Conv2d, args: tuple, kwargs: dict) -> None:
        gather_table(layer, conv, args, kwargs, self.remove_near, plan, self._dependence)

    def _pool_ranges(self, drawn: int, failure: Exception | None) -> tuple[dict[Layer, Plan], list[Layer]]:
        """Plans of the layers with something to bin, and the layers whose maps are not finite; the same on every rank."""
        home = self._layers[0].weight.device
        n, bad, ends = [], [], []
        for layer in self._layers:
            if layer.n is None:  # not called on this rank
                layer.n = torch.zeros(layer.statistics_shape, dtype=torch.int64, device=home)
                layer.ranges = torch.tensor([torch.inf, -torch.inf], device=home).expand(*layer.statistics_shape, 2, 2)
            n.append(layer.n)
            bad.append(not_finite(layer.ranges, layer.n).long())
            ends.append(
                torch.stack((layer.ranges[..., 0], -layer.ranges[..., 1]), dim=-1).double()
            )  # one minimum for both ends
        status = torch.tensor([drawn, failure is not None], device=home)
        *sums, status = on_host(self._ranks.reduce([*n, *bad, status], "sum", home))
        total_drawn, failures = status.tolist()
        _raise_together(failure, failures)
        if total_drawn == 0:
            raise ValueError("batches is empty: an update needs at least one")
        ends = on_host(self._ranks.reduce(ends, "min", home))
        plans, not_finite_layers = {}, []
        for layer, layer_n, layer_bad, lows in zip(self._layers, sums, sums[len(n) :], ends):
            if layer_bad:
                not_finite_layers.append(layer)
            elif (layer_n > 0).any():
                plans[layer] = Plan(torch.stack((lows[..., 0], -lows[..., 1]), dim=-1), layer_n)
        return plans, not_finite_layers

    def _learn(self, plans: dict[Layer, Plan], most_pairs: int, failure: Exception | None) -> None:
        """Pool the tables of the planned layers, forget what was gathered, and set each G that is defined."""
        home = self._layers[0].weight.device
        what = self._dependence
        tables = [
            torch.zeros(what.shape(plan), dtype=what.dtype, device=home) if layer.table is None else layer.table
            for layer, plan in plans.items()
        ]
        self._forget()
        failed = torch.tensor([failure is not None], device=home).to(what.dtype)
        *tables, failures = self._ranks.reduce([*tables, failed], "sum", home, most_pairs)
        _raise_together(failure, int(failures))
        for layer, dependence in zip(plans, self._evaluate(tables)):
            s = spatial_dependence(dependence, layer.kernel_size, self.k, self.remove_near)
            if s is not None:
                self._set(layer, normalize(s))

    def _evaluate(self, tables: list[Tensor]) -> list[Tensor]:
        """The dependence [C, D] of each table, on the CPU. Tables of one size are computed together, which saves calls, but on
        the CPU large ones are not: their temporaries would leave the cache (VGG-16: 1.8 to 2.2 times as slow)."""
        groups: dict[tuple, list[int]] = {}
        for i, table in enumerate(tables):
            alone = table.is_cpu and table.numel() > 2**16
            groups.setdefault((i if alone else table.device, table.shape[2:]), []).append(i)
        parts = [[tables[i].flatten(0, 1) for i in group] for group in groups.values()]
        values = on_host([self._dependence.evaluate(torch.cat(part) if len(part) > 1 else part[0]) for part in parts])
        found = {}
        for group, together in zip(groups.values(), values):
            for i, part in zip(group, together.split([tables[i].shape[:2].numel() for i in group])):
                found[i] = part.view(tables[i].shape[:2])
        return [found[i] for i in range(len(tables))]

    def _forget(self) -> None:
        for layer in self._layers:
            layer.ranges = layer.n = layer.table = None
        self._seen.clear()

    def _set(self, layer: Layer, g: Tensor | None) -> None:
        layer.g = g
        here = None if g is None else g.to(layer.weight.device)
        if self._scaler is None:
            self.optimizer.set_spatial_scaling(layer.weight, here)
        elif g is None:
            self._scaler.scalings.pop(layer.weight, None)
        else:
            self._scaler.scalings[layer.weight] = here


class _Watch:
    """Forward pre-hook of a convolution for `every_steps`; copies and pickles of the model carry an idle one."""

    def __init__(self, controller: SpatialGradientScaling | None, layer: Layer | None):
        self.controller, self.layer = controller, layer

    def __call__(self, conv: nn.Conv2d, args: tuple, kwargs: dict) -> None:
        if self.controller is not None:
            self.controller._watch(self.layer, conv, args, kwargs)

    def __reduce__(self):  # for deepcopy too: an averaged model must not bring a second optimizer with it
        return _Watch, (None, None)


def _is_running(frame: FrameType | None) -> bool:
    """Whether the call of `frame` has not ended. An optimizer whose step calls super().step() runs its hooks within its hooks
    (torch hooks each class); after a step that raised, the next one looks the same but for the stack."""
    caller = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return frame is not None and caller is frame


def _most_pairs(plans: dict[Layer, Plan]) -> int:
    return max((int(plan.n.max()) for plan in plans.values()), default=0)


def _attempt(what: Callable[[], None]) -> Exception | None:
    """What `what` raises: the other ranks wait in the next reduction, and must hear of it first."""
    try:
        what()
    except Exception as failure:
        return failure
    return None


def _raise_together(failure: Exception | None, failures: int) -> None:
    if failure is not None:
        raise failure
    if failures:
        raise RuntimeError(f"the update of the spatial gradient scalings failed on {failures} other rank(s)")


def _warn_not_finite(layers: list[Layer]) -> None:
    if layers:
        names = ", ".join(name for layer in layers for name in layer.convs)
        _warn(f"the input of {names} is not finite; the scaling stays as it was", RuntimeWarning)


def _warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Points to the caller's line, which lies above this module and above torch, where the hooks of a step are called."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and (
        frame.f_globals is globals() or frame.f_globals.get("__name__", "").split(".")[0] == "torch"
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_tensor(name: str, value: object, shape: tuple[int, ...], fits: Callable[[Tensor], bool], dtype: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a Tensor, got {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}")
    if not fits(value):
        raise ValueError(f"{name} must be {dtype}, got {value.dtype}")


def _first_few(names: Iterable[str]) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
