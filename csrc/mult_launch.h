// Launches for the ops over parameters: what copies of their multipliers need.
#pragma once

#include "cuda_launch.h"
#include "mult_places.h"

namespace gradrep {

template <typename T>
__global__ void __launch_bounds__(kThreads) add_diagonal_kernel(const __grid_constant__ DiagonalWork<T> work) {
  work.add(blockIdx.x, threadIdx.x);
}

struct MultLauncher : Launcher {
  using Launcher::Launcher;

  static constexpr int64_t most_of_piece() { return kMostOfPiece; }

  template <typename T>
  void operator()(const DiagonalWork<T>& work) const {
    run(add_diagonal_kernel<T>, work, work.blocks());
  }
};

}  // namespace gradrep
