// Joint histograms on the CPU: quantise a tile of images into stacks of bin numbers, then count pairs flat. No torch here.
//
// Reads downwards: quantise -> count -> flush -> one task (a block of channels, a slab of images) -> all tasks.
#pragma once

#include "displacement_groups.h"
#include "feature_map.h"

#include <array>
#include <mutex>

namespace gradrep {

template <typename S>
struct HistogramArguments {  // of the op, checked: see reference/joint_histogram.py
  using T = Arithmetic<S>;
  FeatureMap<S> map;
  std::vector<Displacement> displacements;
  const T* ranges;      // [C, D, 2, 2]
  const int32_t* bins;  // [C, D], each from 1 to max_bins
  int64_t max_bins, pad_rows, pad_columns;
  bool remove_near;
  int64_t* counts;  // [C, D, max_bins, max_bins]
  bool add;         // to what is in the counts, which else may be anything on entry
};

// ---- values -> bin numbers; with `zeros_drop`, a zero becomes `none`: the number after the last bin

template <bool zeros_drop, typename T, typename Bin>
GRADREP_INLINE Bin quantised(T v, const Binning<T>& binning) {
  const auto number = static_cast<Bin>(bin_number(v, binning));
  return zeros_drop && v == 0 ? static_cast<Bin>(static_cast<Bin>(binning.top) + 1) : number;
}

template <bool zeros_drop, typename S, typename T, typename Bin>
GRADREP_INLINE void quantise_loop(const S* __restrict values, int64_t n, const Binning<T>& binning, Bin* __restrict numbers) {
  for (int64_t i = 0; i < n; ++i) numbers[i] = quantised<zeros_drop, T, Bin>(widen(values[i]), binning);
}

// A binning for each value, as three arrays.
template <typename T>
struct Binnings {
  const T *lo, *inv, *top;
};

template <bool zeros_drop, typename S, typename T, typename Bin>
GRADREP_INLINE void quantise_loop(const S* __restrict values, int64_t n, const Binnings<T>& binnings, Bin* __restrict numbers) {
  const T *__restrict lo = binnings.lo, *__restrict inv = binnings.inv, *__restrict top = binnings.top;
  for (int64_t i = 0; i < n; ++i) numbers[i] = quantised<zeros_drop, T, Bin>(widen(values[i]), Binning<T>{lo[i], inv[i], top[i]});
}

// target_clones does not work on templates, so each loop is stamped out as a plain function.
#define GRADREP_STAMP_QUANTISE_BY(S, Binning, Bin)                                                                                   \
  GRADREP_CLONES inline void quantise(const S* __restrict values, int64_t n, Binning binning, Bin* __restrict numbers) {              \
    quantise_loop<false>(values, n, binning, numbers);                                                                               \
  }                                                                                                                                  \
  GRADREP_CLONES inline void quantise_nonzeros(const S* __restrict values, int64_t n, Binning binning, Bin* __restrict numbers) {     \
    quantise_loop<true>(values, n, binning, numbers);                                                                                \
  }
#define GRADREP_STAMP_QUANTISE(S, T, Bin)       \
  GRADREP_STAMP_QUANTISE_BY(S, Binning<T>, Bin) \
  GRADREP_STAMP_QUANTISE_BY(S, Binnings<T>, Bin)
#define GRADREP_STAMP_QUANTISE_DTYPES(Bin)   \
  GRADREP_STAMP_QUANTISE(float, float, Bin)   \
  GRADREP_STAMP_QUANTISE(double, double, Bin) \
  GRADREP_STAMP_QUANTISE(BFloat16, float, Bin) \
  GRADREP_STAMP_QUANTISE(Half, float, Bin)
GRADREP_STAMP_QUANTISE_DTYPES(uint8_t)
GRADREP_STAMP_QUANTISE_DTYPES(uint16_t)

// ---- bin numbers -> cell numbers, a chunk at a time. With vectors, ahead of the counting: one by one it took 0.08 ns of 0.26 a pair.

constexpr int64_t kChunk = 1024;  // even

GRADREP_CLONES inline void pair_cells(const uint8_t* __restrict p, const uint8_t* __restrict q, int64_t n, uint16_t pitch, uint16_t* __restrict cells) {
  for (int64_t i = 0; i < n; ++i) cells[i] = static_cast<uint16_t>(p[i] * pitch + q[i]);
}

GRADREP_CLONES inline void triangle_cells(const uint8_t* __restrict a, const uint8_t* __restrict b, const uint8_t* __restrict c, int64_t n, uint16_t pitch,
                                          uint16_t* __restrict cells) {
  for (int64_t i = 0; i < n; ++i) cells[i] = static_cast<uint16_t>((a[i] * pitch + b[i]) * pitch + c[i]);
}

// ---- cell numbers -> counts

// step(i, parity) for all i < n. Counting leaves the memory idle, so each 16 of them ask for a line of what is read `ahead`:
// asked for all at once, lines are not fetched.
template <typename Step>
GRADREP_INLINE void in_steps(int64_t n, const char* ahead, const Step& step) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16, ahead += kLine) {
    prefetch_all(ahead, 1);
    for (int64_t j = i; j < i + 16; j += 2) {
      step(j, 0);
      step(j + 1, 1);
    }
  }
  for (; i < n; ++i) step(i, i % 2);
}

// A table per displacement and parity of the pixel: where all data fall into one cell, each increment waits for the one
// before it in the same table.
struct Tables {
  int64_t pitch, size;  // cells of a row (at most 256: a cell's number fits uint16_t), of a table

  explicit Tables(int64_t pitch) : pitch(pitch), size(odd_lines<uint32_t>(pitch * pitch)) {}
  int64_t cells(int64_t displacements) const { return 2 * size * displacements; }
};

// K displacements in one loop, n <= kChunk: K independent chains of increments hide each other's latency.
template <int K>
void count_loop(const uint8_t* const* p, const uint8_t* const* q, int64_t n, const char* ahead, const Tables& layout, uint32_t* tables) {
  uint16_t cells[K][kChunk];
  uint32_t* table[K][2];
  for (int k = 0; k < K; ++k) {
    for (int parity = 0; parity < 2; ++parity) table[k][parity] = tables + (2 * k + parity) * layout.size;
    pair_cells(p[k], q[k], n, static_cast<uint16_t>(layout.pitch), cells[k]);
  }
  in_steps(n, ahead, [&](int64_t i, int parity) {
    for (int k = 0; k < K; ++k) ++table[k][parity][cells[k][i]];
  });
}

inline void count(int64_t displacements, const uint8_t* const* p, const uint8_t* const* q, int64_t n, const char* ahead, const Tables& layout,
                  uint32_t* tables) {
  const auto loops = {count_loop<1>, count_loop<2>, count_loop<3>, count_loop<4>};
  loops.begin()[displacements - 1](p, q, n, ahead, layout, tables);
}

// Stores bound the loop above: one increment a cycle. Where one of four displacements is the sum of two others, the three
// pairs among the pixels a, b = a + first, c = b + second need one increment between them: of cell (a, b, c) of a cube, summed
// over each side later. That leaves 2 increments of 4. Cells are uint16_t to stay in cache.
struct Cube {
  static constexpr int64_t kMostPitch = 32;         // two cubes of 64 KiB
  static constexpr int64_t kRoom = 2 * UINT16_MAX;  // pixels that cannot overflow a cell of two cubes

  int64_t size;  // cells

  explicit Cube(int64_t pitch) : size(odd_lines<uint16_t>(pitch * pitch * pitch)) {}
};

// Counts displacements first, second, first + second in the cubes and `other` in the tables; b runs over n <= kChunk pixels.
inline void count_triangle(const uint8_t* b, int64_t n, int64_t first, int64_t second, int64_t other, const char* ahead, const Tables& layout,
                           uint16_t* cubes, const Cube& cube, uint32_t* tables) {
  uint16_t triangles[kChunk], pairs[kChunk];
  triangle_cells(b - first, b, b + second, n, static_cast<uint16_t>(layout.pitch), triangles);
  pair_cells(b, b + other, n, static_cast<uint16_t>(layout.pitch), pairs);
  uint16_t* const cubes_by[] = {cubes, cubes + cube.size};
  uint32_t* const tables_by[] = {tables, tables + layout.size};
  in_steps(n, ahead, [&](int64_t i, int parity) {
    ++cubes_by[parity][triangles[i]];
    ++tables_by[parity][pairs[i]];
  });
}

// Both cubes move into the tables of the three displacements.
GRADREP_CLONES inline void move_cubes(uint16_t* __restrict even, Cube cube, Tables layout, uint32_t* __restrict first, uint32_t* __restrict second,
                                      uint32_t* __restrict sum) {
  const uint16_t* odd = even + cube.size;
  const int64_t pitch = layout.pitch;
  for (int64_t a = 0; a < pitch; ++a)
    for (int64_t b = 0; b < pitch; ++b) {
      uint32_t over_c = 0;
      for (int64_t c = 0, cell = (a * pitch + b) * pitch; c < pitch; ++c, ++cell) {
        const uint32_t count = static_cast<uint32_t>(even[cell]) + odd[cell];
        over_c += count;
        second[b * pitch + c] += count;
        sum[a * pitch + c] += count;
      }
      first[a * pitch + b] += over_c;
    }
  std::memset(even, 0, 2 * cube.size * sizeof *even);
}

// Both tables of a displacement are added to its counts.
GRADREP_CLONES inline void move_tables(uint32_t* __restrict tables, Tables layout, int64_t bins, bool remove_near, int64_t* __restrict counts,
                                       int64_t max_bins) {
  for (int64_t p = 0; p < bins; ++p) {
    uint32_t *even = tables + p * layout.pitch, *odd = even + layout.size;
    if (remove_near) even[p] = odd[p] = 0;
    for (int64_t q = 0; q < bins; ++q) counts[p * max_bins + q] += even[q] + odd[q];
  }
  std::memset(tables, 0, layout.cells(1) * sizeof *tables);
}

// More than 255 bins: tables would leave the cache, so pairs go straight into the counts.
inline void count_wide(const uint16_t* p, const uint16_t* q, int64_t n, int32_t bins, bool remove_near, int64_t* counts, int64_t max_bins) {
  for (int64_t i = 0; i < n; ++i)
    if (p[i] < bins && q[i] < bins && !(remove_near && p[i] == q[i])) ++counts[p[i] * max_bins + q[i]];
}

// ---- one task

// Bin: uint8_t where all bins and `none` fit it, else uint16_t.
template <typename S, typename Bin>
class HistogramWorker {
 public:
  using T = Arithmetic<S>;
  static constexpr bool kWide = std::is_same_v<Bin, uint16_t>;

  HistogramWorker(const HistogramArguments<S>& arguments, const Split& split, std::mutex& counts_in_use)
      : a_(arguments),
        split_(split),
        counts_in_use_(counts_in_use),
        reader_(arguments.map),
        // zeros around the image are dropped with all the others
        height_(arguments.map.height + (arguments.remove_near ? 0 : 2 * arguments.pad_rows)),
        width_(arguments.map.width + (arguments.remove_near ? 0 : 2 * arguments.pad_columns)),
        stack_(make_stack(height_, width_, arguments.displacements)),
        zeros_between_(!arguments.remove_near && stack_.gap_rows <= arguments.pad_rows && stack_.gap_columns <= arguments.pad_columns),
        layout_(kWide ? 0 : arguments.max_bins + (zeros_between_ ? 0 : 1)),
        cube_(layout_.pitch <= Cube::kMostPitch ? layout_.pitch : 0) {
    if (zeros_between_) {
      stack_.height = arguments.map.height;
      stack_.width = arguments.map.width;
    }
    in_row_ = (stack_.height - arguments.map.height) / 2;
    in_column_ = (stack_.width - arguments.map.width) / 2;
    std::vector<int64_t> active;
    for (size_t d = 0; d < a_.displacements.size(); ++d)
      if (pairs(a_.displacements[d]) > 0) active.push_back(d);
    groups_ = group_displacements(a_.displacements, active);
    for (size_t d = 0; d < groups_.order.size(); ++d) {
      if (zeros_between_) before_ = std::max(before_, offset(d));
      if (zeros_between_) after_ = std::max(after_, -offset(d));
      if (groups_.triangular[d / 4] && d % 4 == 0) after_ = std::max(after_, offset(d));
    }
  }

  void run(int64_t task) {
    task_ = task;
    channel_ = split_.channel(task);
    channels_ = split_.block(task);
    // Usually all displacements of a channel share one binning, so its pixels have one bin number each and one pass over
    // the map serves all displacements. Else four at a time, with at most eight bin numbers for a pixel.
    const auto displacements = static_cast<int64_t>(groups_.order.size());
    if (choose_binnings(0, displacements) == 1) return pass(0, displacements, 1);
    for (int64_t d = 0; d < displacements; d += 4) {
      const int64_t end = std::min(d + 4, displacements);
      pass(d, end, choose_binnings(d, end));
    }
  }

 private:
  static constexpr int kMost = 8;  // binnings of a channel in one pass: of both sides of four displacements

  struct ChannelBinnings {
    int count = 0;
    std::array<Binning<T>, kMost> distinct;
    std::array<const T*, kMost> range;  // that each was made of, and how many bins
    std::array<int32_t, kMost> bins;
    std::array<int, kMost> side;  // displacement of the pass, p | q -> its place in `distinct`; if that holds more than one

    int place(int64_t displacement, int s) const { return count == 1 ? 0 : side[2 * displacement + s]; }
  };

  // Row of ranges, bins and counts.
  int64_t row(int64_t c, int64_t d) const { return (channel_ + c) * a_.displacements.size() + groups_.order[d]; }

  // Fills binnings_ for the displacements [begin, end) in the order of the groups; returns the most that a channel needs,
  // or kMost + 1 if one needs more than kMost.
  int64_t choose_binnings(int64_t begin, int64_t end) {
    binnings_.assign(channels_, {});
    int most = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      ChannelBinnings& mine = binnings_[c];
      for (int64_t side = 0; side < 2 * (end - begin); ++side) {
        const int64_t from = row(c, begin + side / 2);
        const T* range = a_.ranges + from * 4 + side % 2 * 2;
        int k = 0;
        while (k < mine.count && (mine.bins[k] != a_.bins[from] || std::memcmp(mine.range[k], range, 2 * sizeof *range) != 0)) ++k;
        if (k == kMost) return kMost + 1;
        if (k == mine.count) {
          mine.distinct[k] = binning(range[0], range[1], a_.bins[from]);
          mine.range[k] = range;
          mine.bins[k] = a_.bins[from];
          ++mine.count;
        }
        if (side < kMost) mine.side[side] = k;
      }
      most = std::max(most, mine.count);
    }
    return most;
  }

  // Counts the displacements [begin, end).
  void pass(int64_t begin, int64_t end, int64_t stacks_per_channel) {
    begin_ = begin;
    end_ = end;
    stacks_per_channel_ = stacks_per_channel;
    flushes_ = 0;
    const int64_t first = split_.image(task_), last = split_.image_end(task_);
    // A tile stays in L1 for one channel, in L2 for a block. The tables outlive the tile only if there is one channel.
    const int64_t room = channels_ == 1 ? 8192 / stacks_per_channel : (int64_t{1} << 21) / (channels_ * stacks_per_channel);
    tile_ = std::clamp<int64_t>(room / stack_.image(), 1, last - first);
    prepare_stacks();
    prepare_small_planes();
    const int64_t groups = (end - begin + 3) / 4;
    if (!kWide) tables_.resize(std::max<size_t>(tables_.size(), layout_.cells(end - begin)));  // zeros: flushing leaves zeros behind
    const int64_t pixels_between_flushes = (channels_ == 1 ? last - first : tile_) * stack_.image();
    use_cubes_ = !kWide && layout_.pitch <= Cube::kMostPitch && pixels_between_flushes > cube_.size;  // else flushing costs more than it saves
    if (use_cubes_) cubes_.resize(std::max<size_t>(cubes_.size(), 2 * cube_.size * groups));
    for (int64_t image = first; image < last; image += tile_) {
      const int64_t images = std::min(tile_, last - image);
      if (images < tile_) prepare_stacks();  // no images of the tile before behind the last
      fill(image, images);
      const bool flush = channels_ > 1 || image + images == last;
      for (int64_t c = 0; c < channels_; ++c)
        if constexpr (kWide)
          count_channel_wide(c, images);
        else
          count_channel(c, image, images, flush);
    }
  }

  Bin* stack(int64_t c, int64_t binning) { return stacks_.data() + (c * stacks_per_channel_ + binning) * stack_pitch_; }

  Bin zero(int64_t c, int64_t binning) const { return static_cast<Bin>(bin_number(T(0), binnings_[c].distinct[binning])); }

  // Zeros between the images, or `none` between them and zeros around each; the images themselves are filled in tile by tile.
  void prepare_stacks() {
    stack_pitch_ = odd_lines<Bin>(stack_.size(tile_));
    stacks_.resize(channels_ * stacks_per_channel_ * stack_pitch_);
    for (int64_t c = 0; c < channels_; ++c)
      for (int b = 0; b < binnings_[c].count; ++b) {
        std::fill_n(stack(c, b), stack_pitch_, zeros_between_ ? zero(c, b) : static_cast<Bin>(binnings_[c].bins[b]));
        if (in_row_ == 0 && in_column_ == 0) continue;
        for (int64_t image = 0; image < tile_; ++image)
          for (int64_t y = 0; y < stack_.height; ++y) std::fill_n(stack(c, b) + stack_.at(image, y, 0), stack_.width, zero(c, b));
      }
  }

  // Binnings pixel by pixel, for planes that are quantised all at once.
  void prepare_small_planes() {
    const int64_t plane = a_.map.height * a_.map.width, n = channels_ * plane;
    if (plane >= kSmall) return;
    small_.resize(3 * n * stacks_per_channel_);
    for (int64_t b = 0; b < stacks_per_channel_; ++b)
      for (int64_t c = 0; c < channels_; ++c) {
        const Binning<T>& mine = binnings_[c].distinct[std::min<int64_t>(b, binnings_[c].count - 1)];
        T* to = small_.data() + 3 * n * b + c * plane;
        std::fill_n(to, plane, mine.lo);
        std::fill_n(to + n, plane, mine.inv);
        std::fill_n(to + 2 * n, plane, mine.top);
      }
  }

  void fill(int64_t image, int64_t images) {
    const int64_t together = reader_.rows_together(channels_), width = a_.map.width;
    const int64_t plane = a_.map.height * width, n = channels_ * plane;
    numbers_.resize(std::max(together * width, plane < kSmall ? n : 0));
    for (int64_t i = 0; i < images; ++i)
      for (int64_t row = 0; row < a_.map.height; row += together) {
        const int64_t rows = std::min(together, a_.map.height - row), at = stack_.at(i, in_row_ + row, in_column_);
        reader_.read(image + i, channel_, channels_, row, rows);
        if (rows == a_.map.height && plane < kSmall && (channels_ == 1 || reader_.pitch() == plane)) {
          for (int64_t b = 0; b < stacks_per_channel_; ++b) {
            const T* binnings = small_.data() + 3 * n * b;
            to_numbers(reader_.plane(0), n, Binnings<T>{binnings, binnings + n, binnings + 2 * n});
            spread_planes(numbers_.data(), channels_, rows, width, stack(0, b) + at, stacks_per_channel_ * stack_pitch_, stack_.pitch());
          }
          continue;
        }
        for (int64_t c = 0; c < channels_; ++c)
          for (int b = 0; b < binnings_[c].count; ++b) {
            to_numbers(reader_.plane(c), rows * width, binnings_[c].distinct[b]);
            spread_planes(numbers_.data(), 1, rows, width, stack(c, b) + at, stack_pitch_, stack_.pitch());
          }
      }
  }

  template <typename Each>
  void to_numbers(const S* values, int64_t n, const Each& binning) {
    if (a_.remove_near)
      quantise_nonzeros(values, n, binning, numbers_.data());
    else
      quantise(values, n, binning, numbers_.data());
  }

  // What a chunk of the counting asks for, `chunk` of `chunks` of a tile: as large a part of what will be filled in next, which is
  // the next tile, or the first of the block that this thread will probably take.
  const char* ahead(int64_t tile_end, int64_t chunk, int64_t chunks) const {
    const FeatureMap<S>& map = a_.map;
    const int64_t run = channels_ * map.height * map.width, piece = std::min<int64_t>(run, kChunk / 16 * kLine / sizeof(S));
    const bool tile_follows = tile_end < split_.image_end(task_);
    const int64_t pieces = (run + piece - 1) / piece, at = tile_ * pieces * chunk / chunks;
    const int64_t image = (tile_follows ? tile_end : split_.image(task_)) + at / pieces;
    const int64_t channel = channel_ + (tile_follows ? 0 : split_.workers * split_.channels_per_block);
    return reinterpret_cast<const char*>(map.data + image * map.image_stride + channel * map.channel_stride + at % pieces * piece);
  }

  // ---- counting: p runs from `before_` pixels before the first of the tile to `after_` behind the last

  int64_t pairs(const Displacement& d) const { return pairs_along(height_, d.rows) * pairs_along(width_, d.columns); }
  int64_t offset(int64_t d) const { return stack_.offset(a_.displacements[groups_.order[d]]); }
  int64_t places(int64_t images) const { return before_ + images * stack_.image() - stack_.reach() + after_; }

  // Where p, or q, of displacement d starts in the stack of its bin numbers.
  const Bin* side(int64_t c, int64_t d, int s) {
    return stack(c, binnings_[c].place(d - begin_, s)) + stack_.margin() - before_ + (s == 0 ? 0 : offset(d));
  }

  // With zeros between, all pairs with a pixel in them were counted once. What was counted in all, less those that are pairs
  // of the padded images, had zeros on both sides. The number may be negative.
  int64_t zeros_missing(int64_t d, int64_t images) const {
    return zeros_between_ ? images * pairs(a_.displacements[groups_.order[d]]) - places(images) : 0;
  }
  int64_t zeros_cell(int64_t c, int64_t d, int64_t pitch) const {
    return zero(c, binnings_[c].place(d - begin_, 0)) * pitch + zero(c, binnings_[c].place(d - begin_, 1));
  }

  uint32_t* tables(int64_t d) { return tables_.data() + layout_.cells(d - begin_); }
  uint16_t* cubes(int64_t d) { return cubes_.data() + (d - begin_) / 4 * 2 * cube_.size; }
  bool in_cubes(int64_t c, int64_t d) const { return use_cubes_ && groups_.triangular[d / 4] && binnings_[c].count == 1; }

  void count_channel(int64_t c, int64_t image, int64_t images, bool last) {
    const int64_t n = places(images), chunks = (n + kChunk - 1) / kChunk;
    if (in_tables_ + n > kTableRoom) flush_tables(c);
    for (int64_t done = 0, step; done < n; done += step) {
      step = std::min({n - done, kChunk, use_cubes_ ? Cube::kRoom - in_cubes_ : kChunk});
      const char* soon = ahead(image + images, c * chunks + done / kChunk, channels_ * chunks);
      for (int64_t d = begin_; d < end_; d += 4)
        if (in_cubes(c, d))
          count_triangle(side(c, d, 0) + done, step, offset(d), offset(d + 1), offset(d + 3), soon, layout_, cubes(d), cube_, tables(d + 3));
        else
          count_pairs(c, d, done, step, soon);
      in_cubes_ += step + step % 2;  // the even cube may have had one more
      if (use_cubes_ && in_cubes_ == Cube::kRoom) flush_cubes(c);
    }
    in_tables_ += n;
    for (int64_t d = begin_; d < end_; ++d) tables(d)[zeros_cell(c, d, layout_.pitch)] += static_cast<uint32_t>(zeros_missing(d, images));  // modulo 2^32
    if (last) flush_tables(c);
  }

  void count_pairs(int64_t c, int64_t d, int64_t from, int64_t n, const char* soon) {
    const uint8_t *p[4] = {}, *q[4] = {};
    const int64_t together = std::min<int64_t>(4, end_ - d);
    for (int64_t k = 0; k < together; ++k) {
      p[k] = side(c, d + k, 0) + from;
      q[k] = side(c, d + k, 1) + from;
    }
    count(together, p, q, n, soon, layout_, tables(d));
  }

  void flush_cubes(int64_t c) {
    for (int64_t d = begin_; d < end_; d += 4)
      if (in_cubes(c, d)) move_cubes(cubes(d), cube_, layout_, tables(d), tables(d + 1), tables(d + 2));
    in_cubes_ = 0;
  }

  void flush_tables(int64_t c) {
    flush_cubes(c);
    const auto lock = lock_counts();
    const bool first = !a_.add && split_.slabs == 1 && flushes_++ < channels_;  // of this channel in this pass
    for (int64_t d = begin_; d < end_; ++d) {
      if (first) std::fill_n(counts(c, d), a_.max_bins * a_.max_bins, 0);
      move_tables(tables(d), layout_, a_.bins[row(c, d)], a_.remove_near, counts(c, d), a_.max_bins);
    }
    in_tables_ = 0;
  }

  void count_channel_wide(int64_t c, int64_t images) {
    for (int64_t d = begin_; d < end_; ++d) {
      count_wide(side(c, d, 0), side(c, d, 1), places(images), a_.bins[row(c, d)], a_.remove_near, counts(c, d), a_.max_bins);
      counts(c, d)[zeros_cell(c, d, a_.max_bins)] += zeros_missing(d, images);
    }
  }

  int64_t* counts(int64_t c, int64_t d) { return a_.counts + row(c, d) * a_.max_bins * a_.max_bins; }

  // Slabs of one channel add to the same counts.
  std::unique_lock<std::mutex> lock_counts() {
    return split_.slabs > 1 ? std::unique_lock<std::mutex>(counts_in_use_) : std::unique_lock<std::mutex>();
  }

  static constexpr int64_t kTableRoom = int64_t{1} << 31;  // pixels that cannot overflow a cell of two tables; more than any plane has

  const HistogramArguments<S>& a_;
  const Split& split_;
  std::mutex& counts_in_use_;
  PlaneReader<S> reader_;
  int64_t height_, width_;  // of the padded image
  ImageStack stack_;
  bool zeros_between_;  // padding reaches as far as the displacements: one gap of zeros serves both neighbours, else padded images lie in gaps of `none`
  Tables layout_;
  Cube cube_;
  int64_t in_row_, in_column_;  // where the image lies in that of the stack
  DisplacementGroups groups_;  // of the displacements that have pairs
  int64_t before_ = 0, after_ = 0;
  // of the current task and pass
  int64_t task_ = 0, channel_ = 0, channels_ = 0, begin_ = 0, end_ = 0, tile_ = 0, stacks_per_channel_ = 0, stack_pitch_ = 0;
  int64_t in_cubes_ = 0, in_tables_ = 0;  // pixels counted since the last flush
  int64_t flushes_ = 0;                   // of this pass
  bool use_cubes_ = false;
  std::vector<ChannelBinnings> binnings_;
  std::vector<Bin> stacks_, numbers_;
  std::vector<T> small_;
  std::vector<uint32_t> tables_;
  std::vector<uint16_t> cubes_;
};

// ---- all tasks

template <typename S>
void clear_unless_added_to(const HistogramArguments<S>& arguments) {
  if (arguments.add) return;
  std::fill_n(arguments.counts, arguments.map.channels * static_cast<int64_t>(arguments.displacements.size()) * arguments.max_bins * arguments.max_bins, 0);
}

template <typename S, typename Bin, typename Parallel>
void joint_histogram_tasks(const HistogramArguments<S>& arguments, int64_t threads, const Parallel& parallel) {
  const auto& map = arguments.map;
  Split split = split_work(map.images, map.channels, PlaneReader<S>::channels_together(map, 1 << 12), threads);
  constexpr bool wide = std::is_same_v<Bin, uint16_t>;
  if (wide) split.slabs = 1;  // it counts without private tables
  // The first tables of a channel that move into its counts clear them, while they are in L1; if there will be such tables.
  const bool all_clear = !wide && split.slabs == 1 && std::all_of(arguments.displacements.begin(), arguments.displacements.end(), [&](const auto& d) {
    return pairs_along(map.height, d.rows) > 0 && pairs_along(map.width, d.columns) > 0;
  });
  if (!all_clear) clear_unless_added_to(arguments);
  std::mutex counts_in_use;
  share_out(split.tasks(), threads, parallel, [&](const auto& next) {
    HistogramWorker<S, Bin> worker(arguments, split, counts_in_use);
    for (int64_t task = next(); task < split.tasks(); task = next()) worker.run(task);
  });
}

template <typename S, typename Parallel>
void joint_histogram(const HistogramArguments<S>& arguments, int64_t threads, const Parallel& parallel) {
  const auto& map = arguments.map;
  if (map.images == 0 || map.channels == 0 || map.height == 0 || map.width == 0) return clear_unless_added_to(arguments);
  if (arguments.max_bins < 256)
    joint_histogram_tasks<S, uint8_t>(arguments, threads, parallel);
  else
    joint_histogram_tasks<S, uint16_t>(arguments, threads, parallel);
}

}  // namespace gradrep
