// The ops of AdamW summed over branches on CUDA: kernels, launches and registration. What a block does is in
// step_cuda.h with the rule of rep_adamw_update.h, the plan is in step_cuda_plan.h and the ops' arguments in
// rep_adamw_ops.h.
#include "rep_adamw_ops.h"
#include "step_cuda_launch.h"
#include "step_cuda_plan.h"

namespace gradrep {
namespace {
using AdamwPlan = CudaStepPlan<AdamwUpdate, StepLauncher>;
}
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CUDA, m) {
  m.impl("rep_adamw_step", TORCH_BOX(&gradrep::rep_adamw_step<gradrep::AdamwPlan>));
  m.impl("rep_adamw_plan", TORCH_BOX(&gradrep::rep_adamw_plan<gradrep::AdamwPlan>));
  m.impl("rep_adamw_plan_step", TORCH_BOX(&gradrep::take_planned_step));
  m.impl("rep_adamw_plan_norm", TORCH_BOX(&gradrep::take_planned_norm));
  m.impl("rep_adamw_plan_free", TORCH_BOX(&gradrep::free_planned_step));
}
