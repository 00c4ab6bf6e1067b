// What the steps of all optimizers share around their update, for one number: the twin of reference/step_tail.py. No
// torch here.
#pragma once

#include "bins.h"

namespace gradrep {

// What gradients of this norm are multiplied by. The quotient is the one of torch.nn.utils.clip_grad_norm_, where a
// number over a tensor is the product of the number and the reciprocal. NaN stays NaN.
template <typename T>
GRADREP_HD GRADREP_INLINE T clip_factor(T norm, double max_norm) {
  const T factor = T(1) / (norm + static_cast<T>(1e-6)) * static_cast<T>(max_norm);
  return factor > T(1) ? T(1) : factor;
}

// The average of a weight, as it is stored, after a step. `rest` is 1 - decay.
template <typename T>
GRADREP_HD GRADREP_INLINE T averaged(T average, T weight, T rest) {
  return average + (weight - average) * rest;
}

}  // namespace gradrep
