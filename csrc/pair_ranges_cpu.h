// Ranges of both sides of the pairs, and how many pairs, on the CPU. No torch here.
//
// Reads downwards: loops -> one task (a block of channels, a slab of images), by place or by pair -> all tasks.
#pragma once

#include "feature_map.h"

#include <limits>
#include <mutex>
#include <utility>

namespace gradrep {

template <typename S>
struct RangeArguments {  // of the op, checked: see reference/pair_ranges.py
  using T = Arithmetic<S>;
  FeatureMap<S> map;
  std::vector<Displacement> displacements;
  int64_t pad_rows, pad_columns;
  bool remove_near;
  T* ranges;   // [C, D, 2, 2]
  int64_t* n;  // [C, D]
};

// ---- loops

// least[i] and greatest[i] over values[i], values[i + stride], ... for i < n.
template <typename S, typename T>
GRADREP_INLINE void merge_rows_loop(const S* __restrict values, int64_t rows, int64_t stride, int64_t n, T* __restrict least, T* __restrict greatest) {
  for (int64_t row = 0; row < rows; ++row, values += stride)
    for (int64_t i = 0; i < n; ++i) {
      const T v = widen(values[i]);
      least[i] = lesser(least[i], v);
      greatest[i] = greater(greatest[i], v);
    }
}

// The same for n = kLanes: that few running extrema stay in registers. Asks for the values that come `ahead` in pace with the
// reading: without, planes of 4 KiB end before the hardware has noticed a stream (2x slower).
constexpr int kLanes = 64;
template <typename S, typename T>
GRADREP_INLINE void merge_lanes_loop(const S* __restrict values, int64_t rows, int64_t stride, const S* ahead, T* __restrict least, T* __restrict greatest) {
  T low[kLanes], high[kLanes];
  std::copy_n(least, kLanes, low);
  std::copy_n(greatest, kLanes, high);
  for (int64_t at = 0; at < rows * stride; at += stride) {
    prefetch_all(ahead + at, kLanes);
    for (int j = 0; j < kLanes; ++j) {
      const T v = widen(values[at + j]);
      low[j] = lesser(low[j], v);
      high[j] = greater(high[j], v);
    }
  }
  std::copy_n(low, kLanes, least);
  std::copy_n(high, kLanes, greatest);
}

// Pairs (p[i], q[i]) without a zero, dealt to lanes likewise.
constexpr int kNearLanes = 16;
template <typename T>
struct NearExtrema {
  T least_p[kNearLanes], greatest_p[kNearLanes], least_q[kNearLanes], greatest_q[kNearLanes];  // of numbers
  int32_t nan_p[kNearLanes], nan_q[kNearLanes];                                                 // 1 where a NaN was met
};

// Returns how many pairs have none. Arrays end in zeros, so that there are only whole steps.
template <typename S, typename T>
GRADREP_INLINE int64_t merge_near_loop(const S* p, const S* q, int64_t n, NearExtrema<T>& extrema) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  NearExtrema<T> e = extrema;
  int32_t kept[kNearLanes] = {};
  for (int64_t i = 0; i < n; i += kNearLanes)
    for (int j = 0; j < kNearLanes; ++j) {
      const T a = widen(p[i + j]), b = widen(q[i + j]);
      const int32_t keep = (a != 0 ? 1 : 0) & (b != 0 ? 1 : 0);  // as integers it is vectorised: 2x faster than as bool
      kept[j] += keep;
      e.nan_p[j] |= keep & (a != a ? 1 : 0);
      e.nan_q[j] |= keep & (b != b ? 1 : 0);
      const T low_a = keep ? a : infinity, high_a = keep ? a : -infinity, low_b = keep ? b : infinity, high_b = keep ? b : -infinity;
      e.least_p[j] = low_a < e.least_p[j] ? low_a : e.least_p[j];
      e.greatest_p[j] = high_a > e.greatest_p[j] ? high_a : e.greatest_p[j];
      e.least_q[j] = low_b < e.least_q[j] ? low_b : e.least_q[j];
      e.greatest_q[j] = high_b > e.greatest_q[j] ? high_b : e.greatest_q[j];
    }
  extrema = e;
  int64_t total = 0;
  for (const int32_t lane : kept) total += lane;
  return total;
}

// target_clones does not work on templates, so each loop is stamped out as a plain function.
#define GRADREP_STAMP_RANGES(S, T)                                                                                                      \
  GRADREP_CLONES inline void merge_rows(const S* __restrict values, int64_t rows, int64_t stride, int64_t n, T* __restrict least,       \
                                        T* __restrict greatest) {                                                                       \
    merge_rows_loop(values, rows, stride, n, least, greatest);                                                                          \
  }                                                                                                                                     \
  GRADREP_CLONES inline void merge_lanes(const S* __restrict values, int64_t rows, int64_t stride, const S* ahead, T* __restrict least, \
                                         T* __restrict greatest) {                                                                      \
    merge_lanes_loop(values, rows, stride, ahead, least, greatest);                                                                     \
  }                                                                                                                                     \
  GRADREP_CLONES inline int64_t merge_near(const S* p, const S* q, int64_t n, NearExtrema<T>& extrema) { return merge_near_loop(p, q, n, extrema); }
GRADREP_STAMP_RANGES(float, float)
GRADREP_STAMP_RANGES(double, double)
GRADREP_STAMP_RANGES(BFloat16, float)
GRADREP_STAMP_RANGES(Half, float)

template <typename T>
struct Extrema {
  T least = std::numeric_limits<T>::infinity(), greatest = -std::numeric_limits<T>::infinity();

  void take(T low, T high) {
    least = lesser(least, low);
    greatest = greater(greatest, high);
  }
  void take(const T* low, const T* high, int64_t n) {
    for (int64_t i = 0; i < n; ++i) take(low[i], high[i]);
  }
};

// ---- one task

template <typename S>
class RangeWorker {
 public:
  using T = Arithmetic<S>;

  RangeWorker(const RangeArguments<S>& arguments, const Split& split, std::mutex& result_in_use)
      : a_(arguments),
        split_(split),
        result_in_use_(result_in_use),
        reader_(arguments.map),
        in_row_(arguments.remove_near ? 0 : arguments.pad_rows),  // zeros around the image are dropped with all the others
        in_column_(arguments.remove_near ? 0 : arguments.pad_columns),
        stack_(make_stack(arguments.map.height + 2 * in_row_, arguments.map.width + 2 * in_column_, arguments.displacements)) {}

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
    // With enough padding every pixel of the image is on both sides of every displacement, and places need not be kept apart.
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

  // Fills least(c) and greatest(c), arrays of places_: one for each pixel, or fewer where places need not be kept apart.
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
          for (; c + kLanes <= channels_; c += kLanes) merge_lanes(row + c, map.width, map.column_stride, row + c + map.row_stride, least(c), greatest(c));
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

  // ---- zeros drop their pairs: each displacement looks at all pairs. Zeros between the images drop those that are none.

  void by_pair() {
    const int64_t tile = std::clamp<int64_t>(4096 / stack_.image(), 1, images()), displacements = a_.displacements.size();
    const int64_t steps = (tile * stack_.image() + kNearLanes - 1) / kNearLanes * kNearLanes;
    const int64_t pitch = odd_lines<S>(stack_.size(tile) + kNearLanes);
    NearExtrema<T> none{};
    constexpr T infinity = std::numeric_limits<T>::infinity();
    for (T* least : {none.least_p, none.least_q}) std::fill_n(least, kNearLanes, infinity);
    for (T* greatest : {none.greatest_p, none.greatest_q}) std::fill_n(greatest, kNearLanes, -infinity);
    near_.assign(channels_ * displacements, none);
    kept_.assign(channels_ * displacements, 0);
    pixels_.assign(channels_ * pitch, S{});
    for (int64_t image = image_; image < image_end_; image += tile) {
      if (image_end_ - image < tile) pixels_.assign(channels_ * pitch, S{});
      for (int64_t i = 0; i < std::min(tile, image_end_ - image); ++i)
        each_piece_of(image + i, [&](int64_t c, int64_t row, const S* values, int64_t n) {
          spread_planes(values, 1, n / a_.map.width, a_.map.width, pixels_.data() + c * pitch + stack_.at(i, row, 0), pitch, stack_.pitch());
        });
      for (int64_t c = 0; c < channels_; ++c)
        each_displacement([&](int64_t d) {
          const S* p = pixels_.data() + c * pitch + stack_.margin();
          kept_[c * displacements + d] += merge_near(p, p + stack_.offset(a_.displacements[d]), steps, near_[c * displacements + d]);
        });
    }
    for (int64_t c = 0; c < channels_; ++c)
      each_displacement([&](int64_t d) {
        const NearExtrema<T>& e = near_[c * displacements + d];
        give(c, d, over_lanes(e.least_p, e.greatest_p, e.nan_p), over_lanes(e.least_q, e.greatest_q, e.nan_q), kept_[c * displacements + d]);
      });
  }

  static Extrema<T> over_lanes(const T* least, const T* greatest, const int32_t* nan) {
    Extrema<T> range;
    range.take(least, greatest, kNearLanes);
    constexpr T not_a_number = std::numeric_limits<T>::quiet_NaN();
    if (std::any_of(nan, nan + kNearLanes, [](int32_t met) { return met != 0; })) range.take(not_a_number, not_a_number);
    return range;
  }

  // ---- walking and giving

  // visit(channel of the block, first row, values, how many) for every piece of every plane, image by image: the order of memory.
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
  int64_t pairs(const Displacement& d) const { return pairs_along(stack_.height, d.rows) * pairs_along(stack_.width, d.columns); }

  void start(int64_t places) {
    places_ = places;
    least_.assign(channels_ * places, std::numeric_limits<T>::infinity());
    greatest_.assign(channels_ * places, -std::numeric_limits<T>::infinity());
  }
  T* least(int64_t c) { return least_.data() + c * places_; }
  T* greatest(int64_t c) { return greatest_.data() + c * places_; }

  void give(int64_t c, int64_t d, const Extrema<T>& p, const Extrema<T>& q, int64_t pairs) {
    std::unique_lock<std::mutex> lock(result_in_use_, std::defer_lock);
    if (split_.slabs > 1) lock.lock();
    const int64_t row = (channel_ + c) * a_.displacements.size() + d;
    a_.n[row] += pairs;
    for (const auto& [side, range] : {std::pair{0, p}, std::pair{1, q}}) {
      T* result = a_.ranges + row * 4 + side * 2;
      result[0] = lesser(result[0], range.least) + T(0);  // -0.0 becomes +0.0
      result[1] = greater(result[1], range.greatest) + T(0);
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
void pair_ranges(const RangeArguments<S>& arguments, int64_t threads, const Parallel& parallel) {
  using T = Arithmetic<S>;
  const auto& map = arguments.map;
  const int64_t rows = map.channels * static_cast<int64_t>(arguments.displacements.size());
  constexpr T infinity = std::numeric_limits<T>::infinity();
  std::fill_n(arguments.n, rows, 0);
  for (int64_t side = 0; side < 2 * rows; ++side) {
    arguments.ranges[2 * side] = infinity;
    arguments.ranges[2 * side + 1] = -infinity;
  }
  if (map.images == 0 || map.channels == 0 || map.height == 0 || map.width == 0) return;
  const Split split = split_work(map.images, map.channels, PlaneReader<S>::channels_together(map, arguments.remove_near ? 1 << 12 : 1 << 16), threads);
  std::mutex result_in_use;
  share_out(split.tasks(), threads, parallel, [&](const auto& next) {
    RangeWorker<S> worker(arguments, split, result_in_use);
    for (int64_t task = next(); task < split.tasks(); task = next()) worker.run(task);
  });
}

}  // namespace gradrep
