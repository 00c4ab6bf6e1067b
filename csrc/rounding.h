// The rule of stochastic rounding, the twin of reference/rounding_rule.py, which states it in words. No torch here.
#pragma once

#include "feature_map.h"

namespace gradrep {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxMultipliers[2] = {0xD2511F53u, 0xCD9E8D57u}, kPhiloxWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};

// The random bits of eight neighbouring elements, the first of them at a multiple of eight. Word w serves elements
// 2 w and 2 w + 1.
struct RandomWords {
  uint32_t word[4];

  // 16 bits, of the element of any number whose last three bits say which of the eight it is.
  GRADREP_HD GRADREP_INLINE uint32_t of(uint64_t element) const {
    return word[(element & 7) >> 1] >> 16 * (element & 1) & 0xffffu;
  }
};

// Philox4x32.
GRADREP_HD GRADREP_INLINE RandomWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                             uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t first = static_cast<uint64_t>(c0) * kPhiloxMultipliers[0],
                   second = static_cast<uint64_t>(c2) * kPhiloxMultipliers[1];
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += kPhiloxWeyl[0];
    k1 += kPhiloxWeyl[1];
  }
  return {{c0, c1, c2, c3}};
}

// The random bits of one parameter in one step.
struct RandomStream {
  uint32_t key[2], parameter, step;

  GRADREP_HD RandomStream(uint64_t seed, uint64_t step, int64_t parameter)
      : key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        parameter(static_cast<uint32_t>(parameter)),
        step(static_cast<uint32_t>(step)) {}

  // Those of the eight elements among which `element` is, for the state of this number.
  GRADREP_HD GRADREP_INLINE RandomWords words(uint64_t element, uint32_t state) const {
    return philox(static_cast<uint32_t>(element >> 3), parameter, step, state, key[0], key[1]);
  }
};

// v as bfloat16, by 16 random bits.
GRADREP_HD GRADREP_INLINE uint16_t round_by(float v, uint32_t bits) {
  return static_cast<uint16_t>(v != v ? 0x7fc0u : (bits_of(v) + bits) >> 16);
}

// Two as one word, the first in its lower half, by the halves of a random word.
GRADREP_HD GRADREP_INLINE uint32_t round_pair_by(float first, float second, uint32_t word) {
  return round_by(first, word & 0xffffu) | static_cast<uint32_t>(round_by(second, word >> 16)) << 16;
}

}  // namespace gradrep
