"""DyRep: a plain network grows branches while it trains, and loses those that do little.

Source: DyRep (Huang et al., 2022), and its published code (hunto/image_classification_sota) for what the paper leaves
open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradrep_kernels.branches.grown import ORDER, OWN, DynamicBranches, kinds_for
from gradrep_kernels.branches.sites import Where, conv_sites, is_kxk
from gradrep_kernels.messages import first_few
from gradrep_kernels.wrappers import inner_optimizer, unwrapped

__all__ = ["DynamicReparameterization", "StructureChange"]

Forward = Callable[[nn.Module, Any], Any]
_INSIDE = ".branches."  # between the name of a block and that of its branch
_DEEPEST = 2  # blocks within blocks, as the published code limits them

_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "synflow": lambda weight, grad: (weight * grad).sum(dtype=torch.float64),
    "snip": lambda weight, grad: (weight * grad).abs().sum(dtype=torch.float64),
    "grad_norm": lambda weight, grad: grad.double().norm(),
}


class StructureChange(NamedTuple):
    """A convolution that got branches, or a block that lost some. `epoch` is None for `update`."""

    epoch: int | None
    name: str
    grown: tuple[str, ...]
    cut: tuple[str, ...]


class DynamicReparameterization:
    """DyRep beside an optimizer: convolutions grow branches, and blocks lose branches, while the network trains.

    `update_if_due` before each epoch does both. Neither changes what the network computes in eval mode, beyond
    rounding. `csla.merge(model)` gives the plain network at any moment.

    - Growing (Rep): the convolution with the highest mean score since the last update gets the branches of DBB and
      ACNet: 1 x 1, 1 x 1 before k x k, 1 x 1 before an average, 1 x k, k x 1, and a norm alone where it has a shortcut.
      One that is padded otherwise than 'same' gets the sequences alone. Its own kernel is reduced by theirs. The
      convolutions k x k of a block can grow once more.
    - Cutting (Dep): the loudness of a branch is the mean size of the scales of its last norm over that of the k x k
      branch. Where the loudnesses of a block spread by more than `spread` (standard deviation), those below their mean
      and below `least` are cut, and their kernels go into the k x k kernel. A block that has lost all is a convolution
      with a bias.

    Scores are taken at each step of the optimizer from the gradient of a kernel w: Σ w ⊙ grad ("synflow", the published
    choice), Σ |w ⊙ grad| ("snip") or the norm of grad ("grad_norm"). Note: in front of a batch norm the loss does not
    depend on the size of w, so the first is 0 but for the norm's eps and for rounding. Then its choice is almost
    random.

    Parameters that come and go do so in the optimizer too, in the groups that `groups` says. States (momentum) of those
    that left, and of kernels that were rewritten, are dropped.

    Departures from the published code. The norm of the k x k branch starts with the statistics of a batch, and undoes
    them; there it starts with mean 0 and variance 1, so that the network jumps in train mode. Statistics are those of
    one batch, there of 20. New branches start at `size` times the spread of the convolution's output, there at `size`
    beside a k x k branch of 1. The momentum of a kernel that a cut rewrites is dropped, there kept. Updates come before
    an epoch, there after the one before it.

    Where several ranks train, all update before the same epochs. New weights are those of rank 0, which
    DistributedDataParallel sends to all when it wraps the model again.

    Args:
        model:     the plain network, not wrapped: wrap it again after an update that returns True.
        optimizer: trains its parameters.
        groups:    the function that made the optimizer's groups, as `lambda model: gr.param_groups(model, 1e-4)`. Only
            the parameters and their names are taken from what it returns.
        every:     epochs between updates. Published: 15 of 600 on CIFAR, 5 of 120 on ImageNet.
        until:     the last epoch before which there is an update, None for no end. Published: 500, 100.
        score:     "synflow", "snip" or "grad_norm".
        size, least, spread: see above. Published: 0.01, 0.1, 0.02.
        seed:      of the weights of new branches. The default generators are left alone.
        where:     which convolutions may grow, as in `csla.hyper_search_model`. None: those that it converts.

    Raises:
        TypeError: for what is no model or optimizer.
        ValueError: for a wrapped model, arguments out of range, groups that are not the optimizer's, and a model
            without a convolution that can grow.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        groups: Callable[[nn.Module], Sequence[Mapping[str, Any]]],
        *,
        every: int = 15,
        until: int | None = None,
        score: str = "synflow",
        size: float = 0.01,
        least: float = 0.1,
        spread: float = 0.02,
        seed: int = 0,
        where: Where | None = None,
    ):
        if unwrapped(model) is not model:
            raise ValueError(
                f"model must be the network itself, got it inside a {type(model).__name__}: pass what is inside, and "
                "wrap it again after each update that returns True"
            )
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if score not in _SCORES:
            raise ValueError(f"score must be one of {', '.join(_SCORES)}, got {score!r}")
        for name, value in {"size": size, "least": least, "spread": spread}.items():
            if not 0 <= value < math.inf or (name == "size" and value == 0):
                raise ValueError(
                    f"{name} must be a number {'above' if name == 'size' else 'of at least'} 0, got {value}"
                )
        self.model, self.optimizer, self.every, self.until = model, inner_optimizer(optimizer), every, until
        self.score, self.size, self.least, self.spread = score, size, least, spread
        self._groups = groups
        self._check_groups()
        self._names = [site.name for site in conv_sites(model, where) if is_kxk(site.conv.kernel_size)]
        if not self._names:
            raise ValueError("model has no convolution that could grow: needed are odd kernels above 1 both ways")
        self._generator = torch.Generator().manual_seed(seed)
        self._history: list[StructureChange] = []
        self._sums: dict[str, Tensor] = {}
        self._steps, self._records = 0, True
        self._handle = self.optimizer.register_step_pre_hook(self._record)

    def remove(self) -> None:
        """Take the hook off the optimizer. Branches stay."""
        self._handle.remove()

    @property
    def history(self) -> list[StructureChange]:
        """What was grown and cut, oldest first."""
        return list(self._history)

    @property
    def scores(self) -> dict[str, float]:
        """{name of a convolution that can grow: its mean score since the last update}"""
        return {name: float(total) / max(self._steps, 1) for name, total in self._sums.items()}

    # ---- which modules

    def _blocks(self) -> Iterator[tuple[str, DynamicBranches]]:
        """The blocks by name, outer ones first."""
        modules = [(name, module) for name, module in self.model.named_modules() if isinstance(module, DynamicBranches)]
        yield from sorted(modules, key=lambda named: named[0].count(_INSIDE))

    def _convs(self) -> Iterator[tuple[str, nn.Conv2d, int]]:
        """The k x k convolutions: name, module, and how many blocks it is inside of."""
        pending = [(name, 0) for name in reversed(self._names)]
        while pending:
            name, depth = pending.pop()
            module = self.model.get_submodule(name)
            if isinstance(module, DynamicBranches):
                inside = [kind for kind in ("1x1_kxk", OWN) if kind in module.branches]
                pending += [(f"{name}{_INSIDE}{kind}.conv", depth + 1) for kind in inside]
            else:
                yield name, module, depth

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)

    # ---- while it trains

    @torch.no_grad()
    def _record(self, *_: Any) -> None:
        if not self._records:
            return
        score = _SCORES[self.score]
        for name, conv, depth in self._convs():
            if conv.weight.grad is not None and depth < _DEEPEST:
                value = score(conv.weight, conv.weight.grad)
                value = torch.where(value.isfinite(), value, 0.0)  # a step that a GradScaler skips
                total = self._sums.get(name)
                self._sums[name] = value if total is None else total.to(value.device) + value
        self._steps += 1

    def update_if_due(self, epoch: int, loader: Iterable, forward: Forward | None = None) -> bool:
        """Do `update` before epoch `every`, 2 `every`, ... up to `until`, counted from 0. Call it before each epoch."""
        due = epoch > 0 and epoch % self.every == 0 and (self.until is None or epoch <= self.until)
        changed = due and self._update(epoch, loader, forward)
        following = epoch + self.every - epoch % self.every
        self._records = self.until is None or following <= self.until
        return changed

    def update(self, loader: Iterable, forward: Forward | None = None) -> bool:
        """Grow a convolution and cut branches now. Returns whether the network has other parameters than before.

        Args:
            loader: its first batch gives the statistics of new norms.
            forward: called with the model and the batch. By default the model gets the batch, or its first element
                where it is a tuple or a list, on the device of the weights.

        Raises ValueError for a loader without a batch. Modes, batch-norm statistics of other modules and the default
        random states are as before.
        """
        return self._update(None, loader, forward)

    def _update(self, epoch: int | None, loader: Iterable, forward: Forward | None) -> bool:
        scores = {name: score for name, score in self.scores.items() if math.isfinite(score)}
        grown = max(scores, key=scores.__getitem__) if scores else None
        cuts = {name: cut for name, block in self._blocks() if (cut := self._quiet(block))}
        changes = grown is not None or bool(cuts)
        with torch.no_grad(), torch.random.fork_rng(self._gpus()):
            inputs = self._inputs({*cuts, grown}, loader, forward) if changes else {}
            self._sums, self._steps = {}, 0
            if grown is not None:
                kinds = self._grow(grown, inputs[grown])
                self._history.append(StructureChange(epoch, grown, kinds, ()))
            for name, cut in cuts.items():
                if name in dict(self.model.named_modules()):  # else it went with the block around it
                    self._cut(name, cut, inputs[name])
                    self._history.append(StructureChange(epoch, name, (), cut))
        if changes:
            self._renew_groups()
        return changes

    def _grow(self, name: str, x: Tensor) -> tuple[str, ...]:
        conv = self.model.get_submodule(name)
        block = DynamicBranches(conv, kinds_for(conv))
        self._put(name, block)
        block.start(self._generator, self.size, x)
        self._forget_states(block.plain.parameters())
        return tuple(kind for kind in block.branches if kind != OWN)

    def _quiet(self, block: DynamicBranches) -> tuple[str, ...]:
        """The branches of a block that are cut."""
        loudness = block.loudness()
        values = torch.tensor(list(loudness.values()), dtype=torch.float64)
        if len(values) < 2 or not float(values.std()) > self.spread:
            return ()
        mean = float(values.mean())
        return tuple(kind for kind, value in loudness.items() if value < mean and value < self.least)

    def _cut(self, name: str, cut: tuple[str, ...], x: Tensor) -> None:
        block = self.model.get_submodule(name)
        self._forget_states([*block.plain.parameters(), *block.branches[OWN].norm.parameters()])
        if len(cut) == len(block.branches) - 1:
            self._put(name, block.as_plain())
            return
        kernel, bias = block.sums()
        for kind in cut:
            del block.branches[kind]
        block.represent(kernel, bias, x)

    def _gpus(self) -> list[int]:
        return sorted({p.device.index for p in self.model.parameters() if p.is_cuda})

    def _inputs(self, names: set[str | None], loader: Iterable, forward: Forward | None) -> dict[str, Tensor]:
        """What the modules of these names get in a forward in train mode. Leaves modes and buffers as they were."""
        batch = next(iter(loader), None)
        if batch is None:
            raise ValueError("loader gives no batch, needed is one for the statistics of new norms")
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable:
            return lambda module, args: found.update({name: args[0].detach().clone()})

        modes = [(module, module.training) for module in self.model.modules()]
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        handles = [self.model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names if n is not None]
        try:
            for module, _ in modes:
                module.training = True
            (forward or _forward)(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes:
                module.training = mode
            for buffer, value in buffers:
                buffer.copy_(value)
        if missing := [name for name in names if name is not None and name not in found]:
            raise ValueError(f"the forward on the loader's batch does not call {first_few(sorted(missing))}")
        return found

    # ---- the optimizer

    def _check_groups(self) -> None:
        wanted = [list(group["params"]) for group in self._groups(self.model)]
        held = [group["params"] for group in self.optimizer.param_groups]
        if [list(map(id, params)) for params in wanted] != [list(map(id, params)) for params in held]:
            raise ValueError(
                "groups must be the function that made the optimizer's groups: it gives "
                f"{[len(params) for params in wanted]} parameters in its groups, the optimizer has "
                f"{[len(params) for params in held]}, or others, or in another order"
            )

    def _renew_groups(self) -> None:
        for group, new in zip(self.optimizer.param_groups, self._groups(self.model), strict=True):
            group["params"] = list(new["params"])
            if "param_names" in group:
                group["param_names"] = list(new["param_names"])
        kept = {p for group in self.optimizer.param_groups for p in group["params"]}
        self._forget_states([p for p in self.optimizer.state if p not in kept])

    def _forget_states(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            self.optimizer.state.pop(p, None)

    # ---- saving, loading

    def state_dict(self) -> dict[str, Any]:
        """Return the structure, the scores so far, the history and the state of the random numbers.

        It loads with weights_only=True. Weights are the model's, and momentum is the optimizer's.
        """
        return {
            "blocks": [[name, list(block.branches)] for name, block in self._blocks()],
            "biases": [name for name, conv, _ in self._convs() if conv.bias is not None],
            "sums": {name: float(total) for name, total in self._sums.items()},
            "steps": self._steps,
            "history": [[c.epoch, c.name, list(c.grown), list(c.cut)] for c in self._history],
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Give the plain model the structure that was saved, and the optimizer its parameters.

        Then load the model's and the optimizer's own state_dict, in this order.

        Raises ValueError for a model that has branches already, and for a structure that does not fit it. Nothing is
        changed then.
        """
        self._rebuild({name: tuple(kinds) for name, kinds in state_dict["blocks"]}, state_dict["biases"])
        self._sums = {name: torch.tensor(total, dtype=torch.float64) for name, total in state_dict["sums"].items()}
        self._steps = state_dict["steps"]
        self._history = [StructureChange(e, n, tuple(grown), tuple(cut)) for e, n, grown, cut in state_dict["history"]]
        self._generator.set_state(state_dict["generator"].cpu())

    def take_structure_of(self, weights: Mapping[str, Tensor]) -> None:
        """Give the plain model the structure of a trained one, from the names in its state_dict, which it then loads.

        Scores and history stay empty. Raises ValueError as `load_state_dict` does.
        """
        blocks: dict[str, tuple[str, ...]] = {}
        for key in weights:
            parts = key.split(_INSIDE)
            for n, part in enumerate(parts[1:], 1):
                name, kind = _INSIDE.join(parts[:n]), part.partition(".")[0]
                if parts[0] in self._names and kind not in blocks.get(name, ()):
                    blocks[name] = (*blocks.get(name, ()), kind)
        biases = {key.removesuffix(".bias") for key in weights if key.endswith(".bias")}
        self._rebuild(dict(sorted(blocks.items(), key=lambda block: block[0].count(_INSIDE))), biases)

    def _rebuild(self, blocks: Mapping[str, tuple[str, ...]], biases: Iterable[str]) -> None:
        """Put blocks into the plain model, outer ones first, and biases to the convolutions of these names."""
        if has := [name for name, _ in self._blocks()]:
            raise ValueError(f"the model must be the plain one, it has branches already: {first_few(has)}")
        problems = [name for name in blocks if name.partition(_INSIDE)[0] not in self._names]
        problems += [name for name, kinds in blocks.items() if OWN not in kinds or not set(kinds) <= set(ORDER)]
        if problems:
            raise ValueError(f"the structure that was saved does not fit the model: {first_few(problems)}")
        with torch.random.fork_rng(self._gpus()):
            for name, kinds in blocks.items():
                self._put(name, DynamicBranches(self.model.get_submodule(name), kinds))
        for name, conv, _ in self._convs():
            if name in biases and conv.bias is None:
                conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), conv.weight.requires_grad)
        self._renew_groups()


def _forward(model: nn.Module, batch: Any) -> None:
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    model(x.to(next(model.parameters()).device))
