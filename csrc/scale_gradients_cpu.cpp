// Gradients times one number, in one parallel region: reference/scale_gradients.py.
#include "pieces.h"
#include "rounding.h"
#include "step_tail.h"
#include "step_tensors.h"
#include "stored.h"
#include "targets.h"

#define GRADREP_LOOPS "tail_loops.h"
#include "for_each_target.h"

namespace gradrep {
namespace {

using TailLoops = PerTarget<base::TailLoops, avx2::TailLoops, avx512::TailLoops>;

struct Gradient {
  void* g;
  int32_t dtype;

  void scale(double by, int64_t begin, int64_t end) const {
    const auto scale_as = [&](auto* all) {
      using T = Arithmetic<std::remove_pointer_t<decltype(all)>>;
      TailLoops::on_best([&](auto loops) { loops.scale(all + begin, end - begin, static_cast<T>(by)); });
    };
    if (dtype == aoti_torch_dtype_float32())
      scale_as(static_cast<float*>(g));
    else if (dtype == aoti_torch_dtype_float64())
      scale_as(static_cast<double*>(g));
    else if (dtype == aoti_torch_dtype_bfloat16())
      scale_as(static_cast<BFloat16*>(g));
    else
      scale_as(static_cast<Half*>(g));
  }
};

void scale_gradients_cpu(std::vector<Tensor> grads, Tensor factor) {
  STD_TORCH_CHECK(is_number(factor), "scale_gradients_: factor must be one float32 or float64 number on the CPU");
  std::vector<Gradient> rows;
  std::vector<Extent> extents;
  Pieces pieces;
  const double by = read_number(factor);
  for (const Tensor& grad : grads) {
    const int32_t dtype = dtype_of(grad);
    STD_TORCH_CHECK(grad.is_cpu() && is_dense(to_sizes(grad.sizes()), to_sizes(grad.strides())) &&
                        (dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_float64() ||
                         dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float16()),
                    "scale_gradients_: gradients must be dense float32, float64, bfloat16 or float16 tensors on the "
                    "CPU");
    if (by == 1 || grad.numel() == 0) continue;
    auto* g = static_cast<char*>(grad.mutable_data_ptr());
    const auto bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)) * grad.numel();
    pieces.add(rows.size(), grad.numel(), 1);
    rows.push_back({g, dtype});
    extents.push_back({g, g + bytes, true});
  }
  pieces.run(share_memory(extents), [&](const Pieces::Piece& piece, size_t) {
    rows[piece.array].scale(by, piece.begin, piece.end);
  });
}

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CPU, m) {
  m.impl("scale_gradients_", TORCH_BOX(&gradrep::scale_gradients_cpu));
}
