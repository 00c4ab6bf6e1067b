// The ops `pair_ranges` and `pair_ranges_` on CUDA: kernels, launches, arguments and registration; what a block does is
// in pair_ranges_cuda.h.
#include "cuda_launch.h"
#include "pair_arguments.h"
#include "pair_ranges_cuda.h"

namespace gradrep {
namespace {

template <typename S>
__global__ void __launch_bounds__(kThreads) channel_ranges_kernel(const __grid_constant__ ChannelWork<S> work) {
  extern __shared__ __align__(16) char shared[];
  channel_ranges_block(work, blockIdx.x, shared, ThisThread());
}

template <typename S>
__global__ void __launch_bounds__(kThreads) image_extrema_kernel(const __grid_constant__ ExtremaWork<S> work) {
  image_extrema(work, blockIdx.x, threadIdx.x);
}

// Of a multiprocessor. Within the 64 registers of four blocks, doubles would spill.
template <typename S>
constexpr int kBlocksAtOnce = sizeof(Arithmetic<S>) == 8 ? 2 : 4;

template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<S>)
    pair_ranges_kernel(const __grid_constant__ RangeWork<S> work) {
  extern __shared__ __align__(16) char shared[];
  pair_ranges_block(work, blockIdx.x, shared, ThisThread());
}

template <typename T>
__global__ void __launch_bounds__(kThreads) set_numbers_kernel(const __grid_constant__ NumberWork<T> work) {
  set_numbers(work, blockIdx.x, threadIdx.x);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) ends_to_ranges_kernel(const __grid_constant__ FinalWork<T> work) {
  ends_to_ranges(work, blockIdx.x, threadIdx.x);
}

struct RangeLauncher : Launcher {
  using Launcher::Launcher;

  template <typename S>
  void operator()(const ChannelWork<S>& work) const {
    run(channel_ranges_kernel<S>, work, work.blocks(), work.shared_bytes());
  }
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
  void operator()(const NumberWork<T>& work) const {
    run(set_numbers_kernel<T>, work, work.blocks());
  }
  template <typename T>
  void operator()(const FinalWork<T>& work) const {
    run(ends_to_ranges_kernel<T>, work, work.blocks());
  }
};

void pair_ranges_add_cuda(Tensor ends, std::optional<Tensor> n, Tensor x, std::vector<int64_t> displacements,
                          std::vector<int64_t> padding, bool remove_near) {
  const auto pairs = check_pairs("pair_ranges_", x, displacements, padding);
  check_ends(x, pairs.size(), ends, n);
  const RangeLauncher launch(x);
  visit_dtype("pair_ranges_", x, [&](auto stored) {
    using S = decltype(stored);
    pair_ranges_add_launches(feature_map<S>(x), {pairs, padding[0], padding[1], remove_near},
                             static_cast<Arithmetic<S>*>(ends.mutable_data_ptr()), numbers_of(n), launch);
  });
}

std::tuple<Tensor, Tensor> pair_ranges_cuda(Tensor x, std::vector<int64_t> displacements, std::vector<int64_t> padding,
                                            bool remove_near) {
  const auto pairs = check_pairs("pair_ranges", x, displacements, padding);
  auto [ranges, n] = empty_ranges(x, pairs.size());
  const RangeLauncher launch(x);
  visit_dtype("pair_ranges", x, [&, &ranges = ranges, &n = n](auto stored) {
    using S = decltype(stored);
    pair_ranges_launches(feature_map<S>(x), {pairs, padding[0], padding[1], remove_near},
                         static_cast<Arithmetic<S>*>(ranges.mutable_data_ptr()),
                         static_cast<int64_t*>(n.mutable_data_ptr()), launch);
  });
  return {ranges, n};
}

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CUDA, m) {
  m.impl("pair_ranges", TORCH_BOX(&gradrep::pair_ranges_cuda));
  m.impl("pair_ranges_", TORCH_BOX(&gradrep::pair_ranges_add_cuda));
}
