// The step of one chunk: the elements [begin, end) of one parameter. Each way in which M runs through memory has a
// loop.
//
// Reads downwards: the loops by instruction set and variant -> a chunk with M read in place -> any chunk.
#pragma once

#include "bins.h"
#include "grad_mult.h"
#include "targets.h"

#include <array>
#include <type_traits>
#include <utility>

#define GRADREP_LOOPS "step_loops.h"
#include "for_each_target.h"

namespace gradrep {

using StepLoops = PerTarget<base::StepLoops, avx2::StepLoops, avx512::StepLoops>;

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

  TapsLoop taps(int64_t k, int variant) const {
    return k == 9 ? taps9[variant] : k == 25 ? taps25[variant] : taps49[variant];
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

// A chunk of a parameter of any dtype.
struct Chunk {
  void *params, *grads;
  void* const* states;      // those that the update uses
  const float* grad_scale;  // the gradients are first divided by it, in place; null: they are not
  bool first;               // the parameter has no state yet
  int64_t begin, end;
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
  if (taps != 0 && Update::is_frequent(variant) && mult.row_length() >= 32 * taps) {
    const auto loop = loops.taps(taps, variant);
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

// Steps a chunk that is stored as S and computed in T.
template <typename Update, typename S, typename T>
void step_chunk(const Chunk& chunk, const typename Update::Hyper& hyper, const Multiplier<T>& mult) {
  constexpr int64_t kBlock = 1024;  // elements that a scratch array holds: 4 arrays of 4 KiB stay in L1
  const int variant = hyper.variant(chunk.first), states = hyper.states();
  const T sign = hyper.maximize ? -1 : 1;  // (−g) M and g (−M) have the same bits
  auto* p = static_cast<S*>(chunk.params);
  auto* g = static_cast<S*>(chunk.grads);
  // No loop touches a state that the update does not use, so the parameter stands in for it; __restrict is then
  // vacuous.
  std::array<S*, Update::kStates> s;
  for (int k = 0; k < Update::kStates; ++k) s[k] = k < states ? static_cast<S*>(chunk.states[k]) : p;
  const auto numbers = hyper.template numbers<T>();

  if constexpr (std::is_same_v<S, T>) {
    if (chunk.grad_scale != nullptr) {
      const T by = static_cast<T>(*chunk.grad_scale);
      for (int64_t i = chunk.begin; i < chunk.end; ++i) g[i] = g[i] / by;
    }
    if (step_in_place<Update, T>({p, g, s, numbers}, variant, mult, sign, chunk.begin, chunk.end)) return;
  }
  // Any other course of M, and bf16 / fp16: M is written out for a block at a time.
  const auto array = StepTable<Update, T>::best().array[variant];
  alignas(64) T m[kBlock], wide_p[kBlock], wide_g[kBlock];
  alignas(64) std::array<std::array<T, kBlock>, Update::kStates> wide_s;
  const int64_t block = kBlock / mult.period() * mult.period();
  for (int64_t at = chunk.begin; at < chunk.end; at += block) {
    const int64_t n = std::min(block, chunk.end - at);
    mult.fill(at, n, m);
    if (sign != 1)
      for (int64_t i = 0; i < n; ++i) m[i] *= sign;
    if constexpr (std::is_same_v<S, T>) {
      StepArrays<Update, T>{p, g, s, numbers}.run(array, m, at, n);
    } else {
      for (int64_t i = 0; i < n; ++i) wide_p[i] = static_cast<T>(p[at + i]);
      for (int64_t i = 0; i < n; ++i) wide_g[i] = static_cast<T>(g[at + i]);
      if (chunk.grad_scale != nullptr)
        for (int64_t i = 0; i < n; ++i) g[at + i] = static_cast<S>(wide_g[i] = wide_g[i] / *chunk.grad_scale);
      StepArrays<Update, T> arrays{wide_p, wide_g, {}, numbers};
      for (int k = 0; k < Update::kStates; ++k) {
        arrays.states[k] = wide_s[k].data();
        if (k < states && Update::reads_states(variant))
          for (int64_t i = 0; i < n; ++i) wide_s[k][i] = static_cast<T>(s[k][at + i]);
      }
      arrays.run(array, m, 0, n);
      for (int64_t i = 0; i < n; ++i) p[at + i] = static_cast<S>(wide_p[i]);
      for (int k = 0; k < states; ++k)
        for (int64_t i = 0; i < n; ++i) s[k][at + i] = static_cast<S>(wide_s[k][i]);
    }
  }
}

}  // namespace gradrep
