// A step of all parameters of all groups on CUDA, by tensors: the twin of step_plan.h. What does not change between
// steps is prepared once; a step compares its tensors with what they were, writes their places into the launches and
// launches them. Nothing waits for the device.
//
// Launcher runs works of step_cuda.h and mult_places.h, on the device and the stream of a tensor: the kernels', or the
// tests' on the CPU. Update is as step_plan.h lists it, and its Multipliers are GradMults, or BranchFactors where it is
// layered.
#pragma once

#include "cuda_mult.h"
#include "norm_launches.h"
#include "step_cuda.h"
#include "step_tensors.h"

namespace gradrep {

template <typename Update, typename Launcher>
class CudaStepPlan : public PlannedStep {
 public:
  using Tensors = StepTensors<Update::kStates>;
  using States = typename Tensors::States;

  // Without `first_steps` the plan is made for many steps, none of which is the first of a parameter.
  CudaStepPlan(const std::vector<Tensor>& params, const States& states, const typename Update::Multipliers& multipliers,
               const std::vector<int64_t>& groups, const std::vector<bool>* first_steps, const TailColumns& tail) {
    tensors_.reserve(params.size());
    Tensors::each(Update::kOp, params, states, multipliers.size(), groups, first_steps, tail,
                  [&](Tensors tensors, size_t) { tensors_.push_back(std::move(tensors)); });
    if (tensors_.empty()) return;
    const Launcher launch(tensors_[0].param);
    stream_ = launch.stream();
    for (size_t k = 0; k < tensors_.size(); ++k) {
      const Tensors& from = tensors_[k];
      STD_TORCH_CHECK(from.device_type == tensors_[0].device_type && from.device == tensors_[0].device,
                      std::string(Update::kOp) + ": parameters must be on one device");
      has_averages_ = has_averages_ || from.average.has_value();
      has_doubles_ = has_doubles_ || from.dtype == aoti_torch_dtype_float64();
      launches_[from.has_narrow_states()].with(from.dtype, [&]<typename S>(StepLaunches<Update, S>& launches) {
        const auto mult = parts_.template place<Arithmetic<S>>(
            from.param, multipliers.scales[k], multipliers.identities[k], launch, is_layered<Update>);
        launches.add(k, mult, launch.most_of_piece(), [&](StepRow<Update, S>& row, const Piece& piece) {
          row.group = static_cast<int32_t>(from.group);
          row.first = from.first;
          row.number = static_cast<uint32_t>(from.number);
          row.first_element = static_cast<uint64_t>(from.first_element + piece.start);
        });
      });
    }
    each_dtype([](auto& launches, bool) { launches.each([](auto& work) { work.take_chunks(); }); });
  }

  bool step(const std::vector<Tensor>& grads, const HyperTable& table, const StepOptions& options) override {
    const auto& grad_scale = options.grad_scale;
    if (grads.size() != tensors_.size()) return false;
    if (tensors_.empty()) return !options.norm;
    const int64_t groups = static_cast<int64_t>(table.tail_at) / kColumns;
    for (size_t k = 0; k < tensors_.size(); ++k) {
      Tensors& row = tensors_[k];
      if (row.group < 0 || row.group >= groups) return false;
      const int used = Hyper(table.numbers.data() + row.group * kColumns).states();
      if (!takes_states(row, used, table.stochastic())) return false;
      if (!row.look(grads[k], used, grad_scale.has_value(), moved_, moved_)) return false;
    }
    if (moved_ || grad_scale.has_value() != writes_grads_) {
      writes_grads_ = grad_scale.has_value();
      overlapping_ = overlap();
      each_dtype([&](auto& launches, bool narrow) { launches.point_to(tensors_, narrow); });
      moved_ = false;
    }
    if (overlapping_) return false;  // blocks run in any order
    const Launcher launch(tensors_[0].param);
    if (parts_.has_copies() && launch.stream() != stream_) return false;
    std::vector<typename PackWork<Update>::Number> numbers;
    if (!table.on_device.empty() && !find(table, groups, numbers)) return false;
    const float *unscale = one_float_beside(grad_scale), *overflow = one_float_beside(options.found_inf);
    std::optional<OneNumber> clip;
    if (options.clip) clip.emplace("clip", *options.clip, tensors_[0].param);
    RootWork root{};
    if (options.norm) root = root_of(*options.norm);
    if (launch.capturing()) parts_.keep_for_graph();
    // One allocation: packed numbers, the factor, partial sums.
    constexpr int64_t of_factor = sizeof(ClipFactor) / 8;
    const int64_t of_tables = numbers.empty() ? 0 : DeviceTables::scratch(groups);
    double* scratch = nullptr;
    if (options.norm || of_tables > 0)
      scratch = launch.template scratch<double>(of_tables + (options.norm ? of_factor + norm_launches().scratch() : 0));
    DeviceTables tables;
    if (of_tables > 0) tables = pack(numbers, groups, launch, scratch);
    if (options.norm) {
      scratch += of_tables;
      root.grad_scale = unscale;
      root.max_norm = options.max_norm;
      root.factor = reinterpret_cast<ClipFactor*>(scratch);
      norm_launches().run(launch, grads, root, scratch + of_factor);
    }
    double tail[HyperTable::kTail] = {};
    std::copy(table.numbers.begin() + table.tail_at, table.numbers.end(), tail);
    each_dtype([&]<typename S>(StepLaunches<Update, S>& launches, bool narrow) {
      using T = Arithmetic<S>;
      if (launches.empty()) return;
      const T* factor = options.norm ? root.factor->as<T>() : clip ? clip->as<T>() : nullptr;
      const bool random = narrow || (std::is_same_v<S, BFloat16> && table.stochastic());
      const TailKind kind = random                               ? TailKind::kNarrow
                            : factor != nullptr || has_averages_ ? TailKind::kWide
                                                                 : TailKind::kNone;
      launches.set_numbers(table.numbers.data(), TailNumbers<T>(tail), tables.template of<T>());
      launches.each([&](StepWork<Update, S>& work) {
        work.grad_scale = unscale;
        work.found_inf = overflow;
        work.clip = factor;
        work.kind = kind;
        launch(work);
      });
    });
    return true;
  }

  bool norm(const std::vector<Tensor>& grads, const Tensor& to) override {
    if (grads.size() != tensors_.size() || grads.empty()) return false;
    for (size_t k = 0; k < grads.size(); ++k)
      if (!tensors_[k].matches(grads[k], tensors_[k].dtype)) return false;
    const Launcher launch(grads[0]);
    if (parts_.has_copies() && launch.stream() != stream_) return false;
    const RootWork root = root_of(to);
    if (launch.capturing()) parts_.keep_for_graph();
    norm_launches().run(launch, grads, root, launch.template scratch<double>(norm_launches().scratch()));
    return true;
  }

 private:
  using Hyper = typename Update::Hyper;
  template <typename S>
  using LaunchesOf = StepLaunches<Update, S>;
  static constexpr int64_t kColumns = Hyper::kColumns;

  // Hyper-parameters and tail as they are packed on the device.
  struct DeviceTables {
    PackedTable<Update, float> floats;
    PackedTable<Update, double> doubles;

    template <typename T>
    const PackedTable<Update, T>& of() const {
      if constexpr (sizeof(T) == 8)
        return doubles;
      else
        return floats;
    }

    // Doubles of memory that they take.
    static int64_t scratch(int64_t groups) {
      return (sizeof(TailNumbers<double>) + sizeof(TailNumbers<float>) +
              groups * (sizeof(Packed<Update, double>) + sizeof(Packed<Update, float>)) + 7) /
             8;
    }
  };

  // f(launches, whether their states are bfloat16 and their parameters are not)
  template <typename F>
  void each_dtype(const F& f) {
    for (const bool narrow : {false, true}) launches_[narrow].each([&](auto& launches) { f(launches, narrow); });
  }

  // Whether a kernel knows the states that a step uses.
  static bool takes_states(const Tensors& row, int used, bool stochastic) {
    if (used == 0 || !row.has_narrow_states()) return true;
    bool narrow = stochastic;
    for (int n = 0; n < used; ++n) narrow = narrow && row.state_dtypes[n] != row.dtype;
    return narrow;
  }

  NormLaunches& norm_launches() {
    if (norm_) return *norm_;
    norm_.emplace();
    each_dtype([&]<typename S>(StepLaunches<Update, S>& launches, bool) {
      launches.each_row([&](const StepRow<Update, S>& row, const RowSource& source) {
        static_cast<PlacedRow<Arithmetic<S>>&>(norm_->template of<S>().new_row(source)) = row;
      });
    });
    norm_->take_chunks();
    return *norm_;
  }

  RootWork root_of(const Tensor& norm) const {
    RootWork root{};
    root.wide = has_doubles_;
    STD_TORCH_CHECK(on_one_device(norm, tensors_[0].param) && norm.numel() == 1 &&
                        dtype_of(norm) == (root.wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32()),
                    "norm must be one number on the parameters' device, float64 if any parameter is, else float32");
    root.norm = norm.mutable_data_ptr();
    return root;
  }

  bool overlap() const {
    std::vector<Extent> extents;
    for (const Tensors& row : tensors_) row.add_extents(extents, writes_grads_, true);
    return share_memory(extents);
  }

  // All numbers of the table and the tail, with the places of those on the device. Returns false where one cannot be
  // read there.
  bool find(const HyperTable& table, int64_t groups, std::vector<typename PackWork<Update>::Number>& numbers) const {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(table.somewhere->get(), &type));
    if (type != tensors_[0].device_type || table.somewhere->get_device() != tensors_[0].device) return false;
    for (const double number : table.numbers) numbers.push_back({nullptr, number, Stored::kDouble});
    numbers.resize(groups * kColumns + HyperTable::kTail, {nullptr, 0, Stored::kDouble});
    for (const auto& [place, where, dtype] : table.on_device) {
      const Stored stored = dtype == aoti_torch_dtype_float32()    ? Stored::kFloat
                            : dtype == aoti_torch_dtype_bfloat16() ? Stored::kBFloat16
                            : dtype == aoti_torch_dtype_float16()  ? Stored::kHalf
                                                                   : Stored::kDouble;
      if (stored == Stored::kDouble && dtype != aoti_torch_dtype_float64()) return false;
      numbers[place] = {where, 0, stored};
    }
    return true;
  }

  DeviceTables pack(const std::vector<typename PackWork<Update>::Number>& numbers, int64_t groups,
                    const Launcher& launch, double* scratch) const {
    auto* bytes = reinterpret_cast<char*>(scratch);
    const auto take = [&]<typename Part>(Part*& part, int64_t n) {
      part = reinterpret_cast<Part*>(bytes);
      bytes += n * static_cast<int64_t>(sizeof(Part));
    };
    DeviceTables tables;
    take(tables.doubles.tail, 1);
    take(tables.floats.tail, 1);
    take(tables.doubles.groups, groups);
    take(tables.floats.groups, groups);
    using Work = PackWork<Update>;
    for (int64_t from = 0; from < groups; from += Work::kGroups) {
      Work work;
      work.groups = static_cast<int32_t>(std::min<int64_t>(Work::kGroups, groups - from));
      std::copy_n(numbers.data() + from * kColumns, work.groups * kColumns, &work.numbers[0][0]);
      std::copy_n(numbers.data() + groups * kColumns, HyperTable::kTail, work.tail);
      work.doubles = {tables.doubles.groups + from, tables.doubles.tail};
      work.floats = {tables.floats.groups + from, tables.floats.tail};
      launch(work);
    }
    return tables;
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
  std::array<PerDtype<LaunchesOf>, 2> launches_;  // second: those of parameters whose states alone are bfloat16
  std::optional<NormLaunches> norm_;              // once it has been asked for
  void* stream_ = nullptr;                        // that the plan was made on
  bool has_averages_ = false, has_doubles_ = false;
  bool moved_ = true, writes_grads_ = false, overlapping_ = false;
};

}  // namespace gradrep
