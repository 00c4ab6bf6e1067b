// The sum of rep_grad_norm, compiled once per instruction set: see for_each_target.h.

namespace gradrep::GRADREP_TARGET {

struct GradNormLoops {
  // Sixteen independent sums let the compiler use vectors without reordering anything, and make the result the same
  // with vectors of any width.
  static constexpr int kLanes = 16;

  // Adds g², or m ⊙ g², to the sums, element i to sum i mod kLanes. The hardware asks for one stream of memory alone
  // too late: to ask for 4 KiB ahead gains 10 %.
  template <typename S, typename... M>
  static void add_squares(const S* __restrict g, int64_t n, double* __restrict sums, const M* __restrict... m) {
    constexpr int kAhead = 4096 / sizeof(S);
    double lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = sums[lane];
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      prefetch_all(g + i + kAhead, kLanes);
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += square(g, i + lane, m...);
    }
    for (int64_t i = whole; i < n; ++i) lanes[i - whole] += square(g, i, m...);
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane];
  }

 private:
  template <typename S, typename... M>
  GRADREP_INLINE static double square(const S* g, int64_t i, const M*... m) {
    const double x = widen(g[i]);
    return ((x * x) * ... * static_cast<double>(m[i]));
  }
};

}  // namespace gradrep::GRADREP_TARGET
