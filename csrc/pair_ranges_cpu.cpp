// The op `pair_ranges` on the CPU: arguments and registration; the loops are in pair_ranges_cpu.h.
#include "common.h"
#include "pair_arguments.h"
#include "pair_ranges_cpu.h"

namespace gradrep {
namespace {

std::tuple<Tensor, Tensor> pair_ranges_cpu(Tensor x, std::vector<int64_t> displacements, std::vector<int64_t> padding,
                                           bool remove_near) {
  const auto pairs = check_pairs("pair_ranges", x, displacements, padding);
  const int64_t count = pairs.size();
  Tensor ranges = torch::stable::new_empty(x, {x.size(1), count, 2, 2}, arithmetic_dtype(x));
  Tensor n = torch::stable::new_empty(x, {x.size(1), count}, torch::headeronly::ScalarType::Long);
  visit_dtype("pair_ranges", x, [&](auto stored) {
    using S = decltype(stored);
    RangeArguments<S> arguments{feature_map<S>(x),
                                pairs,
                                padding[0],
                                padding[1],
                                remove_near,
                                static_cast<Arithmetic<S>*>(ranges.mutable_data_ptr()),
                                static_cast<int64_t*>(n.mutable_data_ptr())};
    pair_ranges(arguments, torch::stable::get_num_threads(), parallel);
  });
  return {ranges, n};
}

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CPU, m) { m.impl("pair_ranges", TORCH_BOX(&gradrep::pair_ranges_cpu)); }
