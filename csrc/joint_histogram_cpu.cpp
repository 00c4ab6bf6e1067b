// The ops `joint_histogram` and `joint_histogram_` on the CPU: arguments and registration; the loops are in
// joint_histogram_cpu.h.
#include "common.h"
#include "joint_histogram_cpu.h"
#include "pair_arguments.h"

namespace gradrep {
namespace {

void count_into(Tensor& counts, bool add, const Tensor& x, const std::vector<Displacement>& pairs, Tensor ranges,
                Tensor bins, const std::vector<int64_t>& padding, bool remove_near) {
  check_binning(x, pairs.size(), ranges, bins);
  ranges = torch::stable::contiguous(ranges);
  bins = torch::stable::contiguous(bins);
  const auto* numbers = static_cast<const int32_t*>(bins.const_data_ptr());
  const int64_t max_bins = counts.size(3);
  STD_TORCH_CHECK(std::all_of(numbers, numbers + bins.numel(), [&](int32_t b) { return b >= 1 && b <= max_bins; }),
                  "joint_histogram: bins must be between 1 and max_bins");
  visit_dtype("joint_histogram", x, [&](auto stored) {
    using S = decltype(stored);
    HistogramArguments<S> arguments{feature_map<S>(x),
                                    pairs,
                                    static_cast<const Arithmetic<S>*>(ranges.const_data_ptr()),
                                    numbers,
                                    max_bins,
                                    padding[0],
                                    padding[1],
                                    remove_near,
                                    static_cast<int64_t*>(counts.mutable_data_ptr()),
                                    add};
    joint_histogram(arguments, torch::stable::get_num_threads(), parallel);
  });
}

Tensor joint_histogram_cpu(Tensor x, std::vector<int64_t> displacements, Tensor ranges, Tensor bins, int64_t max_bins,
                           std::vector<int64_t> padding, bool remove_near) {
  const auto pairs = check_pairs("joint_histogram", x, displacements, padding);
  Tensor counts =
      torch::stable::new_empty(x, counts_sizes(x, pairs.size(), max_bins), torch::headeronly::ScalarType::Long);
  count_into(counts, false, x, pairs, ranges, bins, padding, remove_near);
  return counts;
}

void joint_histogram_add_cpu(Tensor counts, Tensor x, std::vector<int64_t> displacements, Tensor ranges, Tensor bins,
                             std::vector<int64_t> padding, bool remove_near) {
  const auto pairs = check_pairs("joint_histogram_", x, displacements, padding);
  check_counts(x, pairs.size(), counts);
  count_into(counts, true, x, pairs, ranges, bins, padding, remove_near);
}

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CPU, m) {
  m.impl("joint_histogram", TORCH_BOX(&gradrep::joint_histogram_cpu));
  m.impl("joint_histogram_", TORCH_BOX(&gradrep::joint_histogram_add_cpu));
}
