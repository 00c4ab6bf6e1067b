// The arguments of the ops of AdamW summed over branches, on every device: a plan's class says which.
#pragma once

#include "branch_mult.h"
#include "rep_adamw_update.h"
#include "step_tensors.h"

#include <memory>

namespace gradrep {

// The twin of reference/rep_adamw_step.py.
template <typename Plan>
void rep_adamw_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                    std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs,
                    std::vector<std::optional<Tensor>> factors, std::vector<std::optional<Tensor>> identities,
                    std::vector<bool> first_steps, std::vector<int64_t> groups, Tensor hyper,
                    std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> clip,
                    std::optional<std::vector<std::optional<Tensor>>> averages,
                    std::optional<std::vector<int64_t>> numbers,
                    std::optional<std::vector<std::optional<Tensor>>> elements, std::optional<Tensor> tail) {
  STD_TORCH_CHECK(grads.size() == params.size(), "rep_adamw_step: the lists must have one entry per parameter");
  const HyperTable table = hyper_table("rep_adamw_step", hyper, AdamwUpdate::Hyper::kColumns, tail);
  const auto all = [](const std::vector<Tensor>& states) {
    return std::vector<std::optional<Tensor>>(states.begin(), states.end());
  };
  Plan plan(params, {all(exp_avgs), all(exp_avg_sqs), all(max_exp_avg_sqs)},
            {std::move(factors), std::move(identities)}, groups, &first_steps,
            {std::move(averages), std::move(numbers), std::move(elements)});
  STD_TORCH_CHECK(
      plan.step(grads, table, {grad_scale, found_inf, clip, {}, 0}),
      "rep_adamw_step: parameters, gradients and states must be tensors on one device that share dtype, shape and "
      "strides; averages have the dtype that is computed in, and random bits are for bfloat16 alone");
}

// The cached plan of an optimizer. Its address is the handle, and the optimizer frees it.
template <typename Plan>
int64_t rep_adamw_plan(std::vector<Tensor> params, std::vector<std::optional<Tensor>> exp_avgs,
                       std::vector<std::optional<Tensor>> exp_avg_sqs,
                       std::vector<std::optional<Tensor>> max_exp_avg_sqs, std::vector<std::optional<Tensor>> factors,
                       std::vector<std::optional<Tensor>> identities, std::vector<int64_t> groups,
                       std::optional<std::vector<std::optional<Tensor>>> averages,
                       std::optional<std::vector<int64_t>> numbers,
                       std::optional<std::vector<std::optional<Tensor>>> elements) {
  std::unique_ptr<PlannedStep> plan = std::make_unique<Plan>(
      params, typename Plan::States{std::move(exp_avgs), std::move(exp_avg_sqs), std::move(max_exp_avg_sqs)},
      BranchFactors{std::move(factors), std::move(identities)}, groups, nullptr,
      TailColumns{std::move(averages), std::move(numbers), std::move(elements)});
  return reinterpret_cast<int64_t>(plan.release());
}

}  // namespace gradrep
