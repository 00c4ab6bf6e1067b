// Tiles of images as stacks of bin numbers, made for displaced reading. No torch here.
//
// Reads downwards: the binnings that a channel needs -> the stacks of a block of channels.
#pragma once

#include "feature_map.h"
#include "targets.h"

#include <array>

namespace gradrep {

// A binning for each value, as three arrays.
template <typename T>
struct Binnings {
  const T *lo, *inv, *top;
};

}  // namespace gradrep

#define GRADREP_LOOPS "quantise_loops.h"
#include "for_each_target.h"

namespace gradrep {

using QuantiseLoops = PerTarget<base::QuantiseLoops, avx2::QuantiseLoops, avx512::QuantiseLoops>;

// The unlike binnings of both sides of a channel's displacements.
template <typename T>
struct ChannelBinnings {
  static constexpr int kMost = 8;  // in one pass: of both sides of four displacements

  int count = 0;
  std::array<Binning<T>, kMost> distinct;

  // Where the binning of a side is in `distinct`. P of displacement d of the pass is side 2 d, and Q is side 2 d + 1.
  int place(int64_t side) const { return count == 1 ? 0 : places_[side]; }

  int32_t bins(int binning) const { return bins_[binning]; }

  // Returns false where the channel has more than kMost binnings.
  bool add(int64_t side, const T* range, int32_t bins) {
    int k = 0;
    while (k < count && (bins_[k] != bins || std::memcmp(ranges_[k], range, 2 * sizeof *range) != 0)) ++k;
    if (k == kMost) return false;
    if (k == count) {
      distinct[k] = binning(range[0], range[1], bins);
      ranges_[k] = range;
      bins_[k] = bins;
      ++count;
    }
    if (side < kMost) places_[side] = k;  // more sides than that have one binning in common
    return true;
  }

 private:
  std::array<const T*, kMost> ranges_;
  std::array<int32_t, kMost> bins_;
  std::array<int, kMost> places_;
};

// Bin: uint8_t where all bins and `none` fit it, else uint16_t.
template <typename S, typename Bin>
class BinStacks {
 public:
  using T = Arithmetic<S>;

  // With `zeros_drop`, all zeros become `none`. Then the stacks leave out the padding, which is zeros.
  BinStacks(const FeatureMap<S>& map, const std::vector<Displacement>& displacements, int64_t pad_rows,
            int64_t pad_columns, bool zeros_drop)
      : map_(map),
        zeros_drop_(zeros_drop),
        reader_(map),
        height_(map.height + (zeros_drop ? 0 : 2 * pad_rows)),
        width_(map.width + (zeros_drop ? 0 : 2 * pad_columns)),
        layout_(make_stack(height_, width_, displacements)),
        zeros_between_(!zeros_drop && layout_.gap_rows <= pad_rows && layout_.gap_columns <= pad_columns) {
    if (zeros_between_) {
      layout_.height = map.height;
      layout_.width = map.width;
    }
    in_row_ = (layout_.height - map.height) / 2;
    in_column_ = (layout_.width - map.width) / 2;
  }

  int64_t height() const { return height_; }  // of the padded image
  int64_t width() const { return width_; }
  const ImageStack& layout() const { return layout_; }
  bool zeros_between() const { return zeros_between_; }

  // Starts a block of channels, which have no binnings yet.
  void start(int64_t channel, int64_t channels) {
    channel_ = channel;
    binnings_.assign(channels, {});
  }
  ChannelBinnings<T>& binnings(int64_t c) { return binnings_[c]; }
  const ChannelBinnings<T>& binnings(int64_t c) const { return binnings_[c]; }

  // Makes room for tiles of so many images. A channel has a stack for each of its binnings.
  void prepare(int64_t images, int64_t stacks_per_channel) {
    tile_ = images;
    stacks_per_channel_ = stacks_per_channel;
    clear();
    prepare_small_planes();
  }

  // Zeros between the images, or `none` between them and zeros around each; fill() puts the images in.
  void clear() {
    pitch_ = odd_lines<Bin>(layout_.size(tile_));
    stacks_.resize(channels() * stacks_per_channel_ * pitch_);
    for (int64_t c = 0; c < channels(); ++c)
      for (int b = 0; b < binnings_[c].count; ++b) {
        std::fill_n(stack(c, b), pitch_, zeros_between_ ? zero(c, b) : static_cast<Bin>(binnings_[c].bins(b)));
        if (in_row_ == 0 && in_column_ == 0) continue;
        for (int64_t image = 0; image < tile_; ++image)
          for (int64_t y = 0; y < layout_.height; ++y)
            std::fill_n(stack(c, b) + layout_.at(image, y, 0), layout_.width, zero(c, b));
      }
  }

  // Quantises images [image, image + images) of the map.
  void fill(int64_t image, int64_t images) {
    const int64_t together = reader_.rows_together(channels()), width = map_.width;
    const int64_t plane = map_.height * width, n = channels() * plane;
    numbers_.resize(std::max(together * width, plane < kSmall ? n : 0));
    for (int64_t i = 0; i < images; ++i)
      for (int64_t row = 0; row < map_.height; row += together) {
        const int64_t rows = std::min(together, map_.height - row);
        const int64_t at = layout_.at(i, in_row_ + row, in_column_);
        reader_.read(image + i, channel_, channels(), row, rows);
        if (rows == map_.height && plane < kSmall && (channels() == 1 || reader_.pitch() == plane)) {
          for (int64_t b = 0; b < stacks_per_channel_; ++b) {
            const T* each = small_.data() + 3 * n * b;
            quantise(reader_.plane(0), n, Binnings<T>{each, each + n, each + 2 * n});
            spread_planes(numbers_.data(), channels(), rows, width, stack(0, b) + at, stacks_per_channel_ * pitch_,
                          layout_.pitch());
          }
          continue;
        }
        for (int64_t c = 0; c < channels(); ++c)
          for (int b = 0; b < binnings_[c].count; ++b) {
            quantise(reader_.plane(c), rows * width, binnings_[c].distinct[b]);
            spread_planes(numbers_.data(), 1, rows, width, stack(c, b) + at, pitch_, layout_.pitch());
          }
      }
  }

  Bin* stack(int64_t c, int64_t binning) { return stacks_.data() + (c * stacks_per_channel_ + binning) * pitch_; }

  // The bin number of a zero.
  Bin zero(int64_t c, int64_t binning) const {
    return static_cast<Bin>(bin_number(T(0), binnings_[c].distinct[binning]));
  }

 private:
  int64_t channels() const { return binnings_.size(); }

  // Binnings pixel by pixel, for planes that are quantised all at once.
  void prepare_small_planes() {
    const int64_t plane = map_.height * map_.width, n = channels() * plane;
    if (plane >= kSmall) return;
    small_.resize(3 * n * stacks_per_channel_);
    for (int64_t b = 0; b < stacks_per_channel_; ++b)
      for (int64_t c = 0; c < channels(); ++c) {
        const Binning<T>& mine = binnings_[c].distinct[std::min<int64_t>(b, binnings_[c].count - 1)];
        T* to = small_.data() + 3 * n * b + c * plane;
        std::fill_n(to, plane, mine.lo);
        std::fill_n(to + n, plane, mine.inv);
        std::fill_n(to + 2 * n, plane, mine.top);
      }
  }

  template <typename Each>
  void quantise(const S* values, int64_t n, const Each& binning) {
    QuantiseLoops::on_best([&](auto loops) {
      if (zeros_drop_)
        loops.template quantise<true>(values, n, binning, numbers_.data());
      else
        loops.template quantise<false>(values, n, binning, numbers_.data());
    });
  }

  const FeatureMap<S>& map_;
  const bool zeros_drop_;
  PlaneReader<S> reader_;
  const int64_t height_, width_;
  ImageStack layout_;
  // Padding reaches as far as the displacements: one gap of zeros serves both neighbours. Else padded images lie in
  // gaps of `none`.
  const bool zeros_between_;
  int64_t in_row_, in_column_;  // where the image lies in that of the stack
  // of the current block of channels and pass
  int64_t channel_ = 0, tile_ = 0, stacks_per_channel_ = 0, pitch_ = 0;
  std::vector<ChannelBinnings<T>> binnings_;
  std::vector<Bin> stacks_, numbers_;
  std::vector<T> small_;
};

}  // namespace gradrep
