// The loops of a step, one for each way in which M runs through memory: see for_each_target.h and step_chunk.h.
//
// `states` are the arrays that the update keeps per parameter. They are separate arguments, because the compiler
// believes __restrict of arguments alone, and without it would compare all pointers before every tile.
namespace gradrep::GRADREP_TARGET {

// The step alone.
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

// The step with clipping, and the average and states in bfloat16 where a parameter has them, for M with a number for
// every element. A pass of its own for the average would be one more stream of memory, and alone: it is 5 % slower.
struct TailStepLoops {
  // An element of a state that is computed in T: as it is stored, or of bfloat16 and rounded by its random bits.
  template <typename T, typename State>
  struct Cell {
    State& stored;
    const uint16_t& bits;
    T value;
    GRADREP_INLINE Cell(State& stored, const uint16_t* bits, int64_t i)
        : stored(stored), bits(bits[i]), value(widen(stored)) {}
    GRADREP_INLINE void store() const { stored.bits = round_by(value, bits); }
  };
  template <typename T>
  struct Cell<T, T> {
    T& value;
    GRADREP_INLINE Cell(T& stored, const uint16_t*, int64_t) : value(stored) {}
    GRADREP_INLINE void store() const {}
  };

  template <typename Update, int kVariant, bool kAverages, typename T, typename... State>
  struct Of {
    using Numbers = typename Update::template Numbers<T>;

    // `rest` is 1 - decay of the average e.
    static void array(T* __restrict p, const T* __restrict g, const T* __restrict m, int64_t n, Numbers h, T clip,
                      T* __restrict e, T rest, State* __restrict... states) {
      for (int64_t i = 0; i < n; ++i) one(p, g, m, i, h, clip, e, rest, Cell<T, State>(states[i], nullptr, i)...);
    }

    // States are rounded by random bits, that of p's first element being those of `element`. They are drawn part by
    // part, so that the processor computes them while it waits for memory: drawn for all elements first, they took
    // 10 % of a step.
    static void random(T* __restrict p, const T* __restrict g, const T* __restrict m, int64_t n, Numbers h, T clip,
                       T* __restrict e, T rest, const RandomStream& stream, uint64_t element,
                       State* __restrict... states) {
      constexpr int kPart = RandomBits::kDrawn;
      const RandomBits random(stream);
      const auto skipped = static_cast<int>(element % RandomBits::kGroup);
      uint64_t group = element / RandomBits::kGroup;
      alignas(64) uint16_t bits[sizeof...(State)][2 * kPart];  // of this part, and of the next where one is not enough
      if (skipped != 0)
        for (uint32_t k = 0; k < sizeof...(State); ++k) random.draw(k, group, bits[k] + kPart);
      for (int64_t i = 0; i < n; i += kPart, group += RandomBits::kGroups) {
        for (uint32_t k = 0; k < sizeof...(State); ++k) {
          if (skipped == 0) {
            random.draw(k, group, bits[k]);
          } else {
            memcpy(bits[k], bits[k] + kPart, kPart * sizeof(uint16_t));
            random.draw(k, group + RandomBits::kGroups, bits[k] + kPart);
          }
        }
        constexpr auto each = std::make_index_sequence<sizeof...(State)>();
        if (i + kPart <= n)
          part(each, p + i, g + i, m + i, kPart, h, clip, e + i, rest, bits[0] + skipped, states + i...);
        else
          part(each, p + i, g + i, m + i, n - i, h, clip, e + i, rest, bits[0] + skipped, states + i...);
      }
    }

   private:
    template <size_t... state>
    GRADREP_INLINE static void part(std::index_sequence<state...>, T* __restrict p, const T* __restrict g,
                                    const T* __restrict m, int64_t n, const Numbers& h, T clip, T* __restrict e, T rest,
                                    const uint16_t* __restrict bits, State* __restrict... states) {
      for (int64_t i = 0; i < n; ++i)
        one(p, g, m, i, h, clip, e, rest, Cell<T, State>(states[i], bits + state * 2 * RandomBits::kDrawn, i)...);
    }

    GRADREP_INLINE static void one(T* p, const T* g, const T* m, int64_t i, const Numbers& h, T clip, T* e, T rest,
                                   Cell<T, State>... cells) {
      Update::template element<kVariant>(p[i], g[i] * clip, m[i], h, cells.value...);
      (cells.store(), ...);
      if constexpr (kAverages) e[i] = averaged(e[i], p[i], rest);
    }
  };
};

}  // namespace gradrep::GRADREP_TARGET
