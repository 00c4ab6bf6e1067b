// Launches of the gradient norm, for the .cu file of any optimizer. The kernels are in rep_grad_norm_cuda.cu alone.
#pragma once

#include "mult_launch.h"
#include "rep_grad_norm_cuda.h"

namespace gradrep {

struct NormLauncher : MultLauncher {
  using MultLauncher::MultLauncher;
  using MultLauncher::operator();

  void operator()(const NormWork<float>& work) const;
  void operator()(const NormWork<double>& work) const;
  void operator()(const NormWork<BFloat16>& work) const;
  void operator()(const NormWork<Half>& work) const;
  void operator()(const RootWork& work) const;
};

}  // namespace gradrep
