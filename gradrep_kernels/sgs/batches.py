"""What a model is given of a batch, and how it is called with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, object], object]


def draw(batches: object, most: int, forward: Forward | None, inputs: list) -> None:
    """Append up to `most` batches to `inputs`, or with no `forward` what the model is given of each.

    Raises:
        TypeError: a batch of another kind, and no `forward`.
    """
    for batch in islice(batches, most):
        inputs.append(batch if forward is not None else _model_input(batch))


def _model_input(batch: object) -> Tensor | Mapping:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(first, (Tensor, Mapping)):
        return first
    got = type(batch).__name__ if first is batch else f"{type(batch).__name__} of {type(first).__name__}"
    raise TypeError(
        f"a batch must be a Tensor, a tuple or list that starts with one, or a dict; got {got} (or give forward=)"
    )


def call_of(model: nn.Module, forward: Forward | None) -> Forward:
    """Return what calls the model with a copy of a batch on the device of its parameters.

    A model may write into its input, and both passes must see the same. Without `forward` maps ([C, H, W] or more) get
    the dtype of the model's first convolution, unless some convolution has theirs, or autocast is on. Numbers beside
    them, such as time steps, stay as they are.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if forward is not None:
        return lambda model, batch: forward(model, _copied(batch, device, []))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    dtypes = [p.dtype for conv in convs for p in conv.parameters() if p.is_floating_point()]
    if torch.is_autocast_enabled(device.type):
        dtypes = []  # it casts by itself, and some of its operations want float32
    return lambda model, batch: _call(model, _copied(batch, device, dtypes))


def _call(model: nn.Module, batch: Tensor | Mapping) -> object:
    try:
        return model(**batch) if isinstance(batch, Mapping) else model(batch)
    except torch.OutOfMemoryError:
        raise
    except NotImplementedError as error:
        raise TypeError("the model has no forward that takes a batch; forward= is where it is called") from error
    except Exception as error:
        if isinstance(batch, Mapping) and isinstance(error, TypeError):
            keys = ", ".join(map(str, batch))
            raise TypeError(
                f"the model does not take the batch, a dict of {keys}, as keyword arguments; forward= is where it is "
                "prepared as in the training step"
            ) from error
        tensors = [t for t in (batch.values() if isinstance(batch, Mapping) else [batch]) if isinstance(t, Tensor)]
        if not tensors or any(t.is_floating_point() or t.is_complex() for t in tensors):
            raise
        dtypes = " and ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors))
        raise TypeError(
            f"the batch is {dtypes}, which the model does not take; forward= is where it is prepared as in the "
            "training step"
        ) from error


def _copied(item: Any, device: torch.device, dtypes: Sequence[torch.dtype]) -> Any:
    """Return a copy on `device`. Maps of a dtype that is not among `dtypes` get the first of them."""
    if isinstance(item, Tensor):
        cast = dtypes and item.is_floating_point() and item.dim() >= 3 and item.dtype not in dtypes
        return item.to(device, dtypes[0] if cast else None, copy=True)
    if isinstance(item, Mapping):
        return {key: _copied(value, device, dtypes) for key, value in item.items()}
    if isinstance(item, (tuple, list)):
        copies = [_copied(value, device, dtypes) for value in item]
        return type(item)(*copies) if hasattr(item, "_fields") else type(item)(copies)
    return item
