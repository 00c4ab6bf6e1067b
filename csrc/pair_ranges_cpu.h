// Ranges of both sides of the pairs, and how many pairs, on the CPU. No torch here.
//
// Reads downwards: loops -> one task (a block of channels, a slab of images), by place or by pair -> all tasks.
#pragma once

#include "feature_map.h"
#include "targets.h"

#include <limits>
#include <mutex>
#include <utility>

namespace gradrep {

template <typename S>
struct RangeArguments {  // of pair_ranges_, checked: see reference/pair_ranges.py
  using T = Arithmetic<S>;
  FeatureMap<S> map;
  std::vector<Displacement> displacements;
  int64_t pad_rows, pad_columns;
  bool remove_near;
  T* ends;     // [C, D, 2, 2]: the greatest of -v and of v
  int64_t* n;  // [C, D], or null
};

// ---- loops, which deal what they read to lanes

constexpr int kLanes = 64;      // that few running extrema stay in registers
constexpr int kNearLanes = 16;  // of pairs without a zero

template <typename T>
struct NearExtrema {
  T least_p[kNearLanes], greatest_p[kNearLanes], least_q[kNearLanes], greatest_q[kNearLanes];  // of numbers
  int32_t nan_p[kNearLanes], nan_q[kNearLanes];                                                // 1 where a NaN was met
};

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

}  // namespace gradrep

#define GRADREP_LOOPS "pair_ranges_loops.h"
#include "for_each_target.h"

namespace gradrep {

using RangeLoops = PerTarget<base::RangeLoops, avx2::RangeLoops, avx512::RangeLoops>;

template <typename S, typename T>
void merge_rows(const S* values, int64_t rows, int64_t stride, int64_t n, T* least, T* greatest) {
  RangeLoops::on_best([&](auto loops) { loops.merge_rows(values, rows, stride, n, least, greatest); });
}
template <typename S, typename T>
void merge_lanes(const S* values, int64_t rows, int64_t stride, const S* ahead, T* least, T* greatest) {
  RangeLoops::on_best([&](auto loops) { loops.merge_lanes(values, rows, stride, ahead, least, greatest); });
}
template <typename S, typename T>
int64_t merge_near(const S* p, const S* q, int64_t n, NearExtrema<T>& extrema) {
  return RangeLoops::on_best([&](auto loops) { return loops.merge_near(p, q, n, extrema); });
}

// ---- one task

template <typename T>
struct Extrema {
  T least = kInfinity<T>, greatest = -kInfinity<T>;

  void take(T low, T high) {
    least = lesser(least, low);
    greatest = greater(greatest, high);
  }
  void take(const T* low, const T* high, int64_t n) {
    for (int64_t i = 0; i < n; ++i) take(low[i], high[i]);
  }
};

template <typename S>
class RangeWorker {
 public:
  using T = Arithmetic<S>;

  RangeWorker(const RangeArguments<S>& arguments, const Split& split, std::mutex& result_in_use)
      : a_(arguments),
        split_(split),
        result_in_use_(result_in_use),
        reader_(arguments.map),
        in_row_(arguments.remove_near ? 0
                                      : arguments.pad_rows),  // zeros around the image are dropped with all the others
        in_column_(arguments.remove_near ? 0 : arguments.pad_columns),
        stack_(make_stack(arguments.map.height + 2 * in_row_, arguments.map.width + 2 * in_column_,
                          arguments.displacements)) {}

  void run(int64_t task) {
    channel_ = split_.channel(task);
    channels_ = split_.block(task);
    image_ = split_.image(task);
    image_end_ = split_.image_end(task);
    if (a_.remove_near)
      by_pair();
    else
      by_place();
  }

 private:
  // ---- all pixels take part: which are on a side depends on their place alone, so extrema over the images come first

  void by_place() {
    // With enough padding every pixel of the image is on both sides of every displacement, and places need not be kept
    // apart.
    const bool one_range = stack_.gap_rows <= in_row_ && stack_.gap_columns <= in_column_;
    merge_images(one_range);
    for (int64_t c = 0; c < channels_; ++c) {
      Extrema<T> all;
      if (one_range) {
        all.take(least(c), greatest(c), places_);
        if (in_row_ > 0 || in_column_ > 0) all.take(0, 0);
      }
      each_displacement([&](int64_t d) {
        const Displacement to = a_.displacements[d], back = {-to.rows, -to.columns};  // Q of d is P of -d
        give(c, d, one_range ? all : over_side(c, to), one_range ? all : over_side(c, back), images() * pairs(to));
      });
    }
  }

  // Fills least(c) and greatest(c), arrays of places_: one for each pixel, or fewer where places need not be kept
  // apart.
  void merge_images(bool places_are_one) {
    const FeatureMap<S>& map = a_.map;
    const int64_t plane = map.height * map.width, images = image_end_ - image_;
    const S* first = map.data + image_ * map.image_stride + channel_ * map.channel_stride;
    if (PlaneReader<S>::planes_follow(map) && plane <= kLanes) {
      start(plane);
      merge_rows(first, images, map.image_stride, channels_ * plane, least(0), greatest(0));
    } else if (places_are_one && map.channel_stride == 1 && channels_ >= kLanes) {
      start(1);
      for (int64_t image = 0; image < images; ++image)
        for (int64_t y = 0; y < map.height; ++y) {
          const S* row = first + image * map.image_stride + y * map.row_stride;
          int64_t c = 0;
          for (; c + kLanes <= channels_; c += kLanes)
            merge_lanes(row + c, map.width, map.column_stride, row + c + map.row_stride, least(c), greatest(c));
          merge_rows(row + c, map.width, map.column_stride, channels_ - c, least(c), greatest(c));
        }
    } else if (places_are_one) {
      start(kLanes);
      each_piece([&](int64_t c, int64_t, const S* values, int64_t n) {
        const S* ahead = c + 1 < channels_ ? reader_.plane(c + 1) : reader_.plane(0) + map.image_stride;
        merge_lanes(values, n / kLanes, kLanes, ahead, least(c), greatest(c));
        merge_rows(values + n / kLanes * kLanes, 1, 0, n % kLanes, least(c), greatest(c));
      });
    } else {
      start(plane);
      each_piece([&](int64_t c, int64_t row, const S* values, int64_t n) {
        merge_rows(values, 1, 0, n, least(c) + row * map.width, greatest(c) + row * map.width);
      });
    }
  }

  Extrema<T> over_side(int64_t c, const Displacement& d) {
    const int64_t height = a_.map.height, width = a_.map.width;
    const int64_t row = p_begin(d.rows) - in_row_, row_end = row + pairs_along(stack_.height, d.rows);
    const int64_t column = p_begin(d.columns) - in_column_, column_end = column + pairs_along(stack_.width, d.columns);
    const int64_t top = std::max<int64_t>(row, 0), bottom = std::min(row_end, height);
    const int64_t left = std::max<int64_t>(column, 0), right = std::min(column_end, width);
    Extrema<T> range;
    if (row < 0 || column < 0 || row_end > height || column_end > width) range.take(0, 0);
    for (int64_t y = top; y < bottom; ++y)
      if (left < right) range.take(least(c) + y * width + left, greatest(c) + y * width + left, right - left);
    return range;
  }

  // ---- zeros drop their pairs: each displacement looks at all pairs. Zeros between the images drop what is no pair.

  void by_pair() {
    const int64_t tile = std::clamp<int64_t>(4096 / stack_.image(), 1, images()),
                  displacements = a_.displacements.size();
    const int64_t steps = (tile * stack_.image() + kNearLanes - 1) / kNearLanes * kNearLanes;
    const int64_t pitch = odd_lines<S>(stack_.size(tile) + kNearLanes);
    NearExtrema<T> none{};
    for (T* least : {none.least_p, none.least_q}) std::fill_n(least, kNearLanes, kInfinity<T>);
    for (T* greatest : {none.greatest_p, none.greatest_q}) std::fill_n(greatest, kNearLanes, -kInfinity<T>);
    near_.assign(channels_ * displacements, none);
    kept_.assign(channels_ * displacements, 0);
    pixels_.assign(channels_ * pitch, S{});
    for (int64_t image = image_; image < image_end_; image += tile) {
      if (image_end_ - image < tile) pixels_.assign(channels_ * pitch, S{});
      for (int64_t i = 0; i < std::min(tile, image_end_ - image); ++i)
        each_piece_of(image + i, [&](int64_t c, int64_t row, const S* values, int64_t n) {
          spread_planes(values, 1, n / a_.map.width, a_.map.width, pixels_.data() + c * pitch + stack_.at(i, row, 0),
                        pitch, stack_.pitch());
        });
      for (int64_t c = 0; c < channels_; ++c)
        each_displacement([&](int64_t d) {
          const S* p = pixels_.data() + c * pitch + stack_.margin();
          kept_[c * displacements + d] +=
              merge_near(p, p + stack_.offset(a_.displacements[d]), steps, near_[c * displacements + d]);
        });
    }
    for (int64_t c = 0; c < channels_; ++c)
      each_displacement([&](int64_t d) {
        const NearExtrema<T>& e = near_[c * displacements + d];
        give(c, d, over_lanes(e.least_p, e.greatest_p, e.nan_p), over_lanes(e.least_q, e.greatest_q, e.nan_q),
             kept_[c * displacements + d]);
      });
  }

  static Extrema<T> over_lanes(const T* least, const T* greatest, const int32_t* nan) {
    Extrema<T> range;
    range.take(least, greatest, kNearLanes);
    constexpr T not_a_number = std::numeric_limits<T>::quiet_NaN();
    if (std::any_of(nan, nan + kNearLanes, [](int32_t met) { return met != 0; }))
      range.take(not_a_number, not_a_number);
    return range;
  }

  // ---- walking and giving

  // visit(channel of the block, first row, values, how many) for every piece of every plane, image by image: the order
  // of memory.
  template <typename Visit>
  void each_piece(const Visit& visit) {
    for (int64_t image = image_; image < image_end_; ++image) each_piece_of(image, visit);
  }
  template <typename Visit>
  void each_piece_of(int64_t image, const Visit& visit) {
    const int64_t together = reader_.rows_together(channels_);
    for (int64_t row = 0; row < a_.map.height; row += together) {
      const int64_t rows = std::min(together, a_.map.height - row);
      reader_.read(image, channel_, channels_, row, rows);
      for (int64_t c = 0; c < channels_; ++c) visit(c, row, reader_.plane(c), rows * a_.map.width);
    }
  }
  template <typename Visit>
  void each_displacement(const Visit& visit) {
    for (size_t d = 0; d < a_.displacements.size(); ++d)
      if (pairs(a_.displacements[d]) > 0) visit(d);
  }

  int64_t images() const { return image_end_ - image_; }
  int64_t pairs(const Displacement& d) const {
    return pairs_along(stack_.height, d.rows) * pairs_along(stack_.width, d.columns);
  }

  void start(int64_t places) {
    places_ = places;
    least_.assign(channels_ * places, kInfinity<T>);
    greatest_.assign(channels_ * places, -kInfinity<T>);
  }
  T* least(int64_t c) { return least_.data() + c * places_; }
  T* greatest(int64_t c) { return greatest_.data() + c * places_; }

  void give(int64_t c, int64_t d, const Extrema<T>& p, const Extrema<T>& q, int64_t pairs) {
    std::unique_lock<std::mutex> lock(result_in_use_, std::defer_lock);
    if (split_.slabs > 1) lock.lock();
    const int64_t row = (channel_ + c) * a_.displacements.size() + d;
    if (a_.n != nullptr) a_.n[row] += pairs;
    for (const auto& [side, range] : {std::pair{0, p}, std::pair{1, q}}) {
      T* ends = a_.ends + row * 4 + side * 2;
      ends[0] = greater(ends[0], -range.least + T(0));  // -0.0 becomes +0.0
      ends[1] = greater(ends[1], range.greatest + T(0));
    }
  }

  const RangeArguments<S>& a_;
  const Split& split_;
  std::mutex& result_in_use_;
  PlaneReader<S> reader_;
  int64_t in_row_, in_column_;  // where the image lies in its padded one
  ImageStack stack_;
  // of the current task
  int64_t channel_ = 0, channels_ = 0, image_ = 0, image_end_ = 0, places_ = 0;
  std::vector<T> least_, greatest_;
  std::vector<S> pixels_;
  std::vector<NearExtrema<T>> near_;
  std::vector<int64_t> kept_;
};

// ---- all tasks

template <typename S, typename Parallel>
void pair_ranges_add(const RangeArguments<S>& arguments, int64_t threads, const Parallel& parallel) {
  const auto& map = arguments.map;
  if (map.images == 0 || map.channels == 0 || map.height == 0 || map.width == 0) return;
  const Split split =
      split_work(map.images, map.channels,
                 PlaneReader<S>::channels_together(map, arguments.remove_near ? 1 << 12 : 1 << 16), threads);
  std::mutex result_in_use;
  share_out(split.tasks(), threads, parallel, [&](const auto& next) {
    RangeWorker<S> worker(arguments, split, result_in_use);
    for (int64_t task = next(); task < split.tasks(); task = next()) worker.run(task);
  });
}

// The op `pair_ranges`: from nothing, and the ends become the ranges in place.
template <typename S, typename Parallel>
void pair_ranges(const RangeArguments<S>& arguments, int64_t threads, const Parallel& parallel) {
  using T = Arithmetic<S>;
  const int64_t rows = arguments.map.channels * static_cast<int64_t>(arguments.displacements.size());
  std::fill_n(arguments.n, rows, 0);
  std::fill_n(arguments.ends, 4 * rows, -kInfinity<T>);
  pair_ranges_add(arguments, threads, parallel);
  for (int64_t side = 0; side < 2 * rows; ++side) arguments.ends[2 * side] = -arguments.ends[2 * side] + T(0);
}

}  // namespace gradrep
