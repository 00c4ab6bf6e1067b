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
  int64_t* counts;  // [C, D, max_bins, max_bins], zeros on entry
};

// ---- values -> bin numbers; with `zeros_drop`, a zero becomes `none`

template <bool zeros_drop, typename S, typename T, typename Bin>
GRADREP_INLINE void quantise_loop(const S* __restrict values, int64_t n, const S* ahead, const Binning<T>& binning, Bin none, Bin* __restrict numbers) {
  const auto quantise = [&](int64_t i) {
    const T v = widen(values[i]);
    const auto number = static_cast<Bin>(bin_number(v, binning));
    numbers[i] = zeros_drop && v == 0 ? none : number;
  };
  constexpr int64_t step = 64;
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    prefetch_all(ahead + i, step);
    for (int64_t j = 0; j < step; ++j) quantise(i + j);
  }
  for (; i < n; ++i) quantise(i);
}

// target_clones does not work on templates, so each loop is stamped out as a plain function.
#define GRADREP_STAMP_QUANTISE(S, T, Bin)                                                                                                        \
  GRADREP_CLONES inline void quantise(const S* __restrict values, int64_t n, const S* ahead, Binning<T> binning, Bin none,                       \
                                      Bin* __restrict numbers) {                                                                                 \
    quantise_loop<false>(values, n, ahead, binning, none, numbers);                                                                              \
  }                                                                                                                                              \
  GRADREP_CLONES inline void quantise_nonzeros(const S* __restrict values, int64_t n, const S* ahead, Binning<T> binning, Bin none,              \
                                               Bin* __restrict numbers) {                                                                        \
    quantise_loop<true>(values, n, ahead, binning, none, numbers);                                                                               \
  }
#define GRADREP_STAMP_QUANTISE_DTYPES(Bin)   \
  GRADREP_STAMP_QUANTISE(float, float, Bin)   \
  GRADREP_STAMP_QUANTISE(double, double, Bin) \
  GRADREP_STAMP_QUANTISE(BFloat16, float, Bin) \
  GRADREP_STAMP_QUANTISE(Half, float, Bin)
GRADREP_STAMP_QUANTISE_DTYPES(uint8_t)
GRADREP_STAMP_QUANTISE_DTYPES(uint16_t)

// ---- bin numbers -> counts

// A table per displacement and parity of the pixel: where all data fall into one cell, each increment waits for the one
// before it in the same table. Tables have a row and a column for the mark between images, so every read counts something.
struct Tables {
  int64_t pitch, size;  // cells of a row, of a table

  explicit Tables(int64_t max_bins) : pitch(max_bins + 1), size(odd_lines<uint32_t>(pitch * pitch)) {}
  int64_t cells(int64_t displacements) const { return 2 * size * displacements; }
};

// K displacements in one loop: K independent chains of increments hide each other's latency. With `one_p`, the first side
// is the same array for all.
template <int K, bool one_p>
void count_loop(const uint8_t* const* p, const uint8_t* const* q, int64_t n, const Tables& layout, uint32_t* tables) {
  const uint8_t *ps[K], *qs[K];
  uint32_t *even[K], *odd[K];
  for (int k = 0; k < K; ++k) {
    ps[k] = p[k];
    qs[k] = q[k];
    even[k] = tables + 2 * k * layout.size;
    odd[k] = even[k] + layout.size;
  }
  const auto pitch = static_cast<uint32_t>(layout.pitch);
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    for (int k = 0; k < K; ++k) ++even[k][ps[one_p ? 0 : k][i] * pitch + qs[k][i]];
    for (int k = 0; k < K; ++k) ++odd[k][ps[one_p ? 0 : k][i + 1] * pitch + qs[k][i + 1]];
  }
  if (i < n)
    for (int k = 0; k < K; ++k) ++even[k][ps[one_p ? 0 : k][i] * pitch + qs[k][i]];
}

inline void count(int64_t displacements, bool one_p, const uint8_t* const* p, const uint8_t* const* q, int64_t n, const Tables& layout, uint32_t* tables) {
  const auto loop = [&](auto k) { (one_p ? count_loop<k, true> : count_loop<k, false>)(p, q, n, layout, tables); };
  switch (displacements) {
    case 1: return loop(std::integral_constant<int, 1>());
    case 2: return loop(std::integral_constant<int, 2>());
    case 3: return loop(std::integral_constant<int, 3>());
    default: return loop(std::integral_constant<int, 4>());
  }
}

// Stores bound the loop above: one increment a cycle. Where one of four displacements is the sum of two others, the three
// pairs among the pixels a, b = a + first, c = b + second need one increment between them: of cell (a, b, c) of a cube, summed
// over each side later. That leaves 2 increments of 4: 0.16 ns a pair instead of 0.26. Cells are uint16_t to stay in cache.
struct Cube {
  static constexpr int64_t kMostBins = 31;         // two cubes of 64 KiB
  static constexpr int64_t kRoom = 2 * UINT16_MAX;  // pixels that cannot overflow a cell of two cubes

  int64_t size;  // cells

  explicit Cube(int64_t max_bins) : size(odd_lines<uint16_t>((max_bins + 1) * (max_bins + 1) * (max_bins + 1))) {}
};

// Counts displacements first, second, first + second in the cubes and `other` in the tables; b runs over all pixels.
inline void count_triangle(const uint8_t* b, int64_t n, int64_t first, int64_t second, int64_t other, const Tables& layout, uint16_t* even_cube,
                           const Cube& cube, uint32_t* even_table) {
  const uint8_t *a = b - first, *c = b + second, *q = b + other;
  uint16_t* odd_cube = even_cube + cube.size;
  uint32_t* odd_table = even_table + layout.size;
  const auto pitch = static_cast<uint32_t>(layout.pitch), square = pitch * pitch;
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    const uint32_t even_row = b[i] * pitch, odd_row = b[i + 1] * pitch;
    ++even_cube[a[i] * square + even_row + c[i]];
    ++even_table[even_row + q[i]];
    ++odd_cube[a[i + 1] * square + odd_row + c[i + 1]];
    ++odd_table[odd_row + q[i + 1]];
  }
  if (i < n) {
    ++even_cube[a[i] * square + b[i] * pitch + c[i]];
    ++even_table[b[i] * pitch + q[i]];
  }
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

// Both tables of a displacement move into its counts.
GRADREP_CLONES inline void move_tables(uint32_t* __restrict tables, Tables layout, int64_t bins, bool remove_near, int64_t* __restrict counts,
                                       int64_t max_bins) {
  for (int64_t p = 0; p < bins; ++p) {
    const uint32_t *even = tables + p * layout.pitch, *odd = even + layout.size;
    for (int64_t q = 0; q < bins; ++q) counts[p * max_bins + q] += static_cast<int64_t>(even[q]) + odd[q];
    if (remove_near) counts[p * max_bins + p] = 0;
  }
  std::memset(tables, 0, layout.cells(1) * sizeof *tables);
}

// More than 255 bins: tables would leave the cache, so pairs go straight into the counts.
inline void count_wide(const uint16_t* p, const uint16_t* q, int64_t n, int32_t bins, bool remove_near, int64_t* counts, int64_t max_bins) {
  for (int64_t i = 0; i < n; ++i)
    if (p[i] < bins && q[i] < bins && !(remove_near && p[i] == q[i])) ++counts[p[i] * max_bins + q[i]];
}

// ---- one task

// Bin: uint8_t where all bins and the mark `none` fit it, else uint16_t.
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
        in_row_(arguments.remove_near ? 0 : arguments.pad_rows),  // zeros around the image are dropped with all the others
        in_column_(arguments.remove_near ? 0 : arguments.pad_columns),
        stack_(make_stack(arguments.map.height + 2 * in_row_, arguments.map.width + 2 * in_column_, arguments.displacements)),
        layout_(kWide ? 0 : arguments.max_bins),
        cube_(!kWide && arguments.max_bins <= Cube::kMostBins ? arguments.max_bins : 0) {
    std::vector<int64_t> active;
    for (size_t d = 0; d < a_.displacements.size(); ++d)
      if (pairs_along(stack_.height, a_.displacements[d].rows) > 0 && pairs_along(stack_.width, a_.displacements[d].columns) > 0) active.push_back(d);
    groups_ = group_displacements(a_.displacements, active);
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
  struct ChannelBinnings {
    std::vector<Binning<T>> distinct;
    std::vector<int32_t> bins;                 // of each distinct one
    std::vector<std::array<int64_t, 2>> side;  // displacement of the pass, p | q -> its place in `distinct`
  };

  // Row of ranges, bins and counts.
  int64_t row(int64_t c, int64_t d) const { return (channel_ + c) * a_.displacements.size() + groups_.order[d]; }

  // Fills binnings_ for the displacements [begin, end) in the order of the groups; returns the most that a channel needs.
  int64_t choose_binnings(int64_t begin, int64_t end) {
    binnings_.assign(channels_, {});
    size_t most = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      ChannelBinnings& mine = binnings_[c];
      for (int64_t d = begin; d < end; ++d) {
        const int32_t bins = a_.bins[row(c, d)];
        mine.side.emplace_back();
        for (int s = 0; s < 2; ++s) {
          const T* range = a_.ranges + row(c, d) * 4 + s * 2;
          const auto wanted = binning(range[0], range[1], bins);
          size_t k = 0;
          while (k < mine.distinct.size() && std::memcmp(&mine.distinct[k], &wanted, sizeof wanted) != 0) ++k;
          if (k == mine.distinct.size()) {
            mine.distinct.push_back(wanted);
            mine.bins.push_back(bins);
          }
          mine.side.back()[s] = k;
        }
      }
      most = std::max(most, mine.distinct.size());
    }
    return most;
  }

  // Counts the displacements [begin, end).
  void pass(int64_t begin, int64_t end, int64_t stacks_per_channel) {
    begin_ = begin;
    end_ = end;
    stacks_per_channel_ = stacks_per_channel;
    const int64_t first = split_.image(task_), last = split_.image_end(task_);
    // A tile stays in L1 for one channel, in L2 for a block. The tables outlive the tile only if there is one channel.
    const int64_t room = channels_ == 1 ? 1024 : (int64_t{1} << 21) / (channels_ * stacks_per_channel);
    tile_ = std::clamp<int64_t>(room / stack_.image(), 1, last - first);
    prepare_stacks();
    const int64_t groups = (end - begin + 3) / 4;
    if (!kWide) tables_.resize(std::max<size_t>(tables_.size(), layout_.cells(end - begin)));  // zeros: flushing leaves zeros behind
    const int64_t pixels_between_flushes = (channels_ == 1 ? last - first : tile_) * stack_.image();
    use_cubes_ = !kWide && a_.max_bins <= Cube::kMostBins && pixels_between_flushes > 2 * cube_.size;  // else flushing costs more than it saves
    if (use_cubes_) cubes_.resize(std::max<size_t>(cubes_.size(), 2 * cube_.size * groups));
    for (int64_t image = first; image < last; image += tile_) {
      const int64_t images = std::min(tile_, last - image);
      fill(image, images);
      const bool flush = channels_ > 1 || image + images == last;
      for (int64_t c = 0; c < channels_; ++c)
        if constexpr (kWide)
          count_channel_wide(c, images);
        else
          count_channel(c, images, flush);
    }
  }

  Bin* stack(int64_t c, int64_t binning) { return stacks_.data() + (c * stacks_per_channel_ + binning) * stack_pitch_; }

  // Marks everywhere, and the padding's bin around each image; the images themselves are filled in tile by tile.
  void prepare_stacks() {
    stack_pitch_ = odd_lines<Bin>(stack_.size(tile_));
    stacks_.resize(channels_ * stacks_per_channel_ * stack_pitch_);
    for (int64_t c = 0; c < channels_; ++c)
      for (size_t b = 0; b < binnings_[c].distinct.size(); ++b) {
        std::fill_n(stack(c, b), stack_pitch_, static_cast<Bin>(binnings_[c].bins[b]));
        if (in_row_ == 0 && in_column_ == 0) continue;
        const auto zero = static_cast<Bin>(bin_number(T(0), binnings_[c].distinct[b]));
        for (int64_t image = 0; image < tile_; ++image)
          for (int64_t y = 0; y < stack_.height; ++y) std::fill_n(stack(c, b) + stack_.at(image, y, 0), stack_.width, zero);
      }
  }

  void fill(int64_t image, int64_t images) {
    const int64_t together = reader_.rows_together(channels_), width = a_.map.width;
    numbers_.resize(together * width);
    for (int64_t i = 0; i < images; ++i)
      for (int64_t row = 0; row < a_.map.height; row += together) {
        const int64_t rows = std::min(together, a_.map.height - row);
        reader_.read(image + i, channel_, channels_, row, rows);
        for (int64_t c = 0; c < channels_; ++c)
          for (size_t b = 0; b < binnings_[c].distinct.size(); ++b) {
            const S* ahead = c + 1 < channels_ ? reader_.plane(c + 1) : reader_.plane(0) + a_.map.image_stride;
            const Quantise run = a_.remove_near ? static_cast<Quantise>(quantise_nonzeros) : static_cast<Quantise>(quantise);
            run(reader_.plane(c), rows * width, ahead, binnings_[c].distinct[b], static_cast<Bin>(binnings_[c].bins[b]), numbers_.data());
            spread_rows(numbers_.data(), rows, width, stack(c, b) + stack_.at(i, in_row_ + row, in_column_), stack_.pitch());
          }
      }
  }

  // Where side s of displacement d starts in the stack of its bin numbers.
  const Bin* side(int64_t c, int64_t d, int s) {
    return stack(c, binnings_[c].side[d - begin_][s]) + stack_.margin() + (s == 0 ? 0 : offset(d));
  }
  int64_t offset(int64_t d) const { return stack_.offset(a_.displacements[groups_.order[d]]); }

  uint32_t* tables(int64_t d) { return tables_.data() + layout_.cells(d - begin_); }
  uint16_t* cubes(int64_t d) { return cubes_.data() + (d - begin_) / 4 * 2 * cube_.size; }
  bool in_cubes(int64_t c, int64_t d) const { return use_cubes_ && groups_.triangular[d / 4] && binnings_[c].distinct.size() == 1; }

  void count_channel(int64_t c, int64_t images, bool last) {
    const int64_t n = images * stack_.image();
    for (int64_t done = 0, step; done < n; done += step) {
      step = std::min({n - done, kTableRoom - in_tables_, use_cubes_ ? Cube::kRoom - in_cubes_ : n});
      for (int64_t d = begin_; d < end_; d += 4)
        if (in_cubes(c, d))
          count_triangle(side(c, d, 0) + done, step, offset(d), offset(d + 1), offset(d + 3), layout_, cubes(d), cube_, tables(d + 3));
        else
          count_pairs(c, d, done, step);
      const int64_t counted = step + step % 2;  // an even table may have had one more
      in_tables_ += counted;
      in_cubes_ += counted;
      if (use_cubes_ && in_cubes_ == Cube::kRoom) flush_cubes(c);
      if (in_tables_ == kTableRoom) flush_tables(c);
    }
    if (last) flush_tables(c);
  }

  void count_pairs(int64_t c, int64_t d, int64_t from, int64_t n) {
    const uint8_t *p[4] = {}, *q[4] = {};
    const int64_t together = std::min<int64_t>(4, end_ - d);
    for (int64_t k = 0; k < together; ++k) {
      p[k] = side(c, d + k, 0) + from;
      q[k] = side(c, d + k, 1) + from;
    }
    count(together, binnings_[c].distinct.size() == 1, p, q, n, layout_, tables(d));
  }

  void flush_cubes(int64_t c) {
    for (int64_t d = begin_; d < end_; d += 4)
      if (in_cubes(c, d)) move_cubes(cubes(d), cube_, layout_, tables(d), tables(d + 1), tables(d + 2));
    in_cubes_ = 0;
  }

  void flush_tables(int64_t c) {
    flush_cubes(c);
    const auto lock = lock_counts();
    for (int64_t d = begin_; d < end_; ++d) move_tables(tables(d), layout_, a_.bins[row(c, d)], a_.remove_near, counts(c, d), a_.max_bins);
    in_tables_ = 0;
  }

  void count_channel_wide(int64_t c, int64_t images) {
    for (int64_t d = begin_; d < end_; ++d)
      count_wide(side(c, d, 0), side(c, d, 1), images * stack_.image(), a_.bins[row(c, d)], a_.remove_near, counts(c, d), a_.max_bins);
  }

  int64_t* counts(int64_t c, int64_t d) { return a_.counts + row(c, d) * a_.max_bins * a_.max_bins; }

  // Slabs of one channel add to the same counts.
  std::unique_lock<std::mutex> lock_counts() {
    return split_.slabs > 1 ? std::unique_lock<std::mutex>(counts_in_use_) : std::unique_lock<std::mutex>();
  }

  using Quantise = void (*)(const S*, int64_t, const S*, Binning<T>, Bin, Bin*);
  static constexpr int64_t kTableRoom = int64_t{1} << 31;  // pixels that cannot overflow a cell of a table

  const HistogramArguments<S>& a_;
  const Split& split_;
  std::mutex& counts_in_use_;
  PlaneReader<S> reader_;
  int64_t in_row_, in_column_;  // where the image lies in its padded one
  ImageStack stack_;
  Tables layout_;
  Cube cube_;
  DisplacementGroups groups_;  // of the displacements that have pairs
  // of the current task and pass
  int64_t task_ = 0, channel_ = 0, channels_ = 0, begin_ = 0, end_ = 0, tile_ = 0, stacks_per_channel_ = 0, stack_pitch_ = 0;
  int64_t in_cubes_ = 0, in_tables_ = 0;  // pixels counted since the last flush
  bool use_cubes_ = false;
  std::vector<ChannelBinnings> binnings_;
  std::vector<Bin> stacks_, numbers_;
  std::vector<uint32_t> tables_;
  std::vector<uint16_t> cubes_;
};

// ---- all tasks

template <typename S, typename Bin, typename Parallel>
void joint_histogram_tasks(const HistogramArguments<S>& arguments, int64_t threads, const Parallel& parallel) {
  Split split = split_work(arguments.map.images, arguments.map.channels, PlaneReader<S>::channels_together(arguments.map, 1 << 12), threads);
  if (std::is_same_v<Bin, uint16_t>) split.slabs = 1;  // it counts without private tables
  std::mutex counts_in_use;
  share_out(split.tasks(), threads, parallel, [&](const auto& next) {
    HistogramWorker<S, Bin> worker(arguments, split, counts_in_use);
    for (int64_t task = next(); task < split.tasks(); task = next()) worker.run(task);
  });
}

template <typename S, typename Parallel>
void joint_histogram(const HistogramArguments<S>& arguments, int64_t threads, const Parallel& parallel) {
  const auto& map = arguments.map;
  if (map.images == 0 || map.channels == 0 || map.height == 0 || map.width == 0) return;
  if (arguments.max_bins < 256)
    joint_histogram_tasks<S, uint8_t>(arguments, threads, parallel);
  else
    joint_histogram_tasks<S, uint16_t>(arguments, threads, parallel);
}

}  // namespace gradrep
