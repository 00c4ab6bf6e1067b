// The op `scale_gradients_` on CUDA, by tensors. Launcher is as step_cuda_plan.h says.
#pragma once

#include "cuda_mult.h"
#include "per_dtype.h"
#include "scale_gradients_cuda.h"
#include "step_tensors.h"

namespace gradrep {

template <typename S>
using ScaleLaunches = Launches<ScaleWork<S>>;

template <typename Launcher>
void scale_gradients_(std::vector<Tensor> grads, Tensor factor) {
  if (grads.empty()) return;
  std::vector<Extent> extents;
  for (const Tensor& grad : grads) {
    const auto* begin = static_cast<const char*>(grad.const_data_ptr());
    if (grad.numel() > 0)
      extents.push_back({begin, begin + grad.numel() * aoti_torch_dtype_element_size(dtype_of(grad)), true});
  }
  if (grads.size() > 1 && share_memory(extents)) {  // blocks of one launch run in any order
    for (const Tensor& grad : grads) scale_gradients_<Launcher>({grad}, factor);
    return;
  }
  const Launcher launch(grads[0]);
  PerDtype<ScaleLaunches> launches;
  for (size_t k = 0; k < grads.size(); ++k) {
    const Shape shape{to_sizes(grads[k].sizes()), to_sizes(grads[k].strides())};
    STD_TORCH_CHECK(on_one_device(grads[0], grads[k]) && is_dense(shape.sizes, shape.strides),
                    "scale_gradients_: gradients must be dense tensors on one device");
    const bool known = launches.with(dtype_of(grads[k]), [&]<typename S>(Launches<ScaleWork<S>>& of_dtype) {
      const PlacedMult<Arithmetic<S>> none{address_without_multiplier(shape)};
      of_dtype.add(k, none, launch.most_of_piece(), [&](ScaleRow<S>& row, const Piece& piece) {
        row.grad = static_cast<S*>(grads[k].mutable_data_ptr()) + piece.start;
        row.aligned = reinterpret_cast<uintptr_t>(row.grad) % 16 == 0;
      });
    });
    STD_TORCH_CHECK(known, "scale_gradients_: gradients must be float32, float64, bfloat16 or float16");
  }
  OneNumber number("scale_gradients_: factor", factor, grads[0]);
  launches.each([&]<typename S>(Launches<ScaleWork<S>>& of_dtype) {
    of_dtype.each([&](ScaleWork<S>& work) {
      work.factor = number.as<Arithmetic<S>>();
      work.take_chunks();
      launch(work);
    });
  });
}

}  // namespace gradrep
