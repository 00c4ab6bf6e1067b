// M along a parameter's memory as runs: each is an array of M's values beside as many elements of the parameter. So one
// loop per update serves every course of M.
#pragma once

#include "grad_mult.h"

namespace gradrep {

constexpr int64_t kRun = 1024;  // the most elements of a run: its values, and what is computed beside them, stay in L1
constexpr int64_t kShortRow = 256;  // elements: rows below it would cost more, one by one, than M written out

// Fill values[0, count) with repetitions of values[0, period).
template <typename T>
void repeat(T* values, int64_t period, int64_t count) {
  for (int64_t made = period; made < count; made *= 2) std::copy_n(values, std::min(made, count - made), values + made);
}

// f(values, position, n) for runs over the elements [begin, end), with `sign` times M. The values are f's to read.
template <typename T, typename F>
void each_run(const Multiplier<T>& mult, T sign, int64_t begin, int64_t end, const F& f) {
  alignas(64) T values[kRun + Multiplier<T>::kMostTaps];
  if (mult.is_constant()) {
    std::fill_n(values, std::min(kRun, end - begin), mult.constant() * sign);
    for (int64_t at = begin; at < end; at += kRun) f(values, at, std::min(kRun, end - at));
    return;
  }
  auto diagonal = mult.diagonal_from(begin);
  // A run whose values are `from`, but for the identity's elements in it.
  const auto run = [&](T* from, int64_t at, int64_t n) {
    auto again = diagonal;
    diagonal.each_before(at + n, [&](const auto& tap) { from[tap.at - at] = tap.m * sign; });
    f(from, at, n);
    again.each_before(at + n, [&](const auto& tap) { from[tap.at - at] = tap.scale * sign; });
  };
  const bool repeats = mult.taps() != 0 && mult.row_length() >= kShortRow;
  if (repeats || mult.is_segments()) {
    // A row's taps are repeated once, and each of its runs begins at the tap where it is.
    const int64_t period = repeats ? mult.taps() : 1;
    mult.each_row(begin, end, [&](const T* row, int64_t at, int64_t n) {
      for (int64_t k = 0; k < period; ++k) values[k] = row[k] * sign;
      repeat(values, period, period - 1 + std::min(kRun, n));
      for (const int64_t row_end = at + n; at < row_end; at += kRun)
        run(values + at % period, at, std::min(kRun, row_end - at));
    });
    return;
  }
  if (mult.is_arrays()) {
    mult.each_row(begin, end, [&](const T* row, int64_t at, int64_t n) {
      for (const int64_t row_end = at + n; at < row_end; at += kRun, row += kRun) {
        const int64_t count = std::min(kRun, row_end - at);
        auto ahead = diagonal;
        bool on_diagonal = false;
        ahead.each_before(at + count, [&](const auto&) { on_diagonal = true; });
        if (sign == 1 && !on_diagonal) {
          f(row, at, count);
          continue;
        }
        for (int64_t i = 0; i < count; ++i) values[i] = row[i] * sign;
        run(values, at, count);
      }
    });
    return;
  }
  for (int64_t at = begin; at < end; at += kRun) {
    const int64_t n = std::min(kRun, end - at);
    mult.fill(at, n, values);
    if (sign != 1)
      for (int64_t i = 0; i < n; ++i) values[i] *= sign;
    f(values, at, n);
  }
}

}  // namespace gradrep
