// A step of all parameters of all groups. What does not change between steps is prepared once, and a step is one
// parallel region: with a region per tensor, torch's own fused SGD loses bandwidth.
//
// Reads downwards: making a plan -> its step -> a row, which is one parameter -> the shares of the threads.
//
// StepPlan is a template over the update, a type with these members (rep_sgd_update.h is an example):
// - kOp: the op's name, for errors.
// - kStates: how many arrays it keeps per parameter. Each has the parameter's dtype, shape and strides.
// - Multipliers: the multipliers of all parameters. Its of<T>(k, sizes, strides) makes a One<T> for parameter k, as
//   GradMults does. One<T> has period() and write_out(), and step_chunk has an overload for it.
// - Hyper: a row of the hyper-parameter table, made of a pointer to its kColumns numbers. Its states() is how many of
//   the arrays a step uses, maximize the sign, variant(first) which loops to take, numbers<T>() what they need.
// - Numbers<T>: what the loops need of a row, in the dtype that is computed in.
// - kVariants: how many variants the loops have. is_frequent(variant) says whether one is worth loops of its own for
//   repeated taps, reads_states(variant) whether it reads the states or only writes them.
// - element<variant>(p, g, m, numbers, states...): the rule, for one element.
#pragma once

#include "common.h"
#include "step_chunk.h"

#include <array>
#include <string>

namespace gradrep {

template <typename Update>
class StepPlan {
 public:
  using Hyper = typename Update::Hyper;
  using States = std::array<std::vector<std::optional<Tensor>>, Update::kStates>;  // each: one entry per parameter

  // Without `first_steps` the plan is made for many steps, none of which is the first of a parameter.
  StepPlan(std::vector<Tensor> params, States states, const typename Update::Multipliers& multipliers,
           const std::vector<int64_t>& groups, const std::vector<bool>* first_steps) {
    const size_t count = params.size();
    bool one_each = multipliers.count_is(count) && groups.size() == count &&
                    (first_steps == nullptr || first_steps->size() == count);
    for (const auto& list : states) one_each = one_each && list.size() == count;
    STD_TORCH_CHECK(one_each, Update::kOp, ": the lists must have one entry per parameter");
    rows_.reserve(count);
    for (size_t k = 0; k < count; ++k) {
      Row row;
      row.param = params[k];
      for (int s = 0; s < Update::kStates; ++s) row.states[s] = states[s][k];
      const auto sizes = params[k].sizes(), strides = params[k].strides();
      row.sizes.assign(sizes.begin(), sizes.end());
      row.strides.assign(strides.begin(), strides.end());
      row.dtype = dtype_of(params[k]);
      row.numel = params[k].numel();
      row.group = groups[k];
      row.first = first_steps != nullptr && (*first_steps)[k];
      STD_TORCH_CHECK(row.dtype == aoti_torch_dtype_float32() || row.dtype == aoti_torch_dtype_float64() ||
                          row.dtype == aoti_torch_dtype_bfloat16() || row.dtype == aoti_torch_dtype_float16(),
                      Update::kOp, ": parameters must be float32, float64, bfloat16 or float16");
      STD_TORCH_CHECK(is_dense(row.sizes, row.strides), Update::kOp, ": parameters must be dense in memory");
      if (row.dtype == aoti_torch_dtype_float64())
        row.mult64 = multipliers.template of<double>(k, row.sizes, row.strides);
      else
        row.mult32 = multipliers.template of<float>(k, row.sizes, row.strides);
      if (first_steps == nullptr && row.numel <= kWrittenOut) {
        row.mult32.write_out(row.numel);
        row.mult64.write_out(row.numel);
      }
      const int64_t period = row.dtype == aoti_torch_dtype_float64() ? row.mult64.period() : row.mult32.period();
      const int64_t step = std::max<int64_t>(1, kPiece / period) * period;
      for (int64_t begin = 0; begin < row.numel; begin += step) {
        const int64_t end = std::min(row.numel, begin + step);
        pieces_.push_back({k, begin, end, total_});
        total_ += end - begin;
      }
      rows_.push_back(std::move(row));
    }
  }

  // `table` holds the rows of `groups` groups. Returns false, and has done nothing, where something is no longer as it
  // was when the plan was made.
  bool step(const std::vector<Tensor>& grads, const double* table, int64_t groups,
            const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
    if (grads.size() != rows_.size()) return false;
    for (size_t k = 0; k < rows_.size(); ++k) {
      Row& row = rows_[k];
      if (row.group < 0 || row.group >= groups) return false;
      if (!row.matches(row.param) || !row.matches(grads[k])) return false;
      moved_ |= point_to(row.p, row.param.mutable_data_ptr());
      const int used = hyper_of(table, row).states();
      for (int s = 0; s < Update::kStates; ++s) {
        if (s < used && (!row.states[s] || !row.matches(*row.states[s]))) return false;
        moved_ |= point_to(row.s[s], s < used ? row.states[s]->mutable_data_ptr() : nullptr);
      }
      row.g = grad_scale ? grads[k].mutable_data_ptr() : const_cast<void*>(grads[k].const_data_ptr());
    }
    // With a grad_scale the gradients are written as well, and they may lie elsewhere in each step.
    if (moved_ || grad_scale) {
      overlapping_ = overlap(grad_scale.has_value());
      moved_ = grad_scale.has_value();
    }
    if (found_inf && one_float(*found_inf) != 0) return true;
    const float unscale = grad_scale ? one_float(*grad_scale) : 1;
    const float* scale = grad_scale ? &unscale : nullptr;
    const auto run = [&](size_t from, size_t to) {
      for (size_t c = from; c < to; ++c) {
        const Row& row = rows_[pieces_[c].row];
        row.step(hyper_of(table, row), scale, pieces_[c].begin, pieces_[c].end);
      }
    };
    // Arrays that share memory are stepped one after the other.
    const int64_t threads = overlapping_ ? 1 : torch::stable::get_num_threads();
    if (threads <= 1 || total_ < kPiece) {
      run(0, pieces_.size());
      return true;
    }
    torch::stable::parallel_for(
        0, threads, 1, [&](int64_t from, int64_t to) { run(share_begin(from, threads), share_begin(to, threads)); });
    return true;
  }

 private:
  static constexpr int64_t kPiece = 32768;  // elements of one piece of work
  // Elements up to which a plan keeps M written out: doing it at each step costs 62 x 1000 elements 5 µs.
  static constexpr int64_t kWrittenOut = 2048;

  struct Row {
    Tensor param;
    std::array<std::optional<Tensor>, Update::kStates> states;
    std::vector<int64_t> sizes, strides;
    int32_t dtype;
    int64_t numel, group;
    bool first;
    typename Update::Multipliers::template One<float> mult32;
    typename Update::Multipliers::template One<double> mult64;
    void *p = nullptr, *g = nullptr;
    std::array<void*, Update::kStates> s{};

    int64_t itemsize() const {
      return dtype == aoti_torch_dtype_float64() ? 8 : dtype == aoti_torch_dtype_float32() ? 4 : 2;
    }

    // Whether `t` is on the CPU with the dtype, shape and strides that the parameter had when the row was made; where a
    // size is 1, its stride says nothing. Five calls into torch and no more: a step of 62 small tensors asks this 186
    // times.
    bool matches(const Tensor& t) const {
      const AtenTensorHandle handle = t.get();
      int64_t dim, *t_sizes, *t_strides;
      int32_t device;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
      if (dim != static_cast<int64_t>(sizes.size()) || dtype_of(t) != dtype) return false;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &t_sizes));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &t_strides));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
      if (device != aoti_torch_device_type_cpu()) return false;
      for (int64_t d = 0; d < dim; ++d)
        if (t_sizes[d] != sizes[d] || (t_strides[d] != strides[d] && t_sizes[d] != 1)) return false;
      return true;
    }

    void step(const Hyper& hyper, const float* grad_scale, int64_t begin, int64_t end) const {
      const Chunk chunk{p, g, s.data(), grad_scale, first, begin, end};
      if (dtype == aoti_torch_dtype_float32())
        step_chunk<Update, float>(chunk, hyper, mult32);
      else if (dtype == aoti_torch_dtype_float64())
        step_chunk<Update, double>(chunk, hyper, mult64);
      else if (dtype == aoti_torch_dtype_bfloat16())
        step_chunk<Update, c10::BFloat16>(chunk, hyper, mult32);
      else
        step_chunk<Update, c10::Half>(chunk, hyper, mult32);
    }
  };

  struct Piece {
    size_t row;
    int64_t begin, end, before;  // elements of the row; elements of all pieces before this one
  };

  static Hyper hyper_of(const double* table, const Row& row) { return Hyper(table + row.group * Hyper::kColumns); }

  // Returns whether the pointer has changed.
  static bool point_to(void*& pointer, void* to) { return std::exchange(pointer, to) != to; }

  // The first piece of thread t's share, shares being equal in elements.
  size_t share_begin(int64_t t, int64_t threads) const {
    if (t >= threads) return pieces_.size();
    const int64_t share = total_ / threads * t;
    const auto is_before = [](const Piece& piece, int64_t at) { return piece.before < at; };
    return std::lower_bound(pieces_.begin(), pieces_.end(), share, is_before) - pieces_.begin();
  }

  // Whether two of the arrays that a step writes share memory: parameters made of one tensor, say.
  bool overlap(bool grads_too) const {
    std::vector<std::pair<const char*, const char*>> extents;
    for (const Row& row : rows_) {
      const auto add = [&](const void* begin) {
        const auto* first = static_cast<const char*>(begin);
        if (first != nullptr && row.numel > 0) extents.emplace_back(first, first + row.numel * row.itemsize());
      };
      add(row.p);
      for (const void* state : row.s) add(state);
      if (grads_too) add(row.g);
    }
    std::sort(extents.begin(), extents.end());
    const auto meet = [](const auto& a, const auto& b) { return b.first < a.second; };
    return std::adjacent_find(extents.begin(), extents.end(), meet) != extents.end();
  }

  std::vector<Row> rows_;
  std::vector<Piece> pieces_;
  int64_t total_ = 0;
  bool overlapping_ = false, moved_ = true;  // moved_: some array lies elsewhere since overlapping_ was found
};

}  // namespace gradrep
