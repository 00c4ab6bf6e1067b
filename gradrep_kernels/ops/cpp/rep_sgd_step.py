"""The C++ and the CUDA step."""

from gradrep_kernels.ops.cpp.step import step_front

rep_sgd_step = step_front("rep_sgd_step")
