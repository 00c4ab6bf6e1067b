// Displacements in groups that are counted together. No torch here.
#pragma once

#include "bins.h"

#include <algorithm>
#include <vector>

namespace gradrep {

// Where one displacement is the sum of two others, a, b = a + first and c = b + second make three pairs at once. In a
// group that says so the order is first, second, first + second, any other; and `first` points forwards in memory, so
// that going through b in the order of memory, from the first pixel of the images to `first` behind the last, meets
// every a.
struct DisplacementGroups {
  std::vector<int64_t> order;    // displacement numbers; every four are a group, the last may be smaller
  std::vector<bool> triangular;  // each group
};

inline DisplacementGroups group_displacements(const std::vector<Displacement>& displacements,
                                              std::vector<int64_t> left) {
  DisplacementGroups groups;
  const auto take = [&](const std::vector<int64_t>& chosen, bool triangular) {
    for (const int64_t d : chosen) left.erase(std::find(left.begin(), left.end(), d));
    groups.order.insert(groups.order.end(), chosen.begin(), chosen.end());
    groups.triangular.push_back(triangular);
  };
  const auto is_sum = [&](int64_t first, int64_t second, int64_t sum) {
    const Displacement &f = displacements[first], &s = displacements[second], &both = displacements[sum];
    return sum != first && sum != second && f.rows + s.rows == both.rows && f.columns + s.columns == both.columns;
  };
  const auto points_forwards = [&](int64_t d) {
    return displacements[d].rows > 0 || (displacements[d].rows == 0 && displacements[d].columns >= 0);
  };
  const auto take_triangle = [&] {
    if (left.size() < 4) return false;
    for (const int64_t first : left)
      for (const int64_t second : left)
        for (const int64_t sum : left) {
          if (first == second || !points_forwards(first) || !is_sum(first, second, sum)) continue;
          const auto other = std::find_if(left.rbegin(), left.rend(),
                                          [&](int64_t d) { return d != first && d != second && d != sum; });
          take({first, second, sum, *other}, true);
          return true;
        }
    return false;
  };
  while (take_triangle()) {
  }
  while (!left.empty()) take({left.begin(), left.begin() + std::min<size_t>(4, left.size())}, false);
  return groups;
}

}  // namespace gradrep
