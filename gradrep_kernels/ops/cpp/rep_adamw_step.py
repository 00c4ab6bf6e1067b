"""The C++ and the CUDA step of AdamW over branches."""

from gradrep_kernels.ops.cpp.step import step_front

rep_adamw_step = step_front("rep_adamw_step")
