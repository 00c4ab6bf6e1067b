// The ops of SGD with M ⊙ g in place of g on CUDA: kernels, launches and registration. What a block does is in
// step_cuda.h with the rule of rep_sgd_update.h, the plan is in step_cuda_plan.h and the ops' arguments in
// rep_sgd_ops.h.
#include "rep_sgd_ops.h"
#include "step_cuda_launch.h"
#include "step_cuda_plan.h"

namespace gradrep {
namespace {
using SgdPlan = CudaStepPlan<SgdUpdate, StepLauncher>;
}
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CUDA, m) {
  m.impl("rep_sgd_step", TORCH_BOX(&gradrep::rep_sgd_step<gradrep::SgdPlan>));
  m.impl("rep_sgd_plan", TORCH_BOX(&gradrep::rep_sgd_plan<gradrep::SgdPlan>));
  m.impl("rep_sgd_plan_step", TORCH_BOX(&gradrep::take_planned_step));
  m.impl("rep_sgd_plan_norm", TORCH_BOX(&gradrep::take_planned_norm));
  m.impl("rep_sgd_plan_free", TORCH_BOX(&gradrep::free_planned_step));
}
