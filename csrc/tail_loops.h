// The loops around that of a step: random bits, and what is computed in another dtype than it is stored in. See
// for_each_target.h and step_chunk.h.
namespace gradrep::GRADREP_TARGET {

// Draws the random bits of one parameter in one step.
class RandomBits {
 public:
  static constexpr int kGroup = 8, kGroups = 8, kDrawn = kGroup * kGroups;  // elements that share a counter; of a draw

#if GRADREP_X86_TARGETS
  // Keys are made beforehand: one by one in each draw, they take a quarter of its time.
  GRADREP_INLINE explicit RandomBits(const RandomStream& stream)
      : parameter_(Lanes{} + stream.parameter), step_(Lanes{} + stream.step) {
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      keys_[round][0] = Lanes{} + (stream.key[0] + round * kPhiloxWeyl0);
      keys_[round][1] = Lanes{} + (stream.key[1] + round * kPhiloxWeyl1);
    }
  }

  // Those of a state's elements from kGroup * group on.
  GRADREP_INLINE void draw(uint32_t state, uint64_t group, uint16_t* out) const {
    for (int part = 0; part < kGroups / kLanes; ++part) {
      // Words of 32 bits lie in lanes of 64, each in the lower half; the upper half may be anything.
      Lanes c0, c1 = parameter_, c2 = step_, c3 = Lanes{} + state;
      for (int lane = 0; lane < kLanes; ++lane) c0[lane] = lane;
      c0 += group + part * kLanes;
      for (int round = 0; round < kPhiloxRounds; ++round) {
        const Lanes first = lower_product(c0, Lanes{} + kPhiloxMultipliers[0]),
                    second = lower_product(c2, Lanes{} + kPhiloxMultipliers[1]);
        c0 = (second >> 32) ^ c1 ^ keys_[round][0];
        c1 = second;
        c2 = (first >> 32) ^ c3 ^ keys_[round][1];
        c3 = first;
      }
      const Lanes front = (c0 & 0xffffffffu) | c1 << 32, back = (c2 & 0xffffffffu) | c3 << 32;
      uint64_t words[2 * kLanes];
      for (int lane = 0; lane < kLanes; ++lane) words[2 * lane] = front[lane], words[2 * lane + 1] = back[lane];
      memcpy(out + part * kGroup * kLanes, words, sizeof words);
    }
  }

 private:
  typedef uint64_t Lanes __attribute__((vector_size(GRADREP_VECTOR)));
  static constexpr int kLanes = GRADREP_VECTOR / 8;
  Lanes parameter_, step_, keys_[kPhiloxRounds][2];
#else
  GRADREP_INLINE explicit RandomBits(const RandomStream& stream) : stream_(stream) {}

  GRADREP_INLINE void draw(uint32_t state, uint64_t group, uint16_t* out) const {
    for (int n = 0; n < kGroups; ++n) {
      const RandomWords words = stream_.words(kGroup * (group + n), state);
      for (int k = 0; k < kGroup; ++k) out[kGroup * n + k] = static_cast<uint16_t>(words.of(k));
    }
  }

 private:
  const RandomStream& stream_;
#endif
};

struct TailLoops {
  // Those of n elements and more: `out` must have room for whole draws.
  static void random_bits(const RandomStream& stream, uint32_t state, uint64_t group, int64_t n, uint16_t* out) {
    const RandomBits bits(stream);
    for (int64_t i = 0; i < n; i += RandomBits::kDrawn, group += RandomBits::kGroups) bits.draw(state, group, out + i);
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
