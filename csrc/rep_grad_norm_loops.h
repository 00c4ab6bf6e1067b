// The sum of rep_grad_norm, compiled once per instruction set: see for_each_target.h.

namespace gradrep::GRADREP_TARGET {

struct GradNormLoops {
  // Sixteen independent sums let the compiler use vectors without reordering anything, and make the result the same
  // with vectors of any width.
  static constexpr int kLanes = 16;

  // Adds g², or m ⊙ g², to the sums, element i to sum i mod kLanes. The hardware asks for one stream of memory alone
  // too late: to ask for 4 KiB ahead gains 10 %.
  template <bool kWeighted, typename S>
  static void add_squares(const S* __restrict g, const double* __restrict m, int64_t n, double* __restrict sums) {
    constexpr int kAhead = 4096 / sizeof(S);
    double lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = sums[lane];
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      prefetch_all(g + i + kAhead, kLanes);
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += square<kWeighted>(g, m, i + lane);
    }
    for (int64_t i = whole; i < n; ++i) lanes[i - whole] += square<kWeighted>(g, m, i);
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane];
  }

 private:
  template <bool kWeighted, typename S>
  GRADREP_INLINE static double square(const S* g, const double* m, int64_t i) {
    const double x = widen(g[i]);
    return kWeighted ? x * x * m[i] : x * x;
  }
};

}  // namespace gradrep::GRADREP_TARGET
