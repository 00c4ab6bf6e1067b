"""The gradient norm that the explicit CSLA model would report: clipping by it keeps CSLA = GR exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from gradrep_kernels.ops.reference.multiply import multiply
from gradrep_kernels.ops.schema import op


def _fake(grads, scales, identities):
    double = any(g.dtype in (torch.float64, torch.complex128) for g in grads)
    return grads[0].new_empty((), dtype=torch.float64 if double else torch.float32)


@op("√(Σ M ⊙ g²), the global gradient norm of the CSLA model", fake=_fake)
@torch.no_grad()
def rep_grad_norm(grads: list[Tensor], scales: list[Tensor | None], identities: list[Tensor | None]) -> Tensor:
    """Compute √(Σ M ⊙ |g|²) over all tensors  # [], float64 if any gradient has double precision, else float32

    A branch with scale α has the gradient α ⊙ g, so the squares of all branches sum to Σ α² ⊙ g² = M ⊙ g².
    The sum is formed in float64 and rounded once. An inf or NaN in a gradient comes out as such. The result is on the
    device of the first gradient.
    """
    double = any(g.dtype in (torch.float64, torch.complex128) for g in grads)
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device if grads else None)
    for g, scale, identity in zip(grads, scales, identities):
        magnitude = (torch.view_as_real(g).double().square().sum(-1)) if g.is_complex() else g.double().square()
        total += multiply(magnitude, scale, identity, torch.float64).sum().to(total.device)
    return total.sqrt().to(torch.float64 if double else torch.float32)
