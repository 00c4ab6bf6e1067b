// The ops of AdamW summed over branches on the CPU, in one pass over the parameters of all groups. The update rule is
// in rep_adamw_update.h, its loops are in adamw_chunk.h, step_plan.h runs it over the parameters, and the ops'
// arguments are in rep_adamw_ops.h.
#include "adamw_chunk.h"
#include "rep_adamw_ops.h"
#include "step_plan.h"

namespace gradrep {
namespace {
using AdamwPlan = StepPlan<AdamwUpdate>;
}
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CPU, m) {
  m.impl("rep_adamw_step", TORCH_BOX(&gradrep::rep_adamw_step<gradrep::AdamwPlan>));
  m.impl("rep_adamw_plan", TORCH_BOX(&gradrep::rep_adamw_plan<gradrep::AdamwPlan>));
  m.impl("rep_adamw_plan_step", TORCH_BOX(&gradrep::take_planned_step));
  m.impl("rep_adamw_plan_norm", TORCH_BOX(&gradrep::take_planned_norm));
  m.impl("rep_adamw_plan_free", TORCH_BOX(&gradrep::free_planned_step));
}
