// The step of AdamW for a run of elements, and Σ M ⊙ g² over branches: what step_chunk.h and rep_grad_norm_cpu.h have
// for one multiplier.
#pragma once

#include "branch_mult.h"
#include "rep_adamw_update.h"
#include "rep_grad_norm_cpu.h"
#include "step_chunk.h"

#define GRADREP_LOOPS "adamw_loops.h"
#include "for_each_target.h"

namespace gradrep {

using AdamwLoops = PerTarget<base::AdamwLoops, avx2::AdamwLoops, avx512::AdamwLoops>;

template <typename T>
using AdamwArrays = StepArrays<AdamwUpdate, T>;

constexpr size_t kRedone = 4;  // elements of the identity in a run that are computed once more

template <int kVariant, typename T, typename Loops>
void step_run_as(const AdamwArrays<T>& arrays, const BranchRun<T>& run, int64_t n) {
  using Of = typename Loops::template Of<kVariant, T>;
  T *const p = arrays.p, *const m = arrays.states[0], *const v = arrays.states[1], *const x = arrays.states[2];
  const auto& h = arrays.numbers;
  if (run.factor == nullptr) return Of::whole(p, arrays.g, n, h, run.sign, m, v, x);
  // In one loop, and the identity's elements once more: a row of a convolution has one. In parts a run takes twice as
  // long.
  if (run.alphas.size() <= 2 && run.identity.size() <= kRedone) {
    T old[kRedone];
    for (size_t k = 0; k < run.identity.size(); ++k) old[k] = p[run.identity[k].at];
    if (run.alphas.size() == 1)
      Of::one_branch(p, arrays.g, run.factor, run.alphas[0], n, h, m, v, x);
    else
      Of::two_branches(p, arrays.g, run.factor, run.alphas[0], run.alphas[1], n, h, m, v, x);
    for (size_t k = 0; k < run.identity.size(); ++k) {
      const auto& [at, one] = run.identity[k];
      const auto shared = AdamwUpdate::shared(m[at], kVariant >= 2 ? x[at] : v[at], h);
      T sum = AdamwUpdate::added(shared.n, shared.s, run.alphas[0][at], h);
      if (run.alphas.size() == 2) sum = sum + AdamwUpdate::added(shared.n, shared.s, run.alphas[1][at], h);
      p[at] = AdamwUpdate::moved(old[k], sum + AdamwUpdate::added(shared.n, shared.s, one, h), h);
    }
    return;
  }
  alignas(64) T n_of[kBranchRun], s_of[kBranchRun], sum[kBranchRun];
  Of::shared(arrays.g, run.factor, n, h, m, v, x, n_of, s_of);
  Of::first(n_of, s_of, run.alphas[0], n, h, sum);
  for (size_t k = 1; k < run.alphas.size(); ++k) Of::further(n_of, s_of, run.alphas[k], n, h, sum);
  for (const auto& one : run.identity)
    sum[one.at] = sum[one.at] + AdamwUpdate::added(n_of[one.at], s_of[one.at], one.alpha, h);
  Of::move(p, sum, n, h);
}

// Of AdamW, in place of the loop that step_chunk.h takes for one multiplier.
template <typename Update, typename T>
void step_run(const AdamwArrays<T>& arrays, int variant, const BranchRun<T>& run, int64_t n) {
  AdamwLoops::on_best([&]<typename Loops>(Loops) {
    if (variant == 0)
      step_run_as<0, T, Loops>(arrays, run, n);
    else if (variant == 1)
      step_run_as<1, T, Loops>(arrays, run, n);
    else if (variant == 2)
      step_run_as<2, T, Loops>(arrays, run, n);
    else
      step_run_as<3, T, Loops>(arrays, run, n);
  });
}

template <typename Update, typename S, typename T>
void step_chunk(const Chunk& chunk, const typename Update::Hyper& hyper, const BranchMultiplier<T>& mult) {
  step_in_parts<Update, S, T>(chunk, hyper, mult);
}

// Over elements [begin, end) of a gradient that is stored as S.
template <typename S, typename T>
double sum_of_squares(const S* g, const BranchMultiplier<T>& mult, int64_t begin, int64_t end) {
  constexpr int kLanes = base::GradNormLoops::kLanes;
  double sums[kLanes] = {}, sum = 0;
  alignas(64) T m[kBranchRun];
  mult.each_run(T(1), begin, end, [&](const BranchRun<T>& run, int64_t at, int64_t n) {
    if (run.factor == nullptr) {
      GradNormLoops::on_best([&](auto loops) { loops.add_squares(g + at, n, sums); });
      return;
    }
    std::fill_n(m, n, T(0));
    for (const T* alpha : run.alphas) AdamwLoops::on_best([&](auto loops) { loops.add_square(alpha, n, m); });
    for (const auto& one : run.identity) m[one.at] += one.alpha * one.alpha;
    GradNormLoops::on_best([&](auto loops) { loops.add_squares(g + at, n, sums, m); });
  });
  for (const double lane : sums) sum += lane;
  return sum;
}

}  // namespace gradrep
