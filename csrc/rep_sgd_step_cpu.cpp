// The ops of SGD with M ⊙ g in place of g, in one pass over the parameters of all groups: the twin of
// reference/rep_sgd_step.py. The update rule is in rep_sgd_update.h, and step_plan.h runs it over the parameters. This
// file takes the ops' arguments and registers the ops.
#include "rep_sgd_update.h"
#include "step_plan.h"

#include <memory>

namespace gradrep {
namespace {

using SgdPlan = StepPlan<SgdUpdate>;
constexpr int64_t kColumns = SgdUpdate::Hyper::kColumns;

void rep_sgd_step_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
                      std::vector<std::optional<Tensor>> scales, std::vector<std::optional<Tensor>> identities,
                      std::vector<bool> first_steps, std::vector<int64_t> groups, Tensor hyper,
                      std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  STD_TORCH_CHECK(grads.size() == params.size(), "rep_sgd_step: the lists must have one entry per parameter");
  STD_TORCH_CHECK(hyper.is_cpu() && dtype_of(hyper) == aoti_torch_dtype_float64() && hyper.dim() == 2 &&
                      hyper.size(1) == kColumns && hyper.is_contiguous(),
                  "rep_sgd_step: hyper must be a contiguous float64 CPU tensor [G, 6]");
  std::vector<std::optional<Tensor>> buffers(momentum_buffers.begin(), momentum_buffers.end());
  SgdPlan plan(std::move(params), {std::move(buffers)}, {std::move(scales), std::move(identities)}, groups,
               &first_steps);
  const auto* table = static_cast<const double*>(hyper.const_data_ptr());
  STD_TORCH_CHECK(
      plan.step(grads, table, hyper.size(0), grad_scale, found_inf),
      "rep_sgd_step: parameters, gradients and buffers must be CPU tensors that share dtype, shape and strides");
}

// The cached plan of an optimizer. Its address is the handle, and the optimizer frees it.
int64_t rep_sgd_plan_cpu(std::vector<Tensor> params, std::vector<std::optional<Tensor>> momentum_buffers,
                         std::vector<std::optional<Tensor>> scales, std::vector<std::optional<Tensor>> identities,
                         std::vector<int64_t> groups) {
  auto plan = std::make_unique<SgdPlan>(std::move(params), SgdPlan::States{std::move(momentum_buffers)},
                                        GradMults{std::move(scales), std::move(identities)}, groups, nullptr);
  return reinterpret_cast<int64_t>(plan.release());
}

bool rep_sgd_plan_step_cpu(int64_t plan, std::vector<Tensor> grads, std::vector<double> hyper,
                           std::vector<Tensor> on_device, std::vector<int64_t>, std::optional<Tensor> grad_scale,
                           std::optional<Tensor> found_inf) {
  if (!on_device.empty()) return false;
  const auto groups = static_cast<int64_t>(hyper.size()) / kColumns;
  return reinterpret_cast<SgdPlan*>(plan)->step(grads, hyper.data(), groups, grad_scale, found_inf);
}

void rep_sgd_plan_free_cpu(Tensor, int64_t plan) { delete reinterpret_cast<SgdPlan*>(plan); }

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CPU, m) {
  m.impl("rep_sgd_step", TORCH_BOX(&gradrep::rep_sgd_step_cpu));
  m.impl("rep_sgd_plan", TORCH_BOX(&gradrep::rep_sgd_plan_cpu));
  m.impl("rep_sgd_plan_step", TORCH_BOX(&gradrep::rep_sgd_plan_step_cpu));
  m.impl("rep_sgd_plan_free", TORCH_BOX(&gradrep::rep_sgd_plan_free_cpu));
}
