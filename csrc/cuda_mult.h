// The multipliers of tensors where the CUDA kernels can read them: in place, or in a copy.
#pragma once

#include "grad_mult.h"
#include "mult_places.h"

#include <mutex>

namespace gradrep {

template <typename T>
struct PlacedMult {
  Address address;
  const T *scale = nullptr, *identity = nullptr;
};

template <typename T>
constexpr auto scalar() {
  return sizeof(T) == 8 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
}
template <typename T>
bool is_computed_in(const Tensor& t) {
  return dtype_of(t) == (sizeof(T) == 8 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

// A number on the device of `like`, in the dtypes that are computed in: itself or a copy.
class OneNumber {
 public:
  OneNumber(const char* what, const Tensor& number, const Tensor& like) : number_(number) {
    STD_TORCH_CHECK(number.numel() == 1 && on_one_device(number, like), what,
                    " must be one number on the device of the parameters or gradients");
  }

  template <typename T>
  const T* as() {
    if (is_computed_in<T>(number_)) return static_cast<const T*>(number_.const_data_ptr());
    auto& copy = copies_[sizeof(T) == 8];
    if (!copy) copy = torch::stable::to(number_, scalar<T>());
    return static_cast<const T*>(copy->const_data_ptr());
  }

 private:
  Tensor number_;
  std::optional<Tensor> copies_[2];
};

// The parts of multipliers that kernels read. They live as long as this does, or as a CUDA graph does.
class MultParts {
 public:
  // The multiplier of `like` (dense). `launch` runs what a copy needs, after it and on its stream. `layered`: the scale
  // is several multipliers, one behind the other.
  template <typename T, typename Launch>
  PlacedMult<T> place(const Tensor& like, const std::optional<Tensor>& scale, const std::optional<Tensor>& identity,
                      const Launch& launch, bool layered = false) {
    const Shape shape{to_sizes(like.sizes()), to_sizes(like.strides())};
    if (!scale) return {address_without_multiplier(shape)};
    Shape own{to_sizes(scale->sizes()), to_sizes(scale->strides())};
    Sizes layers;
    int64_t layer_stride = 0;
    if (layered) {
      STD_TORCH_CHECK(own.sizes.size() == shape.sizes.size() + 1 && own.sizes[0] >= 2,
                      "factors must have shape [1 + B, ...], with the dimensions of their parameter behind");
      layers = {own.sizes[0]};
      layer_stride = own.strides[0];
      own.sizes.erase(own.sizes.begin());
      own.strides.erase(own.strides.begin());
    }
    STD_TORCH_CHECK(on_one_device(like, *scale) && broadcast_strides(shape.sizes, own.sizes, own.strides),
                    "a Grad Mult must lie on its parameter's device and broadcast to it");
    if (identity) {
      check_identity(*identity, shape.sizes);
      STD_TORCH_CHECK(on_one_device(like, *identity), "an identity must lie on its parameter's device");
    }
    if (like.numel() == 0) return {address_without_multiplier(shape)};
    Reading reading = reading_of(shape, own, is_computed_in<T>(*scale), identity.has_value(), launch.most_of_piece());
    if (layered) {
      // The fronts pass other layouts to the reference (ops/cpp/step.py).
      STD_TORCH_CHECK(reading.from != Reading::kDense, "factors do not fit the layout of their parameter");
      reading.address.layers = layers[0];
      reading.address.layer_stride = reading.from == Reading::kAsItIs ? layer_stride : count_of(reading.copy);
      STD_TORCH_CHECK(reading.address.last() <= INT32_MAX, "factors have too many elements");
      reading.copy.insert(reading.copy.begin(), layers[0]);
    }
    PlacedMult<T> placed{reading.address};
    const T* ones = nullptr;
    if (identity) {
      const bool as_it_is = is_computed_in<T>(*identity) && identity->is_contiguous();
      ones = read<T>(as_it_is ? *identity : copy_of(empty<T>(like, to_sizes(identity->sizes())), *identity));
    }
    if (reading.from == Reading::kDense) {
      // A copy of the parameter, for its strides. Stable operations offer no empty_strided.
      Tensor m = torch::stable::to(like, scalar<T>(), {}, {}, {}, false, /*copy=*/true);
      m = copy_of(std::move(m), *scale);
      if (identity) launch(DiagonalWork<T>(static_cast<T*>(m.mutable_data_ptr()), ones, shape));
      placed.scale = read<T>(m);
    } else {
      placed.scale = read<T>(reading.from == Reading::kAsItIs ? *scale : copy_of(empty<T>(like, reading.copy), *scale));
      placed.identity = ones;
    }
    return placed;
  }

  // Whether some are copies. They were made on one stream, and its later work may take their memory over.
  bool has_copies() const { return has_copies_; }

  // A CUDA graph that is being captured reads the parts at each replay, so they are never freed.
  void keep_for_graph() {
    static std::mutex one_at_a_time;
    static auto* kept = new std::vector<Tensor>;  // never destroyed: at exit there may be no device any more
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    kept->insert(kept->end(), parts_.begin(), parts_.end());
    parts_.clear();
  }

 private:
  template <typename T>
  static Tensor empty(const Tensor& like, const Sizes& sizes) {
    return torch::stable::new_empty(like, sizes, scalar<T>());
  }

  Tensor copy_of(Tensor to, const Tensor& from) {
    has_copies_ = true;
    return torch::stable::copy_(to, from);
  }

  template <typename T>
  const T* read(const Tensor& part) {
    parts_.push_back(part);
    return static_cast<const T*>(part.const_data_ptr());
  }

  std::vector<Tensor> parts_;
  bool has_copies_ = false;
};

}  // namespace gradrep
