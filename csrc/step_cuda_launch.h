// The kernels of a step and their launches, for the .cu file of any optimizer.
#pragma once

#include "rep_grad_norm_cuda_launch.h"
#include "step_cuda.h"

namespace gradrep {

// Four blocks of a multiprocessor: 64 registers. 49 KB are on their way then, twice what memory at 4.3 TB/s needs. With
// three states it is two blocks, 128 registers and 32 KB.
template <typename Update>
constexpr int kStepBlocks = Update::kStates > 2 ? 2 : 4;

template <typename Update, typename S, TailKind kKind>
__global__ void __launch_bounds__(kThreads, kStepBlocks<Update>)
    step_kernel(const __grid_constant__ StepWork<Update, S> work) {
  static_assert(sizeof(work) <= kMostParameters);
  step_block<kKind>(work, blockIdx.x, threadIdx.x);
}

template <typename Update>
__global__ void __launch_bounds__(kThreads) pack_hyper_kernel(const __grid_constant__ PackWork<Update> work) {
  work.pack(threadIdx.x);
}

struct StepLauncher : NormLauncher {
  using NormLauncher::NormLauncher;
  using NormLauncher::operator();

  template <typename Update, typename S>
  void operator()(const StepWork<Update, S>& work) const {
    with_kind(work.kind, [&](auto kind) { run(step_kernel<Update, S, kind()>, work, work.blocks()); });
  }
  template <typename Update>
  void operator()(const PackWork<Update>& work) const {
    run(pack_hyper_kernel<Update>, work, work.blocks());
  }
};

}  // namespace gradrep
