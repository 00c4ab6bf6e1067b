// A feature map in memory, read plane by plane, and its pixels laid out for displaced reading. No torch here.
#pragma once

#include "bins.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define GRADREP_HAS_SHUFFLE 1
#endif
#endif

namespace gradrep {

// ---- stored dtypes, widened exactly

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

GRADREP_HD GRADREP_INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
GRADREP_HD GRADREP_INLINE uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}
GRADREP_HD GRADREP_INLINE float widen(float v) { return v; }
GRADREP_HD GRADREP_INLINE double widen(double v) { return v; }
GRADREP_HD GRADREP_INLINE float widen(BFloat16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }
GRADREP_HD GRADREP_INLINE float widen(Half v) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
#else
  const uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  const float denormal = static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f;
  // inf and NaN keep the largest exponent.
  const float normal = from_bits((rest << 13) + (rest >= 0x7c00u ? 0x70000000u : 0x38000000u));
  const float magnitude = rest < 0x400u ? denormal : normal;
  return sign != 0 ? -magnitude : magnitude;
#endif
}

// T: the type of all arithmetic on a map stored as S.
template <typename S>
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;

constexpr int64_t kLine = 64;  // bytes of a cache line

// A count of elements that fills an odd number of cache lines: arrays at this pitch never lie a multiple of 4 KiB apart
// (such neighbours evict each other from L1; hot histogram cells were 10-20x slower).
template <typename T>
int64_t odd_lines(int64_t count) {
  constexpr int64_t line = kLine / sizeof(T);
  return ((count + line - 1) / line | 1) * line;
}

// Asks for memory that will be read soon, if there is any there.
template <typename S>
GRADREP_INLINE void prefetch_all([[maybe_unused]] const S* values, [[maybe_unused]] int64_t n) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < n; i += kLine / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(values + i);
#endif
}

// ---- reading

template <typename S>
struct FeatureMap {  // [N, C, H, W], strides in elements
  const S* data;
  int64_t images, channels, height, width;
  int64_t image_stride, channel_stride, row_stride, column_stride;
};

// Planes of fewer pixels are worked on many at a time: a call for each would cost more than its work.
constexpr int64_t kSmall = 64;

// Rows of the planes of some channels of one image as contiguous arrays: in place where they lie so, else copied (and
// transposed) into a scratch array of this reader. Copied small planes follow one another.
template <typename S>
class PlaneReader {
 public:
  explicit PlaneReader(const FeatureMap<S>& map) : map_(map), in_place_(reads_in_place(map)) {}

  static bool reads_in_place(const FeatureMap<S>& map) {
    return (map.width == 1 || map.column_stride == 1) && (map.height == 1 || map.row_stride == map.width);
  }

  // Whether the planes of one image follow one another.
  static bool planes_follow(const FeatureMap<S>& map) {
    return reads_in_place(map) && map.channel_stride == map.height * map.width;
  }

  // How many channels are best read together: `bytes` in a row where planes follow one another, else a few lines of
  // each pixel.
  static int64_t channels_together(const FeatureMap<S>& map, int64_t bytes) {
    const int64_t plane_bytes = map.height * map.width * sizeof(S), four_lines = 4 * kLine / sizeof(S);
    const int64_t best = reads_in_place(map)       ? std::clamp<int64_t>(bytes / plane_bytes, 1, 64)
                         : map.channel_stride == 1 ? four_lines
                                                   : 1;
    return std::min(best, map.channels);
  }

  // How many rows of how many channels are best read at once, so that what is made of them stays in L1.
  int64_t rows_together(int64_t channels) const {
    return std::clamp<int64_t>((in_place_ ? 4096 : 16384 / channels) / map_.width, 1, map_.height);
  }

  // Rows [row, row + rows) of channels [channel, channel + channels); plane(k) is then valid until the next read.
  void read(int64_t image, int64_t channel, int64_t channels, int64_t row, int64_t rows) {
    const S* from = map_.data + image * map_.image_stride + channel * map_.channel_stride + row * map_.row_stride;
    if (in_place_) {
      base_ = from;
      pitch_ = map_.channel_stride;
      return;
    }
    pitch_ = rows * map_.width < kSmall ? rows * map_.width : odd_lines<S>(rows * map_.width);
    copy_.resize(channels * pitch_);
    base_ = copy_.data();
    if (map_.channel_stride == 1)
      transpose(from, channels, rows);
    else
      gather(from, channels, rows);
  }

  const S* plane(int64_t k) const { return base_ + k * pitch_; }
  int64_t pitch() const { return pitch_; }

 private:
  void gather(const S* from, int64_t channels, int64_t rows) {
    for (int64_t k = 0; k < channels; ++k)
      for (int64_t y = 0; y < rows; ++y)
        for (int64_t x = 0; x < map_.width; ++x)
          copy_[k * pitch_ + y * map_.width + x] =
              from[k * map_.channel_stride + y * map_.row_stride + x * map_.column_stride];
  }

  // Channels lie side by side (channels_last): pixels x channels -> channels x pixels. Asks for pixels ahead: 2x
  // faster.
  void transpose(const S* from, int64_t channels, int64_t rows) {
    const bool rows_follow = map_.row_stride == map_.width * map_.column_stride;
    const int64_t runs = rows_follow ? 1 : rows, pixels = rows_follow ? rows * map_.width : map_.width;
    for (int64_t run = 0; run < runs; ++run) {
      const S* pixel = from + run * map_.row_stride;
      S* to = copy_.data() + run * map_.width;
      int64_t i = 0;
      for (; i + 4 <= pixels; i += 4, pixel += 4 * map_.column_stride) {
        for (int64_t j = 16; j < 20; ++j) prefetch_all(pixel + j * map_.column_stride, channels);
        int64_t k = 0;
        for (; k + 4 <= channels; k += 4) transpose_4x4(pixel + k, map_.column_stride, to + k * pitch_ + i, pitch_);
        for (; k < channels; ++k)
          for (int64_t j = 0; j < 4; ++j) to[k * pitch_ + i + j] = pixel[j * map_.column_stride + k];
      }
      for (; i < pixels; ++i, pixel += map_.column_stride)
        for (int64_t k = 0; k < channels; ++k) to[k * pitch_ + i] = pixel[k];
    }
  }

  GRADREP_INLINE static void transpose_4x4(const S* from, int64_t from_stride, S* to, int64_t to_stride) {
#if GRADREP_HAS_SHUFFLE  // 3x faster than what the compiler makes of the loop below
    typedef std::conditional_t<sizeof(S) == 2, uint16_t, S> Four __attribute__((vector_size(4 * sizeof(S))));
    Four a, b, c, d;
    std::memcpy(&a, from, sizeof a);
    std::memcpy(&b, from + from_stride, sizeof b);
    std::memcpy(&c, from + 2 * from_stride, sizeof c);
    std::memcpy(&d, from + 3 * from_stride, sizeof d);
    const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
    b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
    c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
    d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
    std::memcpy(to, &a, sizeof a);
    std::memcpy(to + to_stride, &b, sizeof b);
    std::memcpy(to + 2 * to_stride, &c, sizeof c);
    std::memcpy(to + 3 * to_stride, &d, sizeof d);
#else
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 4; ++i) to[j * to_stride + i] = from[i * from_stride + j];
#endif
  }

  FeatureMap<S> map_;
  bool in_place_;
  const S* base_ = nullptr;
  int64_t pitch_ = 0;
  std::vector<S> copy_;
};

// ---- images of one channel, stacked into one flat array

// Between the rows and between the images lie gaps as wide as the displacements reach, filled with what says "no pixel
// here". So q = p + displacement is one flat offset, valid everywhere, and loops over pairs need no boundary test.
struct ImageStack {
  int64_t height, width;  // of an image
  int64_t gap_rows, gap_columns;

  int64_t pitch() const { return width + gap_columns; }
  int64_t image() const { return (height + gap_rows) * pitch(); }
  int64_t reach() const { return gap_rows * pitch() + gap_columns; }  // no offset is larger
  // Before the first image and after the last: loops may start and end in a gap.
  int64_t margin() const { return 2 * reach(); }
  int64_t size(int64_t images) const { return images * image() + 2 * margin(); }
  int64_t at(int64_t image_number, int64_t row, int64_t column) const {
    return margin() + image_number * image() + row * pitch() + column;
  }
  int64_t offset(const Displacement& d) const { return d.rows * pitch() + d.columns; }
};

inline ImageStack make_stack(int64_t height, int64_t width, const std::vector<Displacement>& displacements) {
  ImageStack stack{height, width, 0, 0};
  for (const Displacement& d : displacements) {
    if (pairs_along(height, d.rows) == 0 || pairs_along(width, d.columns) == 0) continue;
    stack.gap_rows = std::max(stack.gap_rows, d.rows < 0 ? -d.rows : d.rows);
    stack.gap_columns = std::max(stack.gap_columns, d.columns < 0 ? -d.columns : d.columns);
  }
  return stack;
}

// Planes of rows that follow one another -> rows `pitch` apart in planes `plane_pitch` apart, n elements at a time (n
// <= width). Rows are short: a call of memcpy for each would cost more than the copy.
template <int n, typename E>
void spread_planes_by(const E* from, int64_t planes, int64_t rows, int64_t width, E* to, int64_t plane_pitch,
                      int64_t pitch) {
  for (int64_t plane = 0; plane < planes; ++plane, to += plane_pitch) {
    E* row = to;
    for (int64_t y = 0; y < rows; ++y, from += width, row += pitch) {
      int64_t x = 0;
      for (; x + n <= width; x += n) std::memcpy(row + x, from + x, n * sizeof(E));
      if (x < width) std::memcpy(row + width - n, from + width - n, n * sizeof(E));
    }
  }
}

template <typename E>
void spread_planes(const E* from, int64_t planes, int64_t rows, int64_t width, E* to, int64_t plane_pitch,
                   int64_t pitch) {
  const auto by = width >= 16  ? spread_planes_by<16, E>
                  : width >= 8 ? spread_planes_by<8, E>
                  : width >= 4 ? spread_planes_by<4, E>
                  : width >= 2 ? spread_planes_by<2, E>
                               : spread_planes_by<1, E>;
  by(from, planes, rows, width, to, plane_pitch, pitch);
}

// ---- splitting of work

// Tasks are (block of channels, slab of images). More slabs than one only where blocks alone would leave threads idle.
struct Split {
  int64_t channels_per_block, blocks, slabs;
  int64_t images, channels, workers;

  int64_t tasks() const { return blocks * slabs; }
  int64_t channel(int64_t task) const { return task / slabs * channels_per_block; }
  int64_t block(int64_t task) const { return std::min(channels_per_block, channels - channel(task)); }
  int64_t image(int64_t task) const { return images * (task % slabs) / slabs; }
  int64_t image_end(int64_t task) const { return images * (task % slabs + 1) / slabs; }
};

inline Split split_work(int64_t images, int64_t channels, int64_t channels_per_block, int64_t threads) {
  const int64_t blocks = (channels + channels_per_block - 1) / channels_per_block;
  const int64_t slabs = threads <= 1 ? 1 : std::clamp<int64_t>(4 * threads / blocks, 1, images);
  return {channels_per_block, blocks, slabs, images, channels, std::min(threads, blocks * slabs)};
}

// Runs worker(next) on up to `threads` threads; next() gives each of them its next task until it returns `tasks` or
// more. `parallel(n, f)` calls f() about n times at once.
template <typename Parallel, typename Worker>
void share_out(int64_t tasks, int64_t threads, const Parallel& parallel, const Worker& worker) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] { return taken.fetch_add(1, std::memory_order_relaxed); };
  parallel(std::min(threads, tasks), [&] { worker(next); });
}

}  // namespace gradrep
