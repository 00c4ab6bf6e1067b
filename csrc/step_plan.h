// A step of all parameters of all groups. What does not change between steps is prepared once.
//
// Reads downwards: making a plan -> its step and its norm -> a row, which is one parameter.
//
// StepPlan is a template over the update, a type with these members (rep_sgd_update.h is an example):
// - kOp: the op's name, for errors.
// - kStates: how many arrays it keeps per parameter. Each has the parameter's shape and strides, and its dtype or
//   bfloat16.
// - Multipliers: the multipliers of all parameters, size() of them. Its of<T>(k, sizes, strides) makes a One<T> for
//   parameter k, as GradMults does. One<T> is a Multiplier<T>, or each_run, step_chunk, step_run and sum_of_squares
//   have overloads for it, as in adamw_chunk.h. The update then needs no `element`.
// - Hyper: a row of the hyper-parameter table, made of a pointer to its kColumns numbers. Its states() is how many of
//   the arrays a step uses, from the first, maximize the sign, variant(first) which loops to take, numbers<T>() what
//   they need.
// - Numbers<T>: what the loops need of a row, in the dtype that is computed in.
// - kVariants: how many variants the loops have. is_frequent(variant) says whether one is worth loops of its own for
//   repeated taps, averages and random bits, reads_states(variant) whether it reads the states or only writes them.
// - element<variant>(p, g, m, numbers, states...): the rule, for one element.
#pragma once

#include "pieces.h"
#include "rep_grad_norm_cpu.h"
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
      pieces_.add(k, row.numel, std::max(row.mult32.period(), row.mult64.period()));
      is_double_ = is_double_ || row.dtype == aoti_torch_dtype_float64();
      rows_.push_back(std::move(row));
    };
    Tensors::each(Update::kOp, params, states, multipliers.size(), groups, first_steps, tail, add);
  }

  bool step(const std::vector<Tensor>& grads, const HyperTable& table, const StepOptions& options) override {
    const auto &grad_scale = options.grad_scale, &found_inf = options.found_inf;
    if (grads.size() != rows_.size() || !table.on_device.empty()) return false;
    if ((options.clip && !is_number(*options.clip)) || (options.norm && !takes_norm(*options.norm))) return false;
    const int64_t groups = static_cast<int64_t>(table.tail_at) / Hyper::kColumns;
    for (size_t k = 0; k < rows_.size(); ++k) {
      Row& row = rows_[k];
      if (row.group < 0 || row.group >= groups) return false;
      const int used = hyper_of(table, row).states();
      if (!row.stores(used, table.stochastic())) return false;
      bool grad_moved = false;  // with a grad_scale the gradients are written, and they may lie elsewhere in each step
      if (!row.look(grads[k], used, grad_scale.has_value(), moved_, grad_moved)) return false;
    }
    if (moved_ || grad_scale) {
      overlapping_ = overlap(grad_scale.has_value());
      moved_ = grad_scale.has_value();
    }
    StepNumbers numbers{{}, {}, 1 - table.ema_decay(), table.seed(), table.count()};
    if (grad_scale) numbers.grad_scale = one_float(*grad_scale);
    if (options.norm) {
      const auto clip_by = [&]<typename T>(T norm) {
        norm /= numbers.grad_scale.value_or(1);
        write_number(*options.norm, norm);
        numbers.clip = clip_factor(norm, options.max_norm);
      };
      if (is_double_)
        clip_by(gradient_norm());
      else
        clip_by(static_cast<float>(gradient_norm()));
      if (*numbers.clip == 1) numbers.clip.reset();
    } else if (options.clip) {
      numbers.clip = read_number(*options.clip);
    }
    if (found_inf && one_float(*found_inf) != 0) return true;
    // Arrays that share memory are stepped one after the other.
    pieces_.run(overlapping_, [&](const Pieces::Piece& piece, size_t) {
      const Row& row = rows_[piece.array];
      row.step(hyper_of(table, row), numbers, piece.begin, piece.end);
    });
    return true;
  }

  bool norm(const std::vector<Tensor>& grads, const Tensor& to) override {
    if (grads.size() != rows_.size() || !takes_norm(to)) return false;
    for (size_t k = 0; k < rows_.size(); ++k)
      if (!rows_[k].matches(grads[k], rows_[k].dtype)) return false;
    for (size_t k = 0; k < rows_.size(); ++k) rows_[k].g = const_cast<void*>(grads[k].const_data_ptr());
    write_number(to, gradient_norm());
    return true;
  }

 private:
  // Elements up to which a plan keeps M written out: doing it at each step costs 62 x 1000 elements 5 µs.
  static constexpr int64_t kWrittenOut = 2048;

  // What all groups share.
  struct StepNumbers {
    std::optional<float> grad_scale;
    std::optional<double> clip;
    double rest;
    uint64_t seed, count;
  };

  struct Row : Tensors {
    typename Update::Multipliers::template One<float> mult32;
    typename Update::Multipliers::template One<double> mult64;
    bool narrow = false;  // states are rounded to bfloat16 by random bits

    explicit Row(Tensors tensors) : Tensors(std::move(tensors)) {}

    // Whether the loops can store the states as they are in this step, all `used` of them in one way.
    bool stores(int used, bool stochastic) {
      int in_bfloat16 = 0, as_param = 0;
      for (int n = 0; n < used; ++n) {
        in_bfloat16 += this->state_dtypes[n] == aoti_torch_dtype_bfloat16();
        as_param += this->state_dtypes[n] == this->dtype;
      }
      narrow = stochastic && used > 0 && in_bfloat16 == used;
      return narrow || (as_param == used && !(stochastic && in_bfloat16 > 0));
    }

    void step(const Hyper& hyper, const StepNumbers& numbers, int64_t begin, int64_t end) const {
      const RandomStream random(numbers.seed, numbers.count, this->number);
      const Chunk chunk{this->p,
                        this->g,
                        this->s.data(),
                        this->e,
                        numbers.grad_scale ? &*numbers.grad_scale : nullptr,
                        numbers.clip ? &*numbers.clip : nullptr,
                        numbers.rest,
                        narrow ? &random : nullptr,
                        static_cast<uint64_t>(this->first_element),
                        this->first,
                        begin,
                        end};
      const int32_t dtype = this->dtype;
      if (dtype == aoti_torch_dtype_float32())
        step_chunk<Update, float>(chunk, hyper, mult32);
      else if (dtype == aoti_torch_dtype_float64())
        step_chunk<Update, double>(chunk, hyper, mult64);
      else if (dtype == aoti_torch_dtype_bfloat16())
        step_chunk<Update, BFloat16>(chunk, hyper, mult32);
      else
        step_chunk<Update, Half>(chunk, hyper, mult32);
    }
  };

  static Hyper hyper_of(const HyperTable& table, const Row& row) {
    return Hyper(table.numbers.data() + row.group * Hyper::kColumns);
  }

  bool takes_norm(const Tensor& to) const {
    return is_number(to) && (dtype_of(to) == aoti_torch_dtype_float64()) == is_double_;
  }

  // √(Σ M ⊙ g²) of the gradients that the rows point to.
  double gradient_norm() const {
    return std::sqrt(pieces_.sum([&](const Pieces::Piece& piece) {
      const Row& row = rows_[piece.array];
      return sum_of_squares(row.g, row.dtype, row.mult32, row.mult64, piece.begin, piece.end);
    }));
  }

  // Whether two of the arrays that a step writes share memory: parameters made of one tensor, say.
  bool overlap(bool grads_too) const {
    std::vector<Extent> extents;
    for (const Row& row : rows_) row.add_extents(extents, grads_too, false);
    return share_memory(extents);
  }

  std::vector<Row> rows_;
  Pieces pieces_;
  bool is_double_ = false;                   // some parameter is float64, and so is the norm
  bool overlapping_ = false, moved_ = true;  // moved_: some array lies elsewhere since overlapping_ was found
};

}  // namespace gradrep
