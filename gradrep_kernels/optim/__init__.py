"""Optimizers with Grad Mult inside the step, and the parameter groups that they ask for."""

from gradrep_kernels.optim.clipping import clip_grad_norm_
from gradrep_kernels.optim.fused_rep_adamw import FusedRepAdamW
from gradrep_kernels.optim.fused_rep_sgd import FusedRepSGD
from gradrep_kernels.optim.grad_scaler import GradScaler
from gradrep_kernels.optim.param_groups import param_groups

__all__ = ["FusedRepAdamW", "FusedRepSGD", "GradScaler", "clip_grad_norm_", "param_groups"]
