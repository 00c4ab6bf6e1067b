// The course of a multiplier through its parameter's memory, as levels: nested loops, each with its stride of scale.
// No torch here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace gradrep {

using Sizes = std::vector<int64_t>;

struct Level {
  int64_t size, stride;  // of scale, in elements; 0 where it is broadcast
};

// The dimensions whose size is not 1, from the outermost to the innermost in memory.
inline std::vector<size_t> memory_order(const Sizes& sizes, const Sizes& strides) {
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  return order;
}

// The strides of a scale along the dimensions of a parameter; nothing where it does not broadcast to it.
inline std::optional<Sizes> broadcast_strides(const Sizes& sizes, const Sizes& scale_sizes,
                                              const Sizes& scale_strides) {
  if (scale_sizes.size() > sizes.size()) return std::nullopt;
  const size_t lacking = sizes.size() - scale_sizes.size();
  Sizes along(sizes.size(), 0);
  for (size_t d = lacking; d < sizes.size(); ++d) {
    const int64_t n = scale_sizes[d - lacking];
    if (n != 1 && n != sizes[d]) return std::nullopt;
    if (n != 1) along[d] = scale_strides[d - lacking];
  }
  return along;
}

// Levels in place of dimensions: neighbours that one stride serves are one.
inline std::vector<Level> merged_levels(const std::vector<size_t>& order, const Sizes& sizes, const Sizes& along) {
  std::vector<Level> levels;
  for (const size_t d : order) {
    if (!levels.empty() && levels.back().stride == along[d] * sizes[d])
      levels.back() = {levels.back().size * sizes[d], along[d]};
    else
      levels.push_back({sizes[d], along[d]});
  }
  return levels;
}

}  // namespace gradrep
