// The loops of pair_ranges, compiled once per instruction set: see for_each_target.h.

namespace gradrep::GRADREP_TARGET {

struct RangeLoops {
  // least[i] and greatest[i] over values[i], values[i + stride], ... for i < n.
  template <typename S, typename T>
  static void merge_rows(const S* __restrict values, int64_t rows, int64_t stride, int64_t n, T* __restrict least,
                         T* __restrict greatest) {
    for (int64_t row = 0; row < rows; ++row, values += stride)
      for (int64_t i = 0; i < n; ++i) {
        const T v = widen(values[i]);
        least[i] = lesser(least[i], v);
        greatest[i] = greater(greatest[i], v);
      }
  }

  // The same for n = kLanes. Asks for the values that come `ahead` in pace with the reading: without, planes of 4 KiB
  // end before the hardware has noticed a stream (2x slower).
  template <typename S, typename T>
  static void merge_lanes(const S* __restrict values, int64_t rows, int64_t stride, const S* ahead, T* __restrict least,
                          T* __restrict greatest) {
    T low[kLanes], high[kLanes];
    for (int j = 0; j < kLanes; ++j) low[j] = least[j];
    for (int j = 0; j < kLanes; ++j) high[j] = greatest[j];
    for (int64_t at = 0; at < rows * stride; at += stride) {
      prefetch_all(ahead + at, kLanes);
      for (int j = 0; j < kLanes; ++j) {
        const T v = widen(values[at + j]);
        low[j] = lesser(low[j], v);
        high[j] = greater(high[j], v);
      }
    }
    for (int j = 0; j < kLanes; ++j) least[j] = low[j];
    for (int j = 0; j < kLanes; ++j) greatest[j] = high[j];
  }

  // Merges the pairs (p[i], q[i]) without a zero and returns how many there are. Arrays end in zeros, so that there are
  // only whole steps.
  template <typename S, typename T>
  static int64_t merge_near(const S* p, const S* q, int64_t n, NearExtrema<T>& extrema) {
    constexpr T infinity = kInfinity<T>;
    NearExtrema<T> e = extrema;
    int32_t kept[kNearLanes] = {};
    for (int64_t i = 0; i < n; i += kNearLanes)
      for (int j = 0; j < kNearLanes; ++j) {
        const T a = widen(p[i + j]), b = widen(q[i + j]);
        // As an integer it is vectorised: 2x faster than as bool.
        const int32_t keep = (a != 0 ? 1 : 0) & (b != 0 ? 1 : 0);
        kept[j] += keep;
        e.nan_p[j] |= keep & (a != a ? 1 : 0);
        e.nan_q[j] |= keep & (b != b ? 1 : 0);
        const T low_a = keep ? a : infinity, high_a = keep ? a : -infinity;
        const T low_b = keep ? b : infinity, high_b = keep ? b : -infinity;
        e.least_p[j] = low_a < e.least_p[j] ? low_a : e.least_p[j];
        e.greatest_p[j] = high_a > e.greatest_p[j] ? high_a : e.greatest_p[j];
        e.least_q[j] = low_b < e.least_q[j] ? low_b : e.least_q[j];
        e.greatest_q[j] = high_b > e.greatest_q[j] ? high_b : e.greatest_q[j];
      }
    extrema = e;
    int64_t total = 0;
    for (int j = 0; j < kNearLanes; ++j) total += kept[j];
    return total;
  }
};

}  // namespace gradrep::GRADREP_TARGET
