// The update of AdamW summed over branches: its rule and its hyper-parameters, as step_plan.h and step_cuda.h want
// them. No torch here.
//
// An element has no one multiplier. It has G of its gradient, and the |α| of the branches that reach it, 0 where there
// are fewer. So the rule is in three parts, and a kernel calls `added` once for each branch:
//     moments: m, v and what the branches share;  added: the sum over branches;  moved: the weight
#pragma once

#include "bins.h"

#include <cmath>
#include <cstdint>

namespace gradrep {

struct BranchFactors;  // of branch_mult.h

GRADREP_HD GRADREP_INLINE float root_of(float x) { return sqrtf(x); }
GRADREP_HD GRADREP_INLINE double root_of(double x) { return sqrt(x); }

struct AdamwUpdate {
  static constexpr const char* kOp = "rep_adamw_step";
  static constexpr int kStates = 3;  // arrays per parameter: m, v, and with amsgrad the greatest v
  using Multipliers = BranchFactors;
  static constexpr bool kLayered = true;

  // A variant is 2 with amsgrad, and one more where m moves from the gradient's end: 1 - β1 is 0.5 and more then.
  static constexpr int kVariants = 4;
  static constexpr bool is_frequent(int variant) { return variant == 0; }
  GRADREP_HD static constexpr bool reads_states(int) { return true; }

  // Numbers of a row in the dtype that is computed in.
  template <typename T>
  struct Numbers {
    T step_size, weight1, rest1, beta2, weight2, eps, kept, inverse_root;
  };

  struct Hyper {  // a row of the op's table
    static constexpr int64_t kColumns = 8;
    double lr, beta1, beta2, eps, weight_decay;
    bool amsgrad, maximize;
    double step;

    GRADREP_HD explicit Hyper(const double* row)
        : lr(row[0]),
          beta1(row[1]),
          beta2(row[2]),
          eps(row[3]),
          weight_decay(row[4]),
          amsgrad(row[5] != 0),
          maximize(row[6] != 0),
          step(row[7]) {}

    GRADREP_HD int states() const { return amsgrad ? 3 : 2; }  // how many of the arrays a step touches
    GRADREP_HD int variant(bool) const { return 2 * amsgrad + (1 - beta1 >= 0.5 ? 1 : 0); }
    template <typename T>
    GRADREP_HD Numbers<T> numbers() const {
      const double weight1 = 1 - beta1;
      return {static_cast<T>(lr / (1 - pow(beta1, step + 1))),
              static_cast<T>(weight1),
              static_cast<T>(1 - weight1),
              static_cast<T>(beta2),
              static_cast<T>(1 - beta2),
              static_cast<T>(eps),
              static_cast<T>(1 - lr * weight_decay),
              static_cast<T>(1 / sqrt(1 - pow(beta2, step + 1)))};
    }
  };

  // What the branches of an element share: n = lr / (1 - β1^t) m and s = √v / √(1 - β2^t).
  template <typename T>
  struct Shared {
    T n, s;
  };

  // Every product and sum is rounded on its own (the build turns FMA contraction off), as the reference does.
  template <int kVariant, typename T>
  GRADREP_HD GRADREP_INLINE static Shared<T> moments(T g, const Numbers<T>& h, T& m, T& v, T& greatest) {
    const T way = g - m;
    m = kVariant % 2 == 0 ? m + way * h.weight1 : g - way * h.rest1;
    v = v * h.beta2 + g * g * h.weight2;
    T x = v;
    if (kVariant >= 2) {
      x = greatest > v || greatest != greatest ? greatest : v;  // NaN stays
      greatest = x;
    }
    return shared(m, x, h);
  }

  // From the new m and v, or the greatest v.
  template <typename T>
  GRADREP_HD GRADREP_INLINE static Shared<T> shared(T m, T x, const Numbers<T>& h) {
    return {m * h.step_size, root_of(x) * h.inverse_root};
  }

  // Nothing where alpha is 0: fewer branches reach the element than others, and with ε = 0 it would be 0 / 0.
  template <typename T>
  GRADREP_HD GRADREP_INLINE static T added(T n, T s, T alpha, const Numbers<T>& h) {
    const T part = alpha * alpha * n / (alpha * s + h.eps);
    return alpha > 0 ? part : T(0);
  }

  // Of the weight, from the sum over its branches.
  template <typename T>
  GRADREP_HD GRADREP_INLINE static T moved(T p, T sum, const Numbers<T>& h) {
    return p * h.kept - sum;
  }
};

}  // namespace gradrep
