// G and the |α| of the branches that reach each element, read along a parameter's memory: the twin of
// optim/branch_factors.py.
//
// They come as one tensor [1 + B, ...]. As a multiplier of B + 1 copies of the parameter, one behind the other, it runs
// through memory as any Grad Mult does.
#pragma once

#include "mult_runs.h"

namespace gradrep {

constexpr int64_t kBranchRun = 512;  // elements of a run: with four arrays, G, two |α| and what they share, it fits L1

// What a run of elements has.
template <typename T>
struct BranchRun {
  const T* factor = nullptr;  // G times the sign of a maximum, for each element; null: there is nothing but the sign
  T sign = 1;
  std::vector<const T*> alphas;  // an array for each branch
  struct One {
    int64_t at;  // in the run
    T alpha;
  };
  std::vector<One> identity;  // in the order of memory
};

template <typename T>
class BranchMultiplier {
 public:
  BranchMultiplier() = default;
  BranchMultiplier(BranchMultiplier&&) = default;
  BranchMultiplier& operator=(BranchMultiplier&&) = default;

  BranchMultiplier(const std::optional<Tensor>& factors, const std::optional<Tensor>& identity,
                   const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    if (!factors) return;
    STD_TORCH_CHECK(factors->dim() == static_cast<int64_t>(sizes.size()) + 1 && factors->size(0) >= 2,
                    "factors must have shape [1 + B, ...], with the dimensions of their parameter behind");
    count_ = factors->size(0);
    numel_ = 1;
    for (const int64_t size : sizes) numel_ *= size;
    std::vector<int64_t> copies{count_}, apart{numel_};
    copies.insert(copies.end(), sizes.begin(), sizes.end());
    apart.insert(apart.end(), strides.begin(), strides.end());
    stack_ = Multiplier<T>(factors, std::nullopt, copies, apart);
    if (identity) find_diagonal(*identity, sizes, strides);
  }

  bool is_none() const { return count_ == 0; }
  int64_t period() const { return is_none() ? 16 : stack_.period(); }
  void write_out(int64_t numel) {
    if (!is_none()) stack_.write_out(count_ * numel);
  }

  // f(run, position, n) for runs over the elements [begin, end).
  template <typename F>
  void each_run(T sign, int64_t begin, int64_t end, const F& f) const {
    BranchRun<T> run;
    run.sign = sign;
    if (is_none()) {
      for (int64_t at = begin; at < end; at += kRun) f(run, at, std::min(kRun, end - at));
      return;
    }
    run.alphas.resize(count_ - 1);
    const bool repeats = stack_.taps() != 0 && stack_.row_length() >= kShortRow;
    const int64_t period = repeats ? stack_.taps() : 1, room = kBranchRun + period;
    std::vector<T> values(count_ * room);
    auto next = std::lower_bound(diagonal_.begin(), diagonal_.end(), begin,
                                 [](const auto& one, int64_t at) { return one.at < at; });
    const auto with_identity = [&](int64_t at, int64_t n) {
      run.identity.clear();
      for (; next != diagonal_.end() && next->at < at + n; ++next) run.identity.push_back({next->at - at, next->alpha});
      f(run, at, n);
    };
    if (repeats || stack_.is_segments()) {
      stack_.each_row(begin, end, [&](const T* row, int64_t at, int64_t n) {
        for (int64_t k = 0; k < count_; ++k) {
          T* const to = values.data() + k * room;
          const int64_t place = at + k * numel_;
          stack_.each_row(place, place + 1, [&](const T* of_copy, int64_t, int64_t) { row = of_copy; });
          for (int64_t tap = 0; tap < period; ++tap) to[tap] = k == 0 ? row[tap] * sign : row[tap];
          repeat(to, period, period - 1 + std::min(kBranchRun, n));
        }
        for (const int64_t row_end = at + n; at < row_end; at += kBranchRun) {
          const T* const from = values.data() + at % period;
          run.factor = from;
          for (int64_t k = 1; k < count_; ++k) run.alphas[k - 1] = from + k * room;
          with_identity(at, std::min(kBranchRun, row_end - at));
        }
      });
      return;
    }
    for (int64_t at = begin; at < end; at += kBranchRun) {
      const int64_t n = std::min(kBranchRun, end - at);
      for (int64_t k = 0; k < count_; ++k) {
        T* const to = values.data() + k * room;
        stack_.fill(at + k * numel_, n, to);
        if (k > 0)
          run.alphas[k - 1] = to;
        else if (sign != 1)
          for (int64_t i = 0; i < n; ++i) to[i] *= sign;
      }
      run.factor = values.data();
      with_identity(at, n);
    }
  }

 private:
  void find_diagonal(const Tensor& identity, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    check_identity(identity, sizes);
    const Multiplier<T> ones(identity, std::nullopt, {sizes[0]}, {1});
    std::vector<T> alphas(sizes[0]);
    ones.fill(0, sizes[0], alphas.data());
    for (int64_t o = 0; o < sizes[0] && sizes[1] > 0; ++o)
      diagonal_.push_back({o * strides[0] + o % sizes[1] * strides[1] + sizes[2] / 2 * strides[2] +
                               sizes[3] / 2 * strides[3],
                           alphas[o]});
    std::sort(diagonal_.begin(), diagonal_.end(), [](const auto& a, const auto& b) { return a.at < b.at; });
  }

  Multiplier<T> stack_;
  int64_t count_ = 0, numel_ = 0;
  std::vector<typename BranchRun<T>::One> diagonal_;  // where the identity is, in the order of memory
};

template <typename T, typename F>
void each_run(const BranchMultiplier<T>& mult, T sign, int64_t begin, int64_t end, const F& f) {
  mult.each_run(sign, begin, end, f);
}

// The factors of all parameters, as the ops take them.
struct BranchFactors {
  template <typename T>
  using One = BranchMultiplier<T>;

  std::vector<std::optional<Tensor>> scales, identities;  // scales: the factors

  size_t size() const {
    STD_TORCH_CHECK(scales.size() == identities.size(), "factors and identities must be lists of one length");
    return scales.size();
  }

  template <typename T>
  BranchMultiplier<T> of(size_t k, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) const {
    return BranchMultiplier<T>(scales[k], identities[k], sizes, strides);
  }
};

}  // namespace gradrep
