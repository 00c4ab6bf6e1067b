// The step of one chunk: the elements [begin, end) of one parameter.
//
// Reads downwards: the loops by instruction set and variant -> a chunk with M read in place, where each way in which M
// runs through memory has a loop -> the random bits of a run -> any chunk.
#pragma once

#include "mult_runs.h"
#include "rounding.h"
#include "step_tail.h"
#include "stored.h"
#include "targets.h"

#include <array>
#include <type_traits>
#include <utility>

#define GRADREP_LOOPS "tail_loops.h"
#include "for_each_target.h"
#define GRADREP_LOOPS "step_loops.h"
#include "for_each_target.h"

namespace gradrep {

using StepLoops = PerTarget<base::StepLoops, avx2::StepLoops, avx512::StepLoops>;
using TailStepLoops = PerTarget<base::TailStepLoops, avx2::TailStepLoops, avx512::TailStepLoops>;
using TailLoops = PerTarget<base::TailLoops, avx2::TailLoops, avx512::TailLoops>;

// The loops of one update in one dtype, by variant of the update. Loops take each state array as an argument of its
// own.
template <typename Update, typename T, typename = std::make_index_sequence<Update::kStates>>
struct StepTable;

template <typename Update, typename T, size_t... state>
struct StepTable<Update, T, std::index_sequence<state...>> {
  template <size_t>
  using State = T;
  using Numbers = typename Update::template Numbers<T>;
  using Loop = void (*)(T*, const T*, const T*, int64_t, Numbers, State<state>*...);
  using TapsLoop = void (*)(T*, const T*, const T*, int64_t, Numbers, int64_t, T, State<state>*...);

  Loop constant[Update::kVariants], array[Update::kVariants];
  TapsLoop taps9[Update::kVariants], taps25[Update::kVariants], taps49[Update::kVariants];

  // Null where there is none: M is then an array.
  TapsLoop taps(int64_t k, int variant) const {
    return k == 9 ? taps9[variant] : k == 25 ? taps25[variant] : k == 49 ? taps49[variant] : nullptr;
  }

  static const StepTable& best() {
    static const StepTable table = StepLoops::on_best(
        []<typename Loops>(Loops) { return of<Loops>(std::make_integer_sequence<int, Update::kVariants>()); });
    return table;
  }

 private:
  template <typename Loops, int... variant>
  static constexpr StepTable of(std::integer_sequence<int, variant...>) {
    return {{&Loops::template Of<Update, variant, T, State<state>...>::constant...},
            {&Loops::template Of<Update, variant, T, State<state>...>::array...},
            {taps_loop<Loops, variant, 9>()...},
            {taps_loop<Loops, variant, 25>()...},
            {taps_loop<Loops, variant, 49>()...}};
  }
  template <typename Loops, int variant, int K>
  static constexpr TapsLoop taps_loop() {
    if constexpr (Update::is_frequent(variant))
      return &Loops::template Of<Update, variant, T, State<state>...>::template taps<K>;
    else
      return nullptr;
  }
};

// The loops of TailStepLoops for float32, in the same way.
template <typename Update, bool kAverages, typename = std::make_index_sequence<Update::kStates>>
struct TailStepTable;

template <typename Update, bool kAverages, size_t... state>
struct TailStepTable<Update, kAverages, std::index_sequence<state...>> {
  template <size_t, typename Same>
  using Each = Same;
  using Numbers = typename Update::template Numbers<float>;
  using Loop = void (*)(float*, const float*, const float*, int64_t, Numbers, float, float*, float,
                        Each<state, float*>...);
  using RandomLoop = void (*)(float*, const float*, const float*, int64_t, Numbers, float, float*, float,
                              const RandomStream&, uint64_t, Each<state, BFloat16*>...);

  Loop array[Update::kVariants];
  RandomLoop random[Update::kVariants];

  static const TailStepTable& best() {
    static const TailStepTable table = TailStepLoops::on_best(
        []<typename Loops>(Loops) { return of<Loops>(std::make_integer_sequence<int, Update::kVariants>()); });
    return table;
  }

  // Calls a loop with the states from `at` on, behind the other arguments.
  template <typename AnyLoop, typename State, typename... Arguments>
  static void run(AnyLoop loop, const std::array<State*, Update::kStates>& states, int64_t at, Arguments&&... others) {
    loop(others..., states[state] + at...);
  }

 private:
  template <typename Loops, int... variant>
  static constexpr TailStepTable of(std::integer_sequence<int, variant...>) {
    return {{array_loop<Loops, variant>()...}, {random_loop<Loops, variant>()...}};
  }
  // Without an average and random bits there is only clipping, which step_in_parts does.
  template <typename Loops, int variant>
  static constexpr Loop array_loop() {
    if constexpr (kAverages && Update::is_frequent(variant))
      return &Loops::template Of<Update, variant, true, float, Each<state, float>...>::array;
    else
      return nullptr;
  }
  template <typename Loops, int variant>
  static constexpr RandomLoop random_loop() {
    if constexpr (Update::is_frequent(variant))
      return &Loops::template Of<Update, variant, kAverages, float, Each<state, BFloat16>...>::random;
    else
      return nullptr;
  }
};

// The arrays of one parameter, in the dtype that is computed in. A loop runs over the same elements of each.
template <typename Update, typename T, typename = std::make_index_sequence<Update::kStates>>
struct StepArrays;

template <typename Update, typename T, size_t... state>
struct StepArrays<Update, T, std::index_sequence<state...>> {
  using Table = StepTable<Update, T>;
  T* p;
  const T* g;
  std::array<T*, sizeof...(state)> states;
  typename Table::Numbers numbers;

  void run(typename Table::Loop loop, const T* m, int64_t at, int64_t n) const {
    loop(p + at, g + at, m, n, numbers, states[state] + at...);
  }
  void run(typename Table::TapsLoop loop, const T* taps, int64_t at, int64_t n, int64_t odd, T m_odd) const {
    loop(p + at, g + at, taps, n, numbers, odd, m_odd, states[state] + at...);
  }
};

// Steps a chunk with M read in place. Returns false, and has done nothing, where M must be written out instead.
template <typename Update, typename T>
bool step_in_place(const StepArrays<Update, T>& arrays, int variant, const Multiplier<T>& mult, T sign, int64_t begin,
                   int64_t end) {
  const auto& loops = StepTable<Update, T>::best();
  const auto constant = loops.constant[variant], array = loops.array[variant];
  auto diagonal = mult.diagonal_from(begin);
  // f over [at, at + n) between the identity's elements, and those one by one.
  const auto around_diagonal = [&](int64_t at, int64_t n, const auto& f) {
    int64_t from = at;
    diagonal.each_before(at + n, [&](const auto& tap) {
      const T m = tap.m * sign;
      f(from, tap.at - from);
      arrays.run(constant, &m, tap.at, 1);
      from = tap.at + 1;
    });
    f(from, at + n - from);
  };
  const int64_t taps = mult.taps();
  if (mult.is_constant()) {
    const T m = mult.constant() * sign;
    arrays.run(constant, &m, begin, end - begin);
    return true;
  }
  // Rows of fewer than two tiles are not worth the tile.
  if (const auto loop = loops.taps(taps, variant); loop != nullptr && mult.row_length() >= 32 * taps) {
    mult.each_row(begin, end, [&](const T* row, int64_t at, int64_t n) {
      T negative[49];
      if (sign != 1) {
        for (int64_t k = 0; k < taps; ++k) negative[k] = -row[k];
        row = negative;
      }
      int64_t from = at, odd = -1;  // of several identity elements in one row each gets a call of its own
      T m_odd = 0;
      const auto run_to = [&](int64_t to) { arrays.run(loop, row, from, to - from, odd < 0 ? -1 : odd - from, m_odd); };
      diagonal.each_before(at + n, [&](const auto& tap) {
        if (odd >= 0) {
          const int64_t cut = odd / taps * taps + taps;
          run_to(cut);
          from = cut;
        }
        odd = tap.at;
        m_odd = tap.m * sign;
      });
      run_to(at + n);
    });
    return true;
  }
  if (mult.is_segments()) {
    mult.each_row(begin, end, [&](const T* row, int64_t at, int64_t n) {
      const T m = *row * sign;
      around_diagonal(at, n, [&](int64_t from, int64_t count) { arrays.run(constant, &m, from, count); });
    });
    return true;
  }
  if (mult.is_arrays() && sign == 1) {
    mult.each_row(begin, end, [&](const T* row, int64_t at, int64_t n) {
      around_diagonal(at, n, [&](int64_t from, int64_t count) { arrays.run(array, row + (from - at), from, count); });
    });
    return true;
  }
  return false;
}

// A chunk of a parameter of any dtype.
struct Chunk {
  void *params, *grads;
  void* const* states;         // those that the update uses
  void* average;               // null: none is kept
  const float* grad_scale;     // the gradients are first divided by it, in place; null: they are not
  const double* clip;          // and then multiplied by it, not in place; null: they are not
  double rest;                 // 1 - decay of the average
  const RandomStream* random;  // states are in bfloat16, rounded by its bits; null: they are stored as the parameter is
  uint64_t first_element;      // of the parameter, which may be a run of a whole one
  bool first;                  // the parameter has no state yet
  int64_t begin, end;
};

template <typename Update, typename S>
std::array<S*, Update::kStates> states_of(const Chunk& chunk, int used) {
  // No loop touches a state that the update does not use, so the parameter stands in for it; __restrict is then
  // vacuous.
  std::array<S*, Update::kStates> states;
  for (int k = 0; k < Update::kStates; ++k) states[k] = static_cast<S*>(k < used ? chunk.states[k] : chunk.params);
  return states;
}

// Steps a chunk of a float32 parameter, of which an average is kept or states are in bfloat16, in one loop.
template <typename Update, bool kAverages>
void step_fused(const Chunk& chunk, const typename Update::Hyper& hyper, const Multiplier<float>& mult) {
  using Table = TailStepTable<Update, kAverages>;
  const Table& table = Table::best();
  const int variant = hyper.variant(chunk.first);
  const auto numbers = hyper.template numbers<float>();
  const float clip = chunk.clip == nullptr ? 1 : static_cast<float>(*chunk.clip), rest = static_cast<float>(chunk.rest);
  const auto states = states_of<Update, float>(chunk, hyper.states());
  const auto in_bfloat16 = states_of<Update, BFloat16>(chunk, hyper.states());
  auto *const params = static_cast<float*>(chunk.params), *const grads = static_cast<float*>(chunk.grads);
  // Without an average the loop does not touch it.
  auto* const average = static_cast<float*>(kAverages ? chunk.average : chunk.params);
  each_run(mult, hyper.maximize ? -1.0f : 1.0f, chunk.begin, chunk.end, [&](const float* m, int64_t at, int64_t n) {
    float *const p = params + at, *const g = grads + at, *const e = average + at;
    if (chunk.grad_scale != nullptr) TailLoops::on_best([&](auto loops) { loops.divide(g, n, *chunk.grad_scale); });
    if (chunk.random == nullptr)
      Table::run(table.array[variant], states, at, p, g, m, n, numbers, clip, e, rest);
    else
      Table::run(table.random[variant], in_bfloat16, at, p, g, m, n, numbers, clip, e, rest, *chunk.random,
                 chunk.first_element + at);
  });
}

// Steps a run of elements. `m` is what each_run gives: an array of M's values here.
template <typename Update, typename T>
void step_run(const StepArrays<Update, T>& arrays, int variant, const T* m, int64_t n) {
  arrays.run(StepTable<Update, T>::best().array[variant], m, 0, n);
}

// Steps a chunk that is stored as S and computed in T, part by part: a run at a time is widened to T, as far as it is
// not stored so, and clipped, stepped, rounded and averaged.
template <typename Update, typename S, typename T, typename Mult>
void step_in_parts(const Chunk& chunk, const typename Update::Hyper& hyper, const Mult& mult) {
  constexpr bool kWide = std::is_same_v<S, T>;
  constexpr int kStates = Update::kStates;
  const int variant = hyper.variant(chunk.first), used = hyper.states();
  const auto numbers = hyper.template numbers<T>();
  const bool narrow = chunk.random != nullptr, reads = Update::reads_states(variant);
  const auto stored = states_of<Update, S>(chunk, used);
  const auto in_bfloat16 = states_of<Update, BFloat16>(chunk, used);
  alignas(64) T wide_p[kRun], wide_g[kRun], wide_s[kStates][kRun];
  constexpr int kGroup = base::RandomBits::kGroup, kDrawn = base::RandomBits::kDrawn;
  alignas(64) uint16_t bits[kGroup + kRun + kDrawn];  // a run may begin within a group and end within a draw
  const T sign = hyper.maximize ? -1 : 1;
  each_run(mult, sign, chunk.begin, chunk.end, [&](const auto& m, int64_t at, int64_t n) {
    S *const p = static_cast<S*>(chunk.params) + at, *const g = static_cast<S*>(chunk.grads) + at;
    TailLoops::on_best([&](auto loops) {
      StepArrays<Update, T> arrays{wide_p, wide_g, {}, numbers};
      if constexpr (kWide) {
        if (chunk.grad_scale != nullptr) loops.divide(g, n, static_cast<T>(*chunk.grad_scale));
        arrays.p = p;
        arrays.g = g;
      } else {
        loops.widen_all(p, n, wide_p);
        loops.widen_all(g, n, wide_g);
        if (chunk.grad_scale != nullptr) {
          loops.divide(wide_g, n, static_cast<T>(*chunk.grad_scale));
          loops.narrow_all(wide_g, n, g);
        }
      }
      if (chunk.clip != nullptr) {
        loops.multiply(arrays.g, static_cast<T>(*chunk.clip), n, wide_g);
        arrays.g = wide_g;
      }
      for (int k = 0; k < kStates; ++k) {
        arrays.states[k] = wide_s[k];
        if (k >= used) continue;
        if (narrow && reads) loops.widen_all(in_bfloat16[k] + at, n, wide_s[k]);
        if constexpr (kWide) {
          if (!narrow) arrays.states[k] = stored[k] + at;
        } else {
          if (!narrow && reads) loops.widen_all(stored[k] + at, n, wide_s[k]);
        }
      }
      step_run<Update>(arrays, variant, m, n);
      for (int k = 0; k < used && narrow; ++k) {
        const uint64_t element = chunk.first_element + at, skipped = element % kGroup;
        loops.random_bits(*chunk.random, k, element / kGroup, skipped + n, bits);
        loops.round_all(wide_s[k], bits + skipped, n, in_bfloat16[k] + at);
      }
      if constexpr (!kWide) {
        loops.narrow_all(wide_p, n, p);
        for (int k = 0; k < used && !narrow; ++k) loops.narrow_all(wide_s[k], n, stored[k] + at);
      }
      if (chunk.average != nullptr)
        loops.average(p, n, static_cast<T*>(chunk.average) + at, static_cast<T>(chunk.rest));
    });
  });
}

// Steps a chunk that is stored as S and computed in T.
template <typename Update, typename S, typename T>
void step_chunk(const Chunk& chunk, const typename Update::Hyper& hyper, const Multiplier<T>& mult) {
  if constexpr (std::is_same_v<S, float>) {
    if (Update::is_frequent(hyper.variant(chunk.first))) {
      if (chunk.average != nullptr) return step_fused<Update, true>(chunk, hyper, mult);
      if (chunk.random != nullptr) return step_fused<Update, false>(chunk, hyper, mult);
    }
  }
  if constexpr (std::is_same_v<S, T>) {
    if (chunk.random == nullptr && chunk.average == nullptr && chunk.clip == nullptr && chunk.grad_scale == nullptr) {
      auto *p = static_cast<T*>(chunk.params), *g = static_cast<T*>(chunk.grads);
      const T sign = hyper.maximize ? -1 : 1;  // (−g) M and g (−M) have the same bits
      if (step_in_place<Update, T>({p, g, states_of<Update, T>(chunk, hyper.states()), hyper.template numbers<T>()},
                                   hyper.variant(chunk.first), mult, sign, chunk.begin, chunk.end))
        return;
    }
  }
  step_in_parts<Update, S, T>(chunk, hyper, mult);
}

}  // namespace gradrep
