// The rule of binning, the twin of gradrep_kernels/ops/reference/pair_rule.py, which states it in words. No torch here:
// the CPU loops, the CUDA kernels and the sanitizers' driver share it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GRADREP_HD __host__ __device__
#else
#define GRADREP_HD
#endif
// Always inlined, so that it may be called from loops that are compiled for another instruction set
// (for_each_target.h).
#if defined(__GNUC__)
#define GRADREP_INLINE [[gnu::always_inline]] inline
#else
#define GRADREP_INLINE inline
#endif

namespace gradrep {

constexpr int64_t kMaxBins = 32767;

struct Displacement {
  int64_t rows, columns;
};

// ---- pairs: along one dimension, P are the pixels [p_begin, p_begin + pairs) and Q those at the same place + d.

GRADREP_HD inline int64_t pairs_along(int64_t size, int64_t d) {
  if (d >= size || d <= -size) return 0;
  return d < 0 ? size + d : size - d;
}

GRADREP_HD inline int64_t p_begin(int64_t d) { return d < 0 ? -d : 0; }

// ---- bins of one side of the pairs of one channel and displacement; T as in bins.py

template <typename T>
struct Binning {
  T lo, inv, top;
};

template <typename T>
GRADREP_HD inline Binning<T> binning(T lo, T hi, int32_t bins) {
  const T inv = static_cast<T>(bins) / (hi - lo);
  return {lo, inv - inv == 0 ? inv : T(0), static_cast<T>(bins - 1)};  // inf - inf is NaN
}

template <typename T>
GRADREP_HD GRADREP_INLINE int32_t bin_number(T v, const Binning<T>& b) {
  T t = (v - b.lo) * b.inv;
#if defined(__CUDA_ARCH__)
  t = fmin(fmax(t, T(0)), b.top);  // the same in two instructions, not four
#else
  t = t > 0 ? t : T(0);  // NaN too
  t = t < b.top ? t : b.top;
#endif
  return static_cast<int32_t>(t);  // the clamps come first: a bin out of range would be a wild write
}

// ---- ranges: the lesser (greater) of two, NaN if either is

template <typename T>
GRADREP_HD GRADREP_INLINE T lesser(T so_far, T v) {
  return v < so_far || v != v ? v : so_far;
}

template <typename T>
GRADREP_HD GRADREP_INLINE T greater(T so_far, T v) {
  return v > so_far || v != v ? v : so_far;
}

}  // namespace gradrep
