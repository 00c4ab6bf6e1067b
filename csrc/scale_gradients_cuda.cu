// The op `scale_gradients_` on CUDA: kernels, launches and registration. What a block does is in
// scale_gradients_cuda.h, and the op's arguments in scale_gradients_cuda_op.h.
#include "mult_launch.h"
#include "scale_gradients_cuda_op.h"

namespace gradrep {
namespace {

template <typename S>
__global__ void __launch_bounds__(kThreads) scale_gradients_kernel(const __grid_constant__ ScaleWork<S> work) {
  static_assert(sizeof(work) <= kMostParameters);
  scale_block(work, blockIdx.x, threadIdx.x);
}

struct ScaleLauncher : MultLauncher {
  using MultLauncher::MultLauncher;

  template <typename S>
  void operator()(const ScaleWork<S>& work) const {
    run(scale_gradients_kernel<S>, work, work.blocks());
  }
};

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CUDA, m) {
  m.impl("scale_gradients_", TORCH_BOX(&gradrep::scale_gradients_<gradrep::ScaleLauncher>));
}
