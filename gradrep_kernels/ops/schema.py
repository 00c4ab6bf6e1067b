"""Declare an op beside its reference. The reference's signature is the op's schema, so it is written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_origin

from torch import Tensor

TwoInts = Annotated[list[int], "int[2]"]
"""Rows and columns. A caller of torch.ops may give one number for both."""

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]",
    list[Tensor | None] | None: "Tensor?[]?",
    list[bool]: "bool[]",
    list[int]: "int[]",
    list[int] | None: "int[]?",
    bool: "bool",
    int: "int",
    float: "float",
}


OPTIONAL = ("grad_scale", "found_inf", "clip", "averages", "numbers", "elements", "tail")
"""The arguments that every step has and any call may leave out: see reference/step_tail.py."""


class StepCall(NamedTuple):
    """The arguments of a step, by their meaning."""

    columns: Sequence[list]  # see StepRule
    hyper: Tensor
    grad_scale: Tensor | None
    found_inf: Tensor | None
    clip: Tensor | None
    averages: Sequence[Tensor | None] | None
    numbers: Sequence[int] | None
    elements: Sequence[Tensor | None] | None
    tail: Tensor | None


@dataclass(frozen=True)
class StepRule:
    """The meaning of a step op's arguments.

    They are, in this order: columns with one entry for each parameter (params, grads, the states, the parts of the
    multipliers, first_steps, groups), then `hyper`, and then those of OPTIONAL.
    """

    states: tuple[str, ...]  # the columns with the optimizer's arrays
    multipliers: tuple[str, ...]  # the columns with the parts of the multipliers, of which any entry may be None
    hyper: tuple[str, ...]  # the columns of the table of hyper-parameters: names of a param group's entries
    # From the table [G, H]: how many of its states each row uses, counted from the first.
    kept_states: Callable[[Tensor], Sequence[int]]
    layered: bool = False  # whether the first of the multipliers is several, one behind the other: [1 + B, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return ("params", "grads", *self.states, *self.multipliers, "first_steps", "groups")

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*self.columns, "hyper", *OPTIONAL)

    def dealt(self, given: Sequence[Any], named: dict[str, Any]) -> StepCall:
        """Deal the arguments of a call, of which any may be named."""
        names = self.arguments
        values = {**dict.fromkeys(OPTIONAL), **dict(zip(names, given)), **named}
        twice = named.keys() & set(names[: len(given)])
        if len(given) > len(names) or twice or values.keys() != set(names):
            raise TypeError(f"a step takes {', '.join(names)}; got {len(given)} arguments and {list(named)}")
        return StepCall([values[name] for name in self.columns], values["hyper"], *(values[name] for name in OPTIONAL))

    def taken_apart(self, columns: Sequence[Any]) -> tuple[Any, Any, Sequence[Any], Sequence[Any], Any, Any]:
        """Take the columns, or one parameter's row of them, apart.

        They are (params, grads, states, multipliers, first_steps, groups).
        """
        behind = 2 + len(self.states)
        return *columns[:2], columns[2:behind], columns[behind:-2], *columns[-2:]


@dataclass(frozen=True)
class Op:
    """A row of the table of ops."""

    name: str
    schema: str
    meaning: str
    reference: Callable | None = None  # None for the ops of a plan, which only a backend with kernels has
    fake: Callable | None = None  # shapes without data, for an op that returns tensors
    step: StepRule | None = None


def op(
    meaning: str,
    *,
    writes: Sequence[str] = (),
    returns: Sequence[str] = (),
    fake: Callable | None = None,
    step: StepRule | None = None,
) -> Callable[[Callable], Callable]:
    """Declare the decorated function as the reference of the op of its name. `function.op` is the table's row.

    Args:
        meaning: one line, shown by `python -m gradrep_kernels env`
        writes:  the arguments that the op changes in place
        returns: names of several results
        fake:    the function of the same arguments that makes results without data
        step:    for an optimizer's step
    """

    def declare(reference: Callable) -> Callable:
        name = reference.__name__
        if step is not None and tuple(inspect.signature(reference).parameters) != step.arguments:
            raise TypeError(f"{name}: a step with this rule takes {', '.join(step.arguments)}")
        reference.op = Op(name, schema_of(reference, writes, returns), meaning, reference, fake, step)
        return reference

    return declare


def schema_of(function: Callable, writes: Sequence[str], returns: Sequence[str] = ()) -> str:
    """The schema in torch.library's language: '(Tensor(a!) counts, int[] displacements) -> ()'."""
    signature = inspect.signature(function, eval_str=True)
    marks = dict(zip(writes, "abcdefgh"))
    arguments = [_argument(parameter, marks.get(name)) for name, parameter in signature.parameters.items()]
    results = {None: "()", Tensor: "Tensor"}.get(signature.return_annotation)
    if results is None:
        results = f"({', '.join(f'Tensor {name}' for name in returns)})"
    return f"({', '.join(arguments)}) -> {results}"


def _argument(parameter: inspect.Parameter, mark: str | None) -> str:
    annotation: Any = parameter.annotation
    text = annotation.__metadata__[0] if get_origin(annotation) is Annotated else _TYPES.get(annotation)
    if text is None:
        raise TypeError(f"{parameter.name}: an op cannot take {annotation}")
    if mark is not None:
        text = text.replace("Tensor", f"Tensor({mark}!)", 1)
    default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default}"
    return f"{text} {parameter.name}{default}"


def plan_ops(step: Op) -> tuple[Op, Op, Op, Op]:
    """The ops of a plan of `step`: the same update, told only once what does not change.

    A backend makes no plan, and returns 0, where its kernels do not take every parameter.

    `hyper` is the table as one list of numbers, `tail` that of the tail. Those that lie on the device are in
    `on_device`, at `places` of both lists put together. With a `norm` the gradients are clipped: it receives
    √(Σ M ⊙ g²) of what they are after unscaling, and the step multiplies them by min(1, max_norm / (norm + 1e-6)), in
    the dtype of `norm`, and does not write them. A `clip` is a factor that is known already.
    """
    name = step.name.removesuffix("_step") + "_plan"
    states = "".join(f"Tensor?[] {column}, " for column in step.step.states)
    multipliers = "".join(f"Tensor?[] {column}, " for column in step.step.multipliers)
    return (
        Op(
            name,
            f"(Tensor[] params, {states}{multipliers}int[] groups, Tensor?[]? averages=None, int[]? numbers=None, "
            "Tensor?[]? elements=None) -> int",
            f"makes a plan of {step.name}",
        ),
        Op(
            f"{name}_step",
            "(int plan, Tensor[] grads, float[] hyper, Tensor[] on_device, int[] places, Tensor? grad_scale, "
            "Tensor? found_inf, float[] tail=[], float max_norm=0., Tensor(a!)? norm=None, Tensor? clip=None) -> bool",
            "takes the planned step; False, and nothing done, where a tensor is not what it was",
        ),
        Op(
            f"{name}_norm",
            "(int plan, Tensor[] grads, Tensor(a!) norm) -> bool",
            "the gradient norm of planned steps; False, and nothing done, where a tensor is not what it was",
        ),
        Op(
            f"{name}_free",
            "(Tensor param, int plan) -> ()",
            "frees a plan. `param`, any tensor, says on which device",
        ),
    )
