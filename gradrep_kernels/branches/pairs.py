"""Whether the norm after a convolution is what consumes its output, and nothing else does.

Registration order only suggests it. A graph of the model shows it, or the calls of one forward pass.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gradrep_kernels.branches.sites import Site, first_few, warn_outside

__all__ = ["Example", "call", "check_pairs", "in_eval_mode"]

Example = Tensor | tuple | list | Mapping  # the input of a model: a tensor, positional or keyword arguments


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Set modes as attributes, because `.eval()` may be overridden, and put them back."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def call(model: nn.Module, example: Example) -> Any:
    """Return the outputs of a model on an example, in eval mode and without autograd."""
    with in_eval_mode(model), torch.no_grad():
        if isinstance(example, Mapping):
            return model(**example)
        return model(*example) if isinstance(example, (tuple, list)) else model(example)


def check_pairs(model: nn.Module, pairs: list[Site], example: Example | None, what: str) -> None:
    """Raise ValueError where a convolution has another consumer than its norm, or the norm another input.

    Without an example the model is traced by torch.fx. Where it cannot be traced, pairs that are neighbours in an
    nn.Sequential are believed, and a warning says that the others are as they are registered.
    """
    if not pairs:
        return
    if example is not None:
        problems = _problems(pairs, *_calls_of_a_forward(model, pairs, example))
    else:
        calls = _calls_of_a_graph(model)
        if isinstance(calls, str):
            doubtful = _not_in_a_sequential(model, pairs)
            if doubtful:
                warn_outside(
                    f"{what} cannot see whether these norms are called on the outputs of their convolutions, and goes "
                    f"by the order in which they are registered: {first_few(doubtful)}. The model cannot be traced "
                    f"({calls}). example= an input of the model checks the result"
                )
            return
        problems = _problems(pairs, *calls)
    if problems:
        raise ValueError(f"{what} needs convolutions whose only consumer is the norm after them: {first_few(problems)}")


def _problems(pairs: list[Site], consumers: Mapping[nn.Module, list[Any]], calls: Counter[nn.Module]) -> list[str]:
    """List the pairs that are none.

    `consumers` has for each call of a convolution the modules that take its output. None stands for anything else.
    """
    problems = []
    for site in pairs:
        used = consumers.get(site.conv, [])
        if not used:
            problems.append(f"{site.name} is not called")
        elif any(taken != [site.norm] for taken in used):
            times = f" in one of its {len(used)} calls" if len(used) > 1 else ""
            problems.append(f"{site.name} has another consumer than its norm{times}")
        elif calls[site.norm] != len(used):
            problems.append(f"the norm after {site.name} is called elsewhere too")
    return problems


def _calls_of_a_graph(model: nn.Module) -> tuple[Mapping[nn.Module, list], Counter] | str:
    """Return (consumers, calls) as `_problems` takes them, or why the model cannot be traced."""
    from torch import fx  # 0.1 s

    try:
        with in_eval_mode(model):
            graph = fx.Tracer().trace(model)
    except Exception as reason:  # a model may fail in any way on proxies
        return f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"[:120]
    modules = dict(model.named_modules(remove_duplicate=False))
    consumers: dict[nn.Module, list] = defaultdict(list)
    calls: Counter[nn.Module] = Counter()
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            calls[module] += 1
            consumers[module].append(
                [modules.get(user.target) if user.op == "call_module" else None for user in node.users]
            )
        elif node.op == "get_attr":  # a weight or a statistic that is used outside of its module's call
            owner = modules.get(node.target.rpartition(".")[0])
            if owner is not None:
                calls[owner] += 1
                consumers[owner].append([None])
    return consumers, calls


def _calls_of_a_forward(
    model: nn.Module, pairs: list[Site], example: Example
) -> tuple[Mapping[nn.Module, list], Counter]:
    """Return the same as seen by hooks, where only calls of these modules show."""
    consumers: dict[nn.Module, list] = defaultdict(list)
    calls: Counter[nn.Module] = Counter()
    outputs: dict[int, tuple[Tensor, list]] = {}  # kept alive, so that no id is given twice

    def made(conv: nn.Module, inputs: tuple, output: Tensor) -> None:
        taken: list = []
        consumers[conv].append(taken)
        outputs[id(output)] = output, taken

    def takes(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[module] += 1
        for x in (*args, *kwargs.values()):
            if id(x) in outputs:
                outputs[id(x)][1].append(module)

    with ExitStack() as hooks:
        for conv in {site.conv for site in pairs}:
            hooks.callback(conv.register_forward_hook(made).remove)
        for module in model.modules():
            if not any(True for _ in module.children()):
                hooks.callback(module.register_forward_pre_hook(takes, with_kwargs=True).remove)
        call(model, example)
    return consumers, calls


def _not_in_a_sequential(model: nn.Module, pairs: Iterable[Site]) -> list[str]:
    neighbours = set()
    for module in model.modules():
        if type(module) is nn.Sequential:
            children = list(module.children())
            neighbours.update(pairwise(children))
    return [site.name for site in pairs if (site.conv, site.norm) not in neighbours]
