// One of something for each dtype that the CUDA kernels over parameters take.
#pragma once

#include "common.h"
#include "feature_map.h"

#include <tuple>

namespace gradrep {

template <template <typename S> class Of>
class PerDtype {
 public:
  // f(the one of a dtype). Returns false where there is none.
  template <typename F>
  bool with(int32_t dtype, const F& f) {
    if (dtype == aoti_torch_dtype_float32())
      f(std::get<0>(all_));
    else if (dtype == aoti_torch_dtype_float64())
      f(std::get<1>(all_));
    else if (dtype == aoti_torch_dtype_bfloat16())
      f(std::get<2>(all_));
    else if (dtype == aoti_torch_dtype_float16())
      f(std::get<3>(all_));
    else
      return false;
    return true;
  }

  template <typename S>
  Of<S>& of() {
    return std::get<Of<S>>(all_);
  }

  template <typename F>
  void each(const F& f) {
    std::apply([&](auto&... of_dtype) { (f(of_dtype), ...); }, all_);
  }

 private:
  std::tuple<Of<float>, Of<double>, Of<BFloat16>, Of<Half>> all_;
};

}  // namespace gradrep
