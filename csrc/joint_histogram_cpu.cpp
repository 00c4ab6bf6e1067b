// The op `joint_histogram` on the CPU: arguments and registration; the loops are in joint_histogram_cpu.h.
#include "common.h"
#include "joint_histogram_cpu.h"
#include "pair_arguments.h"

namespace gradrep {
namespace {

Tensor joint_histogram_cpu(Tensor x, std::vector<int64_t> displacements, Tensor ranges, Tensor bins, int64_t max_bins, std::vector<int64_t> padding,
                           bool remove_near) {
  const auto pairs = check_pairs("joint_histogram", x, displacements, padding);
  const int64_t count = pairs.size();
  check_binning(x, count, ranges, bins, max_bins);
  ranges = torch::stable::contiguous(ranges);
  bins = torch::stable::contiguous(bins);
  const auto* numbers = static_cast<const int32_t*>(bins.const_data_ptr());
  STD_TORCH_CHECK(std::all_of(numbers, numbers + bins.numel(), [&](int32_t b) { return b >= 1 && b <= max_bins; }),
                  "joint_histogram: bins must be between 1 and max_bins");
  Tensor counts = torch::stable::new_empty(x, {x.size(1), count, max_bins, max_bins}, torch::headeronly::ScalarType::Long);
  visit_dtype("joint_histogram", x, [&](auto stored) {
    using S = decltype(stored);
    HistogramArguments<S> arguments{feature_map<S>(x), pairs, static_cast<const Arithmetic<S>*>(ranges.const_data_ptr()), numbers, max_bins, padding[0], padding[1],
                                    remove_near, static_cast<int64_t*>(counts.mutable_data_ptr())};
    joint_histogram(arguments, torch::stable::get_num_threads(), parallel);
  });
  return counts;
}

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CPU, m) { m.impl("joint_histogram", TORCH_BOX(&gradrep::joint_histogram_cpu)); }
