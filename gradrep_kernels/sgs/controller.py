"""Spatial gradient scaling during training: when the scalings are learned, and from which batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradrep_kernels.messages import warn_outside
from gradrep_kernels.sgs.checks import check_choice, check_ints, check_objects, saved_state
from gradrep_kernels.sgs.copies import carried, carry, release
from gradrep_kernels.sgs.dependence import check_k
from gradrep_kernels.sgs.description import described, next_due, when_next
from gradrep_kernels.sgs.drawn import learn_from

# Models that were pickled before the hook moved name it `gradrep_kernels.sgs.controller._Watch`.
from gradrep_kernels.sgs.every_steps import ForwardWatch as _Watch  # noqa: F401
from gradrep_kernels.sgs.every_steps import TrainingUpdates
from gradrep_kernels.sgs.gathering import DEPENDENCES, Binning
from gradrep_kernels.sgs.gradient_hooks import GradientScaling, StepHooks, UpdateScaling, closure_of
from gradrep_kernels.sgs.history import History, ScalingUpdate
from gradrep_kernels.sgs.layers import find_layers, number_of_parameters
from gradrep_kernels.sgs.learning import Learning, Options, warn_forgotten, warn_not_finite
from gradrep_kernels.sgs.ranks import Ranks
from gradrep_kernels.wrappers import inner_optimizer, named_root, saved_name, unwrapped

logger = logging.getLogger(__name__)

# Controllers that were not removed. Hooks would scale once more what another controller scales.
_controllers: WeakSet[SpatialGradientScaling] = WeakSet()


def _option(name: str) -> property:
    """A public attribute that the parts of the controller read too, so that it may be changed between updates."""
    return property(
        lambda controller: getattr(controller._options, name),
        lambda controller, value: setattr(controller._options, name, value),
    )


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
        model:         may be wrapped (DistributedDataParallel, torch.compile, Fabric). Names are those of the model
                       inside
        optimizer:     torch.optim.Optimizer, or a wrapper with one in its `.optimizer` (Accelerate, Lightning). The
                       attribute `optimizer` is the one inside. Convolutions whose weight it does not hold are skipped
                       until it does. Two controllers may scale one weight if the optimizer has `set_spatial_scaling`:
                       the last update wins. Where hooks scale there can be only one
        k:             of the transform (Eq. 8), positive; 5 is the paper's
        every, warmup: an update is due at epoch `warmup` and after it at each epoch that `every` divides
        batches:       how many are drawn for an update, on each rank
        every_steps:   n: update from the training batches themselves, at every n-th step of the optimizer. See below
        remove_near:   the paper's ImageNet setting: pairs with a zero and pairs of equal bin numbers do not count
        dependence:    'nmi', or 'autocorrelation' (section 4.3): |Pearson's r| over the same pairs, in float64, with
                       the same k-transform (it has a pole at a negative r, hence the magnitude). Pairs of equal bin
                       numbers stay, for there are no bins. The last digits depend on the order of the batches
        apply_to:      'gradient' (Eq. 2), or 'update': scale the change that the step makes to the weight (the paper's
                       Adagrad*, appendix A.2)
        process_group: of torch.distributed, whose ranks pool ranges and counts. None: the default group, if there is
                       one. G is the same on every rank, to the bit, however the batches are dealt. Every rank must call
                       for an update at the same time. Numbers of batches may differ. Under FSDP2 (a parameter is a
                       DTensor) a rank with fewer batches takes part in the forwards of the others, and needs one

    Tied weights, and convolutions that are called more than once, pool all their maps. A convolution that is not called
    during an update keeps its G. So does one whose map is not finite (with a warning) or whose dependence is undefined.

    `history` has G after each update, thinned so that it stays small. `repr` tells how far the controller is.

    Copies (copy.deepcopy) and pickles: a controller that is copied together with its model and optimizer goes on with
    the copies. A copy of an optimizer that hooks scale keeps the scalings of that time, until a controller is made for
    it, which begins with them.

    `every_steps` departs from the paper. The maps are those of the training forward: in train mode, with the weights of
    that step. They are seen once, so bins lie where the ranges of the update before put them, and the first update only
    finds ranges.
    - `batches` and `every` mean nothing. `update_if_due`, if it is called, pauses the updates up to epoch `warmup`.
    - In torch.compile the hooks break the graph at each convolution.
    - Checkpointing (torch.utils.checkpoint) runs a convolution twice. Its map counts once. If one convolution is called
      both inside and outside a reentrant checkpoint, only the outside calls count.
    - A step that a GradScaler skips looks like one more forward before the next step. Its maps pool with those of that
      step. If they are not finite, the scalings stay as they were, with the warning. (Fused optimizers are called and
      skip by themselves. Such a step counts like any other.)

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range, or an optimizer that hooks would scale
            twice.
    """

    k = _option("k")
    remove_near = _option("remove_near")
    every_steps = _option("every_steps")

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
        check_objects(model, process_group)
        optimizer = inner_optimizer(optimizer)
        check_ints(
            every=(every, 1),
            warmup=(warmup, 0),
            batches=(batches, 1),
            every_steps=(1 if every_steps is None else every_steps, 1),
        )
        check_choice("dependence", dependence, tuple(DEPENDENCES))
        check_choice("apply_to", apply_to, ("gradient", "update"))
        self._scaler: GradientScaling | UpdateScaling | None = None
        if apply_to == "update" or not hasattr(optimizer, "set_spatial_scaling"):
            self._scaler = UpdateScaling() if apply_to == "update" else GradientScaling()
        if apply_to == "update" and getattr(optimizer, "ema_decay", None) is not None:
            raise ValueError(
                "apply_to='update' changes weights after the step, which has averaged them by then: use "
                "apply_to='gradient', or an optimizer without ema_decay"
            )
        self.optimizer = optimizer
        if self._is_scaled_by_another():
            raise ValueError("optimizer is scaled by another SpatialGradientScaling already; call its remove() first")
        self._options = Options(check_k(k), bool(remove_near), every_steps)
        self.every, self.warmup, self.batches = every, warmup, batches
        self.apply_to, self.dependence = apply_to, dependence
        self._model = unwrapped(model)
        self._layers, self._skipped = find_layers(named_root(self._model), optimizer)
        if not self._layers:
            warn_outside("SpatialGradientScaling found no convolution to scale; .skipped says why")
        self._ranks = Ranks(process_group)
        target = optimizer if self._scaler is None else self._scaler
        self._learning = Learning(self._layers, DEPENDENCES[dependence], self._options, self._ranks, target)
        self._training = TrainingUpdates(self._learning, self._options)
        self._watches = every_steps is not None  # for as long as the controller lives
        self._held = number_of_parameters(optimizer)  # when layers were last looked for
        self._informed = False  # whether scalings were learned or loaded, or their lack was told
        self._history = History()
        self._epoch: int | None = None  # that `update_if_due` was told last
        self._start()

    def _is_scaled_by_another(self) -> bool:
        """Whether another controller scales the optimizer, and one of the two by hooks."""
        others = [other for other in _controllers if other.optimizer is self.optimizer and other is not self]
        return any(other._scaler is not None or self._scaler is not None for other in others)

    def _start(self) -> None:
        """Set all hooks, in place of those that a copied optimizer brought, and go on with the scalings of those."""
        inherited = release(self.optimizer)
        if self._scaler is not None:
            carry(self.optimizer, self._scaler)
        self._handles = self._training.register(self._layers) if self._watches else []
        if self._scaler is not None or self._watches:
            self._handles += StepHooks(self._before_step, self._after_step).register(self.optimizer)
        _controllers.add(self)
        # A copied optimizer that scales by itself has the scalings too. `set` moves them to where they belong now.
        own = getattr(self.optimizer, "spatial_scaling", None)
        for layer in self._layers:
            g = None if own is None else own(layer.weight)
            if g is not None and self._scaler is not None:
                self.optimizer.set_spatial_scaling(layer.weight, None)
            if g is None and inherited is not None and inherited is not self._scaler:
                g = inherited.spatial_scaling(layer.weight)
            if g is not None:
                self._learning.set(layer, g.to("cpu", copy=True))
                self._informed = True

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": [], "_is_active": self in _controllers}

    def __setstate__(self, state: dict) -> None:
        """Restore a copy or a pickle.

        A pickle from before `Learning` had its options in attributes, and the layers held what was learned.
        """
        if "_learning" not in state:
            self._restore_attributes(state)
            return
        handles, is_active = state["_handles"], state.get("_is_active")
        state = {"_history": History(), "_epoch": None, **state}  # earlier versions kept neither
        self.__dict__.update({name: value for name, value in state.items() if name != "_is_active"}, _handles=[])
        if is_active is None:  # an earlier version's, which pickled its hooks
            is_active = bool(handles) or (self._scaler is None and self.every_steps is None)
            self._watches, self._held, self._informed = self.every_steps is not None, -1, True
            for layer in self._layers:
                layer.convs = {saved_name(name): conv for name, conv in layer.convs.items()}
        # A shallow copy shares everything, and its original has the hooks.
        is_shallow = any(other._learning is self._learning for other in _controllers)
        if is_active and not is_shallow and not self._is_scaled_by_another():
            self._start()

    def _restore_attributes(self, state: dict) -> None:
        names = ("k", "every", "warmup", "batches", "every_steps", "remove_near", "dependence", "apply_to")
        options = {name: state[name] for name in names}
        self.__init__(state["_model"], state["optimizer"], **options, process_group=state["_ranks"].group)
        saved = {saved_name(layer.name): vars(layer) for layer in state["_layers"]}
        for layer in self._layers:
            self._learning.set(layer, saved[layer.name]["g"])
        plans = {layer: saved[layer.name]["plan"] for layer in self._layers}
        binnings = {layer: Binning(plan.ranges, plan.n) for layer, plan in plans.items() if plan is not None}
        self._training.restore(state["_steps"], state["_paused"], binnings)
        self._informed = True

    @property
    def scalings(self) -> dict[str, Tensor]:
        """{module name: G float32 [kh, kw]}, copies on the CPU. Ones before the first update."""
        return {name: layer.scaling() for layer in self._layers for name in layer.convs}

    @property
    def history(self) -> list[ScalingUpdate]:
        """The scalings after each update that learned some, oldest first: (number, epoch, step, scalings), as copies.

        `epoch` is the one that `update_if_due` was told last, `step` that of an update by `every_steps`. Up to 127
        updates are all there. Of more it has the first, the last, and from 64 to 127 at equal distances between them.
        It is part of the state_dict.
        """
        names = [(name, layer) for layer in self._layers for name in layer.convs]
        return [
            entry._replace(scalings={name: layer.copy_of(entry.scalings.get(layer.name)) for name, layer in names})
            for entry in self._history.entries()
        ]

    @property
    def skipped(self) -> dict[str, str]:
        """{module name: why this nn.Conv2d is not scaled}."""
        return dict(self._skipped)

    def state_dict(self) -> dict:
        """Return the scalings and, for `every_steps`, the steps taken and the ranges for the next update.

        It loads with weights_only=True.
        """
        return {
            "scalings": self.scalings,
            "steps": self._training.steps,
            "paused": self._training.paused,
            "ranges": {layer.name: (b.ranges.clone(), b.n.clone()) for layer, b in self._training.binnings.items()},
            "history": self._history.state(),
            "epoch": self._epoch,
        }

    def load_state_dict(self, state_dict: Mapping) -> None:
        """Restore what `state_dict()` gave, and tell the optimizer.

        Names may have the prefixes of wrappers (`_orig_mod.`, `_forward_module.`), as earlier versions saved them.

        Raises:
            ValueError: anything else: names, shapes or dtypes that do not fit this model, scalings that are negative or
                not finite. Nothing is changed then.
        """
        self._look_again()
        saved = saved_state(state_dict, self.scalings, self._layers)
        for layer in self._layers:
            g = saved.scalings[layer.name].detach().to("cpu", torch.float32, copy=True)
            self._learning.set(layer, None if bool((g == 1).all()) else g)
        self._training.restore(saved.steps, saved.paused, saved.binnings)
        self._history, self._epoch = saved.history, saved.epoch
        self._informed = True

    def remove(self) -> None:
        """Take all hooks off, leave the optimizer unscaled, and let go of what was gathered for the next update."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._scaler is not None and carried(self.optimizer) is self._scaler:
            release(self.optimizer)
        for layer in self._layers:
            self._learning.set(layer, None)
        self._training.forget()
        _controllers.discard(self)

    def update_if_due(self, epoch: int, loader: Iterable, forward: Callable | None = None) -> bool:
        """Call `update(loader)` if it is due before the training of `epoch`, and return whether it was.

        Epochs count from 0. An update is due at `warmup` and after it where `every` divides the epoch. With
        `every_steps` none ever is, but the updates of the steps pause while epoch < warmup.

        Warns once where a resumed run seems to have forgotten `load_state_dict`.
        """
        self._look_again()
        self._epoch = int(epoch)
        if self.every_steps is not None:
            self._training.paused = epoch < self.warmup
            if self._training.steps == 0 and self.optimizer.state:
                self._warn_if_forgotten(epoch, "the updates of its steps")
            return False
        if epoch != next_due(epoch - 1, self.every, self.warmup):
            if self.optimizer.state:
                self._warn_if_forgotten(epoch, f"epoch {next_due(epoch, self.every, self.warmup)}")
            return False
        self.update(loader, forward)
        return True

    def _warn_if_forgotten(self, epoch: int, until: str) -> None:
        if epoch > self.warmup and self._layers and not self._informed:
            self._informed = True
            warn_forgotten(epoch, self.warmup, until)

    def _look_again(self) -> None:
        """Add the convolutions whose weights have joined the optimizer."""
        self._held = number_of_parameters(self.optimizer)
        seen = {conv for layer in self._layers for conv in layer.convs.values()}
        layers, self._skipped = find_layers(named_root(self._model), self.optimizer, self._layers)
        self._layers[:] = layers  # `Learning` has the same list
        if self._watches and self._handles:
            self._handles += self._training.register(layers, seen)

    def update(self, batches: Iterable, forward: Callable[..., object] | None = None) -> None:
        """Learn G from up to `self.batches` batches, drawn once, in two passes without autograd in eval mode.

        Args:
            batches: iterable (a DataLoader). A Tensor goes to model(b), a tuple or list to model(b[0]), a dict to
                     model(**b), copied to the device of the parameters. Maps get the dtype of the model's first
                     convolution, unless one of its convolutions has theirs, or autocast is on
            forward: forward(model, batch) instead, with the model free of its wrappers and the whole batch copied
                     there, in the dtype that it has

        One map is alive at a time: hooks take its statistics and let it go. The passes run under the caller's autocast,
        and a map is what the convolution is given, before it casts it. Modes, buffers, hooks and random states (of
        torch, numpy, Python, and the generators of the loader and its samplers) are afterwards as before, also if a
        pass raises. Both passes begin with the same buffers and random states.

        Warns where there are fewer batches than asked for, and with the names of layers whose map is not finite.

        Raises:
            ValueError:   no batch at all, on any rank. Under FSDP2: none on one of the ranks.
            TypeError:    a batch of another kind, or an integer one that the model does not take, and no `forward`.
            RuntimeError: the update failed on another rank.
        """
        self._look_again()
        if not self._layers:
            self._informed = True  # nothing was forgotten: layers may join later
            return
        start, self._ranks.bytes = time.perf_counter(), 0
        self._training.forget()
        outcome = learn_from(batches, self.batches, forward, self._model, self._learning, self._options)
        self._informed = True
        if outcome.learned:
            self._remember(None)
        if outcome.drawn < self.batches:
            warn_outside(f"asked for {self.batches} batches, there were {outcome.drawn}")
        warn_not_finite(outcome.not_finite)
        counts = outcome.counted, len(self._layers), outcome.drawn, time.perf_counter() - start, self._ranks.bytes
        logger.debug("counted for %d of %d layers over %d batches in %.3f s, %d bytes to other ranks", *counts)

    def __repr__(self) -> str:
        try:
            steps = None if self.every_steps is None or self._training.paused else self._training.steps
            when = when_next(self._epoch, self.every, self.warmup, steps, self.every_steps, self._history.updates)
            when = when if self in _controllers else "removed"
            return f"{type(self).__name__}({described(self._layers, self._skipped, self._history.updates, when)})"
        except Exception:  # a traceback of the constructor shows one that has not all attributes yet
            return f"{type(self).__name__}(not whole)"

    def _remember(self, step: int | None) -> None:
        self._history.add(self._epoch, step, {layer.name: layer.g for layer in self._layers if layer.g is not None})

    def _learn_in_step(self) -> None:
        learned, not_finite_layers = self._training.learn()
        if learned:
            self._remember(self._training.steps + 1)
        warn_not_finite(not_finite_layers)

    def _before_step(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._training.due and closure_of(args, kwargs) is None:
            self._learn_in_step()
        return None if self._scaler is None else self._scaler.before_step(args, kwargs)

    def _after_step(self, args: tuple, kwargs: dict) -> None:
        if self._scaler is not None:
            self._scaler.after_step(args, kwargs)
        if self._training.due and closure_of(args, kwargs) is not None:  # its forward ran inside the step
            self._learn_in_step()
        if self.every_steps is not None:
            self._training.steps += 1
        if self._watches and number_of_parameters(self.optimizer) != self._held:
            self._look_again()
