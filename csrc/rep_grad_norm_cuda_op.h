// The op `rep_grad_norm` on CUDA, by tensors. Launcher is as step_cuda_plan.h says.
#pragma once

#include "cuda_mult.h"
#include "norm_launches.h"

namespace gradrep {

template <typename Launcher>
Tensor rep_grad_norm(std::vector<Tensor> grads, std::vector<std::optional<Tensor>> scales,
                     std::vector<std::optional<Tensor>> identities) {
  STD_TORCH_CHECK(!grads.empty() && scales.size() == grads.size() && identities.size() == grads.size(),
                  "rep_grad_norm: the lists must have one entry per gradient");
  const Launcher launch(grads[0]);
  NormLaunches launches;
  MultParts parts;
  RootWork root{};
  for (size_t k = 0; k < grads.size(); ++k) {
    const Tensor& grad = grads[k];
    STD_TORCH_CHECK(on_one_device(grads[0], grad) && is_dense(to_sizes(grad.sizes()), to_sizes(grad.strides())),
                    "rep_grad_norm: gradients must be dense tensors on one device");
    const bool known = launches.with(dtype_of(grad), [&]<typename S>(Launches<NormWork<S>>& of_dtype) {
      const auto mult = parts.place<Arithmetic<S>>(grad, scales[k], identities[k], launch);
      of_dtype.add(k, mult, launch.most_of_piece(), [](auto&, const Piece&) {});
      root.wide = root.wide || sizeof(S) == 8;
    });
    STD_TORCH_CHECK(known, "rep_grad_norm: gradients must be float32, float64, bfloat16 or float16");
  }
  launches.take_chunks();
  double* scratch = launch.template scratch<double>(launches.scratch());
  if (launch.capturing()) parts.keep_for_graph();
  Tensor norm = torch::stable::new_empty(
      grads[0], {}, root.wide ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float);
  root.norm = norm.mutable_data_ptr();
  launches.run(launch, grads, root, scratch);
  return norm;
}

}  // namespace gradrep
