// The op `rep_grad_norm` on CUDA, by tensors. Launcher is as step_cuda_plan.h says.
#pragma once

#include "cuda_mult.h"
#include "rep_grad_norm_cuda.h"

#include <tuple>

namespace gradrep {

template <typename Launcher>
Tensor rep_grad_norm(std::vector<Tensor> grads, std::vector<std::optional<Tensor>> scales,
                     std::vector<std::optional<Tensor>> identities) {
  STD_TORCH_CHECK(!grads.empty() && scales.size() == grads.size() && identities.size() == grads.size(),
                  "rep_grad_norm: the lists must have one entry per gradient");
  const Launcher launch(grads[0]);
  std::tuple<Launches<NormWork<float>>, Launches<NormWork<double>>, Launches<NormWork<BFloat16>>,
             Launches<NormWork<Half>>>
      launches;
  MultParts parts;
  for (size_t k = 0; k < grads.size(); ++k) {
    const Tensor& grad = grads[k];
    STD_TORCH_CHECK(on_one_device(grads[0], grad) && is_dense(to_sizes(grad.sizes()), to_sizes(grad.strides())),
                    "rep_grad_norm: gradients must be dense tensors on one device");
    const auto add = [&]<typename S>(Launches<NormWork<S>>& of_dtype) {
      const auto mult = parts.place<Arithmetic<S>>(grad, scales[k], identities[k], launch);
      for (const Piece& piece : pieces_of(mult.address, launch.most_of_piece())) {
        auto& row = of_dtype.new_row();
        row.take(piece, mult.scale, mult.identity);
        row.grad = static_cast<const S*>(grad.const_data_ptr()) + piece.start;
        row.aligned = reinterpret_cast<uintptr_t>(row.grad) % 16 == 0;
      }
    };
    const int32_t dtype = dtype_of(grad);
    if (dtype == aoti_torch_dtype_float32())
      add(std::get<0>(launches));
    else if (dtype == aoti_torch_dtype_float64())
      add(std::get<1>(launches));
    else if (dtype == aoti_torch_dtype_bfloat16())
      add(std::get<2>(launches));
    else if (dtype == aoti_torch_dtype_float16())
      add(std::get<3>(launches));
    else
      STD_TORCH_CHECK(false, "rep_grad_norm: gradients must be float32, float64, bfloat16 or float16");
  }
  const auto each = [&](const auto& f) { std::apply([&](auto&... of_dtype) { (of_dtype.each(f), ...); }, launches); };
  RootWork root{};
  each([&]<typename S>(NormWork<S>& work) {
    work.take_chunks();
    (sizeof(S) == 8 ? root.count_of_doubles : root.count_of_floats) += work.blocks();
  });
  for (const Tensor& grad : grads) root.wide = root.wide || dtype_of(grad) == aoti_torch_dtype_float64();
  double* doubles = launch.template scratch<double>(root.count_of_doubles + (root.count_of_floats + 1) / 2);
  auto* floats = reinterpret_cast<float*>(doubles + root.count_of_doubles);
  root.doubles = doubles;
  root.floats = floats;
  if (launch.capturing()) parts.keep_for_graph();
  each([&]<typename S>(NormWork<S>& work) {
    if constexpr (sizeof(S) == 8)
      work.partials = doubles, doubles += work.blocks();
    else
      work.partials = floats, floats += work.blocks();
    launch(work);
  });
  Tensor norm = torch::stable::new_empty(
      grads[0], {}, root.wide ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float);
  root.norm = norm.mutable_data_ptr();
  launch(root);
  return norm;
}

}  // namespace gradrep
