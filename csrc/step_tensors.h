// What the steps on all devices know of their tensors, and look at again at every step: the plans' common part.
//
// Reads downwards: the numbers of a step -> a plan, and the ops that take any -> whether tensors share memory ->
// the tensors of a parameter.
#pragma once

#include "common.h"

#include <array>
#include <string>
#include <utility>

namespace gradrep {

// The table of hyper-parameters, a row of columns for each group, and the numbers of the tail.
struct HyperTable {
  struct OnDevice {
    int64_t place;
    const void* where;
    int32_t dtype;
  };

  static constexpr size_t kTail = 4;  // see reference/step_tail.py

  std::vector<double> numbers;  // 1 where the number is on a device: it may be any, so what it uses is needed
  size_t tail_at = 0;           // where the tail's numbers begin; there may be none
  std::vector<OnDevice> on_device;  // all on one device
  std::optional<Tensor> somewhere;  // a tensor on that device

  HyperTable(std::vector<double> hyper, const std::vector<double>& tail) : numbers(std::move(hyper)) {
    tail_at = numbers.size();
    numbers.insert(numbers.end(), tail.begin(), tail.end());
    STD_TORCH_CHECK(tail.empty() || tail.size() == kTail, "the tail of a step has 4 numbers, or none");
  }

  bool has_tail() const { return numbers.size() > tail_at; }
  double ema_decay() const { return has_tail() ? numbers[tail_at] : 0; }
  bool stochastic() const { return has_tail() && numbers[tail_at + 1] != 0; }
  uint64_t seed() const { return has_tail() ? static_cast<uint64_t>(numbers[tail_at + 2]) : 0; }
  uint64_t count() const { return has_tail() ? static_cast<uint64_t>(numbers[tail_at + 3]) : 0; }

  void take(int64_t place, const Tensor& tensor, int64_t element = 0) {
    STD_TORCH_CHECK(place >= 0 && place < static_cast<int64_t>(numbers.size()),
                    "hyper-parameters on a device: a place must be in the table");
    const int32_t dtype = dtype_of(tensor);
    const auto* data = static_cast<const char*>(tensor.const_data_ptr());
    on_device.push_back({place, data + element * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)), dtype});
    numbers[place] = 1;
    somewhere = tensor;
  }
};

// The arguments `hyper`, [groups, columns] float64, and `tail`, [4] float64 or null, of a step.
inline HyperTable hyper_table(const std::string& op, const Tensor& hyper, int64_t columns,
                              const std::optional<Tensor>& tail) {
  STD_TORCH_CHECK(dtype_of(hyper) == aoti_torch_dtype_float64() && hyper.dim() == 2 && hyper.size(1) == columns &&
                      hyper.is_contiguous(),
                  op + ": hyper must be a contiguous float64 tensor [G, " + std::to_string(columns) + "]");
  STD_TORCH_CHECK(!tail || (dtype_of(*tail) == aoti_torch_dtype_float64() && tail->dim() == 1 &&
                            tail->size(0) == HyperTable::kTail && tail->is_contiguous()),
                  op + ": tail must be a contiguous float64 tensor [4]");
  HyperTable table(std::vector<double>(hyper.numel()), std::vector<double>(tail ? HyperTable::kTail : 0));
  const auto read = [&](const Tensor& numbers, int64_t at) {
    if (numbers.is_cpu())
      std::copy_n(static_cast<const double*>(numbers.const_data_ptr()), numbers.numel(), table.numbers.begin() + at);
    else
      for (int64_t n = 0; n < numbers.numel(); ++n) table.take(at + n, numbers, n);
  };
  read(hyper, 0);
  if (tail) read(*tail, hyper.numel());
  return table;
}

// What a step takes beside gradients and hyper-parameters.
struct StepOptions {
  std::optional<Tensor> grad_scale, found_inf;
  std::optional<Tensor> clip;  // gradients are multiplied by it
  std::optional<Tensor> norm;  // or by min(1, max_norm / (norm + 1e-6)), once the norm has been written here
  double max_norm = 0;
};

// ---- plans of any optimizer on any device. An address of this type is the handle, so that any module can take it:
// the parameters of a plan may have moved to another device.

class PlannedStep {
 public:
  virtual ~PlannedStep() = default;
  // Both return false, and have done nothing, where something is no longer as it was when the plan was made.
  virtual bool step(const std::vector<Tensor>& grads, const HyperTable& hyper, const StepOptions& options) = 0;
  // Writes √(Σ M ⊙ g²), a float or a double, to `to`.
  virtual bool norm(const std::vector<Tensor>& grads, const Tensor& to) = 0;
};

inline bool take_planned_step(int64_t plan, std::vector<Tensor> grads, std::vector<double> hyper,
                              std::vector<Tensor> on_device, std::vector<int64_t> places,
                              std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                              std::vector<double> tail, double max_norm, std::optional<Tensor> norm,
                              std::optional<Tensor> clip) {
  STD_TORCH_CHECK(on_device.size() == places.size(), "a planned step needs one place for each tensor in on_device");
  HyperTable table(std::move(hyper), tail);
  for (size_t n = 0; n < places.size(); ++n) {
    if (on_device[n].numel() != 1 || (n > 0 && on_device[n].get_device() != on_device[0].get_device())) return false;
    table.take(places[n], on_device[n]);
  }
  return reinterpret_cast<PlannedStep*>(plan)->step(grads, table, {grad_scale, found_inf, clip, norm, max_norm});
}

inline bool take_planned_norm(int64_t plan, std::vector<Tensor> grads, Tensor norm) {
  return reinterpret_cast<PlannedStep*>(plan)->norm(grads, norm);
}

inline void free_planned_step(Tensor, int64_t plan) { delete reinterpret_cast<PlannedStep*>(plan); }

// ---- sharing memory

struct Extent {
  const char *begin, *end;
  bool written;
};

// Whether an array that is written shares memory with another one.
inline bool share_memory(std::vector<Extent>& extents) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  const char *any = nullptr, *written = nullptr;  // where those so far end
  for (const Extent& extent : extents) {
    if (extent.begin < (extent.written ? any : written)) return true;
    any = std::max(any, extent.end);
    if (extent.written) written = std::max(written, extent.end);
  }
  return false;
}

// ---- the tensors of a parameter

// The columns of a step that a call may leave out (reference/step_tail.py).
struct TailColumns {
  std::optional<std::vector<std::optional<Tensor>>> averages;
  std::optional<std::vector<int64_t>> numbers;
  std::optional<std::vector<std::optional<Tensor>>> elements;

  bool has(size_t count) const {
    return (!averages || averages->size() == count) && (!numbers || numbers->size() == count) &&
           (!elements || elements->size() == count);
  }
};

template <int kStates>
struct StepTensors {
  using States = std::array<std::vector<std::optional<Tensor>>, kStates>;  // each: one entry per parameter

  Tensor param;
  std::array<std::optional<Tensor>, kStates> states;
  std::optional<Tensor> average;
  Sizes sizes, strides;
  int32_t dtype, device_type, device;
  std::array<int32_t, kStates> state_dtypes;  // the parameter's, or bfloat16
  int64_t numel, group;
  int64_t number, first_element;  // which random bits are its own (reference/rounding_rule.py)
  bool first;                     // it is the parameter's first step
  // Where the arrays are now; null: a state that the step does not use, an average that is not kept.
  void *p = nullptr, *g = nullptr, *e = nullptr;
  std::array<void*, kStates> s{};

  StepTensors(const std::string& op, const Tensor& param, int64_t group, bool first)
      : param(param),
        sizes(to_sizes(param.sizes())),
        strides(to_sizes(param.strides())),
        dtype(dtype_of(param)),
        device(param.get_device()),
        numel(param.numel()),
        group(group),
        first(first) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(param.get(), &device_type));
    STD_TORCH_CHECK(dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_float64() ||
                        dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float16(),
                    op, ": parameters must be float32, float64, bfloat16 or float16");
    STD_TORCH_CHECK(is_dense(sizes, strides), op, ": parameters must be dense in memory");
  }

  // add(tensors, number) for each parameter, once the lists are found to have one entry per parameter.
  template <typename Add>
  static void each(const std::string& op, const std::vector<Tensor>& params, const States& states, size_t multipliers,
                   const std::vector<int64_t>& groups, const std::vector<bool>* first_steps, const TailColumns& tail,
                   const Add& add) {
    const size_t count = params.size();
    bool one_each = multipliers == count && groups.size() == count && tail.has(count) &&
                    (first_steps == nullptr || first_steps->size() == count);
    for (const auto& list : states) one_each = one_each && list.size() == count;
    STD_TORCH_CHECK(one_each, op, ": the lists must have one entry per parameter");
    for (size_t k = 0; k < count; ++k) {
      StepTensors tensors(op, params[k], groups[k], first_steps != nullptr && (*first_steps)[k]);
      for (int n = 0; n < kStates; ++n) {
        tensors.states[n] = states[n][k];
        tensors.state_dtypes[n] =
            states[n][k] && dtype_of(*states[n][k]) == aoti_torch_dtype_bfloat16() ? aoti_torch_dtype_bfloat16()
                                                                                    : tensors.dtype;
      }
      if (tail.averages) tensors.average = (*tail.averages)[k];
      tensors.number = tail.numbers ? (*tail.numbers)[k] : static_cast<int64_t>(k);
      tensors.first_element = tail.elements ? first_of(op, (*tail.elements)[k]) : 0;
      add(std::move(tensors), k);
    }
  }

  static int64_t size_of(int32_t dtype) {
    return dtype == aoti_torch_dtype_float64() ? 8 : dtype == aoti_torch_dtype_float32() ? 4 : 2;
  }
  // Of the average: the dtype that is computed in.
  int32_t wide_dtype() const {
    return dtype == aoti_torch_dtype_float64() ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  }
  // Whether some state is stored in bfloat16 that the parameter is not stored in: it needs random bits.
  bool has_narrow_states() const {
    for (const int32_t other : state_dtypes)
      if (other != dtype) return true;
    return false;
  }

  // Whether `t` has the dtype `wanted`, and the device, shape and strides that the parameter had when the plan was
  // made; where a size is 1, its stride says nothing. Five or six calls into torch and no more: a step of 62 small
  // tensors asks this 186 times.
  bool matches(const Tensor& t, int32_t wanted) const {
    const AtenTensorHandle handle = t.get();
    int64_t dim, *t_sizes, *t_strides;
    int32_t t_device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    if (dim != static_cast<int64_t>(sizes.size()) || dtype_of(t) != wanted) return false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &t_sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &t_strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &t_device));
    if (t_device != device_type) return false;
    if (device_type != aoti_torch_device_type_cpu()) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &t_device));
      if (t_device != device) return false;
    }
    for (int64_t d = 0; d < dim; ++d)
      if (t_sizes[d] != sizes[d] || (t_strides[d] != strides[d] && t_sizes[d] != 1)) return false;
    return true;
  }

  // Takes the pointers of a step that uses the first `used` states. Returns false where a tensor is not what it was.
  // `moved` becomes true where an array is elsewhere than before, `grad_moved` where the gradient is.
  bool look(const Tensor& grad, int used, bool writes_grad, bool& moved, bool& grad_moved) {
    if (!matches(param, dtype) || !matches(grad, dtype)) return false;
    moved |= point_to(p, param.mutable_data_ptr());
    for (int n = 0; n < kStates; ++n) {
      if (n < used && (!states[n] || !matches(*states[n], state_dtypes[n]))) return false;
      moved |= point_to(s[n], n < used ? states[n]->mutable_data_ptr() : nullptr);
    }
    if (average && !matches(*average, wide_dtype())) return false;
    moved |= point_to(e, average ? average->mutable_data_ptr() : nullptr);
    grad_moved |= point_to(g, writes_grad ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr()));
    return true;
  }

  // The arrays of this step. Gradients are written, read, or neither of them counts. A state that is the parameter
  // stands for one that the step may not use, and the same thread has both.
  void add_extents(std::vector<Extent>& extents, bool writes_grads, bool reads_grads) const {
    const auto add = [&](const void* array, int32_t stored, bool written) {
      const auto* begin = static_cast<const char*>(array);
      if (begin != nullptr && numel > 0) extents.push_back({begin, begin + numel * size_of(stored), written});
    };
    add(p, dtype, true);
    for (int n = 0; n < kStates; ++n)
      if (s[n] != p) add(s[n], state_dtypes[n], true);
    add(e, wide_dtype(), true);
    if (writes_grads || reads_grads) add(g, dtype, writes_grads);
  }

 private:
  // Returns whether the pointer has changed.
  static bool point_to(void*& pointer, void* to) { return std::exchange(pointer, to) != to; }

  // Where a run of the whole parameter begins.
  static int64_t first_of(const std::string& op, const std::optional<Tensor>& elements) {
    if (!elements) return 0;
    STD_TORCH_CHECK(elements->is_cpu() && elements->numel() == 1 && dtype_of(*elements) == aoti_torch_dtype_int64(), op,
                    ": kernels take one int64 number on the CPU in `elements`, where a run of the parameter begins");
    return *static_cast<const int64_t*>(elements->const_data_ptr());
  }
};

}  // namespace gradrep
