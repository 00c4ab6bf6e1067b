// One SGD-momentum update of all parameters of all groups with M ⊙ g in place of g: reference/rep_sgd_step.py, in one pass.
//
// Reads downwards: element -> loops (one per way in which M runs through memory) -> a parameter -> a plan over all
// parameters, run in one parallel region -> registration. A region per tensor costs torch's own fused SGD its bandwidth.
#include "common.h"
#include "grad_mult.h"

#include <cmath>
#include <memory>
#include <type_traits>

namespace gradrep {
namespace {

enum Momentum { kNone, kPlain, kNesterov, kFirst, kFirstNesterov, kModes };

template <typename T>
struct Hyper {
  T lr, momentum, undampened, weight_decay;
};

// Every product and sum is rounded on its own (the build turns FMA contraction off), as the reference does.
template <typename T, int mode, bool decays>
[[gnu::always_inline]] inline void element(T& p, T g, T* v, T m, const Hyper<T>& h) {
  T d = g * m;
  if (decays) d = d + p * h.weight_decay;
  if (mode != kNone) {
    const T b = mode == kFirst || mode == kFirstNesterov ? d : *v * h.momentum + d * h.undampened;
    *v = b;
    d = mode == kNesterov || mode == kFirstNesterov ? d + b * h.momentum : b;
  }
  p = p - d * h.lr;
}

// M is one number.
template <typename T, int mode, bool decays>
[[gnu::always_inline]] inline void constant_loop(T* __restrict p, const T* __restrict g, T* __restrict v, const T* m, int64_t n, Hyper<T> h) {
  const T value = *m;
  for (int64_t i = 0; i < n; ++i) element<T, mode, decays>(p[i], g[i], v + i, value, h);
}

// M has a number for every element.
template <typename T, int mode, bool decays>
[[gnu::always_inline]] inline void array_loop(T* __restrict p, const T* __restrict g, T* __restrict v, const T* __restrict m, int64_t n, Hyper<T> h) {
  for (int64_t i = 0; i < n; ++i) element<T, mode, decays>(p[i], g[i], v + i, m[i], h);
}

template <typename T, int kTile, int mode, bool decays>
[[gnu::always_inline]] inline void tile_loop(T* __restrict p, const T* __restrict g, T* __restrict v, const T* __restrict m, const Hyper<T>& h) {
  for (int j = 0; j < kTile; ++j) element<T, mode, decays>(p[j], g[j], v + j, m[j], h);
}

// M repeats the K taps of a kernel, but for the element `odd` (the identity's; -1: none), where it is m_odd. The trip count
// must be known at compile time (a run-time tile loses 6-20 %), and the identity's element must not be fetched apart from
// the stream (keeping and redoing it lost 7 %): a tile of its own holds m_odd, compared into place where it is needed (made
// beforehand, and chosen tile by tile, it cost 2 % of a step).
template <typename T, int K, int mode, bool decays>
[[gnu::always_inline]] inline void taps_loop(T* __restrict p, const T* __restrict g, T* __restrict v, const T* __restrict taps, int64_t n, Hyper<T> h,
                                             int64_t odd, T m_odd) {
  constexpr int kTile = 16 * K;  // a multiple of the vector width and of K
  alignas(64) T tile[kTile], odd_tile[kTile];
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < K; ++k) tile[r * K + k] = taps[k];
  const int64_t whole = n / kTile * kTile, odd_at = odd < 0 || odd >= whole ? whole : odd / kTile * kTile;
  for (int64_t i = 0; i < odd_at; i += kTile) tile_loop<T, kTile, mode, decays>(p + i, g + i, v + i, tile, h);
  if (odd_at < whole) {
    const auto place = static_cast<int>(odd - odd_at);
    for (int j = 0; j < kTile; ++j) odd_tile[j] = j == place ? m_odd : tile[j];
    tile_loop<T, kTile, mode, decays>(p + odd_at, g + odd_at, v + odd_at, odd_tile, h);
  }
  for (int64_t i = odd_at + kTile; i < whole; i += kTile) tile_loop<T, kTile, mode, decays>(p + i, g + i, v + i, tile, h);
  if (odd >= whole) tile[odd - whole] = m_odd;
  for (int64_t i = whole; i < n; ++i) element<T, mode, decays>(p[i], g[i], v + i, tile[i - whole], h);
}

// target_clones does not work on templates, so each loop is stamped out as a plain function.
template <typename T>
using Loop = void (*)(T*, const T*, T*, const T*, int64_t, Hyper<T>);
template <typename T>
using TapsLoop = void (*)(T*, const T*, T*, const T*, int64_t, Hyper<T>, int64_t, T);

#define GRADREP_STAMP(T, NAME, BODY)                                                                               \
  GRADREP_CLONES void NAME(T* __restrict p, const T* __restrict g, T* __restrict v, const T* __restrict m, int64_t n, Hyper<T> h) { \
    BODY(p, g, v, m, n, h);                                                                                        \
  }
#define GRADREP_STAMP_MODE(T, SUFFIX, mode, decays)                                      \
  GRADREP_STAMP(T, constant_##SUFFIX, (constant_loop<T, mode, decays>))                   \
  GRADREP_STAMP(T, array_##SUFFIX, (array_loop<T, mode, decays>))
#define GRADREP_STAMP_K(T, NAME, BODY)                                                                             \
  GRADREP_CLONES void NAME(T* __restrict p, const T* __restrict g, T* __restrict v, const T* __restrict m, int64_t n, Hyper<T> h, int64_t odd, T m_odd) { \
    BODY(p, g, v, m, n, h, odd, m_odd);                                                                            \
  }
#define GRADREP_STAMP_TAPS(T, SUFFIX, mode, decays)                                      \
  GRADREP_STAMP_K(T, taps9_##SUFFIX, (taps_loop<T, 9, mode, decays>))                     \
  GRADREP_STAMP_K(T, taps25_##SUFFIX, (taps_loop<T, 25, mode, decays>))                   \
  GRADREP_STAMP_K(T, taps49_##SUFFIX, (taps_loop<T, 49, mode, decays>))

#define GRADREP_LOOPS(T)                                                                                  \
  GRADREP_STAMP_MODE(T, T##_0, kNone, false)                                                              \
  GRADREP_STAMP_MODE(T, T##_0d, kNone, true)                                                              \
  GRADREP_STAMP_MODE(T, T##_1, kPlain, false)                                                             \
  GRADREP_STAMP_MODE(T, T##_1d, kPlain, true)                                                             \
  GRADREP_STAMP_MODE(T, T##_2, kNesterov, false)                                                          \
  GRADREP_STAMP_MODE(T, T##_2d, kNesterov, true)                                                          \
  GRADREP_STAMP_MODE(T, T##_3, kFirst, false)                                                             \
  GRADREP_STAMP_MODE(T, T##_3d, kFirst, true)                                                             \
  GRADREP_STAMP_MODE(T, T##_4, kFirstNesterov, false)                                                     \
  GRADREP_STAMP_MODE(T, T##_4d, kFirstNesterov, true)                                                     \
  GRADREP_STAMP_TAPS(T, T##_0, kNone, false)                                                              \
  GRADREP_STAMP_TAPS(T, T##_0d, kNone, true)                                                              \
  GRADREP_STAMP_TAPS(T, T##_1, kPlain, false)                                                             \
  GRADREP_STAMP_TAPS(T, T##_1d, kPlain, true)                                                             \
  GRADREP_STAMP_TAPS(T, T##_2, kNesterov, false)                                                          \
  GRADREP_STAMP_TAPS(T, T##_2d, kNesterov, true)                                                          \
  const Loop<T> constant_##T[kModes][2] = {{constant_##T##_0, constant_##T##_0d},                         \
                                           {constant_##T##_1, constant_##T##_1d},                         \
                                           {constant_##T##_2, constant_##T##_2d},                         \
                                           {constant_##T##_3, constant_##T##_3d},                         \
                                           {constant_##T##_4, constant_##T##_4d}};                        \
  const Loop<T> array_##T[kModes][2] = {{array_##T##_0, array_##T##_0d},                                  \
                                        {array_##T##_1, array_##T##_1d},                                  \
                                        {array_##T##_2, array_##T##_2d},                                  \
                                        {array_##T##_3, array_##T##_3d},                                  \
                                        {array_##T##_4, array_##T##_4d}};                                 \
  const TapsLoop<T> taps_##T[3][kModes][2] = {                                                            \
      {{taps9_##T##_0, taps9_##T##_0d}, {taps9_##T##_1, taps9_##T##_1d}, {taps9_##T##_2, taps9_##T##_2d}},       \
      {{taps25_##T##_0, taps25_##T##_0d}, {taps25_##T##_1, taps25_##T##_1d}, {taps25_##T##_2, taps25_##T##_2d}}, \
      {{taps49_##T##_0, taps49_##T##_0d}, {taps49_##T##_1, taps49_##T##_1d}, {taps49_##T##_2, taps49_##T##_2d}}};

GRADREP_LOOPS(float)
GRADREP_LOOPS(double)

template <typename T>
struct Loops;
template <>
struct Loops<float> {
  static Loop<float> constant(int mode, bool decays) { return constant_float[mode][decays]; }
  static Loop<float> array(int mode, bool decays) { return array_float[mode][decays]; }
  static TapsLoop<float> taps(int64_t k, int mode, bool decays) { return taps_float[k == 9 ? 0 : k == 25 ? 1 : 2][mode][decays]; }
};
template <>
struct Loops<double> {
  static Loop<double> constant(int mode, bool decays) { return constant_double[mode][decays]; }
  static Loop<double> array(int mode, bool decays) { return array_double[mode][decays]; }
  static TapsLoop<double> taps(int64_t k, int mode, bool decays) { return taps_double[k == 9 ? 0 : k == 25 ? 1 : 2][mode][decays]; }
};

// ---- one parameter

struct GroupHyper {  // a row of the op's table
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

constexpr int64_t kBlock = 1024;   // elements that a scratch array holds: 4 arrays of 4 KiB stay in L1
constexpr int64_t kChunk = 32768;  // elements of one piece of work
constexpr int64_t kSmall = 2048;   // elements up to which a plan keeps M written out: doing it at each step costs 62 x 1000 elements 5 µs

// What one call does to elements [begin, end) of a parameter; S is the stored dtype, T the one that is computed in.
template <typename S, typename T>
void update(void* params, void* grads, void* buffers, const Multiplier<T>& mult, bool first, const GroupHyper& group, const float* grad_scale,
            int64_t begin, int64_t end) {
  const Hyper<T> h{static_cast<T>(group.lr), static_cast<T>(group.momentum), static_cast<T>(1 - group.dampening), static_cast<T>(group.weight_decay)};
  const int mode = group.momentum == 0 ? kNone : first ? (group.nesterov ? kFirstNesterov : kFirst) : group.nesterov ? kNesterov : kPlain;
  const bool decays = group.weight_decay != 0;
  const T sign = group.maximize ? -1 : 1;  // (−g) M and g (−M) have the same bits
  auto* p = static_cast<S*>(params);
  auto* g = static_cast<S*>(grads);
  auto* v = static_cast<S*>(mode == kNone ? params : buffers);

  if constexpr (std::is_same_v<S, T>) {
    if (grad_scale != nullptr) {
      const T by = static_cast<T>(*grad_scale);
      for (int64_t i = begin; i < end; ++i) g[i] = g[i] / by;
    }
    // `element` never touches *v in mode kNone, so v may alias p there; the loops' __restrict is then vacuous.
    const Loop<T> constant = Loops<T>::constant(mode, decays), array = Loops<T>::array(mode, decays);
    const auto run = [&](Loop<T> loop, const T* m, int64_t at, int64_t n) { loop(p + at, g + at, v + at, m, n, h); };
    auto diagonal = mult.diagonal_from(begin);
    // f over [at, at + n) between the identity's elements, and those one by one.
    const auto around_diagonal = [&](int64_t at, int64_t n, const auto& f) {
      int64_t from = at;
      diagonal.each_before(at + n, [&](const auto& tap) {
        const T m = tap.m * sign;
        f(from, tap.at - from);
        run(constant, &m, tap.at, 1);
        from = tap.at + 1;
      });
      f(from, at + n - from);
    };
    const int64_t taps = mult.taps();
    if (mult.is_constant()) {
      const T m = mult.constant() * sign;
      return run(constant, &m, begin, end - begin);
    }
    if (taps != 0 && mode <= kNesterov && mult.row_length() >= 32 * taps) {  // two tiles: shorter rows are not worth one
      const TapsLoop<T> loop = Loops<T>::taps(taps, mode, decays);
      return mult.each_row(begin, end, [&](const T* row, int64_t at, int64_t n) {
        T negative[49];
        if (sign != 1) {
          for (int64_t k = 0; k < taps; ++k) negative[k] = -row[k];
          row = negative;
        }
        int64_t from = at, odd = -1;  // of several identity elements in one row each gets a call of its own
        T m_odd = 0;
        const auto run_to = [&](int64_t to) { loop(p + from, g + from, v + from, row, to - from, h, odd < 0 ? -1 : odd - from, m_odd); };
        diagonal.each_before(at + n, [&](const auto& tap) {
          if (odd >= 0) {
            const int64_t cut = odd / taps * taps + taps;
            run_to(cut);
            from = cut;
          }
          odd = tap.at;
          m_odd = tap.m * sign;
        });
        run_to(at + n);
      });
    }
    if (mult.is_segments())
      return mult.each_row(begin, end, [&](const T* row, int64_t at, int64_t n) {
        const T m = *row * sign;
        around_diagonal(at, n, [&](int64_t from, int64_t count) { run(constant, &m, from, count); });
      });
    if (mult.is_arrays() && sign == 1)
      return mult.each_row(begin, end, [&](const T* row, int64_t at, int64_t n) {
        around_diagonal(at, n, [&](int64_t from, int64_t count) { run(array, row + (from - at), from, count); });
      });
  }
  // Any other course of M, and bf16 / fp16: M is written out for a block at a time.
  alignas(64) T pm[kBlock], pp[kBlock], pg[kBlock], pv[kBlock];
  const int64_t block = kBlock / mult.period() * mult.period();
  for (int64_t at = begin; at < end; at += block) {
    const int64_t n = std::min(block, end - at);
    mult.fill(at, n, pm);
    if (sign != 1)
      for (int64_t i = 0; i < n; ++i) pm[i] *= sign;
    if constexpr (std::is_same_v<S, T>) {
      Loops<T>::array(mode, decays)(p + at, g + at, v + at, pm, n, h);
    } else {
      for (int64_t i = 0; i < n; ++i) pp[i] = static_cast<T>(p[at + i]);
      for (int64_t i = 0; i < n; ++i) pg[i] = static_cast<T>(g[at + i]);
      if (grad_scale != nullptr)
        for (int64_t i = 0; i < n; ++i) g[at + i] = static_cast<S>(pg[i] = pg[i] / *grad_scale);
      if (mode == kPlain || mode == kNesterov)
        for (int64_t i = 0; i < n; ++i) pv[i] = static_cast<T>(v[at + i]);
      Loops<T>::array(mode, decays)(pp, pg, pv, pm, n, h);
      for (int64_t i = 0; i < n; ++i) p[at + i] = static_cast<S>(pp[i]);
      if (mode != kNone)
        for (int64_t i = 0; i < n; ++i) v[at + i] = static_cast<S>(pv[i]);
    }
  }
}

struct Row {
  Tensor param;
  std::optional<Tensor> buffer;
  std::vector<int64_t> sizes, strides;
  int32_t dtype;
  int64_t numel, group;
  bool first;
  Multiplier<float> mult32;
  Multiplier<double> mult64;
  void *p = nullptr, *g = nullptr, *v = nullptr;

  int64_t itemsize() const { return dtype == aoti_torch_dtype_float64() ? 8 : dtype == aoti_torch_dtype_float32() ? 4 : 2; }

  void update(const GroupHyper& group_hyper, const float* grad_scale, int64_t begin, int64_t end) const {
    if (dtype == aoti_torch_dtype_float32())
      gradrep::update<float, float>(p, g, v, mult32, first, group_hyper, grad_scale, begin, end);
    else if (dtype == aoti_torch_dtype_float64())
      gradrep::update<double, double>(p, g, v, mult64, first, group_hyper, grad_scale, begin, end);
    else if (dtype == aoti_torch_dtype_bfloat16())
      gradrep::update<c10::BFloat16, float>(p, g, v, mult32, first, group_hyper, grad_scale, begin, end);
    else
      gradrep::update<c10::Half, float>(p, g, v, mult32, first, group_hyper, grad_scale, begin, end);
  }
};

// Same dtype, shape and strides (but for sizes of 1, where a stride says nothing) as the parameter had when its row was made,
// and on the CPU. Five calls into torch and no more: a step of 62 small tensors asks this 186 times.
bool matches(const Tensor& t, const Row& row) {
  const AtenTensorHandle handle = t.get();
  int64_t dim, *sizes, *strides;
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  if (dim != static_cast<int64_t>(row.sizes.size()) || dtype_of(t) != row.dtype) return false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
  if (device != aoti_torch_device_type_cpu()) return false;
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] != row.sizes[d] || (strides[d] != row.strides[d] && sizes[d] != 1)) return false;
  return true;
}

// ---- all parameters

class Plan {
 public:
  Plan(std::vector<Tensor> params, std::vector<std::optional<Tensor>> buffers, std::vector<std::optional<Tensor>> scales, std::vector<std::optional<Tensor>> identities,
       const std::vector<int64_t>& groups, const std::vector<bool>* first_steps) {
    const size_t count = params.size();
    STD_TORCH_CHECK(buffers.size() == count && scales.size() == count && identities.size() == count && groups.size() == count,
                    "rep_sgd_step: the lists must have one entry per parameter");
    rows_.reserve(count);
    for (size_t k = 0; k < count; ++k) {
      Row row;
      row.param = params[k];
      row.buffer = buffers[k];
      const auto sizes = params[k].sizes(), strides = params[k].strides();
      row.sizes.assign(sizes.begin(), sizes.end());
      row.strides.assign(strides.begin(), strides.end());
      row.dtype = dtype_of(params[k]);
      row.numel = params[k].numel();
      row.group = groups[k];
      row.first = first_steps != nullptr && (*first_steps)[k];
      STD_TORCH_CHECK(row.dtype == aoti_torch_dtype_float32() || row.dtype == aoti_torch_dtype_float64() || row.dtype == aoti_torch_dtype_bfloat16() ||
                          row.dtype == aoti_torch_dtype_float16(),
                      "rep_sgd_step: parameters must be float32, float64, bfloat16 or float16");
      STD_TORCH_CHECK(is_dense(row.sizes, row.strides), "rep_sgd_step: parameters must be dense in memory");
      if (row.dtype == aoti_torch_dtype_float64())
        row.mult64 = Multiplier<double>(scales[k], identities[k], row.sizes, row.strides);
      else
        row.mult32 = Multiplier<float>(scales[k], identities[k], row.sizes, row.strides);
      if (first_steps == nullptr && row.numel <= kSmall) {
        row.mult32.write_out(row.numel);
        row.mult64.write_out(row.numel);
      }
      const int64_t period = row.dtype == aoti_torch_dtype_float64() ? row.mult64.period() : row.mult32.period();
      const int64_t step = std::max<int64_t>(1, kChunk / period) * period;
      for (int64_t begin = 0; begin < row.numel; begin += step) {
        const int64_t end = std::min(row.numel, begin + step);
        chunks_.push_back({k, begin, end, total_});
        total_ += end - begin;
      }
      rows_.push_back(std::move(row));
    }
  }

  // False, and nothing done, where something is no longer as it was when the plan was made.
  bool step(const std::vector<Tensor>& grads, const std::vector<GroupHyper>& hyper, const std::optional<Tensor>& grad_scale,
            const std::optional<Tensor>& found_inf) {
    if (grads.size() != rows_.size()) return false;
    bool moved = grad_scale.has_value();  // then gradients are written as well
    for (size_t k = 0; k < rows_.size(); ++k) {
      Row& row = rows_[k];
      if (row.group < 0 || row.group >= static_cast<int64_t>(hyper.size())) return false;
      const bool momentum = hyper[row.group].momentum != 0;
      if (!matches(row.param, row) || !matches(grads[k], row) || (momentum && (!row.buffer || !matches(*row.buffer, row)))) return false;
      void *p = row.param.mutable_data_ptr(), *v = momentum ? row.buffer->mutable_data_ptr() : nullptr;
      moved = moved || p != row.p || v != row.v;
      row.p = p;
      row.v = v;
      row.g = grad_scale ? grads[k].mutable_data_ptr() : const_cast<void*>(grads[k].const_data_ptr());
    }
    if (moved) overlapping_ = overlap(grad_scale.has_value());
    if (found_inf && one_float(*found_inf) != 0) return true;
    const float unscale = grad_scale ? one_float(*grad_scale) : 1;
    const float* scale = grad_scale ? &unscale : nullptr;
    const auto run = [&](size_t from, size_t to) {
      for (size_t c = from; c < to; ++c) rows_[chunks_[c].row].update(hyper[rows_[chunks_[c].row].group], scale, chunks_[c].begin, chunks_[c].end);
    };
    const int64_t threads = overlapping_ ? 1 : torch::stable::get_num_threads();  // what shares memory is stepped one after the other
    if (threads <= 1 || total_ < kChunk) {
      run(0, chunks_.size());
      return true;
    }
    torch::stable::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) { run(chunk_at(from, threads), chunk_at(to, threads)); });
    return true;
  }

 private:
  struct Chunk {
    size_t row;
    int64_t begin, end, before;  // elements of the row; elements of all chunks before this one
  };

  // The first chunk of thread t's share, shares being equal in elements.
  size_t chunk_at(int64_t t, int64_t threads) const {
    if (t >= threads) return chunks_.size();
    const int64_t share = total_ / threads * t;
    return std::lower_bound(chunks_.begin(), chunks_.end(), share, [](const Chunk& chunk, int64_t at) { return chunk.before < at; }) - chunks_.begin();
  }

  // Whether two of the arrays that a step writes share memory: parameters made of one tensor, say.
  bool overlap(bool grads_too) const {
    std::vector<std::pair<const char*, const char*>> extents;
    for (const Row& row : rows_)
      for (const void* begin : {row.p, row.v, grads_too ? row.g : nullptr}) {
        const auto* first = static_cast<const char*>(begin);
        if (first != nullptr && row.numel > 0) extents.emplace_back(first, first + row.numel * row.itemsize());
      }
    std::sort(extents.begin(), extents.end());
    return std::adjacent_find(extents.begin(), extents.end(), [](const auto& a, const auto& b) { return b.first < a.second; }) != extents.end();
  }

  std::vector<Row> rows_;
  std::vector<Chunk> chunks_;
  int64_t total_ = 0;
  bool overlapping_ = false;
};

void rep_sgd_step_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers, std::vector<std::optional<Tensor>> scales,
                      std::vector<std::optional<Tensor>> identities, std::vector<bool> first_steps, std::vector<int64_t> groups, Tensor hyper,
                      std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  STD_TORCH_CHECK(first_steps.size() == params.size() && grads.size() == params.size(), "rep_sgd_step: the lists must have one entry per parameter");
  STD_TORCH_CHECK(hyper.is_cpu() && dtype_of(hyper) == aoti_torch_dtype_float64() && hyper.dim() == 2 && hyper.size(1) == 6 && hyper.is_contiguous(),
                  "rep_sgd_step: hyper must be a contiguous float64 CPU tensor [G, 6]");
  const auto* table = static_cast<const double*>(hyper.const_data_ptr());
  std::vector<GroupHyper> rows;
  for (int64_t k = 0; k < hyper.size(0); ++k, table += 6) rows.push_back({table[0], table[1], table[2], table[3], table[4] != 0, table[5] != 0});
  std::vector<std::optional<Tensor>> buffers(momentum_buffers.begin(), momentum_buffers.end());
  Plan plan(std::move(params), std::move(buffers), std::move(scales), std::move(identities), groups, &first_steps);
  STD_TORCH_CHECK(plan.step(grads, rows, grad_scale, found_inf),
                  "rep_sgd_step: parameters, gradients and buffers must be CPU tensors that share dtype, shape and strides");
}

// The cached plan of an optimizer: its address is the handle, the optimizer frees it.
int64_t rep_sgd_plan_cpu(std::vector<Tensor> params, std::vector<std::optional<Tensor>> momentum_buffers, std::vector<std::optional<Tensor>> scales,
                         std::vector<std::optional<Tensor>> identities, std::vector<int64_t> groups) {
  auto plan = std::make_unique<Plan>(std::move(params), std::move(momentum_buffers), std::move(scales), std::move(identities), groups, nullptr);
  return reinterpret_cast<int64_t>(plan.release());
}

bool rep_sgd_plan_step_cpu(int64_t plan, std::vector<Tensor> grads, std::vector<double> hyper, std::optional<Tensor> grad_scale,
                           std::optional<Tensor> found_inf) {
  std::vector<GroupHyper> rows;
  rows.reserve(hyper.size() / 6);
  for (size_t k = 0; k + 6 <= hyper.size(); k += 6) rows.push_back({hyper[k], hyper[k + 1], hyper[k + 2], hyper[k + 3], hyper[k + 4] != 0, hyper[k + 5] != 0});
  return reinterpret_cast<Plan*>(plan)->step(grads, rows, grad_scale, found_inf);
}

void rep_sgd_plan_free(int64_t plan) { delete reinterpret_cast<Plan*>(plan); }

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CPU, m) {
  m.impl("rep_sgd_step", TORCH_BOX(&gradrep::rep_sgd_step_cpu));
  m.impl("rep_sgd_plan", TORCH_BOX(&gradrep::rep_sgd_plan_cpu));
  m.impl("rep_sgd_plan_step", TORCH_BOX(&gradrep::rep_sgd_plan_step_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CompositeExplicitAutograd, m) {
  m.impl("rep_sgd_plan_free", TORCH_BOX(&gradrep::rep_sgd_plan_free));
}
