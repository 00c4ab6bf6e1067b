// The sum of rep_grad_norm, compiled once per instruction set: see for_each_target.h.

namespace gradrep::GRADREP_TARGET {

struct GradNormLoops {
  // Σ m ⊙ g². Sixteen independent sums let the compiler use vectors without reordering anything, and make the result
  // the same with vectors of any width.
  template <typename S, typename T>
  static double weighted_sum(const S* __restrict g, const T* __restrict m, int64_t n) {
    constexpr int kLanes = 16;
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        const double x = static_cast<T>(g[i + lane]);
        lanes[lane] += x * x * static_cast<double>(m[i + lane]);
      }
    for (; i < n; ++i) {
      const double x = static_cast<T>(g[i]);
      lanes[0] += x * x * static_cast<double>(m[i]);
    }
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    return sum;
  }
};

}  // namespace gradrep::GRADREP_TARGET
