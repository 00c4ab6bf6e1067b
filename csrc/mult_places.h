// How the place of an element in its parameter's memory leads to its multiplier, for the CUDA kernels. No torch here.
//
// The place splits into three levels, whatever the layout,
//     place = (outer * middle_size + middle) * inner_size + inner,
//     index in scale = outer * outer_stride + middle * middle_stride + inner * inner_stride:
// [O, 1, kh, kw] takes O, I, kh·kw for a contiguous weight and O, kh·kw, I for channels_last. A dense scale is one
// level. The identity's tap of output channel o is at (o mod channels) * tap_step + tap_first of its outer row.
// A scale may have layers: several multipliers, one behind the other. The index is then that of the first.
//
// Reads downwards: the address of a multiplier -> its pieces, which 32-bit indices reach -> what a kernel is told and
// does.
#pragma once

#include "cuda_blocks.h"
#include "levels.h"

#include <array>

namespace gradrep {

// ---- on the host

// Elements of a piece at most: places stay below 2^31, which Division needs.
constexpr int64_t kMostOfPiece = int64_t{1} << 30;

struct Shape {
  Sizes sizes, strides;
};

struct Address {
  std::array<Level, 3> levels;
  int64_t channels = 1, tap_step = 0, tap_first = 0, layers = 1, layer_stride = 0;

  int64_t row() const { return levels[1].size * levels[2].size; }
  // Of the elements of scale that it reads, the last.
  int64_t last() const {
    int64_t index = (layers - 1) * layer_stride;
    for (const Level& level : levels) index += (level.size - 1) * level.stride;
    return index;
  }
};

inline int64_t count_of(const Sizes& sizes) {
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  return n;
}

inline Address address_without_multiplier(const Shape& param) {
  return {{Level{1, 0}, Level{1, 0}, Level{count_of(param.sizes), 0}}};
}

// Nothing where three levels cannot express it, or an identity's rows are longer than a piece. The parameter is dense.
inline std::optional<Address> address_of(const Shape& param, const Shape& scale, bool identity, int64_t most) {
  const auto along = broadcast_strides(param.sizes, scale.sizes, scale.strides);
  if (!along) return std::nullopt;
  auto order = memory_order(param.sizes, param.strides);
  if (identity && param.sizes[0] != 1) {  // the identity is found by o, so that is a level of its own
    if (order[0] != 0) return std::nullopt;
    order.erase(order.begin());
  }
  const auto merged = merged_levels(order, param.sizes, *along);
  if (merged.size() > (identity ? 2 : 3)) return std::nullopt;
  Address address{{Level{1, 0}, Level{1, 0}, Level{1, 0}}};
  std::copy_backward(merged.begin(), merged.end(), address.levels.end());
  if (!identity) return address;
  address.levels[0] = {param.sizes[0], (*along)[0]};
  address.channels = param.sizes[1];
  address.tap_step = param.sizes[1] > 1 ? param.strides[1] : 0;
  address.tap_first = param.sizes[2] / 2 * param.strides[2] + param.sizes[3] / 2 * param.strides[3];
  if (address.row() > most) return std::nullopt;  // a part of a row has no identity
  return address;
}

// A part of a parameter: its first element, the elements of scale and identity that belong to it, and its address.
struct Piece {
  int64_t start, scale, identity;
  Address address;

  int64_t numel() const { return address.levels[0].size * address.row(); }
};

// Parts of at most `most` elements: rows of the outermost level, or parts of a row that is too long.
inline std::vector<Piece> pieces_of(const Address& address, int64_t most) {
  const auto [outer, middle, inner] = address.levels;
  const int64_t row = address.row();
  std::vector<Piece> pieces;
  if (outer.size * row == 0) return pieces;
  if (outer.size * row <= most) return {Piece{0, 0, 0, address}};
  if (row <= most) {
    int64_t rows = most / row;
    if (rows > 16) rows -= rows % 16;  // so that every piece starts at a multiple of 16 bytes if the parameter does
    for (int64_t first = 0; first < outer.size; first += rows) {
      pieces.push_back({first * row, first * outer.stride, first, address});
      pieces.back().address.levels[0].size = std::min(rows, outer.size - first);
    }
    return pieces;
  }
  Address within = address;
  within.levels = middle.size > 1 ? std::array<Level, 3>{middle, Level{1, 0}, inner}
                                  : std::array<Level, 3>{inner, Level{1, 0}, Level{1, 0}};
  for (int64_t n = 0; n < outer.size; ++n)
    for (Piece piece : pieces_of(within, most)) {
      piece.start += n * row;
      piece.scale += n * outer.stride;
      pieces.push_back(piece);
    }
  return pieces;
}

// How a kernel reads a scale.
struct Reading {
  Address address;
  enum { kAsItIs, kCopy, kDense } from;
  Sizes copy;  // kCopy: the sizes of a contiguous copy of the scale. kDense: M itself, laid out as the parameter is.
};

inline Shape contiguous_shape(const Sizes& sizes) {
  Shape shape{sizes, Sizes(sizes.size())};
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) shape.strides[d] = stride;
  return shape;
}

// `as_it_is`: the scale has the dtype that is computed in. It broadcasts to the parameter. `most`: elements of a piece.
inline Reading reading_of(const Shape& param, const Shape& scale, bool as_it_is, bool identity, int64_t most) {
  const auto reach = [&](const Shape& shape) {
    auto address = address_of(param, shape, identity, most);
    bool reached = address.has_value();
    if (reached)
      for (const Piece& piece : pieces_of(*address, most)) reached = reached && piece.address.last() <= INT32_MAX;
    return reached ? address : std::nullopt;
  };
  if (as_it_is)
    if (const auto address = reach(scale)) return {*address, Reading::kAsItIs, {}};
  if (const auto address = reach(contiguous_shape(scale.sizes))) return {*address, Reading::kCopy, scale.sizes};
  // [O, 1, kh, 1] has too many levels; with the whole kernel it has three.
  if (param.sizes.size() == 4 && scale.sizes.size() == 4) {
    const Sizes whole{scale.sizes[0], scale.sizes[1], param.sizes[2], param.sizes[3]};
    if (const auto address = reach(contiguous_shape(whole))) return {*address, Reading::kCopy, whole};
  }
  Address dense = address_without_multiplier(param);
  dense.levels[2].stride = 1;
  return {dense, Reading::kDense, {}};
}

// ---- on the device

struct MultPlaces {
  Division by_row, by_inner, by_channels;
  uint32_t outer_stride, middle_stride, inner_stride, phase, tap_step, tap_first, layers, layer_stride;

  MultPlaces() = default;
  explicit MultPlaces(const Piece& piece)
      : by_row(piece.address.row()),
        by_inner(piece.address.levels[2].size),
        by_channels(piece.address.channels),
        outer_stride(static_cast<uint32_t>(piece.address.levels[0].stride)),
        middle_stride(static_cast<uint32_t>(piece.address.levels[1].stride)),
        inner_stride(static_cast<uint32_t>(piece.address.levels[2].stride)),
        phase(static_cast<uint32_t>(piece.identity % piece.address.channels)),
        tap_step(static_cast<uint32_t>(piece.address.tap_step)),
        tap_first(static_cast<uint32_t>(piece.address.tap_first)),
        layers(static_cast<uint32_t>(piece.address.layers)),
        layer_stride(static_cast<uint32_t>(piece.address.layer_stride)) {}

  // What belongs to a place of the piece: an element of the scale, and of the identity where there is one.
  struct Found {
    uint32_t index, outer;
    bool tap;
  };
  GRADREP_HD GRADREP_INLINE Found find(uint32_t place, bool has_identity) const {
    const uint32_t outer = by_row.quotient(place), within = place - outer * by_row.by;
    const uint32_t middle = by_inner.quotient(within), inner = within - middle * by_inner.by;
    const uint32_t index = outer * outer_stride + middle * middle_stride + inner * inner_stride;
    if (!has_identity) return {index, outer, false};
    const uint32_t shifted = outer + phase;
    const uint32_t channel = shifted - by_channels.quotient(shifted) * by_channels.by;
    return {index, outer, within == channel * tap_step + tap_first};
  }

  // M at a place of the piece. `identity` may be null.
  template <typename T>
  GRADREP_HD GRADREP_INLINE T multiplier(uint32_t place, const T* scale, const T* identity) const {
    // Not by `find`: with it the SGD step with states in bfloat16 needs more than 64 registers on sm_80.
    const uint32_t outer = by_row.quotient(place), within = place - outer * by_row.by;
    const uint32_t middle = by_inner.quotient(within), inner = within - middle * by_inner.by;
    T m = scale[outer * outer_stride + middle * middle_stride + inner * inner_stride];
    if (identity != nullptr) {
      const uint32_t shifted = outer + phase;
      const uint32_t channel = shifted - by_channels.quotient(shifted) * by_channels.by;
      if (within == channel * tap_step + tap_first) m = m + identity[outer];
    }
    return m;
  }
};

// Adds an identity to a multiplier that is laid out as its parameter is, where M itself is copied.
template <typename T>
struct DiagonalWork {
  T* dense;
  const T* identity;
  int64_t outputs, channels, output_step, channel_step, first;

  DiagonalWork(T* m, const T* ones, const Shape& param)
      : dense(m),
        identity(ones),
        outputs(param.sizes[0]),
        channels(param.sizes[1]),
        output_step(param.strides[0]),
        channel_step(param.strides[1]),
        first(param.sizes[2] / 2 * param.strides[2] + param.sizes[3] / 2 * param.strides[3]) {}

  int64_t blocks() const { return (outputs + kThreads - 1) / kThreads; }
  GRADREP_HD void add(int64_t block, int thread) const {
    const int64_t o = block * kThreads + thread;
    if (o < outputs) {
      T& m = dense[o * output_step + o % channels * channel_step + first];
      m = m + identity[o];
    }
  }
};

}  // namespace gradrep
