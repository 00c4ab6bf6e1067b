// The op `joint_histogram` on CUDA: kernels, launches, arguments and registration; what a block does is in joint_histogram_cuda.h.
#include "cuda_launch.h"
#include "joint_histogram_cuda.h"
#include "pair_arguments.h"

namespace gradrep {
namespace {

template <bool private_tables, typename S>
__global__ void __launch_bounds__(kThreads) joint_histogram_kernel(const __grid_constant__ HistogramWork<S> work) {
  extern __shared__ __align__(16) char shared[];
  joint_histogram_block<private_tables>(work, blockIdx.x, shared, ThisThread());
}

struct HistogramLauncher : Launcher {
  using Launcher::Launcher;

  template <typename S>
  void operator()(HistogramWork<S> work) const {
    const auto kernel = work.private_tables ? joint_histogram_kernel<true, S> : joint_histogram_kernel<false, S>;
    work.take_slabs(blocks_at_once(kernel, work.shared_bytes()));
    run(kernel, work, work.blocks(), work.shared_bytes());
  }
};

Tensor joint_histogram_cuda(Tensor x, std::vector<int64_t> displacements, Tensor ranges, Tensor bins, int64_t max_bins, std::vector<int64_t> padding,
                            bool remove_near) {
  const auto pairs = check_pairs("joint_histogram", x, displacements, padding);
  const auto count = static_cast<int64_t>(pairs.size());
  check_binning(x, count, ranges, bins, max_bins);
  ranges = torch::stable::contiguous(ranges);
  bins = torch::stable::contiguous(bins);
  Tensor counts = torch::stable::new_zeros(x, {x.size(1), count, max_bins, max_bins}, torch::headeronly::ScalarType::Long);
  const HistogramLauncher launch(x);
  visit_dtype("joint_histogram", x, [&](auto stored) {
    using S = decltype(stored);
    joint_histogram_launches(feature_map<S>(x), pairs, static_cast<const Arithmetic<S>*>(ranges.const_data_ptr()),
                             static_cast<const int32_t*>(bins.const_data_ptr()), max_bins, padding[0], padding[1], remove_near,
                             static_cast<int64_t*>(counts.mutable_data_ptr()), launch.most_shared(), launch);
  });
  return counts;
}

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CUDA, m) { m.impl("joint_histogram", TORCH_BOX(&gradrep::joint_histogram_cuda)); }
