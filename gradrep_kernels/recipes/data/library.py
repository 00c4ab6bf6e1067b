"""torchvision, which has data sets and augmentations that the commands use where they are asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from gradrep_kernels.recipes.errors import InputError, one_line

__all__ = ["torchvision"]


def torchvision(module: str, wanted_by: str, otherwise: str = "") -> ModuleType:
    """Import a module of torchvision.

    Raises InputError, saying what to do, where it is missing or was built for another torch. `otherwise` says what
    needs none.
    """
    otherwise = otherwise and f"; {otherwise}"
    try:
        return importlib.import_module(f"torchvision.{module}")
    except ModuleNotFoundError as reason:
        if not (reason.name or "").startswith("torchvision"):  # Pillow, say
            raise InputError(f"{wanted_by} needs torchvision, which needs {reason.name}: pip install it") from None
        raise InputError(
            f"{wanted_by} needs torchvision, of the release and build that belong to torch {torch.__version__}: "
            f"pip install torchvision, from the index that torch came from{otherwise}"
        ) from None
    except (ImportError, RuntimeError, OSError, AttributeError) as reason:  # Its C++ part does not fit this torch.
        raise InputError(
            f"{wanted_by} needs torchvision, and the one that is installed does not fit torch {torch.__version__} "
            f"({one_line(reason)}): "
            f"install the release and build that belong to it, from the index that torch came from{otherwise}"
        ) from None
