// Compiles the file GRADREP_LOOPS once per instruction set. GRADREP_TARGET is then the name of the namespace for its
// content: base, avx2 or avx512. A loop needs no macro, and may have any template parameters.
//
// Rules for the file GRADREP_LOOPS:
// - It includes nothing. The file that includes this header includes targets.h and what the loops need before.
// - All its content is in namespace gradrep::GRADREP_TARGET.
// - It has no lambdas, and calls only its own functions, GRADREP_INLINE functions and functions of C. Any other, for
//   example std::min, has one instantiation in the program. A compiler may use the instructions of the loop for it,
//   and the linker may keep that one for machines that lack them.
#if GRADREP_X86_TARGETS

// Both sets have FMA, but the build turns contraction off, so every product and sum is rounded on its own.
// GCC prefers vectors of 256 bits where it tunes for certain machines. These loops were measured with 512.
#define GRADREP_TARGET avx512
#define GRADREP_VECTOR 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), \
                             apply_to = function)
#include GRADREP_LOOPS
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512")
#include GRADREP_LOOPS
#pragma GCC pop_options
#endif
#undef GRADREP_TARGET
#undef GRADREP_VECTOR

#define GRADREP_TARGET avx2
#define GRADREP_VECTOR 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#include GRADREP_LOOPS
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#include GRADREP_LOOPS
#pragma GCC pop_options
#endif
#undef GRADREP_TARGET
#undef GRADREP_VECTOR

#endif

#define GRADREP_TARGET base
#define GRADREP_VECTOR 16
#include GRADREP_LOOPS
#undef GRADREP_TARGET
#undef GRADREP_VECTOR
#undef GRADREP_LOOPS
