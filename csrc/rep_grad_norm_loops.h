// The sum of rep_grad_norm, compiled once per instruction set: see for_each_target.h.

namespace gradrep::GRADREP_TARGET {

struct GradNormLoops {
  // Sixteen independent sums let the compiler use vectors without reordering anything, and make the result the same
  // with vectors of any width.
  static constexpr int kLanes = 16;

  // Adds m ⊙ g² to the sums, element i to sum i mod kLanes. One stream of memory alone is read at two thirds of the
  // rate that the hardware's prefetching reaches with several; asking for 4 KiB ahead gains 10 %.
  template <typename S>
  static void add_squares(const S* __restrict g, const double* __restrict m, int64_t n, double* __restrict sums) {
    constexpr int kAhead = 4096 / sizeof(S);
    double lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = sums[lane];
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      prefetch_all(g + i + kAhead, kLanes);
      for (int lane = 0; lane < kLanes; ++lane) {
        const double x = widen(g[i + lane]);
        lanes[lane] += x * x * m[i + lane];
      }
    }
    for (int64_t i = whole; i < n; ++i) {
      const double x = widen(g[i]);
      lanes[i - whole] += x * x * m[i];
    }
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane];
  }
};

}  // namespace gradrep::GRADREP_TARGET
