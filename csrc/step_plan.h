// A step of all parameters of all groups. What does not change between steps is prepared once, and a step is one
// parallel region: with a region per tensor, torch's own fused SGD loses bandwidth.
//
// Reads downwards: making a plan -> its step -> a row, which is one parameter -> the shares of the threads.
//
// StepPlan is a template over the update, a type with these members (rep_sgd_update.h is an example):
// - kOp: the op's name, for errors.
// - kStates: how many arrays it keeps per parameter. Each has the parameter's dtype, shape and strides.
// - Multipliers: the multipliers of all parameters, size() of them. Its of<T>(k, sizes, strides) makes a One<T> for
// parameter k, as
//   GradMults does. One<T> has period() and write_out(), and step_chunk has an overload for it.
// - Hyper: a row of the hyper-parameter table, made of a pointer to its kColumns numbers. Its states() is how many of
//   the arrays a step uses, maximize the sign, variant(first) which loops to take, numbers<T>() what they need.
// - Numbers<T>: what the loops need of a row, in the dtype that is computed in.
// - kVariants: how many variants the loops have. is_frequent(variant) says whether one is worth loops of its own for
//   repeated taps, reads_states(variant) whether it reads the states or only writes them.
// - element<variant>(p, g, m, numbers, states...): the rule, for one element.
#pragma once

#include "step_chunk.h"
#include "step_tensors.h"

namespace gradrep {

template <typename Update>
class StepPlan : public PlannedStep {
 public:
  using Hyper = typename Update::Hyper;
  using Tensors = StepTensors<Update::kStates>;
  using States = typename Tensors::States;

  // Without `first_steps` the plan is made for many steps, none of which is the first of a parameter.
  StepPlan(const std::vector<Tensor>& params, const States& states, const typename Update::Multipliers& multipliers,
           const std::vector<int64_t>& groups, const std::vector<bool>* first_steps, const TailColumns& tail) {
    rows_.reserve(params.size());
    const auto add = [&](Tensors tensors, size_t k) {
      Row row(std::move(tensors));
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
    };
    Tensors::each(Update::kOp, params, states, multipliers.size(), groups, first_steps, tail, add);
  }

  bool step(const std::vector<Tensor>& grads, const HyperTable& table, const StepOptions& options) override {
    const auto &grad_scale = options.grad_scale, &found_inf = options.found_inf;
    if (grads.size() != rows_.size() || !table.on_device.empty() || options.clip || options.norm) return false;
    const int64_t groups = static_cast<int64_t>(table.tail_at) / Hyper::kColumns;
    for (size_t k = 0; k < rows_.size(); ++k) {
      Row& row = rows_[k];
      if (row.average || table.stochastic() || row.has_narrow_states()) return false;
      if (row.group < 0 || row.group >= groups) return false;
      const int used = hyper_of(table, row).states();
      bool grad_moved = false;  // with a grad_scale the gradients are written, and they may lie elsewhere in each step
      if (!row.look(grads[k], used, grad_scale.has_value(), moved_, grad_moved)) return false;
    }
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

  bool norm(const std::vector<Tensor>&, const Tensor&) override { return false; }

 private:
  static constexpr int64_t kPiece = 32768;  // elements of one piece of work
  // Elements up to which a plan keeps M written out: doing it at each step costs 62 x 1000 elements 5 µs.
  static constexpr int64_t kWrittenOut = 2048;

  struct Row : Tensors {
    typename Update::Multipliers::template One<float> mult32;
    typename Update::Multipliers::template One<double> mult64;

    explicit Row(Tensors tensors) : Tensors(std::move(tensors)) {}

    void step(const Hyper& hyper, const float* grad_scale, int64_t begin, int64_t end) const {
      const Chunk chunk{this->p, this->g, this->s.data(), grad_scale, this->first, begin, end};
      const int32_t dtype = this->dtype;
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

  static Hyper hyper_of(const HyperTable& table, const Row& row) {
    return Hyper(table.numbers.data() + row.group * Hyper::kColumns);
  }

  // The first piece of thread t's share, shares being equal in elements.
  size_t share_begin(int64_t t, int64_t threads) const {
    if (t >= threads) return pieces_.size();
    const int64_t share = total_ / threads * t;
    const auto is_before = [](const Piece& piece, int64_t at) { return piece.before < at; };
    return std::lower_bound(pieces_.begin(), pieces_.end(), share, is_before) - pieces_.begin();
  }

  // Whether two of the arrays that a step writes share memory: parameters made of one tensor, say.
  bool overlap(bool grads_too) const {
    std::vector<Extent> extents;
    for (const Row& row : rows_) row.add_extents(extents, grads_too, false);
    return share_memory(extents);
  }

  std::vector<Row> rows_;
  std::vector<Piece> pieces_;
  int64_t total_ = 0;
  bool overlapping_ = false, moved_ = true;  // moved_: some array lies elsewhere since overlapping_ was found
};

}  // namespace gradrep
