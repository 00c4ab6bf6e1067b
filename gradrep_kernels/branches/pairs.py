"""Whether the norm after a convolution is what consumes its output, and nothing else does.

Registration order only suggests it. A graph of the model shows it, or the calls of one forward pass.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gradrep_kernels.branches.sites import Site
from gradrep_kernels.messages import first_few, warn_outside

__all__ = ["Example", "call", "check_pairs", "copy_without_hooks", "floating_outputs", "scratch_copy"]

Example = Tensor | tuple | list | Mapping  # the input of a model: a tensor, positional or keyword arguments


def scratch_copy(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """Return a copy in eval mode, to look at one forward of it: a forward may write into buffers and attributes.

    Modes are set as attributes, because `.eval()` may be overridden. The tensors `shared` are not copied.
    """
    copied = copy.deepcopy(model, {id(t): t for t in shared})
    for module in copied.modules():
        module.training = False
    return copied


def copy_without_hooks(model: nn.Module) -> nn.Module:
    """Return a copy without forward hooks, its modules in the modes of the model's."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied


def call(model: nn.Module, example: Example) -> Any:
    """Return the outputs of a model on an example, without autograd, each time from the same random state."""
    gpus = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(gpus):
        torch.manual_seed(0)
        if isinstance(example, Mapping):
            return model(**example)
        return model(*example) if isinstance(example, (tuple, list)) else model(example)


def floating_outputs(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in what a model returns, in their order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = value.values()
    elif is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for part in value for t in floating_outputs(part)]


def check_pairs(model: nn.Module, pairs: list[Site], example: Example | None, what: str) -> list[Site]:
    """Return the pairs whose convolution is called, in eval mode.

    Without an example the model is traced by torch.fx. Where it cannot be traced, pairs that are neighbours in an
    nn.Sequential are believed, and a warning says that the others are as they are registered.

    Raises ValueError where a convolution has another consumer than its norm, or the norm another input.
    """
    if not pairs:
        return []
    if example is not None:
        consumers, calls = _calls_of_a_forward(model, pairs, example)
    else:
        seen = _calls_of_a_graph(model)
        if isinstance(seen, str):
            doubtful = _not_in_a_sequential(model, pairs)
            if doubtful:
                warn_outside(
                    f"{what} cannot see whether these norms are called on the outputs of their convolutions, and goes "
                    f"by the order in which they are registered: {first_few(doubtful)}. The model cannot be traced "
                    f"({seen}). example= an input of the model checks the result"
                )
            return pairs
        consumers, calls = seen
    problems = []
    for site in pairs:
        used = consumers.get(site.conv, [])
        if any(taken != [site.norm] for taken in used):
            times = f" in one of its {len(used)} calls" if len(used) > 1 else ""
            problems.append(f"{site.name} has another consumer than its norm{times}")
        elif used and calls[site.norm] != len(used):
            problems.append(f"the norm after {site.name} is called elsewhere too")
    if problems:
        raise ValueError(f"{what} needs convolutions whose only consumer is the norm after them: {first_few(problems)}")
    return [site for site in pairs if site.conv in consumers]


# For each call of a module the modules that take its output (None stands for anything else), and its number of calls.
_Calls = tuple[Mapping[nn.Module, list[Any]], Counter[nn.Module]]


def _calls_of_a_graph(model: nn.Module) -> _Calls | str:
    """Return what the graph of the model shows, or why the model cannot be traced.

    Optional arguments of its forward have their defaults.
    """
    from torch import fx  # 0.1 s

    class Traced(fx.Proxy):
        # So that `isinstance(x, Tensor)` in a forward takes the way of a tensor.
        __class__ = property(lambda proxy: Tensor)

    class Tracer(fx.Tracer):
        def proxy(self, node: fx.Node) -> fx.Proxy:
            return Traced(node, self)

        def create_arg(self, a: Any) -> Any:
            return a.node if type(a) is Traced else super().create_arg(a)

    # A forward on proxies leaves them in the attributes that it sets, and calls hooks with them.
    tensors = [*model.parameters(), *model.buffers()]
    traced = scratch_copy(model, shared=tensors)
    for module in traced.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of defaults that the graph takes for granted
            graph = Tracer().trace(traced, defaults)
    except Exception as reason:  # a model may fail in any way on proxies
        return f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"[:120]
    modules = dict(model.named_modules(remove_duplicate=False))
    consumers: dict[nn.Module, list] = defaultdict(list)
    calls: Counter[nn.Module] = Counter()
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            calls[module] += 1
            taken = [modules.get(user.target) if user.op == "call_module" else None for user in node.users]
            consumers[module].append(taken)
        elif node.op == "get_attr":  # a weight or a statistic that is used outside of its module's call
            owner = modules.get(node.target.rpartition(".")[0])
            if owner is not None:
                calls[owner] += 1
                consumers[owner].append([None])
    return consumers, calls


def _calls_of_a_forward(model: nn.Module, pairs: list[Site], example: Example) -> _Calls:
    """Return what hooks see, for which only the calls of modules show."""
    copied = scratch_copy(model)
    original = dict(zip(copied.modules(), model.modules()))
    consumers: dict[nn.Module, list] = defaultdict(list)
    calls: Counter[nn.Module] = Counter()
    outputs: dict[int, tuple[Tensor, list]] = {}  # kept alive, so that no id is given twice

    def made(conv: nn.Module, inputs: tuple, output: Tensor) -> None:
        taken: list = []
        consumers[original[conv]].append(taken)
        outputs[id(output)] = output, taken

    def takes(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[original[module]] += 1
        for x in (*args, *kwargs.values()):
            if id(x) in outputs:
                outputs[id(x)][1].append(original[module])

    convs = {site.conv for site in pairs}
    for module in copied.modules():
        if original[module] in convs:
            module.register_forward_hook(made)
        if not any(True for _ in module.children()):
            module.register_forward_pre_hook(takes, with_kwargs=True)
    call(copied, example)
    return consumers, calls


def _not_in_a_sequential(model: nn.Module, pairs: Iterable[Site]) -> list[str]:
    neighbours = set()
    for module in model.modules():
        if type(module) is nn.Sequential:
            children = list(module.children())
            neighbours.update(pairwise(children))
    return [site.name for site in pairs if (site.conv, site.norm) not in neighbours]
