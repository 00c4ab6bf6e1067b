// The launches of √(Σ M ⊙ g²): of the op `rep_grad_norm`, and of a planned step that clips.
#pragma once

#include "per_dtype.h"
#include "rep_grad_norm_cuda.h"

#include <utility>

namespace gradrep {

template <typename S>
using NormLaunchesOf = Launches<NormWork<S>>;

class NormLaunches : public PerDtype<NormLaunchesOf> {
 public:
  // Once all rows are there.
  void take_chunks() {
    each([&]<typename S>(Launches<NormWork<S>>& launches) {
      launches.each([&](NormWork<S>& work) {
        work.take_chunks();
        (sizeof(S) == 8 ? doubles_ : floats_) += work.blocks();
      });
    });
  }

  // Doubles of memory that a run needs.
  int64_t scratch() const { return doubles_ + (floats_ + 1) / 2; }

  // Launches on `launch`, as step_cuda_plan.h has one. `root` says what becomes of the norm of `grads`.
  template <typename Launcher>
  void run(const Launcher& launch, const std::vector<Tensor>& grads, RootWork root, double* scratch) {
    double* doubles = scratch;
    auto* floats = reinterpret_cast<float*>(scratch + doubles_);
    root.doubles = doubles;
    root.floats = floats;
    root.count_of_doubles = doubles_;
    root.count_of_floats = floats_;
    each([&]<typename S>(Launches<NormWork<S>>& launches) {
      launches.each_row([&](NormRow<S>& row, const RowSource& source) {
        row.grad = static_cast<const S*>(grads[source.tensor].const_data_ptr()) + source.start;
        row.aligned = reinterpret_cast<uintptr_t>(row.grad) % 16 == 0;
      });
      launches.each([&](NormWork<S>& work) {
        if constexpr (sizeof(S) == 8)
          work.partials = std::exchange(doubles, doubles + work.blocks());
        else
          work.partials = std::exchange(floats, floats + work.blocks());
        launch(work);
      });
    });
    launch(root);
  }

 private:
  int64_t floats_ = 0, doubles_ = 0;  // partial sums
};

}  // namespace gradrep
