// A step of all parameters of all groups on CUDA, by tensors: the twin of step_plan.h. What does not change between
// steps is prepared once; a step compares its tensors with what they were, writes their places into the launches and
// launches them. Nothing waits for the device.
//
// Launcher runs works of step_cuda.h and mult_places.h, on the device and the stream of a tensor: the kernels', or the
// tests' on the CPU. Update is as step_plan.h lists it, and its Multipliers are GradMults.
#pragma once

#include "cuda_mult.h"
#include "step_cuda.h"
#include "step_tensors.h"

#include <tuple>

namespace gradrep {

template <typename Update, typename Launcher>
class CudaStepPlan : public PlannedStep {
 public:
  using Tensors = StepTensors<Update::kStates>;
  using States = typename Tensors::States;

  // Without `first_steps` the plan is made for many steps, none of which is the first of a parameter.
  CudaStepPlan(const std::vector<Tensor>& params, const States& states, const GradMults& multipliers,
               const std::vector<int64_t>& groups, const std::vector<bool>* first_steps, const TailColumns& tail) {
    tensors_.reserve(params.size());
    Tensors::each(Update::kOp, params, states, multipliers.size(), groups, first_steps, tail,
                  [&](Tensors tensors, size_t) { tensors_.push_back(std::move(tensors)); });
    if (tensors_.empty()) return;
    const Launcher launch(tensors_[0].param);
    stream_ = launch.stream();
    for (size_t k = 0; k < tensors_.size(); ++k) {
      const Tensors& row = tensors_[k];
      STD_TORCH_CHECK(row.device_type == tensors_[0].device_type && row.device == tensors_[0].device,
                      std::string(Update::kOp) + ": parameters must be on one device");
      with_launches(row.dtype, [&]<typename S>(StepLaunches<Update, S>& launches) {
        const auto mult =
            parts_.template place<Arithmetic<S>>(row.param, multipliers.scales[k], multipliers.identities[k], launch);
        for (const Piece& piece : pieces_of(mult.address, launch.most_of_piece()))
          launches.add(k, piece, mult.scale, mult.identity, row.group, row.first);
      });
    }
    each_dtype([](auto& launches) { launches.each([](auto& work) { work.take_chunks(); }); });
  }

  bool step(const std::vector<Tensor>& grads, const HyperTable& table, const StepOptions& options) override {
    const auto &grad_scale = options.grad_scale, &found_inf = options.found_inf;
    if (grads.size() != tensors_.size() || options.clip || options.norm) return false;
    if (tensors_.empty()) return true;
    const int64_t groups = static_cast<int64_t>(table.tail_at) / kColumns;
    for (size_t k = 0; k < tensors_.size(); ++k) {
      Tensors& row = tensors_[k];
      if (row.average || table.stochastic() || row.has_narrow_states()) return false;
      if (row.group < 0 || row.group >= groups) return false;
      const int used = Hyper(table.numbers.data() + row.group * kColumns).states();
      if (!row.look(grads[k], used, grad_scale.has_value(), moved_, moved_)) return false;
    }
    if (moved_ || grad_scale.has_value() != writes_grads_) {
      writes_grads_ = grad_scale.has_value();
      overlapping_ = overlap();
      each_dtype([&](auto& launches) { launches.point_to(tensors_); });
      moved_ = false;
    }
    if (overlapping_) return false;  // blocks run in any order
    const Launcher launch(tensors_[0].param);
    if (parts_.has_copies() && launch.stream() != stream_) return false;
    PackedTables packed;
    if (!table.on_device.empty() && !pack(table, groups, launch, packed)) return false;
    const float *unscale = one_float_beside(grad_scale), *overflow = one_float_beside(found_inf);
    if (launch.capturing()) parts_.keep_for_graph();
    each_dtype([&]<typename S>(StepLaunches<Update, S>& launches) {
      launches.set_hyper(table.numbers.data(), std::get<const Packed<Update, Arithmetic<S>>*>(packed));
      launches.each([&](auto& work) {
        work.grad_scale = unscale;
        work.found_inf = overflow;
        launch(work);
      });
    });
    return true;
  }

  bool norm(const std::vector<Tensor>&, const Tensor&) override { return false; }

 private:
  using Hyper = typename Update::Hyper;
  using PackedTables = std::tuple<const Packed<Update, float>*, const Packed<Update, double>*>;
  static constexpr int64_t kColumns = Hyper::kColumns;

  template <typename F>
  void each_dtype(const F& f) {
    std::apply([&](auto&... launches) { (f(launches), ...); }, launches_);
  }
  template <typename F>
  void with_launches(int32_t dtype, const F& f) {
    if (dtype == aoti_torch_dtype_float32()) return f(std::get<0>(launches_));
    if (dtype == aoti_torch_dtype_float64()) return f(std::get<1>(launches_));
    if (dtype == aoti_torch_dtype_bfloat16()) return f(std::get<2>(launches_));
    return f(std::get<3>(launches_));
  }

  bool overlap() const {
    std::vector<Extent> extents;
    for (const Tensors& row : tensors_) row.add_extents(extents, writes_grads_, true);
    return share_memory(extents);
  }

  // Packs the hyper-parameters on the device. Returns false where it cannot read a number.
  bool pack(const HyperTable& table, int64_t groups, const Launcher& launch, PackedTables& packed) const {
    using Work = PackWork<Update>;
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(table.somewhere->get(), &type));
    if (type != tensors_[0].device_type || table.somewhere->get_device() != tensors_[0].device) return false;
    std::vector<typename Work::Number> numbers(groups * kColumns);
    for (int64_t n = 0; n < groups * kColumns; ++n) numbers[n] = {nullptr, table.numbers[n], Stored::kDouble};
    for (const auto& [place, where, dtype] : table.on_device) {
      const Stored stored = dtype == aoti_torch_dtype_float32()    ? Stored::kFloat
                            : dtype == aoti_torch_dtype_bfloat16() ? Stored::kBFloat16
                            : dtype == aoti_torch_dtype_float16()  ? Stored::kHalf
                                                                   : Stored::kDouble;
      if (stored == Stored::kDouble && dtype != aoti_torch_dtype_float64()) return false;
      numbers[place] = {where, 0, stored};
    }
    constexpr int64_t of_doubles = sizeof(Packed<Update, double>), of_floats = sizeof(Packed<Update, float>);
    auto* doubles = reinterpret_cast<Packed<Update, double>*>(
        launch.template scratch<double>((groups * (of_doubles + of_floats) + 7) / 8));
    auto* floats = reinterpret_cast<Packed<Update, float>*>(doubles + groups);
    for (int64_t from = 0; from < groups; from += Work::kGroups) {
      Work work;
      work.groups = static_cast<int32_t>(std::min<int64_t>(Work::kGroups, groups - from));
      std::copy_n(numbers.data() + from * kColumns, work.groups * kColumns, &work.numbers[0][0]);
      work.doubles = doubles + from;
      work.floats = floats + from;
      launch(work);
    }
    packed = {floats, doubles};
    return true;
  }

  // The place of grad_scale or found_inf, null where there is none.
  const float* one_float_beside(const std::optional<Tensor>& t) const {
    if (!t) return nullptr;
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t->get(), &type));
    STD_TORCH_CHECK(type == tensors_[0].device_type && t->get_device() == tensors_[0].device &&
                        dtype_of(*t) == aoti_torch_dtype_float32() && t->numel() == 1,
                    "grad_scale and found_inf must be one float32 number on the parameters' device");
    return static_cast<const float*>(t->const_data_ptr());
  }

  std::vector<Tensors> tensors_;
  MultParts parts_;
  std::tuple<StepLaunches<Update, float>, StepLaunches<Update, double>, StepLaunches<Update, BFloat16>,
             StepLaunches<Update, Half>>
      launches_;
  void* stream_ = nullptr;  // that the plan was made on
  bool moved_ = true, writes_grads_ = false, overlapping_ = false;
};

}  // namespace gradrep
