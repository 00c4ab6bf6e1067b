// The op `pair_ranges` on CUDA: kernels, launches, arguments and registration; what a block does is in
// pair_ranges_cuda.h.
#include "cuda_launch.h"
#include "pair_arguments.h"
#include "pair_ranges_cuda.h"

namespace gradrep {
namespace {

template <typename S>
__global__ void __launch_bounds__(kThreads) image_extrema_kernel(const __grid_constant__ ExtremaWork<S> work) {
  image_extrema(work, blockIdx.x, threadIdx.x);
}

template <typename S>
__global__ void __launch_bounds__(kThreads) pair_ranges_kernel(const __grid_constant__ RangeWork<S> work) {
  extern __shared__ __align__(16) char shared[];
  pair_ranges_block(work, blockIdx.x, shared, ThisThread());
}

template <typename T>
__global__ void __launch_bounds__(kThreads) keys_to_ranges_kernel(const __grid_constant__ KeyWork<T> work) {
  keys_to_ranges(work, blockIdx.x, threadIdx.x);
}

struct RangeLauncher : Launcher {
  using Launcher::Launcher;

  template <typename S>
  void operator()(const ExtremaWork<S>& work) const {
    run(image_extrema_kernel<S>, work, work.blocks());
  }
  template <typename S>
  void operator()(RangeWork<S> work) const {
    work.take_slabs(blocks_at_once(pair_ranges_kernel<S>, work.shared_bytes()));
    run(pair_ranges_kernel<S>, work, work.blocks(), work.shared_bytes());
  }
  template <typename T>
  void operator()(const KeyWork<T>& work) const {
    run(keys_to_ranges_kernel<T>, work, work.blocks());
  }
};

std::tuple<Tensor, Tensor> pair_ranges_cuda(Tensor x, std::vector<int64_t> displacements, std::vector<int64_t> padding,
                                            bool remove_near) {
  const auto pairs = check_pairs("pair_ranges", x, displacements, padding);
  const auto count = static_cast<int64_t>(pairs.size());
  Tensor ranges = torch::stable::new_zeros(x, {x.size(1), count, 2, 2}, arithmetic_dtype(x));
  Tensor n = torch::stable::new_zeros(x, {x.size(1), count}, torch::headeronly::ScalarType::Long);
  const RangeLauncher launch(x);
  visit_dtype("pair_ranges", x, [&](auto stored) {
    using S = decltype(stored);
    pair_ranges_launches(feature_map<S>(x), pairs, padding[0], padding[1], remove_near,
                         static_cast<Arithmetic<S>*>(ranges.mutable_data_ptr()),
                         static_cast<int64_t*>(n.mutable_data_ptr()), launch);
  });
  return {ranges, n};
}

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CUDA, m) { m.impl("pair_ranges", TORCH_BOX(&gradrep::pair_ranges_cuda)); }
