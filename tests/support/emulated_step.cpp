// The ops over parameters on CUDA as they are but for the launches: the blocks run on
// the CPU, on CPU tensors. They are registered as
// gradrep_emulated::rep_sgd_step and so on, whose schemas the test defines.
#include "emulated_threads.h"
#include "rep_adamw_ops.h"
#include "rep_grad_norm_cuda_op.h"
#include "rep_sgd_ops.h"
#include "scale_gradients_cuda_op.h"
#include "second_update.h"
#include "step_cuda_plan.h"

#include <functional>

using namespace gradrep;

namespace {

// What the tests ask for and are told.
struct Device {
  int64_t most_of_piece = kMostOfPiece, stream = 1, captures = 0;  // given
  int64_t launches = 0, blocks = 0;
};
Device device;
std::vector<std::function<void()>> graph;  // the launches that were captured,
                                           // with their parameters as they were

struct Emulator {
  explicit Emulator(const Tensor& like) : like_(like) {}

  static int64_t most_of_piece() { return device.most_of_piece; }
  static bool capturing() { return device.captures != 0; }
  static void* stream() { return reinterpret_cast<void*>(device.stream); }

  template <typename T>
  T* scratch(int64_t n) const {
    scratch_ = torch::stable::new_empty(like_, {n}, torch::headeronly::ScalarType::Double);
    if (capturing()) kept().push_back(*scratch_);
    return static_cast<T*>(scratch_->mutable_data_ptr());
  }

  template <typename Work>
  void operator()(const Work& work) const {
    device.launches += 1;
    device.blocks += work.blocks();
    if (!capturing()) return run(work);
    auto copy = std::make_shared<Work>(work);
    graph.push_back([copy] { run(*copy); });
  }

 private:
  template <typename S>
  static void run(const NormWork<S>& work) {
    for (int64_t block = 0; block < work.blocks(); ++block) {
      std::vector<Arithmetic<S>> shared(kThreads, 0.0 / 0.0);
      norm_block(work, static_cast<uint32_t>(block), shared.data(), Phases{block % 2 == 1});
    }
  }
  static void run(const RootWork& work) {
    std::vector<double> shared(kThreads, 0.0 / 0.0);
    root_block(work, shared.data(), Phases{false});
  }
  template <typename Work>
  static void run(const Work& work) {
    for (int64_t block = 0; block < work.blocks(); ++block)
      Phases{block % 2 == 1}([&](int thread) { run_thread(work, block, thread); });
  }
  template <typename Update, typename S>
  static void run_thread(const StepWork<Update, S>& work, int64_t block, int thread) {
    with_kind(work.kind, [&](auto kind) { step_block<kind()>(work, static_cast<uint32_t>(block), thread); });
  }
  template <typename S>
  static void run_thread(const ScaleWork<S>& work, int64_t block, int thread) {
    scale_block(work, static_cast<uint32_t>(block), thread);
  }
  template <typename Update>
  static void run_thread(const PackWork<Update>& work, int64_t, int thread) {
    work.pack(thread);
  }
  template <typename T>
  static void run_thread(const DiagonalWork<T>& work, int64_t block, int thread) {
    work.add(block, thread);
  }
  static std::vector<Tensor>& kept() {
    static auto* tensors = new std::vector<Tensor>;
    return *tensors;
  }

  const Tensor& like_;
  mutable std::optional<Tensor> scratch_;
};

static_assert(sizeof(StepWork<SgdUpdate, float>) <= kMostParameters);
static_assert(sizeof(StepWork<SgdUpdate, double>) <= kMostParameters);

static_assert(sizeof(StepWork<AdamwUpdate, double>) <= kMostParameters);

using SgdPlan = CudaStepPlan<SgdUpdate, Emulator>;
using AdamwPlan = CudaStepPlan<AdamwUpdate, Emulator>;

void second_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> fast,
                 std::vector<Tensor> slow, std::vector<std::optional<Tensor>> scales,
                 std::vector<std::optional<Tensor>> identities, std::vector<bool> first_steps,
                 std::vector<int64_t> groups, Tensor hyper, std::optional<Tensor> grad_scale,
                 std::optional<Tensor> found_inf, std::optional<Tensor> tail) {
  const HyperTable table = hyper_table("second_step", hyper, SecondUpdate::Hyper::kColumns, tail);
  using Plan = CudaStepPlan<SecondUpdate, Emulator>;
  Plan plan(params, {std::vector<std::optional<Tensor>>(fast.begin(), fast.end()), {slow.begin(), slow.end()}},
            {std::move(scales), std::move(identities)}, groups, &first_steps, {});
  STD_TORCH_CHECK(plan.step(grads, table, {grad_scale, found_inf, {}, {}, 0}),
                  "second_step: the tensors must be alike");
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {
Device* emulated_device() { return &device; }
int64_t rows_of_a_launch() { return StepWork<SgdUpdate, float>::kRows; }
void replay() {
  for (const auto& launch : graph) launch();
}
void forget_graph() { graph.clear(); }
}
#pragma GCC visibility pop

STABLE_TORCH_LIBRARY_IMPL(gradrep_emulated, CPU, m) {
  m.impl("rep_grad_norm", TORCH_BOX(&rep_grad_norm<Emulator>));
  m.impl("scale_gradients_", TORCH_BOX(&scale_gradients_<Emulator>));
  m.impl("second_step", TORCH_BOX(&second_step));
  m.impl("rep_adamw_step", TORCH_BOX(&rep_adamw_step<AdamwPlan>));
  m.impl("rep_adamw_plan", TORCH_BOX(&rep_adamw_plan<AdamwPlan>));
  m.impl("rep_adamw_plan_step", TORCH_BOX(&take_planned_step));
  m.impl("rep_adamw_plan_norm", TORCH_BOX(&take_planned_norm));
  m.impl("rep_adamw_plan_free", TORCH_BOX(&free_planned_step));
  m.impl("rep_sgd_step", TORCH_BOX(&rep_sgd_step<SgdPlan>));
  m.impl("rep_sgd_plan", TORCH_BOX(&rep_sgd_plan<SgdPlan>));
  m.impl("rep_sgd_plan_step", TORCH_BOX(&take_planned_step));
  m.impl("rep_sgd_plan_norm", TORCH_BOX(&take_planned_norm));
  m.impl("rep_sgd_plan_free", TORCH_BOX(&free_planned_step));
}
