// √(Σ M ⊙ g²) in blocks of threads. No torch here (see cuda_blocks.h).
//
// Each chunk has a partial sum, and one block adds them all in double, in an order that the shapes decide, and whether
// gradients begin at a multiple of 16 bytes: the same gradients at the same places give the same bits.
//
// In float32 a thread adds at most 8 products of 3 roundings each in each of 4 sums, which 2 additions join, and 8 more
// join those of the threads: 21 · 2^-24 of Σ, half of that after the root, and 2^-24 for the result. That is 7e-7 of
// the norm. In float64 it is below 1e-14. Squares below 1e-38 or above 3e38 leave float32's range, as in
// torch.nn.utils.clip_grad_norm_ on a GPU.
#pragma once

#include "launch_rows.h"
#include "step_tail.h"

#include <cmath>

namespace gradrep {

// Σ of a number of each thread of a block, by a tree. `shared` has room for kThreads; the result is in its first.
template <typename T, typename Phases>
GRADREP_HD GRADREP_INLINE void sum_over_threads(T* shared, const Phases& phases) {
  for (int half = kThreads / 2; half > 0; half /= 2)
    phases([&](int thread) {
      if (thread < half) shared[thread] += shared[thread + half];
    });
}

template <typename S>
struct NormRow : PlacedRow<Arithmetic<S>> {
  const S* grad;
  bool aligned;
};

template <typename S>
struct NormWork : LaunchRows<S, NormRow<S>, sizeof(void*)> {
  using T = Arithmetic<S>;
  T* partials;  // of each chunk

  // Σ M ⊙ g² over a thread's part of a chunk.
  GRADREP_HD GRADREP_INLINE T sum_of(const ChunkOfRow& chunk, int thread) const {
    constexpr int width = kTogether<S>;
    constexpr int part = Together<S, width>::kPart;
    const NormRow<S>& row = this->row[chunk.row];
    const T constant = row.constant();
    const bool general = row.form == Form::kGeneral;
    T sums[part] = {};
    const auto add = [&](int lane, T g, uint32_t at) {
      const T square = g * g;
      sums[lane] = sums[lane] + (general ? row.norm_multiplier(at) : constant) * square;
    };
    for (uint32_t at = chunk.begin + thread * width; at < chunk.wide_end; at += kThreads * width) {
      Together<S, width> elements;
      elements.load(row.grad + at);
#pragma unroll 1
      for (int k = 0; k < elements.kParts; ++k) {
        T g[part];
        elements.read(g);
#pragma unroll
        for (int i = 0; i < part; ++i) add(i, g[i], at + k * part + i);
        elements.turn();
      }
    }
    for (uint32_t at = chunk.wide_end + thread; at < chunk.end;)
#pragma unroll
      for (int i = 0; i < part; ++i, at += kThreads)
        if (at < chunk.end) add(i, widen(row.grad[at]), at);
#pragma unroll
    for (int half = part / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    return sums[0];
  }
};

template <typename S, typename Phases>
GRADREP_HD GRADREP_INLINE void norm_block(const NormWork<S>& work, uint32_t block, Arithmetic<S>* shared,
                                          const Phases& phases) {
  const ChunkOfRow chunk = work.chunk_of(block);
  phases([&](int thread) { shared[thread] = work.sum_of(chunk, thread); });
  sum_over_threads(shared, phases);
  phases([&](int thread) {
    if (thread == 0) work.partials[block] = shared[0];
  });
}

// What a step multiplies gradients by, for both dtypes that are computed in.
struct ClipFactor {
  double wide;
  float low;

  template <typename T>
  const T* as() const {
    if constexpr (sizeof(T) == 8)
      return &wide;
    else
      return &low;
  }
};

struct RootWork {
  void* norm;
  bool wide;                // it is a double, else a float
  const float* grad_scale;  // what the gradients are yet to be divided by; or null
  ClipFactor* factor;       // becomes min(1, max_norm / (norm + 1e-6)); or null
  double max_norm;
  const float* floats;
  const double* doubles;
  int64_t count_of_floats, count_of_doubles;

  int64_t blocks() const { return 1; }

  template <typename T>
  GRADREP_HD GRADREP_INLINE static double sum_of(const T* partials, int64_t count, int thread) {
    double sum = 0;
#pragma unroll 4
    for (int64_t n = thread; n < count; n += kThreads) sum = sum + static_cast<double>(partials[n]);
    return sum;
  }

  template <typename T>
  GRADREP_HD GRADREP_INLINE void write(T root) const {
    if (grad_scale != nullptr) root = root / static_cast<T>(*grad_scale);
    *static_cast<T*>(norm) = root;
    if (factor == nullptr) return;
    const T f = clip_factor(root, max_norm);
    factor->wide = f;
    factor->low = static_cast<float>(f);
  }
};

template <typename Phases>
GRADREP_HD GRADREP_INLINE void root_block(const RootWork& work, double* shared, const Phases& phases) {
  phases([&](int thread) {
    shared[thread] = RootWork::sum_of(work.floats, work.count_of_floats, thread) +
                     RootWork::sum_of(work.doubles, work.count_of_doubles, thread);
  });
  sum_over_threads(shared, phases);
  phases([&](int thread) {
    if (thread != 0) return;
    const double root = sqrt(shared[0]);
    if (work.wide)
      work.write(root);
    else
      work.write(static_cast<float>(root));
  });
}

}  // namespace gradrep
