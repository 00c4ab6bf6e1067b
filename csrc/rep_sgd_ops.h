// The arguments of the ops of SGD with M ⊙ g in place of g, on every device: a plan's class says which.
#pragma once

#include "grad_mult.h"
#include "rep_sgd_update.h"
#include "step_tensors.h"

#include <memory>

namespace gradrep {

// The twin of reference/rep_sgd_step.py.
template <typename Plan>
void rep_sgd_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
                  std::vector<std::optional<Tensor>> scales, std::vector<std::optional<Tensor>> identities,
                  std::vector<bool> first_steps, std::vector<int64_t> groups, Tensor hyper,
                  std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> clip,
                  std::optional<std::vector<std::optional<Tensor>>> averages,
                  std::optional<std::vector<int64_t>> numbers,
                  std::optional<std::vector<std::optional<Tensor>>> elements, std::optional<Tensor> tail) {
  STD_TORCH_CHECK(grads.size() == params.size(), "rep_sgd_step: the lists must have one entry per parameter");
  const HyperTable table = hyper_table("rep_sgd_step", hyper, SgdUpdate::Hyper::kColumns, tail);
  std::vector<std::optional<Tensor>> buffers(momentum_buffers.begin(), momentum_buffers.end());
  Plan plan(params, {std::move(buffers)}, {std::move(scales), std::move(identities)}, groups, &first_steps,
            {std::move(averages), std::move(numbers), std::move(elements)});
  STD_TORCH_CHECK(
      plan.step(grads, table, {grad_scale, found_inf, clip, {}, 0}),
      "rep_sgd_step: parameters, gradients and buffers must be tensors on one device that share dtype, shape "
      "and strides; averages have the dtype that is computed in, and random bits are for bfloat16 alone");
}

// The cached plan of an optimizer. Its address is the handle, and the optimizer frees it.
template <typename Plan>
int64_t rep_sgd_plan(std::vector<Tensor> params, std::vector<std::optional<Tensor>> momentum_buffers,
                     std::vector<std::optional<Tensor>> scales, std::vector<std::optional<Tensor>> identities,
                     std::vector<int64_t> groups, std::optional<std::vector<std::optional<Tensor>>> averages,
                     std::optional<std::vector<int64_t>> numbers,
                     std::optional<std::vector<std::optional<Tensor>>> elements) {
  std::unique_ptr<PlannedStep> plan =
      std::make_unique<Plan>(params, typename Plan::States{std::move(momentum_buffers)},
                             GradMults{std::move(scales), std::move(identities)}, groups, nullptr,
                             TailColumns{std::move(averages), std::move(numbers), std::move(elements)});
  return reinterpret_cast<int64_t>(plan.release());
}

}  // namespace gradrep
