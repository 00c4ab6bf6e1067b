// A step of all parameters of all groups on CUDA: what a block does, and the launches. No torch here (see
// cuda_blocks.h).
//
// All that a launch reads besides the tensors is among the kernel's parameters, so nothing is uploaded, and a CUDA
// graph captures a launch as it is.
//
// In the loop that reads 16 bytes at a time a thread executes for an element in float32 on sm_90: 25 instructions where
// M is one number, 45 with any M, 64 at most with an identity. With a factor and an average they are 33, 54 and 73, and
// with states in bfloat16 beside those 62, 83 and 101. At 4.3 TB/s, memory leaves time for 140 (20 bytes), 187 (28) and
// 160 (24).
//
// Reads downwards: hyper-parameters -> the rows of a launch -> what a block does -> the launches of one dtype.
//
// The update is a type as step_plan.h lists it. Of its members this file needs kStates, kVariants, Hyper, Numbers,
// reads_states and element, for host and device. One that has kLayered gets the layers of a scale in place of M, and
// has moments, added and moved in place of element, as rep_adamw_update.h.
#pragma once

#include "launch_rows.h"
#include "step_tail.h"

#include <utility>

namespace gradrep {

template <typename Update>
constexpr bool is_layered = requires { Update::kLayered; };

// ---- hyper-parameters

// A row of the table of hyper-parameters as the kernels read it.
template <typename Update, typename T>
struct Packed {
  typename Update::template Numbers<T> numbers;
  int8_t variant, first_variant, states, maximize;  // first_variant: of a parameter's first step

  Packed() = default;
  GRADREP_HD explicit Packed(const typename Update::Hyper& hyper)
      : numbers(hyper.template numbers<T>()),
        variant(static_cast<int8_t>(hyper.variant(false))),
        first_variant(static_cast<int8_t>(hyper.variant(true))),
        states(static_cast<int8_t>(hyper.states())),
        maximize(hyper.maximize ? 1 : 0) {}
};

// The numbers of a step's tail as the kernels read them (reference/step_tail.py).
template <typename T>
struct TailNumbers {
  T undecayed;  // 1 - ema_decay
  bool stochastic;
  uint64_t seed, step;

  TailNumbers() = default;
  GRADREP_HD explicit TailNumbers(const double (&tail)[4])
      : undecayed(static_cast<T>(1 - tail[0])),
        stochastic(tail[1] != 0),
        seed(static_cast<uint64_t>(tail[2])),
        step(static_cast<uint64_t>(tail[3])) {}
};

// The table and the tail where they are packed on the device; null: each row has its own, and the launch has the tail.
template <typename Update, typename T>
struct PackedTable {
  Packed<Update, T>* groups = nullptr;
  TailNumbers<T>* tail = nullptr;
};

enum class Stored : int32_t { kFloat, kDouble, kBFloat16, kHalf };

// Packs rows of which some numbers are on the device: a learning rate that is a tensor. The host never reads them.
template <typename Update>
struct PackWork {
  static constexpr int kGroups = 32;  // of a launch
  static constexpr int kColumns = Update::Hyper::kColumns;

  struct Number {
    const void* where;  // on the device; null: it is `value`
    double value;
    Stored stored;

    GRADREP_HD double read() const {
      if (where == nullptr) return value;
      switch (stored) {
        case Stored::kFloat: return *static_cast<const float*>(where);
        case Stored::kDouble: return *static_cast<const double*>(where);
        case Stored::kBFloat16: return widen(*static_cast<const BFloat16*>(where));
        default: return widen(*static_cast<const Half*>(where));
      }
    }
  };

  Number numbers[kGroups][kColumns], tail[4];
  int32_t groups;
  PackedTable<Update, float> floats;  // from the first group on
  PackedTable<Update, double> doubles;

  int64_t blocks() const { return 1; }
  GRADREP_HD void pack(int thread) const {
    if (thread == kGroups) {
      const double numbers_of_tail[4] = {tail[0].read(), tail[1].read(), tail[2].read(), tail[3].read()};
      *floats.tail = TailNumbers<float>(numbers_of_tail);
      *doubles.tail = TailNumbers<double>(numbers_of_tail);
    }
    const int group = thread;
    if (group >= groups) return;
    double row[kColumns];
    for (int c = 0; c < kColumns; ++c) row[c] = numbers[group][c].read();
    const typename Update::Hyper hyper(row);
    floats.groups[group] = Packed<Update, float>(hyper);
    doubles.groups[group] = Packed<Update, double>(hyper);
  }
};

// ---- the rows of a launch

// How much of the tail a kernel has. A step without it runs as if there were none.
enum class TailKind : int8_t {
  kNone,
  kWide,   // a factor of the gradients, and averages
  kNarrow  // and states in bfloat16, by random bits
};

template <typename Update, typename S>
struct StepRow : PlacedRow<Arithmetic<S>> {
  S *param, *grad;
  void* states[Update::kStates];
  Arithmetic<S>* average;  // or null
  Packed<Update, Arithmetic<S>> hyper;
  int32_t group;
  uint32_t number;         // of the parameter in its optimizer
  uint64_t first_element;  // of the piece, in the whole parameter
  bool aligned, first;     // all accesses of several elements are aligned; it is the parameter's first step
};

// What the rows share.
template <typename Update, typename S>
struct StepShared {
  using T = Arithmetic<S>;
  const float *grad_scale, *found_inf;  // or null
  const T* clip;                        // what gradients are multiplied by; or null
  PackedTable<Update, T> on_device;
  TailNumbers<T> tail;
  TailKind kind;
};

template <typename Update, typename S>
struct StepWork : LaunchRows<S, StepRow<Update, S>, sizeof(StepShared<Update, S>)>, StepShared<Update, S> {};

// ---- what a block does

// f(std::integral_constant<int, variant>()), with a number that all threads of a block share.
template <int from, int to, typename F>
GRADREP_HD GRADREP_INLINE void with_variant(int variant, const F& f) {
  if constexpr (to - from == 1) {
    f(std::integral_constant<int, from>());
  } else {
    constexpr int middle = (from + to) / 2;
    if (variant < middle)
      with_variant<from, middle>(variant, f);
    else
      with_variant<middle, to>(variant, f);
  }
}

template <typename Update, typename S, TailKind kKind, typename = std::make_index_sequence<Update::kStates>>
struct StepBlock;

template <typename Update, typename S, TailKind kKind, size_t... state>
struct StepBlock<Update, S, kKind, std::index_sequence<state...>> {
  static constexpr bool kTail = kKind != TailKind::kNone, kNarrow = kKind == TailKind::kNarrow;
  using T = Arithmetic<S>;
  using V = std::conditional_t<kNarrow, BFloat16, S>;  // of states
  const StepWork<Update, S>& work;
  const StepRow<Update, S>& row;
  Packed<Update, T> hyper;
  int variant;
  T unscale, constant;  // what gradients are divided by; M where it is one number
  T factor;             // of the tail: what gradients are multiplied by, -1 to maximize
  TailNumbers<T> tail;

  GRADREP_HD GRADREP_INLINE StepBlock(const StepWork<Update, S>& w, const StepRow<Update, S>& r)
      : work(w), row(r), unscale(1), constant(r.constant()) {
    if (w.on_device.groups != nullptr)
      hyper = w.on_device.groups[r.group];
    else
      hyper = r.hyper;
    variant = r.first ? hyper.first_variant : hyper.variant;
    if (w.grad_scale != nullptr) unscale = static_cast<T>(*w.grad_scale);
    if constexpr (kTail) {
      factor = hyper.maximize ? T(-1) : T(1);
      if (w.clip != nullptr) factor = factor * *w.clip;
      tail = w.on_device.tail != nullptr ? *w.on_device.tail : w.tail;
    }
  }

  GRADREP_HD GRADREP_INLINE bool uses(size_t n) const { return hyper.states > static_cast<int>(n); }

  GRADREP_HD GRADREP_INLINE V* state_at(size_t n, uint32_t at) const { return static_cast<V*>(row.states[n]) + at; }

  // 16 random bits for each of n elements that begin at a place.
  template <int n>
  GRADREP_HD GRADREP_INLINE uint64_t random_bits(uint32_t at, uint32_t which) const {
    const RandomStream stream(tail.seed, tail.step, row.number);
    const auto of_four = [&](uint64_t element) {
      const RandomWords eight = stream.words(element, which);
      const bool later = (element & 4) != 0;
      return (later ? eight.word[2] : eight.word[0]) | static_cast<uint64_t>(later ? eight.word[3] : eight.word[1])
                                                           << 32;
    };
    const uint64_t element = row.first_element + at;
    const int before = static_cast<int>(element & 3);  // of the four among which the first is
    uint64_t bits = 0;
#pragma unroll 1
    for (int from = -before; from < n; from += 4) {
      const uint64_t four = of_four(element + from);
      bits |= from < 0 ? four >> -16 * from : four << 16 * from;
    }
    return bits;
  }

  template <int n>
  GRADREP_HD GRADREP_INLINE void write_state(Together<V, n>& s, const T (&wide)[Together<S, n>::kPart], uint32_t at,
                                             uint32_t which) const {
    if constexpr (kNarrow) {
      constexpr int part = Together<V, n>::kPart;
      if (!uses(which)) return;
      float v[part];
#pragma unroll
      for (int i = 0; i < part; ++i) v[i] = static_cast<float>(wide[i]);
      if (tail.stochastic)
        s.write(v, random_bits<part>(at, which));
      else
        s.write(v);
    } else {
      s.write(wide);
    }
  }

  template <int kVariant, typename... States>
  GRADREP_HD GRADREP_INLINE void layered_element(T& p, T g, uint32_t place, States&... states) const {
    const auto layers = row.layers(place);
    const auto shared = Update::template moments<kVariant>(g * layers.first(), hyper.numbers, states...);
    T sum = 0;
    layers.each_alpha(
        [&](T alpha) { sum = sum + Update::template added<T>(shared.n, shared.s, alpha, hyper.numbers); });
    p = Update::template moved<T>(p, sum, hyper.numbers);
  }

  // n elements that begin at a place: one, or as many as one access reads where all tensors are aligned.
  template <int n>
  GRADREP_HD GRADREP_INLINE void step(uint32_t at) const {
    using Elements = Together<S, n>;
    constexpr int part = Elements::kPart;
    Elements p, g;
    Together<V, n> s[Update::kStates];
    [[maybe_unused]] Together<T, n> e;
    p.load(row.param + at);
    g.load(row.grad + at);
    if (Update::reads_states(variant)) ((uses(state) ? s[state].load(state_at(state, at)) : void()), ...);
    if constexpr (kTail)
      if (row.average != nullptr) e.load(row.average + at);
#pragma unroll 1
    for (int k = 0; k < Elements::kParts; ++k) {
      T d[part], wide_p[part], wide_s[Update::kStates][part];
      g.read(d);
      if (work.grad_scale != nullptr) {
#pragma unroll
        for (int i = 0; i < part; ++i) d[i] = d[i] / unscale;
        g.write(d);
      }
      if (kTail || hyper.maximize)
#pragma unroll
        for (int i = 0; i < part; ++i) d[i] = kTail ? d[i] * factor : -d[i];
      if (!is_layered<Update> && row.form == Form::kConstant)
#pragma unroll
        for (int i = 0; i < part; ++i) d[i] = d[i] * constant;
      if (!is_layered<Update> && row.form == Form::kGeneral)
#pragma unroll
        for (int i = 0; i < part; ++i) d[i] = d[i] * row.multiplier(at + k * part + i);
      p.read(wide_p);
      (s[state].read(wide_s[state]), ...);
      with_variant<0, Update::kVariants>(variant, [&](auto fixed) {
#pragma unroll
        for (int i = 0; i < part; ++i) {
          if constexpr (is_layered<Update>)
            layered_element<decltype(fixed)::value>(wide_p[i], d[i], at + k * part + i, wide_s[state][i]...);
          else
            Update::template element<decltype(fixed)::value>(wide_p[i], d[i], T(1), hyper.numbers, wide_s[state][i]...);
        }
      });
      p.write(wide_p);
      (write_state<n>(s[state], wide_s[state], at + k * part, state), ...);
      if constexpr (kTail)
        if (row.average != nullptr) {
          T wide_e[part];
          p.read(wide_p);  // as it is stored
          e.read(wide_e);
#pragma unroll
          for (int i = 0; i < part; ++i) wide_e[i] = averaged(wide_e[i], wide_p[i], tail.undecayed);
          e.write(wide_e);
        }
      p.turn();
      g.turn();
      (s[state].turn(), ...);
      if constexpr (kTail) e.turn();
    }
    if (work.grad_scale != nullptr) g.store(row.grad + at);
    ((uses(state) ? s[state].store(state_at(state, at)) : void()), ...);
    p.store(row.param + at);
    if constexpr (kTail)
      if (row.average != nullptr) e.store(row.average + at);
  }
};

// Makes the compiler read a row's numbers again, from constant memory. With a tail there are so many that 64 registers,
// those of four blocks on a multiprocessor, would not keep them from one round of a loop to the next.
GRADREP_HD GRADREP_INLINE void keep_nothing() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

template <TailKind kKind, typename Update, typename S>
GRADREP_HD GRADREP_INLINE void step_block(const StepWork<Update, S>& work, uint32_t block, int thread) {
  constexpr uint32_t width = kTogether<S>;
  if (work.found_inf != nullptr && *work.found_inf != 0) return;
  const ChunkOfRow chunk = work.chunk_of(block);
  const StepBlock<Update, S, kKind> own(work, work.row[chunk.row]);
  const auto step = [&]<int n>(std::integral_constant<int, n>, uint32_t from, uint32_t to) {
    for (uint32_t at = from + thread * n; at < to; at += kThreads * n) {
      if constexpr (kKind != TailKind::kNone) keep_nothing();
      own.template step<n>(at);
    }
  };
  step(std::integral_constant<int, width>(), chunk.begin, chunk.wide_end);
  step(std::integral_constant<int, 1>(), chunk.wide_end, chunk.end);
}

// f(std::integral_constant<TailKind, kind>())
template <typename F>
void with_kind(TailKind kind, const F& f) {
  if (kind == TailKind::kNone) return f(std::integral_constant<TailKind, TailKind::kNone>());
  if (kind == TailKind::kWide) return f(std::integral_constant<TailKind, TailKind::kWide>());
  f(std::integral_constant<TailKind, TailKind::kNarrow>());
}

// ---- the launches of one dtype

template <typename Update, typename S>
class StepLaunches : public Launches<StepWork<Update, S>> {
 public:
  using T = Arithmetic<S>;

  // The arrays of each parameter, as they are now: p, g, s and e. `narrow`: states are bfloat16.
  template <typename Tensors>
  void point_to(const std::vector<Tensors>& tensors, bool narrow) {
    constexpr int width = kTogether<S>;
    this->each_row([&](auto& row, const RowSource& source) {
      const Tensors& from = tensors[source.tensor];
      row.aligned = true;
      const auto at = [&](void* array, int64_t size, int access) {
        char* const place = array == nullptr ? nullptr : static_cast<char*>(array) + source.start * size;
        row.aligned = row.aligned && reinterpret_cast<uintptr_t>(place) % access == 0;
        return static_cast<void*>(place);
      };
      row.param = static_cast<S*>(at(from.p, sizeof(S), 16));
      row.grad = static_cast<S*>(at(from.g, sizeof(S), 16));
      for (int k = 0; k < Update::kStates; ++k)
        row.states[k] = narrow ? at(from.s[k], 2, 2 * width) : at(from.s[k], sizeof(S), 16);
      row.average = static_cast<T*>(at(from.e, sizeof(T), 16));
    });
  }

  // `table`: numbers of the host, one row per group, and the tail. `on_device`: all on the device instead.
  void set_numbers(const double* table, const TailNumbers<T>& tail, const PackedTable<Update, T>& on_device) {
    this->each([&](auto& work) {
      work.on_device = on_device;
      work.tail = tail;
    });
    if (on_device.groups != nullptr) return;
    this->each_row([&](auto& row, const RowSource&) {
      row.hyper = Packed<Update, T>(typename Update::Hyper(table + row.group * Update::Hyper::kColumns));
    });
  }
};

}  // namespace gradrep
