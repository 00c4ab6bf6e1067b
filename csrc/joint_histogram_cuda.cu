// The ops `joint_histogram` and `joint_histogram_` on CUDA: kernels, launches, arguments, registration; the blocks are
// in joint_histogram_cuda.h.
#include "cuda_launch.h"
#include "joint_histogram_cuda.h"
#include "pair_arguments.h"

namespace gradrep {
namespace {

// Four blocks of a multiprocessor: 64 registers.
template <typename Counting, typename S>
__global__ void __launch_bounds__(kThreads, 4) joint_histogram_kernel(const __grid_constant__ HistogramWork<S> work) {
  extern __shared__ __align__(16) char shared[];
  joint_histogram_block<Counting>(work, blockIdx.x, shared, ThisThread());
}

struct HistogramLauncher : Launcher {
  using Launcher::Launcher;

  template <typename S>
  void operator()(HistogramWork<S> work) const {
    const auto kernel =
        visit_counting(work, [](auto counting) { return &joint_histogram_kernel<decltype(counting), S>; });
    work.take_slabs(blocks_at_once(kernel, work.shared_bytes()));
    run(kernel, work, work.blocks(), work.shared_bytes());
  }
};

void joint_histogram_add_cuda(Tensor counts, Tensor x, std::vector<int64_t> displacements, Tensor ranges, Tensor bins,
                              std::vector<int64_t> padding, bool remove_near) {
  const auto pairs = check_pairs("joint_histogram_", x, displacements, padding);
  check_counts(x, pairs.size(), counts);
  check_binning(x, pairs.size(), ranges, bins);
  ranges = torch::stable::contiguous(ranges);
  bins = torch::stable::contiguous(bins);
  const HistogramLauncher launch(x);
  visit_dtype("joint_histogram", x, [&](auto stored) {
    using S = decltype(stored);
    joint_histogram_launches(feature_map<S>(x), pairs, static_cast<const Arithmetic<S>*>(ranges.const_data_ptr()),
                             static_cast<const int32_t*>(bins.const_data_ptr()), counts.size(3), padding[0], padding[1],
                             remove_near, static_cast<int64_t*>(counts.mutable_data_ptr()), launch.most_shared(),
                             launch);
  });
}

Tensor joint_histogram_cuda(Tensor x, std::vector<int64_t> displacements, Tensor ranges, Tensor bins, int64_t max_bins,
                            std::vector<int64_t> padding, bool remove_near) {
  const auto pairs = check_pairs("joint_histogram", x, displacements, padding);
  Tensor counts =
      torch::stable::new_zeros(x, counts_sizes(x, pairs.size(), max_bins), torch::headeronly::ScalarType::Long);
  joint_histogram_add_cuda(counts, x, displacements, ranges, bins, padding, remove_near);
  return counts;
}

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CUDA, m) {
  m.impl("joint_histogram", TORCH_BOX(&gradrep::joint_histogram_cuda));
  m.impl("joint_histogram_", TORCH_BOX(&gradrep::joint_histogram_add_cuda));
}
