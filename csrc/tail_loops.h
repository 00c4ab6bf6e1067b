// The loops around that of a step: random bits, and what is computed in another dtype than it is stored in. See
// for_each_target.h and step_chunk.h.
namespace gradrep::GRADREP_TARGET {

struct TailLoops {
  static constexpr int kGroup = 8;  // elements that share a counter

  // The random bits of n groups of elements and more, as many as a vector has: `out` must have room for
  // kGroup * (n + 7) numbers.
  static void random_bits(const RandomStream& stream, uint32_t state, uint64_t first_group, int64_t n,
                          uint16_t* __restrict out) {
#if GRADREP_X86_TARGETS
    // A counter's words lie in lanes of 64 bits, each in the lower half of a lane; the upper half may be anything.
    typedef uint64_t Lanes __attribute__((vector_size(GRADREP_VECTOR)));
    constexpr int kLanes = GRADREP_VECTOR / 8;
    const Lanes multipliers[2] = {Lanes{} + kPhiloxMultipliers[0], Lanes{} + kPhiloxMultipliers[1]};
    Lanes group;
    for (int lane = 0; lane < kLanes; ++lane) group[lane] = first_group + lane;
    for (int64_t i = 0; i < n; i += kLanes, group += kLanes) {
      Lanes c0 = group, c1 = Lanes{} + stream.parameter, c2 = Lanes{} + stream.step, c3 = Lanes{} + state;
      uint32_t k0 = stream.key[0], k1 = stream.key[1];
      for (int round = 0; round < kPhiloxRounds; ++round) {
        const Lanes first = lower_product(c0, multipliers[0]), second = lower_product(c2, multipliers[1]);
        c0 = (second >> 32) ^ c1 ^ (Lanes{} + k0);
        c1 = second;
        c2 = (first >> 32) ^ c3 ^ (Lanes{} + k1);
        c3 = first;
        k0 += kPhiloxWeyl[0];
        k1 += kPhiloxWeyl[1];
      }
      const Lanes front = (c0 & 0xffffffffu) | c1 << 32, back = (c2 & 0xffffffffu) | c3 << 32;
      uint64_t words[2 * kLanes];
      for (int lane = 0; lane < kLanes; ++lane) words[2 * lane] = front[lane], words[2 * lane + 1] = back[lane];
      memcpy(out + kGroup * i, words, sizeof words);
    }
#else
    for (int64_t i = 0; i < n; ++i) {
      const RandomWords words = stream.words(kGroup * (first_group + i), state);
      for (int k = 0; k < kGroup; ++k) out[kGroup * i + k] = static_cast<uint16_t>(words.of(k));
    }
#endif
  }

  template <typename S, typename T>
  static void widen_all(const S* __restrict from, int64_t n, T* __restrict to) {
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
  }

  template <typename S, typename T>
  static void narrow_all(const T* __restrict from, int64_t n, S* __restrict to) {
    for (int64_t i = 0; i < n; ++i) to[i] = narrow<S>(from[i]);
  }

  template <typename T>
  static void round_all(const T* __restrict from, const uint16_t* __restrict bits, int64_t n, BFloat16* __restrict to) {
    for (int64_t i = 0; i < n; ++i) to[i].bits = round_by(static_cast<float>(from[i]), bits[i]);
  }

  template <typename T>
  static void multiply(const T* from, T by, int64_t n, T* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] * by;
  }

  template <typename T>
  static void divide(T* g, int64_t n, T by) {
    for (int64_t i = 0; i < n; ++i) g[i] = g[i] / by;
  }

  template <typename S, typename T>
  static void scale(S* g, int64_t n, T by) {
    for (int64_t i = 0; i < n; ++i) g[i] = narrow<S>(widen(g[i]) * by);
  }

    template <typename S, typename T>
  static void average(const S* __restrict p, int64_t n, T* __restrict e, T rest) {
    for (int64_t i = 0; i < n; ++i) e[i] = averaged(e[i], widen(p[i]), rest);
  }
};

}  // namespace gradrep::GRADREP_TARGET
