"""The two parameter groups that the equivalence CSLA = GR asks for."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradrep_kernels.wrappers import plain_name, root_prefix

DECAY_RULES = {
    "repopt": "weights and identity scales",
    "everything": "every parameter, norms and biases too, as the SGS paper's code for CIFAR",
    "yolov6": "weights and all branch scales",
}
"""Rule -> the parameters that decay."""


def param_groups(model: nn.Module, weight_decay: float, rule: str = "repopt") -> list[dict[str, Any]]:
    """Deal the parameters to two groups: weights and identity scales, which decay, and all others, which do not.

    Norms, biases and the scale vectors behind a CSLA block's convolutions do not decay, as in the published code. The
    scale of its identity branch does, although it is a vector: the merged kernel holds it, and decays as a whole.
    A module names such vectors in its attribute `decayed_vectors`. Frozen parameters are left out. When one is
    unfrozen, `optimizer.add_param_group` takes it, with its name or without.

    Args:
        rule: 'repopt' as above, from which alone CSLA = GR follows. 'everything': all parameters decay (the SGS paper's
            code for CIFAR). 'yolov6': the scale vectors behind a CSLA block's convolutions decay too (YOLOv6).

    Returns groups with `params`, `param_names` and `weight_decay`. The names are free of what wrappers add to them.
    Error messages use them, and checkpoints find Grad Mults by them.
    Raises TypeError for what is no model, and ValueError for a negative weight_decay or an unknown rule.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, got {type(model).__name__}: param_groups(model, 4e-5) takes the model "
            "itself, for it needs the names of the parameters"
        )
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    if rule not in DECAY_RULES:
        raise ValueError(f"rule must be one of {', '.join(DECAY_RULES)}, got {rule!r}")
    vectors = ("decayed_vectors", "branch_scales") if rule == "yolov6" else ("decayed_vectors",)
    decayed_vectors = {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        for attribute in vectors
        for name in getattr(module, attribute, ())
    }
    decays: dict[bool, list] = {True: [], False: []}
    prefix = root_prefix(model)
    for name, param in model.named_parameters():
        if param.requires_grad:
            does = rule == "everything" or param.dim() > 1 or name in decayed_vectors
            decays[does].append((plain_name(name.removeprefix(prefix)), param))
    return [
        {
            "params": [p for _, p in named],
            "param_names": [n for n, _ in named],
            "weight_decay": weight_decay if does else 0.0,
        }
        for does, named in decays.items()
    ]
