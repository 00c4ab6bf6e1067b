// M = scale + identity on the taps (o, o mod I, centre), read along a parameter's memory: the twin of grad_mult.py.
#pragma once

#include "common.h"

namespace gradrep {

inline void check_identity(const Tensor& identity, const Sizes& sizes) {
  STD_TORCH_CHECK(sizes.size() == 4 && sizes[2] % 2 == 1 && sizes[3] % 2 == 1 && identity.dim() == 1 &&
                      identity.size(0) == sizes[0],
                  "an identity needs a 4-D parameter with an odd kernel, and one number per output channel");
}

template <typename T>
class Multiplier {
 public:
  Multiplier() = default;
  Multiplier(Multiplier&&) = default;  // not copied: it points into itself
  Multiplier& operator=(Multiplier&&) = default;

  // `strides` is the order in which the (dense) parameter lies in memory; scale broadcasts to `sizes`.
  Multiplier(const std::optional<Tensor>& scale, const std::optional<Tensor>& identity,
             const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    if (!scale) return;
    const auto scale_strides = broadcast_strides(sizes, to_sizes(scale->sizes()), to_sizes(scale->strides()));
    STD_TORCH_CHECK(scale->is_cpu() && scale_strides, "a Grad Mult must lie on the CPU and broadcast to its parameter");
    scale_ = values(*scale);
    dims_ = merged_levels(memory_order(sizes, strides), sizes, *scale_strides);
    if (identity) find_diagonal(*identity, sizes, strides, *scale_strides);
  }

  // ---- the course of M through memory

  static constexpr int64_t kMostTaps = 1024;

  bool is_constant() const {
    return diagonal_.empty() && (dims_.empty() || (dims_.size() == 1 && dims_[0].stride == 0));
  }
  T constant() const { return scale_.data == nullptr ? T(1) : scale_.data[0]; }

  // K where M repeats K taps that lie side by side, as it does over the input channels of a convolution; else 0.
  int64_t taps() const {
    const bool repeats = dims_.size() > 1 && dims_.back().stride == 1 && dims_[dims_.size() - 2].stride == 0;
    return repeats && dims_.back().size <= kMostTaps ? dims_.back().size : 0;
  }
  // M stays the same over long stretches; or is read from memory over long stretches.
  bool is_segments() const { return !dims_.empty() && dims_.back().stride == 0 && is_long(); }
  bool is_arrays() const { return taps() == 0 && !dims_.empty() && dims_.back().stride == 1 && is_long(); }

  // Chunks of work begin at multiples of this: where M repeats its taps at their first one, and on a cache line.
  int64_t period() const { return 16 * std::max<int64_t>(1, taps()); }

  // Elements over which M repeats the same taps.
  int64_t row_length() const { return dims_.back().size * (dims_.size() > 1 ? dims_[dims_.size() - 2].size : 1); }

  // f(M's values, position, n) for the stretches of [begin, end) in which M repeats its taps, stays the same, or lies
  // in memory.
  template <typename F>
  void each_row(int64_t begin, int64_t end, const F& f) const {
    const bool repeats = taps() != 0;
    const size_t outer = dims_.size() - (repeats ? 2 : 1);
    const int64_t row = dims_.back().size * (repeats ? dims_[outer].size : 1);
    for (int64_t at = begin; at < end;) {
      int64_t index = at / row;
      const int64_t inside = at - index * row, n = std::min(row - inside, end - at);
      const T* values = scale_.data;
      for (size_t d = outer; d-- > 0; index /= dims_[d].size) values += index % dims_[d].size * dims_[d].stride;
      f(!repeats && dims_.back().stride == 1 ? values + inside : values, at, n);
      at += n;
    }
  }

  // out = M at the positions [at, at + n), identity included; right for every course.
  void fill(int64_t at, int64_t n, T* out) const {
    const int64_t k = taps();
    if (dims_.empty()) {
      std::fill(out, out + n, constant());
    } else if (k != 0) {
      each_row(at, at + n, [&](const T* row, int64_t position, int64_t count) {
        T* to = out + (position - at);
        for (int64_t tap = position % k; count > 0; tap = 0) {  // a row begins at its first tap
          const int64_t some = std::min(k - tap, count);
          to = std::copy_n(row + tap, some, to);
          count -= some;
        }
      });
    } else {
      const Level last = dims_.back();
      for (int64_t done = 0; done < n;) {
        int64_t index = (at + done) / last.size;
        const int64_t inside = at + done - index * last.size, run = std::min(last.size - inside, n - done);
        const T* values = scale_.data + inside * last.stride;
        for (size_t d = dims_.size() - 1; d-- > 0; index /= dims_[d].size)
          values += index % dims_[d].size * dims_[d].stride;
        for (int64_t i = 0; i < run; ++i) out[done + i] = values[i * last.stride];
        done += run;
      }
    }
    each_diagonal(at, at + n, [&](const Tap& tap) { out[tap.at - at] = tap.m; });
  }

  // From now on M is read from memory, element by element.
  void write_out(int64_t numel) {
    if (is_constant() || numel == 0) return;
    std::vector<T> m(numel);
    fill(0, numel, m.data());
    scale_.copy = std::move(m);
    scale_.data = scale_.copy.data();
    scale_.kept.reset();
    diagonal_.clear();
    dims_ = {{numel, 1}};
  }

  struct Tap {   // of the identity
    int64_t at;  // position in the parameter's memory
    T m, scale;  // M there, and M without the identity
  };

  // Walks forwards over the identity's taps: a search for every short stretch of M would cost as much as the stretch.
  class Cursor {
   public:
    Cursor(const Tap* next, const Tap* last) : next_(next), last_(last) {}
    template <typename F>
    void each_before(int64_t end, const F& f) {
      for (; next_ != last_ && next_->at < end; ++next_) f(*next_);
    }

   private:
    const Tap *next_, *last_;
  };

  Cursor diagonal_from(int64_t begin) const {
    const auto first =
        std::lower_bound(diagonal_.begin(), diagonal_.end(), begin, [](const Tap& t, int64_t at) { return t.at < at; });
    return {diagonal_.data() + (first - diagonal_.begin()), diagonal_.data() + diagonal_.size()};
  }

  template <typename F>
  void each_diagonal(int64_t begin, int64_t end, const F& f) const {
    diagonal_from(begin).each_before(end, f);
  }

 private:
  struct Values {
    const T* data = nullptr;
    std::vector<T> copy;
    std::optional<Tensor> kept;
  };

  static constexpr int64_t kLong = 64;  // elements: below, a call per stretch costs more than writing M out
  bool is_long() const { return dims_.size() == 1 || dims_.back().size >= kLong; }

  // The tensor's own memory where it has T, else a converted copy that keeps its strides (so `t` must be dense).
  static Values values(const Tensor& t) {
    Values v;
    v.kept = t;
    const bool same = dtype_of(t) == (sizeof(T) == 4 ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64());
    if (same) {
      v.data = static_cast<const T*>(t.const_data_ptr());
      return v;
    }
    STD_TORCH_CHECK(
        t.is_contiguous() && (dtype_of(t) == aoti_torch_dtype_float32() || dtype_of(t) == aoti_torch_dtype_float64()),
        "a Grad Mult must be contiguous, float32 or float64");
    v.copy.resize(t.numel());
    if (sizeof(T) == 4)
      std::copy_n(static_cast<const double*>(t.const_data_ptr()), t.numel(), v.copy.begin());
    else
      std::copy_n(static_cast<const float*>(t.const_data_ptr()), t.numel(), v.copy.begin());
    v.data = v.copy.data();
    return v;
  }

  void find_diagonal(const Tensor& identity, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     const std::vector<int64_t>& scale_strides) {
    check_identity(identity, sizes);
    STD_TORCH_CHECK(identity.is_cpu(), "an identity must lie on the CPU");
    const Values ones = values(identity);
    const int64_t step = identity.stride(0);
    for (int64_t o = 0; o < sizes[0] && sizes[1] > 0; ++o) {
      const int64_t tap[4] = {o, o % sizes[1], sizes[2] / 2, sizes[3] / 2};
      int64_t position = 0, at = 0;
      for (int d = 0; d < 4; ++d) position += tap[d] * strides[d], at += tap[d] * scale_strides[d];
      diagonal_.push_back({position, scale_.data[at] + ones.data[o * step], scale_.data[at]});
    }
    std::sort(diagonal_.begin(), diagonal_.end(), [](const Tap& a, const Tap& b) { return a.at < b.at; });
  }

  Values scale_;
  std::vector<Level> dims_;    // from the outermost to the innermost in memory
  std::vector<Tap> diagonal_;  // in the order of memory
};

// The Grad Mults of all parameters, as the ops take them.
struct GradMults {
  template <typename T>
  using One = Multiplier<T>;

  std::vector<std::optional<Tensor>> scales, identities;

  size_t size() const {
    STD_TORCH_CHECK(scales.size() == identities.size(), "scales and identities must be lists of one length");
    return scales.size();
  }

  template <typename T>
  Multiplier<T> of(size_t k, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) const {
    return Multiplier<T>(scales[k], identities[k], sizes, strides);
  }
};

}  // namespace gradrep
