// The step of one chunk: the elements [begin, end) of one parameter, run by run of M (mult_runs.h).
//
// Reads downwards: the loops by instruction set and variant -> the random bits of a run -> any chunk.
#pragma once

#include "mult_runs.h"
#include "rounding.h"
#include "step_tail.h"
#include "stored.h"
#include "targets.h"

#include <array>
#include <type_traits>
#include <utility>

#define GRADREP_LOOPS "step_loops.h"
#include "for_each_target.h"
#define GRADREP_LOOPS "tail_loops.h"
#include "for_each_target.h"

namespace gradrep {

using StepLoops = PerTarget<base::StepLoops, avx2::StepLoops, avx512::StepLoops>;
using TailLoops = PerTarget<base::TailLoops, avx2::TailLoops, avx512::TailLoops>;

// The loops of one update that computes in T and has its states in State, by its variants. Loops take each state as an
// argument of its own.
template <typename Update, typename T, typename State, typename = std::make_index_sequence<Update::kStates>>
struct StepTable;

template <typename Update, typename T, typename State, size_t... state>
struct StepTable<Update, T, State, std::index_sequence<state...>> {
  template <size_t, typename Same>
  using Each = Same;
  using Numbers = typename Update::template Numbers<T>;
  using Loop = void (*)(T*, const T*, const T*, int64_t, Numbers, T, T*, T, Each<state, State*>...,
                        Each<state, const uint16_t*>...);

  Loop alone[Update::kVariants], with_average[Update::kVariants];

  static const StepTable& best() {
    static const StepTable table = StepLoops::on_best(
        []<typename Loops>(Loops) { return of<Loops>(std::make_integer_sequence<int, Update::kVariants>()); });
    return table;
  }

 private:
  template <typename Loops, int... variant>
  static constexpr StepTable of(std::integer_sequence<int, variant...>) {
    return {{&Loops::template Of<Update, variant, false, T, Each<state, State>...>::run...},
            {&Loops::template Of<Update, variant, true, T, Each<state, State>...>::run...}};
  }
};

// The arrays of one run, in the dtype that is computed in. Without an average, e is null.
template <typename Update, typename T, typename State, typename = std::make_index_sequence<Update::kStates>>
struct StepRun;

template <typename Update, typename T, typename State, size_t... state>
struct StepRun<Update, T, State, std::index_sequence<state...>> {
  using Table = StepTable<Update, T, State>;
  T* p;
  const T* g;
  T* e;
  std::array<State*, sizeof...(state)> states;
  std::array<const uint16_t*, sizeof...(state)> bits;

  void operator()(int variant, const T* m, int64_t n, const typename Table::Numbers& numbers, T clip, T rest) const {
    const Table& table = Table::best();
    const auto loop = e == nullptr ? table.alone[variant] : table.with_average[variant];
    loop(p, g, m, n, numbers, clip, e, rest, states[state]..., bits[state]...);
  }
};

// The random bits of a run, those of each state beside the others.
template <int kStates>
class RunBits {
 public:
  std::array<const uint16_t*, kStates> draw(const RandomStream& stream, uint64_t element, int64_t n) {
    constexpr int kGroup = base::TailLoops::kGroup;
    const int64_t skipped = element % kGroup;
    std::array<const uint16_t*, kStates> begin;
    for (int k = 0; k < kStates; ++k) {
      TailLoops::on_best([&](auto loops) {
        loops.random_bits(stream, k, element / kGroup, (skipped + n + kGroup - 1) / kGroup, bits_[k]);
      });
      begin[k] = bits_[k] + skipped;
    }
    return begin;
  }

 private:
  // A run may begin within a group, and vectors of eight groups may write seven beyond the last.
  alignas(64) uint16_t bits_[kStates][kRun + 8 * base::TailLoops::kGroup];
};

// A chunk of a parameter of any dtype.
struct Chunk {
  void *params, *grads;
  void* const* states;        // those that the update uses
  void* average;              // null: none is kept
  const float* grad_scale;    // the gradients are first divided by it, in place; null: they are not
  double clip;                // and then multiplied by it, not in place
  double rest;                // 1 - decay of the average
  const RandomStream* random;  // by its bits states are rounded to bfloat16; null: they are stored as the parameter is
  uint64_t first_element;     // of the parameter, in the whole of which it may be a run
  bool first;                 // the parameter has no state yet
  int64_t begin, end;
};

// Steps a chunk that is stored as S and computed in T, with states that are stored as S or, narrow, as bfloat16.
template <bool kNarrow, typename Update, typename S, typename T, typename Mult>
void step_chunk(const Chunk& chunk, const typename Update::Hyper& hyper, const Mult& mult) {
  constexpr bool kWide = std::is_same_v<S, T>;
  constexpr int kStates = Update::kStates;
  using State = std::conditional_t<kNarrow, BFloat16, T>;
  const int variant = hyper.variant(chunk.first), used = hyper.states();
  const T sign = hyper.maximize ? -1 : 1;  // (−g) M and g (−M) have the same bits
  const T clip = static_cast<T>(chunk.clip), rest = static_cast<T>(chunk.rest);
  const auto numbers = hyper.template numbers<T>();
  auto* const params = static_cast<S*>(chunk.params);
  auto* const grads = static_cast<S*>(chunk.grads);
  auto* const average = static_cast<T*>(chunk.average);
  alignas(64) T wide_p[kWide ? 1 : kRun], wide_g[kWide ? 1 : kRun];
  alignas(64) T wide_s[kStates][kWide || kNarrow ? 1 : kRun];
  std::conditional_t<kNarrow, RunBits<kStates>, char> random;
  each_run(mult, sign, chunk.begin, chunk.end, [&](const T* m, int64_t at, int64_t n) {
    S *const p = params + at, *const g = grads + at;
    StepRun<Update, T, State> run{};
    if constexpr (kNarrow) {
      for (int k = 0; k < kStates; ++k) run.states[k] = static_cast<State*>(chunk.states[k]) + at;
      run.bits = random.draw(*chunk.random, chunk.first_element + at, n);
    }
    TailLoops::on_best([&](auto loops) {
      if constexpr (kWide) {
        if (chunk.grad_scale != nullptr) loops.divide(g, n, static_cast<T>(*chunk.grad_scale));
        run.p = p;
        run.g = g;
        run.e = average == nullptr ? nullptr : average + at;
        // No loop touches a state that the update does not use, so the parameter stands in for it; __restrict is then
        // vacuous.
        if constexpr (!kNarrow)
          for (int k = 0; k < kStates; ++k) run.states[k] = k < used ? static_cast<T*>(chunk.states[k]) + at : p;
        run(variant, m, n, numbers, clip, rest);
      } else {
        loops.widen_all(p, n, wide_p);
        loops.widen_all(g, n, wide_g);
        if (chunk.grad_scale != nullptr) {
          loops.divide(wide_g, n, static_cast<T>(*chunk.grad_scale));
          loops.narrow_all(wide_g, n, g);
        }
        run.p = wide_p;
        run.g = wide_g;
        if constexpr (!kNarrow)
          for (int k = 0; k < kStates; ++k) {
            run.states[k] = wide_s[k];
            if (k < used && Update::reads_states(variant))
              loops.widen_all(static_cast<const S*>(chunk.states[k]) + at, n, wide_s[k]);
          }
        run(variant, m, n, numbers, clip, rest);
        loops.narrow_all(wide_p, n, p);
        if constexpr (!kNarrow)
          for (int k = 0; k < used; ++k) loops.narrow_all(wide_s[k], n, static_cast<S*>(chunk.states[k]) + at);
        if (average != nullptr) loops.average(p, n, average + at, rest);
      }
    });
  });
}

}  // namespace gradrep
