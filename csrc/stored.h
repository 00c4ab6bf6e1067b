// Numbers of the dtypes that tensors are stored in: rounding to them, and 16 bytes of them at once. No torch here.
#pragma once

#include "feature_map.h"

namespace gradrep {

// To the nearest, of two as near the even one.
template <typename S>
GRADREP_HD GRADREP_INLINE S narrow(Arithmetic<S> v) {
  return v;
}

template <>
GRADREP_HD GRADREP_INLINE BFloat16 narrow<BFloat16>(float v) {
  BFloat16 result;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
#else
  const uint32_t bits = bits_of(v);
  result.bits = static_cast<uint16_t>(v != v ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
  return result;
}

template <>
GRADREP_HD GRADREP_INLINE Half narrow<Half>(float v) {
  Half result;
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
#else
  const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (v != v) {
    rounded = 0x7e00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the last bit of a number near 1/2 is 2^-24, as is a denormal's
    rounded = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t rebased = magnitude - 0x38000000u;
    rounded = std::min((rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13, 0x7c00u);
  }
  result.bits = static_cast<uint16_t>(sign | rounded);
#endif
  return result;
}

// Two as one word, the first in its lower half.
template <typename S>
GRADREP_HD GRADREP_INLINE uint32_t narrow_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  if constexpr (std::is_same_v<S, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  return narrow<S>(first).bits | static_cast<uint32_t>(narrow<S>(second).bits) << 16;
#endif
}

template <typename S>
constexpr int kTogether = 16 / sizeof(S);  // elements of the widest access

// n neighbouring elements, which one access reads or writes: one, or 16 bytes, which must begin at a multiple of 16.
// They are computed with in parts of at most four: with eight at once, a step would take 80 registers.
template <typename S, int n>
struct Together {
  using T = Arithmetic<S>;
  static constexpr bool kPairs = sizeof(S) == 2 && n > 1;  // kept as words: a 16-bit number takes a whole register
  static constexpr int kPart = n < 4 ? n : 4, kParts = n / kPart;
  using Word = std::conditional_t<kPairs, uint32_t, S>;
  static constexpr int kWords = n * sizeof(S) / sizeof(Word), kPartWords = kWords / kParts;
  static_assert(n == 1 || n == kTogether<S>);

  struct alignas(n == 1 ? alignof(S) : 16) Words {
    Word all[kWords];
  } words;

  GRADREP_HD GRADREP_INLINE void load(const S* from) { words = *reinterpret_cast<const Words*>(from); }
  GRADREP_HD GRADREP_INLINE void store(S* to) const { *reinterpret_cast<Words*>(to) = words; }

  // The part that is first.
  GRADREP_HD GRADREP_INLINE void read(T (&to)[kPart]) const {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      if constexpr (kPairs)
        to[i] = widen(S{static_cast<uint16_t>(words.all[i / 2] >> 16 * (i % 2))});
      else
        to[i] = widen(words.all[i]);
    }
  }
  GRADREP_HD GRADREP_INLINE void write(const T (&from)[kPart]) {
#pragma unroll
    for (int w = 0; w < kPartWords; ++w) {
      if constexpr (kPairs)
        words.all[w] = narrow_pair<S>(from[2 * w], from[2 * w + 1]);
      else
        words.all[w] = narrow<S>(from[w]);
    }
  }
  // The next part becomes the first. After kParts times all are in order again.
  GRADREP_HD GRADREP_INLINE void turn() {
    if constexpr (kParts > 1) {
      Words turned;
#pragma unroll
      for (int w = 0; w < kWords; ++w) turned.all[w] = words.all[(w + kPartWords) % kWords];
      words = turned;
    }
  }
};

}  // namespace gradrep
