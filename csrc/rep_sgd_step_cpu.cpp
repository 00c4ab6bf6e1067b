// The ops of SGD with M ⊙ g in place of g on the CPU, in one pass over the parameters of all groups. The update rule is
// in rep_sgd_update.h, step_plan.h runs it over the parameters, and the ops' arguments are in rep_sgd_ops.h.
#include "rep_sgd_ops.h"
#include "step_plan.h"

namespace gradrep {
namespace {
using SgdPlan = StepPlan<SgdUpdate>;
}
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CPU, m) {
  m.impl("rep_sgd_step", TORCH_BOX(&gradrep::rep_sgd_step<gradrep::SgdPlan>));
  m.impl("rep_sgd_plan", TORCH_BOX(&gradrep::rep_sgd_plan<gradrep::SgdPlan>));
  m.impl("rep_sgd_plan_step", TORCH_BOX(&gradrep::take_planned_step));
  m.impl("rep_sgd_plan_norm", TORCH_BOX(&gradrep::take_planned_norm));
  m.impl("rep_sgd_plan_free", TORCH_BOX(&gradrep::free_planned_step));
}
