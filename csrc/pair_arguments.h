// What the ops over pairs of pixels check and unpack, on every device.
#pragma once

#include "common.h"
#include "feature_map.h"

#include <string>
#include <tuple>

namespace gradrep {

// A map [N, C, H, W], displacements (di0, dj0, di1, dj1, ...) and padding (rows, columns) that the kernels can take.
inline std::vector<Displacement> check_pairs(const std::string& op, const Tensor& x,
                                             const std::vector<int64_t>& displacements,
                                             const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(x.dim() == 4, op + ": x must be a map [N, C, H, W]");
  STD_TORCH_CHECK(displacements.size() % 2 == 0, op + ": displacements must be pairs (rows, columns)");
  STD_TORCH_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0,
                  op + ": padding must be two numbers, none below 0");
  constexpr int64_t most = int64_t{1} << 30;  // pixels of a padded plane
  const int64_t height = x.size(2) + 2 * std::min(padding[0], most), width = x.size(3) + 2 * std::min(padding[1], most);
  STD_TORCH_CHECK(height < most && width < most && height * width < most,
                  op + ": x must have fewer than 2^30 pixels in a padded plane");
  std::vector<Displacement> pairs;
  for (size_t i = 0; i < displacements.size(); i += 2) pairs.push_back({displacements[i], displacements[i + 1]});
  return pairs;
}

inline torch::headeronly::ScalarType arithmetic_dtype(const Tensor& x) {
  return dtype_of(x) == aoti_torch_dtype_float64() ? torch::headeronly::ScalarType::Double
                                                   : torch::headeronly::ScalarType::Float;
}

inline int32_t arithmetic_code(const Tensor& x) {
  return dtype_of(x) == aoti_torch_dtype_float64() ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// ranges [C, D, 2, 2] in the arithmetic dtype and n [C, D], where x is, not written yet.
inline std::tuple<Tensor, Tensor> empty_ranges(const Tensor& x, int64_t displacements) {
  return {torch::stable::new_empty(x, {x.size(1), displacements, 2, 2}, arithmetic_dtype(x)),
          torch::stable::new_empty(x, {x.size(1), displacements}, torch::headeronly::ScalarType::Long)};
}

inline int64_t* numbers_of(const std::optional<Tensor>& n) {
  return n.has_value() ? static_cast<int64_t*>(n->mutable_data_ptr()) : nullptr;
}

// Ends, and numbers of pairs if they are asked for, that are written through a pointer.
inline void check_ends(const Tensor& x, int64_t displacements, const Tensor& ends, const std::optional<Tensor>& n) {
  STD_TORCH_CHECK(dtype_of(ends) == arithmetic_code(x) && equal(ends.sizes(), {x.size(1), displacements, 2, 2}) &&
                      ends.is_contiguous() && on_one_device(x, ends),
                  "pair_ranges_: ends must be contiguous [C, D, 2, 2] where x is, float64 for a float64 map, else "
                  "float32");
  STD_TORCH_CHECK(
      !n.has_value() || (dtype_of(*n) == aoti_torch_dtype_int64() && equal(n->sizes(), {x.size(1), displacements}) &&
                         n->is_contiguous() && on_one_device(x, *n)),
      "pair_ranges_: n must be contiguous int64 [C, D], where x is");
}

// ranges [C, D, 2, 2] in the arithmetic dtype, bins [C, D] int32, both where x is.
inline void check_binning(const Tensor& x, int64_t displacements, const Tensor& ranges, const Tensor& bins) {
  STD_TORCH_CHECK(dtype_of(ranges) == arithmetic_code(x) && equal(ranges.sizes(), {x.size(1), displacements, 2, 2}),
                  "joint_histogram: ranges must be [C, D, 2, 2], float64 for a float64 map, else float32");
  STD_TORCH_CHECK(dtype_of(bins) == aoti_torch_dtype_int32() && equal(bins.sizes(), {x.size(1), displacements}),
                  "joint_histogram: bins must be int32 [C, D]");
  STD_TORCH_CHECK(on_one_device(x, ranges) && on_one_device(x, bins),
                  "joint_histogram: x, ranges and bins must be on one device");
}

// Of the counts, [C, D, max_bins, max_bins].
inline std::vector<int64_t> counts_sizes(const Tensor& x, int64_t displacements, int64_t max_bins) {
  STD_TORCH_CHECK(max_bins >= 1 && max_bins <= kMaxBins,
                  "joint_histogram: max_bins must be between 1 and " + std::to_string(kMaxBins));
  return {x.size(1), displacements, max_bins, max_bins};
}

// Counts that are written through a pointer.
inline void check_counts(const Tensor& x, int64_t displacements, const Tensor& counts) {
  STD_TORCH_CHECK(counts.dim() == 4 && equal(counts.sizes(), counts_sizes(x, displacements, counts.size(3))) &&
                      counts.is_contiguous() && dtype_of(counts) == aoti_torch_dtype_int64() &&
                      on_one_device(x, counts),
                  "joint_histogram_: counts must be contiguous int64 [C, D, B, B], where x is");
}

// visit(S()) with S the stored type of x.
template <typename Visit>
void visit_dtype(const std::string& op, const Tensor& x, const Visit& visit) {
  const int32_t dtype = dtype_of(x);
  if (dtype == aoti_torch_dtype_float32()) return visit(float());
  if (dtype == aoti_torch_dtype_float64()) return visit(double());
  if (dtype == aoti_torch_dtype_bfloat16()) return visit(BFloat16());
  if (dtype == aoti_torch_dtype_float16()) return visit(Half());
  STD_TORCH_CHECK(false, op + ": x must be float32, float64, bfloat16 or float16");
}

template <typename S>
FeatureMap<S> feature_map(const Tensor& x) {
  return {static_cast<const S*>(x.const_data_ptr()),
          x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          x.stride(0),
          x.stride(1),
          x.stride(2),
          x.stride(3)};
}

// f() about n times at once.
constexpr auto parallel = [](int64_t n, const auto& f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) f();
  });
};

}  // namespace gradrep
