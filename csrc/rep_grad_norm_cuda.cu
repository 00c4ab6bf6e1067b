// The op `rep_grad_norm` on CUDA: kernels, launches and registration. What a block does is in rep_grad_norm_cuda.h, and
// the op's arguments in rep_grad_norm_cuda_op.h.
#include "rep_grad_norm_cuda_launch.h"
#include "rep_grad_norm_cuda_op.h"

namespace gradrep {
namespace {

// Four blocks of a multiprocessor. Left to itself, the compiler keeps to 32 registers, and spills.
template <typename S>
__global__ void __launch_bounds__(kThreads, 4) grad_norm_kernel(const __grid_constant__ NormWork<S> work) {
  static_assert(sizeof(work) <= kMostParameters);
  __shared__ Arithmetic<S> shared[kThreads];
  norm_block(work, blockIdx.x, shared, ThisThread());
}

__global__ void __launch_bounds__(kThreads) norm_root_kernel(const __grid_constant__ RootWork work) {
  __shared__ double shared[kThreads];
  root_block(work, shared, ThisThread());
}

}  // namespace

void NormLauncher::operator()(const NormWork<float>& work) const { run(grad_norm_kernel<float>, work, work.blocks()); }
void NormLauncher::operator()(const NormWork<double>& work) const {
  run(grad_norm_kernel<double>, work, work.blocks());
}
void NormLauncher::operator()(const NormWork<BFloat16>& work) const {
  run(grad_norm_kernel<BFloat16>, work, work.blocks());
}
void NormLauncher::operator()(const NormWork<Half>& work) const { run(grad_norm_kernel<Half>, work, work.blocks()); }
void NormLauncher::operator()(const RootWork& work) const { run(norm_root_kernel, work, work.blocks()); }

}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CUDA, m) {
  m.impl("rep_grad_norm", TORCH_BOX(&gradrep::rep_grad_norm<gradrep::NormLauncher>));
}
