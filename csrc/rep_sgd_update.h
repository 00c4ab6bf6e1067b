// The update of SGD with M ⊙ g in place of g: its rule and its hyper-parameters, as step_plan.h and step_cuda.h want
// them. No torch here.
#pragma once

#include "bins.h"

#include <cstdint>

namespace gradrep {

struct GradMults;  // of grad_mult.h

struct SgdUpdate {
  static constexpr const char* kOp = "rep_sgd_step";
  static constexpr int kStates = 1;  // arrays per parameter: the momentum buffer
  using Multipliers = GradMults;

  // A first step puts the gradient itself into the buffer. A variant is 2 * mode, and one more with weight decay.
  enum Mode { kNone, kPlain, kNesterov, kFirst, kFirstNesterov, kModes };
  static constexpr int kVariants = 2 * kModes;
  // First steps are rare, so they go without loops of their own.
  static constexpr bool is_frequent(int variant) { return variant / 2 <= kNesterov; }
  GRADREP_HD static constexpr bool reads_states(int variant) {
    return variant / 2 == kPlain || variant / 2 == kNesterov;
  }

  // Numbers of a group in the dtype that is computed in.
  template <typename T>
  struct Numbers {
    T lr, momentum, undampened, weight_decay;
  };

  struct Hyper {  // a row of the op's table
    static constexpr int64_t kColumns = 6;
    double lr, momentum, dampening, weight_decay;
    bool nesterov, maximize;

    GRADREP_HD explicit Hyper(const double* row)
        : lr(row[0]),
          momentum(row[1]),
          dampening(row[2]),
          weight_decay(row[3]),
          nesterov(row[4] != 0),
          maximize(row[5] != 0) {}

    GRADREP_HD int states() const { return momentum != 0 ? 1 : 0; }  // how many of the arrays a step touches
    GRADREP_HD int variant(bool first) const {
      const Mode mode = momentum == 0 ? kNone
                        : first       ? (nesterov ? kFirstNesterov : kFirst)
                                      : (nesterov ? kNesterov : kPlain);
      return 2 * mode + (weight_decay != 0 ? 1 : 0);
    }
    template <typename T>
    GRADREP_HD Numbers<T> numbers() const {
      return {static_cast<T>(lr), static_cast<T>(momentum), static_cast<T>(1 - dampening),
              static_cast<T>(weight_decay)};
    }
  };

  // Every product and sum is rounded on its own (the build turns FMA contraction off), as the reference does.
  template <int kVariant, typename T>
  GRADREP_HD GRADREP_INLINE static void element(T& p, T g, T m, const Numbers<T>& h, T& buffer) {
    constexpr int mode = kVariant / 2;
    T d = g * m;
    if (kVariant % 2 == 1) d = d + p * h.weight_decay;
    if (mode != kNone) {
      const T b = mode == kFirst || mode == kFirstNesterov ? d : buffer * h.momentum + d * h.undampened;
      buffer = b;
      d = mode == kNesterov || mode == kFirstNesterov ? d + b * h.momentum : b;
    }
    p = p - d * h.lr;
  }
};

}  // namespace gradrep
