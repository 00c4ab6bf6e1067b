// What the steps on all devices know of their tensors, and look at again at every step: the plans' common part.
//
// Reads downwards: hyper-parameters -> a plan, and the ops that take any -> whether tensors share memory ->
// the tensors of a parameter.
#pragma once

#include "common.h"

#include <array>
#include <string>
#include <utility>

namespace gradrep {

// The table of hyper-parameters, a row of columns for each group.
struct HyperTable {
  struct OnDevice {
    int64_t place;
    const void* where;
    int32_t dtype;
  };

  std::vector<double> numbers;      // 1 where the number is on a device: it may be any, so what it uses is needed
  std::vector<OnDevice> on_device;  // all on one device
  std::optional<Tensor> somewhere;  // a tensor on that device

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

// The argument `hyper` of a step: [groups, columns] float64.
inline HyperTable hyper_table(const std::string& op, const Tensor& hyper, int64_t columns) {
  STD_TORCH_CHECK(dtype_of(hyper) == aoti_torch_dtype_float64() && hyper.dim() == 2 && hyper.size(1) == columns &&
                      hyper.is_contiguous(),
                  op + ": hyper must be a contiguous float64 tensor [G, " + std::to_string(columns) + "]");
  HyperTable table{std::vector<double>(hyper.numel()), {}, {}};
  if (hyper.is_cpu())
    std::copy_n(static_cast<const double*>(hyper.const_data_ptr()), hyper.numel(), table.numbers.begin());
  else
    for (int64_t n = 0; n < hyper.numel(); ++n) table.take(n, hyper, n);
  return table;
}

// ---- plans of any optimizer on any device. An address of this type is the handle, so that any module can take it:
// the parameters of a plan may have moved to another device.

class PlannedStep {
 public:
  virtual ~PlannedStep() = default;
  // Returns false, and has done nothing, where something is no longer as it was when the plan was made.
  virtual bool step(const std::vector<Tensor>& grads, const HyperTable& hyper, const std::optional<Tensor>& grad_scale,
                    const std::optional<Tensor>& found_inf) = 0;
};

inline bool take_planned_step(int64_t plan, std::vector<Tensor> grads, std::vector<double> hyper,
                              std::vector<Tensor> on_device, std::vector<int64_t> places,
                              std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  STD_TORCH_CHECK(on_device.size() == places.size(), "a planned step needs one place for each tensor in on_device");
  HyperTable table{std::move(hyper), {}, {}};
  for (size_t n = 0; n < places.size(); ++n) {
    if (on_device[n].numel() != 1 || (n > 0 && on_device[n].get_device() != on_device[0].get_device())) return false;
    table.take(places[n], on_device[n]);
  }
  return reinterpret_cast<PlannedStep*>(plan)->step(grads, table, grad_scale, found_inf);
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

template <int kStates>
struct StepTensors {
  using States = std::array<std::vector<std::optional<Tensor>>, kStates>;  // each: one entry per parameter

  Tensor param;
  std::array<std::optional<Tensor>, kStates> states;
  Sizes sizes, strides;
  int32_t dtype, device_type, device;
  int64_t numel, group;
  bool first;  // it is the parameter's first step
  // Where the arrays are now; null: a state that the step does not use.
  void *p = nullptr, *g = nullptr;
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
                   const std::vector<int64_t>& groups, const std::vector<bool>* first_steps, const Add& add) {
    const size_t count = params.size();
    bool one_each =
        multipliers == count && groups.size() == count && (first_steps == nullptr || first_steps->size() == count);
    for (const auto& list : states) one_each = one_each && list.size() == count;
    STD_TORCH_CHECK(one_each, op, ": the lists must have one entry per parameter");
    for (size_t k = 0; k < count; ++k) {
      StepTensors tensors(op, params[k], groups[k], first_steps != nullptr && (*first_steps)[k]);
      for (int n = 0; n < kStates; ++n) tensors.states[n] = states[n][k];
      add(std::move(tensors), k);
    }
  }

  int64_t itemsize() const {
    return dtype == aoti_torch_dtype_float64() ? 8 : dtype == aoti_torch_dtype_float32() ? 4 : 2;
  }

  // Whether `t` has the device, dtype, shape and strides that the parameter had when the plan was made; where a size is
  // 1, its stride says nothing. Five or six calls into torch and no more: a step of 62 small tensors asks this 186
  // times.
  bool matches(const Tensor& t) const {
    const AtenTensorHandle handle = t.get();
    int64_t dim, *t_sizes, *t_strides;
    int32_t t_device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    if (dim != static_cast<int64_t>(sizes.size()) || dtype_of(t) != dtype) return false;
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
    if (!matches(param) || !matches(grad)) return false;
    moved |= point_to(p, param.mutable_data_ptr());
    for (int n = 0; n < kStates; ++n) {
      if (n < used && (!states[n] || !matches(*states[n]))) return false;
      moved |= point_to(s[n], n < used ? states[n]->mutable_data_ptr() : nullptr);
    }
    grad_moved |= point_to(g, writes_grad ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr()));
    return true;
  }

  // The arrays of this step. Gradients are written, read, or neither of them counts. A state that is the parameter
  // stands for one that the step may not use, and the same thread has both.
  void add_extents(std::vector<Extent>& extents, bool writes_grads, bool reads_grads) const {
    const auto add = [&](const void* array, bool written) {
      const auto* begin = static_cast<const char*>(array);
      if (begin != nullptr && numel > 0) extents.push_back({begin, begin + numel * itemsize(), written});
    };
    add(p, true);
    for (const void* state : s)
      if (state != p) add(state, true);
    if (writes_grads || reads_grads) add(g, writes_grads);
  }

 private:
  // Returns whether the pointer has changed.
  static bool point_to(void*& pointer, void* to) { return std::exchange(pointer, to) != to; }
};

}  // namespace gradrep
