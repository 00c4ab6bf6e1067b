// Checks of tensors and their dtypes, shared by the kernels.
#pragma once

#include "levels.h"

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
Sizes to_sizes(const Array& array) {
  return Sizes(array.begin(), array.end());
}

template <typename Array>
bool equal(const Array& array, const std::vector<int64_t>& expected) {
  return array.size() == expected.size() && std::equal(array.begin(), array.end(), expected.begin());
}

// No two elements share memory, and none of the memory between them is unused: kernels may walk it flat.
inline bool is_dense(const Sizes& sizes, const Sizes& strides) {
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return true;
  const auto order = memory_order(sizes, strides);
  int64_t expected = 1;
  for (size_t n = order.size(); n-- > 0; expected *= sizes[order[n]])
    if (strides[order[n]] != expected) return false;
  return true;
}

inline bool on_one_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device() == b.get_device();
}

// The one element of a float32 CPU tensor (grad_scale, found_inf).
inline float one_float(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && dtype_of(t) == aoti_torch_dtype_float32() && t.numel() == 1,
                  "grad_scale and found_inf must be one float32 number on the CPU");
  return *static_cast<const float*>(t.const_data_ptr());
}

// A float32 or float64 CPU tensor of one element.
inline bool is_number(const Tensor& t) {
  return t.is_cpu() && t.numel() == 1 &&
         (dtype_of(t) == aoti_torch_dtype_float32() || dtype_of(t) == aoti_torch_dtype_float64());
}
inline double read_number(const Tensor& t) {
  const void* data = t.const_data_ptr();
  return dtype_of(t) == aoti_torch_dtype_float64() ? *static_cast<const double*>(data)
                                                   : *static_cast<const float*>(data);
}
inline void write_number(const Tensor& t, double value) {
  void* data = t.mutable_data_ptr();
  if (dtype_of(t) == aoti_torch_dtype_float64())
    *static_cast<double*>(data) = value;
  else
    *static_cast<float*>(data) = static_cast<float>(value);
}

}  // namespace gradrep
