// The instruction sets that loops are compiled for, and the choice between them at run time. No torch here.
//
// Define GRADREP_LOOPS as the name of a file of loops, then include for_each_target.h: the file is compiled once per
// set. So one binary for x86-64 reaches the speed of -march=native. It uses vectors of 512 bits where the machine has
// them, else of 256, else of 128. Elsewhere there is one set, that of the compiler.
#pragma once

#include <cstdint>

// The sanitizers' builds set this to 0: they then compile a third of the loops, and go the way of other processors.
#ifndef GRADREP_X86_TARGETS
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define GRADREP_X86_TARGETS 1
#else
#define GRADREP_X86_TARGETS 0
#endif
#endif

#if GRADREP_X86_TARGETS
#include <immintrin.h>
#endif

namespace gradrep {

namespace base {}
#if !GRADREP_X86_TARGETS
namespace avx2 = base;
namespace avx512 = base;
#endif

#if GRADREP_X86_TARGETS
// The products of the lower halves of lanes of 64 bits: one instruction, which GCC does not find by itself.
#define GRADREP_LOWER_PRODUCT(bytes, set, Vector, product)                                                         \
  typedef uint64_t Lanes##bytes __attribute__((vector_size(bytes)));                                               \
  [[gnu::always_inline, gnu::target(set)]] inline Lanes##bytes lower_product(Lanes##bytes a, Lanes##bytes b) {     \
    return reinterpret_cast<Lanes##bytes>(product(reinterpret_cast<Vector>(a), reinterpret_cast<Vector>(b)));      \
  }
GRADREP_LOWER_PRODUCT(16, "sse2", __m128i, _mm_mul_epu32)
GRADREP_LOWER_PRODUCT(32, "avx2", __m256i, _mm256_mul_epu32)
GRADREP_LOWER_PRODUCT(64, "avx512f", __m512i, _mm512_mul_epu32)
#undef GRADREP_LOWER_PRODUCT
#endif

enum class Target { kBase, kAvx2, kAvx512 };

// Whether this machine has what for_each_target.h compiles with, and its operating system saves the registers.
inline bool supports([[maybe_unused]] Target target) {
#if GRADREP_X86_TARGETS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return target == Target::kAvx512 ? avx512 : target == Target::kAvx2 ? avx2 : true;
#else
  return target == Target::kBase;
#endif
}

inline Target best_target() {
  static const Target best = supports(Target::kAvx512) ? Target::kAvx512
                             : supports(Target::kAvx2) ? Target::kAvx2
                                                       : Target::kBase;
  return best;
}

// One struct of loops, as it was compiled for each instruction set. The loops are its static member functions.
template <typename Base, typename Avx2, typename Avx512>
struct PerTarget {
  // Returns f(loops), where `loops` is an object of the struct for this instruction set.
  template <typename F>
  static decltype(auto) on(Target target, const F& f) {
    if (target == Target::kAvx512) return f(Avx512());
    if (target == Target::kAvx2) return f(Avx2());
    return f(Base());
  }
  template <typename F>
  static decltype(auto) on_best(const F& f) {
    return on(best_target(), f);
  }
};

}  // namespace gradrep
