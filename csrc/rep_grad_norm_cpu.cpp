// √(Σ M ⊙ g²) in one pass over the gradients: reference/rep_grad_norm.py.
//
// Every chunk has its own sum in double, and the sums are added in order: the result does not depend on the threads.
#include "common.h"
#include "grad_mult.h"
#include "targets.h"

#include <cmath>

#define GRADREP_LOOPS "rep_grad_norm_loops.h"
#include "for_each_target.h"

namespace gradrep {

using GradNormLoops = PerTarget<base::GradNormLoops, avx2::GradNormLoops, avx512::GradNormLoops>;

namespace {

constexpr int64_t kChunk = 32768, kBlock = 1024;

double sum_of(const float* g, const float* m, int64_t n) {
  return GradNormLoops::on_best([&](auto loops) { return loops.weighted_sum(g, m, n); });
}
double sum_of(const double* g, const double* m, int64_t n) {
  return GradNormLoops::on_best([&](auto loops) { return loops.weighted_sum(g, m, n); });
}
// Torch's 16-bit types convert with functions of their own, which no loop of another instruction set may call.
template <typename S>
double sum_of(const S* g, const float* m, int64_t n) {
  return base::GradNormLoops::weighted_sum(g, m, n);
}

// Σ M ⊙ g² over elements [begin, end) of one gradient.
template <typename S, typename T>
double sum_chunk(const S* g, const Multiplier<T>& mult, int64_t begin, int64_t end) {
  alignas(64) T m[kBlock];
  double sum = 0;
  if (mult.is_constant()) {
    std::fill(m, m + kBlock, T(1));  // the one number comes in at the end
    for (int64_t at = begin; at < end; at += kBlock) sum += sum_of(g + at, m, std::min(kBlock, end - at));
    return sum * static_cast<double>(mult.constant());
  }
  const int64_t taps = mult.taps();
  if (taps == 0) {
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t n = std::min(kBlock, end - at);
      mult.fill(at, n, m);
      sum += sum_of(g + at, m, n);
    }
    return sum;
  }
  const int64_t tile = kBlock / taps * taps;
  mult.each_row(begin, end, [&](const T* row, int64_t at, int64_t n) {
    for (int64_t i = 0; i < std::min(tile, n); ++i) m[i] = row[i % taps];
    for (int64_t i = 0; i < n; i += tile) sum += sum_of(g + at + i, m, std::min(tile, n - i));
  });
  mult.each_diagonal(begin, end, [&](const auto& tap) {
    const double x = static_cast<T>(g[tap.at]);
    sum += x * x * (static_cast<double>(tap.m) - static_cast<double>(tap.scale));
  });
  return sum;
}

struct Gradient {
  const void* g;
  int32_t dtype;
  Multiplier<float> mult32;
  Multiplier<double> mult64;

  double sum(int64_t begin, int64_t end) const {
    if (dtype == aoti_torch_dtype_float32()) return sum_chunk(static_cast<const float*>(g), mult32, begin, end);
    if (dtype == aoti_torch_dtype_float64()) return sum_chunk(static_cast<const double*>(g), mult64, begin, end);
    if (dtype == aoti_torch_dtype_bfloat16())
      return sum_chunk(static_cast<const c10::BFloat16*>(g), mult32, begin, end);
    return sum_chunk(static_cast<const c10::Half*>(g), mult32, begin, end);
  }
};

struct Piece {
  size_t gradient;
  int64_t begin, end;
  double sum;
};

Tensor rep_grad_norm_cpu(std::vector<Tensor> grads, std::vector<std::optional<Tensor>> scales,
                         std::vector<std::optional<Tensor>> identities) {
  STD_TORCH_CHECK(!grads.empty() && scales.size() == grads.size() && identities.size() == grads.size(),
                  "rep_grad_norm: the lists must have one entry per gradient");
  std::vector<Gradient> rows(grads.size());
  std::vector<Piece> pieces;
  bool wide = false;
  int64_t total = 0;
  for (size_t k = 0; k < grads.size(); ++k) {
    const auto sizes_of = grads[k].sizes(), strides_of = grads[k].strides();
    const std::vector<int64_t> sizes(sizes_of.begin(), sizes_of.end()), strides(strides_of.begin(), strides_of.end());
    Gradient& row = rows[k];
    row.dtype = dtype_of(grads[k]);
    STD_TORCH_CHECK(grads[k].is_cpu() && is_dense(sizes, strides) &&
                        (row.dtype == aoti_torch_dtype_float32() || row.dtype == aoti_torch_dtype_float64() ||
                         row.dtype == aoti_torch_dtype_bfloat16() || row.dtype == aoti_torch_dtype_float16()),
                    "rep_grad_norm: gradients must be dense float32, float64, bfloat16 or float16 tensors on the CPU");
    row.g = grads[k].const_data_ptr();
    const bool is_double = row.dtype == aoti_torch_dtype_float64();
    wide = wide || is_double;
    if (is_double)
      row.mult64 = Multiplier<double>(scales[k], identities[k], sizes, strides);
    else
      row.mult32 = Multiplier<float>(scales[k], identities[k], sizes, strides);
    const int64_t period = is_double ? row.mult64.period() : row.mult32.period(), step = kChunk / period * period,
                  numel = grads[k].numel();
    for (int64_t begin = 0; begin < numel; begin += step)
      pieces.push_back({k, begin, std::min(numel, begin + step), 0});
    total += numel;
  }
  const auto run = [&](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) pieces[c].sum = rows[pieces[c].gradient].sum(pieces[c].begin, pieces[c].end);
  };
  if (total < kChunk)
    run(0, pieces.size());
  else
    torch::stable::parallel_for(0, pieces.size(), 1, run);
  double sum = 0;
  for (const Piece& piece : pieces) sum += piece.sum;
  Tensor norm = torch::stable::new_empty(
      grads[0], {}, wide ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float);
  if (wide)
    *static_cast<double*>(norm.mutable_data_ptr()) = std::sqrt(sum);
  else
    *static_cast<float*>(norm.mutable_data_ptr()) = static_cast<float>(std::sqrt(sum));
  return norm;
}

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CPU, m) { m.impl("rep_grad_norm", TORCH_BOX(&gradrep::rep_grad_norm_cpu)); }
