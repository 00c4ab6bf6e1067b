// The loops of a step, one for each way in which M runs through memory: see for_each_target.h and step_chunk.h.
//
// `states` are the arrays that the update keeps per parameter. They are separate arguments, because the compiler
// believes __restrict of arguments alone, and without it would compare all pointers before every tile.
namespace gradrep::GRADREP_TARGET {

struct StepLoops {
  template <typename Update, int kVariant, typename T, typename... State>
  struct Of {
    using Numbers = typename Update::template Numbers<T>;

    // M is one number.
    static void constant(T* __restrict p, const T* __restrict g, const T* m, int64_t n, Numbers h,
                         State* __restrict... states) {
      const T value = *m;
      for (int64_t i = 0; i < n; ++i) Update::template element<kVariant>(p[i], g[i], value, h, states[i]...);
    }

    // M has a number for every element.
    static void array(T* __restrict p, const T* __restrict g, const T* __restrict m, int64_t n, Numbers h,
                      State* __restrict... states) {
      for (int64_t i = 0; i < n; ++i) Update::template element<kVariant>(p[i], g[i], m[i], h, states[i]...);
    }

    // M repeats the K taps of a kernel, but for the element `odd` (the identity's; -1: none), where it is m_odd. The
    // trip count must be known at compile time: a run-time tile loses 6-20 %. The identity's element must not be
    // fetched apart from the stream: keeping and redoing it lost 7 %. So a tile of its own holds m_odd, compared into
    // place where it is needed. Made beforehand, and chosen tile by tile, it cost 2 % of a step.
    template <int K>
    static void taps(T* __restrict p, const T* __restrict g, const T* __restrict taps, int64_t n, Numbers h,
                     int64_t odd, T m_odd, State* __restrict... states) {
      constexpr int kTile = 16 * K;  // a multiple of the vector width and of K
      alignas(64) T tile[kTile], odd_tile[kTile];
      for (int r = 0; r < 16; ++r)
        for (int k = 0; k < K; ++k) tile[r * K + k] = taps[k];
      const int64_t whole = n / kTile * kTile, odd_at = odd < 0 || odd >= whole ? whole : odd / kTile * kTile;
      for (int64_t i = 0; i < odd_at; i += kTile) one_tile<kTile>(p + i, g + i, tile, h, states + i...);
      if (odd_at < whole) {
        const auto place = static_cast<int>(odd - odd_at);
        for (int j = 0; j < kTile; ++j) odd_tile[j] = j == place ? m_odd : tile[j];
        one_tile<kTile>(p + odd_at, g + odd_at, odd_tile, h, states + odd_at...);
      }
      for (int64_t i = odd_at + kTile; i < whole; i += kTile) one_tile<kTile>(p + i, g + i, tile, h, states + i...);
      if (odd >= whole) tile[odd - whole] = m_odd;
      for (int64_t i = whole; i < n; ++i)
        Update::template element<kVariant>(p[i], g[i], tile[i - whole], h, states[i]...);
    }

   private:
    template <int kTile>
    GRADREP_INLINE static void one_tile(T* __restrict p, const T* __restrict g, const T* __restrict m, const Numbers& h,
                                        State* __restrict... states) {
      for (int j = 0; j < kTile; ++j) Update::template element<kVariant>(p[j], g[j], m[j], h, states[j]...);
    }
  };
};

}  // namespace gradrep::GRADREP_TARGET
