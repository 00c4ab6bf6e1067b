// The rule of second_step.py, an update with two states, as step_plan.h lists it: to show what an optimizer costs.
#pragma once

#include "rep_sgd_update.h"

namespace gradrep {

struct SecondUpdate {
  static constexpr const char* kOp = "second_step";
  static constexpr int kStates = 2, kVariants = 2;  // later steps, the first
  using Multipliers = GradMults;

  static constexpr bool is_frequent(int variant) { return variant == 0; }
  GRADREP_HD static constexpr bool reads_states(int variant) { return variant == 0; }

  template <typename T>
  struct Numbers {
    T lr, fast_decay, slow_decay;
  };

  struct Hyper {
    static constexpr int64_t kColumns = 3;
    static constexpr bool maximize = false;
    double lr, fast_decay, slow_decay;

    GRADREP_HD explicit Hyper(const double* row) : lr(row[0]), fast_decay(row[1]), slow_decay(row[2]) {}

    GRADREP_HD int states() const { return kStates; }
    GRADREP_HD int variant(bool first) const { return first ? 1 : 0; }
    template <typename T>
    GRADREP_HD Numbers<T> numbers() const {
      return {static_cast<T>(lr), static_cast<T>(fast_decay), static_cast<T>(slow_decay)};
    }
  };

  template <int kVariant, typename T>
  GRADREP_HD GRADREP_INLINE static void element(T& p, T g, T m, const Numbers<T>& h, T& fast, T& slow) {
    const T d = g * m;
    fast = kVariant == 1 ? d : fast * h.fast_decay + d;
    slow = kVariant == 1 ? d : slow * h.slow_decay + d;
    p = p - (fast + slow) * h.lr;
  }
};

}  // namespace gradrep
