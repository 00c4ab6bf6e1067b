// Σ M ⊙ g² over part of a gradient, for the op and for planned steps: reference/rep_grad_norm.py.
#pragma once

#include "mult_runs.h"
#include "targets.h"

#include "feature_map.h"

#define GRADREP_LOOPS "rep_grad_norm_loops.h"
#include "for_each_target.h"

#include <cmath>

namespace gradrep {

using GradNormLoops = PerTarget<base::GradNormLoops, avx2::GradNormLoops, avx512::GradNormLoops>;

// Over elements [begin, end) of a gradient that is stored as S. Every product of gradients is exact in double.
template <typename S, typename T>
double sum_of_squares(const S* g, const Multiplier<T>& mult, int64_t begin, int64_t end) {
  constexpr int kLanes = base::GradNormLoops::kLanes;
  double sums[kLanes] = {};
  const bool constant = mult.is_constant();
  if (constant)
    GradNormLoops::on_best([&](auto loops) { loops.add_squares(g + begin, end - begin, sums); });
  else
    each_run(mult, T(1), begin, end, [&](const T* m, int64_t at, int64_t n) {
      GradNormLoops::on_best([&](auto loops) { loops.add_squares(g + at, n, sums, m); });
    });
  double sum = 0;
  for (const double lane : sums) sum += lane;
  return constant ? sum * static_cast<double>(mult.constant()) : sum;
}

template <typename Mult32, typename Mult64>
double sum_of_squares(const void* g, int32_t dtype, const Mult32& mult32, const Mult64& mult64, int64_t begin,
                      int64_t end) {
  if (dtype == aoti_torch_dtype_float32()) return sum_of_squares(static_cast<const float*>(g), mult32, begin, end);
  if (dtype == aoti_torch_dtype_float64()) return sum_of_squares(static_cast<const double*>(g), mult64, begin, end);
  if (dtype == aoti_torch_dtype_bfloat16()) return sum_of_squares(static_cast<const BFloat16*>(g), mult32, begin, end);
  return sum_of_squares(static_cast<const Half*>(g), mult32, begin, end);
}

}  // namespace gradrep
