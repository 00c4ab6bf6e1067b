// The op `rep_grad_norm` on CUDA: kernels, launches and registration. What a block does is in rep_grad_norm_cuda.h, and
// the op's arguments in rep_grad_norm_cuda_op.h.
#include "mult_launch.h"
#include "rep_grad_norm_cuda_op.h"

namespace gradrep {
namespace {

template <typename S>
__global__ void __launch_bounds__(kThreads) grad_norm_kernel(const __grid_constant__ NormWork<S> work) {
  static_assert(sizeof(work) <= kMostParameters);
  __shared__ Arithmetic<S> shared[kThreads];
  norm_block(work, blockIdx.x, shared, ThisThread());
}

__global__ void __launch_bounds__(kThreads) norm_root_kernel(const __grid_constant__ RootWork work) {
  __shared__ double shared[kThreads];
  root_block(work, shared, ThisThread());
}

struct NormLauncher : MultLauncher {
  using MultLauncher::MultLauncher;
  using MultLauncher::operator();

  template <typename S>
  void operator()(const NormWork<S>& work) const {
    run(grad_norm_kernel<S>, work, work.blocks());
  }
  void operator()(const RootWork& work) const { run(norm_root_kernel, work, work.blocks()); }
};

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CUDA, m) {
  m.impl("rep_grad_norm", TORCH_BOX(&gradrep::rep_grad_norm<gradrep::NormLauncher>));
}
