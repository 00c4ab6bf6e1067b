// Checks of tensors and their dtypes, shared by the kernels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace gradrep {

using torch::stable::Tensor;

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

template <typename Array>
bool equal(const Array& array, const std::vector<int64_t>& expected) {
  return array.size() == expected.size() && std::equal(array.begin(), array.end(), expected.begin());
}

// No two elements share memory, and none of the memory between them is unused: kernels may walk it flat.
inline bool is_dense(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const size_t d : order) {
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// The one element of a float32 CPU tensor (grad_scale, found_inf).
inline float one_float(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && dtype_of(t) == aoti_torch_dtype_float32() && t.numel() == 1,
                  "grad_scale and found_inf must be one float32 number on the CPU");
  return *static_cast<const float*>(t.const_data_ptr());
}

}  // namespace gradrep
