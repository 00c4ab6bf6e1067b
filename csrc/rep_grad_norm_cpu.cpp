// √(Σ M ⊙ g²) in one pass over the gradients: reference/rep_grad_norm.py.
#include "rep_grad_norm_cpu.h"
#include "pieces.h"

namespace gradrep {
namespace {

struct Gradient {
  const void* g;
  int32_t dtype;
  Multiplier<float> mult32;
  Multiplier<double> mult64;
};

Tensor rep_grad_norm_cpu(std::vector<Tensor> grads, std::vector<std::optional<Tensor>> scales,
                         std::vector<std::optional<Tensor>> identities) {
  STD_TORCH_CHECK(!grads.empty() && scales.size() == grads.size() && identities.size() == grads.size(),
                  "rep_grad_norm: the lists must have one entry per gradient");
  std::vector<Gradient> rows(grads.size());
  Pieces pieces;
  bool wide = false;
  for (size_t k = 0; k < grads.size(); ++k) {
    const Sizes sizes = to_sizes(grads[k].sizes()), strides = to_sizes(grads[k].strides());
    Gradient& row = rows[k];
    row.dtype = dtype_of(grads[k]);
    STD_TORCH_CHECK(grads[k].is_cpu() && is_dense(sizes, strides) &&
                        (row.dtype == aoti_torch_dtype_float32() || row.dtype == aoti_torch_dtype_float64() ||
                         row.dtype == aoti_torch_dtype_bfloat16() || row.dtype == aoti_torch_dtype_float16()),
                    "rep_grad_norm: gradients must be dense float32, float64, bfloat16 or float16 tensors on the CPU");
    row.g = grads[k].const_data_ptr();
    if (row.dtype == aoti_torch_dtype_float64()) {
      wide = true;
      row.mult64 = Multiplier<double>(scales[k], identities[k], sizes, strides);
    } else {
      row.mult32 = Multiplier<float>(scales[k], identities[k], sizes, strides);
    }
    pieces.add(k, grads[k].numel(), std::max(row.mult32.period(), row.mult64.period()));
  }
  const double norm = std::sqrt(pieces.sum([&](const Pieces::Piece& piece) {
    const Gradient& row = rows[piece.array];
    return sum_of_squares(row.g, row.dtype, row.mult32, row.mult64, piece.begin, piece.end);
  }));
  Tensor result = torch::stable::new_empty(
      grads[0], {}, wide ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float);
  write_number(result, norm);
  return result;
}

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CPU, m) { m.impl("rep_grad_norm", TORCH_BOX(&gradrep::rep_grad_norm_cpu)); }
