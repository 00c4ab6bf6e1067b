// A step of all parameters of all groups on CUDA: what a block does, and the launches. No torch here (see
// cuda_blocks.h).
//
// All that a launch reads besides the tensors is among the kernel's parameters, so nothing is uploaded, and a CUDA
// graph captures a launch as it is.
//
// In the loop that reads 16 bytes at a time a thread executes for an element in float32 on sm_90: 25 instructions where
// M is one number, 45 with any M, 64 at most with an identity. At 4.3 TB/s, memory leaves time for 140.
//
// Reads downwards: hyper-parameters -> the rows of a launch -> what a block does -> the launches of one dtype.
//
// The update is a type as step_plan.h lists it. Of its members this file needs kStates, kVariants, Hyper, Numbers,
// reads_states and element, for host and device.
#pragma once

#include "launch_rows.h"

#include <utility>

namespace gradrep {

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

  Number numbers[kGroups][kColumns];
  int32_t groups;
  Packed<Update, float>* floats;  // of the first group
  Packed<Update, double>* doubles;

  int64_t blocks() const { return 1; }
  GRADREP_HD void pack(int group) const {
    if (group >= groups) return;
    double row[kColumns];
    for (int c = 0; c < kColumns; ++c) row[c] = numbers[group][c].read();
    const typename Update::Hyper hyper(row);
    floats[group] = Packed<Update, float>(hyper);
    doubles[group] = Packed<Update, double>(hyper);
  }
};

// ---- the rows of a launch

template <typename Update, typename S>
struct StepRow : PlacedRow<Arithmetic<S>> {
  S *param, *grad, *states[Update::kStates];
  Packed<Update, Arithmetic<S>> hyper;
  int32_t group;
  bool aligned, first;  // all tensors begin at a multiple of 16 bytes; it is the parameter's first step
};

template <typename Update, typename S>
struct StepWork : LaunchRows<S, StepRow<Update, S>, 3 * sizeof(void*)> {
  const float *grad_scale, *found_inf;             // or null
  const Packed<Update, Arithmetic<S>>* on_device;  // by group; null: each row has its own
};

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

template <typename Update, typename S, typename = std::make_index_sequence<Update::kStates>>
struct StepBlock;

template <typename Update, typename S, size_t... state>
struct StepBlock<Update, S, std::index_sequence<state...>> {
  using T = Arithmetic<S>;
  const StepWork<Update, S>& work;
  const StepRow<Update, S>& row;
  Packed<Update, T> hyper;
  int variant;
  T unscale, constant;  // what gradients are divided by; M where it is one number

  GRADREP_HD GRADREP_INLINE StepBlock(const StepWork<Update, S>& w, const StepRow<Update, S>& r)
      : work(w), row(r), unscale(1), constant(r.constant()) {
    if (w.on_device != nullptr)
      hyper = w.on_device[r.group];
    else
      hyper = r.hyper;
    variant = r.first ? hyper.first_variant : hyper.variant;
    if (w.grad_scale != nullptr) unscale = static_cast<T>(*w.grad_scale);
  }

  GRADREP_HD GRADREP_INLINE bool uses(size_t n) const { return hyper.states > static_cast<int>(n); }

  // n elements that begin at a place: one, or as many as one access reads where all tensors are aligned.
  template <int n>
  GRADREP_HD GRADREP_INLINE void step(uint32_t at) const {
    using Elements = Together<S, n>;
    constexpr int part = Elements::kPart;
    Elements p, g, s[Update::kStates];
    p.load(row.param + at);
    g.load(row.grad + at);
    if (Update::reads_states(variant)) ((uses(state) ? s[state].load(row.states[state] + at) : void()), ...);
#pragma unroll 1
    for (int k = 0; k < Elements::kParts; ++k) {
      T d[part], wide_p[part], wide_s[Update::kStates][part];
      g.read(d);
      if (work.grad_scale != nullptr) {
#pragma unroll
        for (int i = 0; i < part; ++i) d[i] = d[i] / unscale;
        g.write(d);
      }
      if (hyper.maximize)
#pragma unroll
        for (int i = 0; i < part; ++i) d[i] = -d[i];
      if (row.form == Form::kConstant)
#pragma unroll
        for (int i = 0; i < part; ++i) d[i] = d[i] * constant;
      if (row.form == Form::kGeneral)
#pragma unroll
        for (int i = 0; i < part; ++i) d[i] = d[i] * row.multiplier(at + k * part + i);
      p.read(wide_p);
      (s[state].read(wide_s[state]), ...);
      with_variant<0, Update::kVariants>(variant, [&](auto fixed) {
#pragma unroll
        for (int i = 0; i < part; ++i)
          Update::template element<decltype(fixed)::value>(wide_p[i], d[i], T(1), hyper.numbers, wide_s[state][i]...);
      });
      p.write(wide_p);
      (s[state].write(wide_s[state]), ...);
      p.turn();
      g.turn();
      (s[state].turn(), ...);
    }
    if (work.grad_scale != nullptr) g.store(row.grad + at);
    ((uses(state) ? s[state].store(row.states[state] + at) : void()), ...);
    p.store(row.param + at);
  }
};

template <typename Update, typename S>
GRADREP_HD GRADREP_INLINE void step_block(const StepWork<Update, S>& work, uint32_t block, int thread) {
  constexpr uint32_t width = kTogether<S>;
  if (work.found_inf != nullptr && *work.found_inf != 0) return;
  const ChunkOfRow chunk = work.chunk_of(block);
  const StepBlock<Update, S> own(work, work.row[chunk.row]);
  for (uint32_t at = chunk.begin + thread * width; at < chunk.wide_end; at += kThreads * width)
    own.template step<width>(at);
  for (uint32_t at = chunk.wide_end + thread; at < chunk.end; at += kThreads) own.template step<1>(at);
}

// ---- the launches of one dtype

template <typename Update, typename S>
class StepLaunches : public Launches<StepWork<Update, S>> {
 public:
  using T = Arithmetic<S>;

  void add(size_t param, const Piece& piece, const T* scale, const T* identity, int64_t group, bool first) {
    auto& row = this->new_row();
    row.take(piece, scale, identity);
    row.group = static_cast<int32_t>(group);
    row.first = first;
    sources_.push_back({param, piece.start});
  }

  // The arrays of each parameter, as they are now: p, g and s.
  template <typename Tensors>
  void point_to(const std::vector<Tensors>& tensors) {
    auto source = sources_.begin();
    this->each_row([&](auto& row) {
      const Tensors& from = tensors[source->param];
      uintptr_t bits = 0;
      const auto at = [&](void* array) {
        S* const place = array == nullptr ? nullptr : static_cast<S*>(array) + source->start;
        bits |= reinterpret_cast<uintptr_t>(place);
        return place;
      };
      row.param = at(from.p);
      row.grad = at(from.g);
      for (int k = 0; k < Update::kStates; ++k) row.states[k] = at(from.s[k]);
      row.aligned = bits % 16 == 0;
      ++source;
    });
  }

  // `table`: numbers of the host, one row per group. `on_device`: all of them on the device instead, or null.
  void set_hyper(const double* table, const Packed<Update, T>* on_device) {
    this->each([&](auto& work) { work.on_device = on_device; });
    if (on_device != nullptr) return;
    this->each_row([&](auto& row) {
      row.hyper = Packed<Update, T>(typename Update::Hyper(table + row.group * Update::Hyper::kColumns));
    });
  }

 private:
  struct Source {  // of a row
    size_t param;
    int64_t start;  // its first element
  };

  std::vector<Source> sources_;
};

}  // namespace gradrep
