// Joint histograms on the CPU: quantise a tile of images into stacks of bin numbers (bin_stacks.h), then count pairs
// flat (pair_counting.h). No torch here.
//
// Reads downwards: one task (a block of channels, a slab of images) -> its passes, tile by tile -> all tasks.
#pragma once

#include "bin_stacks.h"
#include "displacement_groups.h"
#include "pair_counting.h"

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
        stacks_(arguments.map, arguments.displacements, arguments.pad_rows, arguments.pad_columns,
                arguments.remove_near),
        layout_(kWide ? 0 : arguments.max_bins + (stacks_.zeros_between() ? 0 : 1)),
        cube_(layout_.pitch <= Cube::kMostPitch ? layout_.pitch : 0) {
    std::vector<int64_t> active;
    for (size_t d = 0; d < a_.displacements.size(); ++d)
      if (pairs(a_.displacements[d]) > 0) active.push_back(d);
    groups_ = group_displacements(a_.displacements, active);
    for (size_t d = 0; d < groups_.order.size(); ++d) {
      if (stacks_.zeros_between()) before_ = std::max(before_, offset(d));
      if (stacks_.zeros_between()) after_ = std::max(after_, -offset(d));
      if (groups_.triangular[d / 4] && d % 4 == 0) after_ = std::max(after_, offset(d));
    }
  }

  void run(int64_t task) {
    task_ = task;
    channel_ = split_.channel(task);
    channels_ = split_.block(task);
    // Usually all displacements of a channel share one binning, so its pixels have one bin number each and one pass
    // over the map serves all displacements. Else four at a time, with at most eight bin numbers for a pixel.
    const auto displacements = static_cast<int64_t>(groups_.order.size());
    if (choose_binnings(0, displacements) == 1) return pass(0, displacements, 1);
    for (int64_t d = 0; d < displacements; d += 4) {
      const int64_t end = std::min(d + 4, displacements);
      pass(d, end, choose_binnings(d, end));
    }
  }

 private:
  // Row of ranges, bins and counts.
  int64_t row(int64_t c, int64_t d) const { return (channel_ + c) * a_.displacements.size() + groups_.order[d]; }

  // Gives the stacks their binnings, for the displacements [begin, end) in the order of the groups. Returns the most
  // that a channel needs, or kMost + 1 if one needs more than kMost.
  int64_t choose_binnings(int64_t begin, int64_t end) {
    constexpr int kMost = ChannelBinnings<T>::kMost;
    stacks_.start(channel_, channels_);
    int most = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      ChannelBinnings<T>& binnings = stacks_.binnings(c);
      for (int64_t side = 0; side < 2 * (end - begin); ++side) {
        const int64_t from = row(c, begin + side / 2);
        if (!binnings.add(side, a_.ranges + from * 4 + side % 2 * 2, a_.bins[from])) return kMost + 1;
      }
      most = std::max(most, binnings.count);
    }
    return most;
  }

  // Counts the displacements [begin, end).
  void pass(int64_t begin, int64_t end, int64_t stacks_per_channel) {
    begin_ = begin;
    end_ = end;
    flushes_ = 0;
    const int64_t first = split_.image(task_), last = split_.image_end(task_);
    // A tile stays in L1 for one channel, in L2 for a block. The tables outlive the tile only if there is one channel.
    const int64_t room =
        channels_ == 1 ? 8192 / stacks_per_channel : (int64_t{1} << 21) / (channels_ * stacks_per_channel);
    tile_ = std::clamp<int64_t>(room / stacks_.layout().image(), 1, last - first);
    stacks_.prepare(tile_, stacks_per_channel);
    const int64_t groups = (end - begin + 3) / 4;
    // New cells are zeros, and flushing leaves zeros behind.
    if (!kWide) tables_.resize(std::max<size_t>(tables_.size(), layout_.cells(end - begin)));
    const int64_t pixels_between_flushes = (channels_ == 1 ? last - first : tile_) * stacks_.layout().image();
    // With fewer pixels than cells, flushing the cubes costs more than they save.
    use_cubes_ = !kWide && layout_.pitch <= Cube::kMostPitch && pixels_between_flushes > cube_.size;
    if (use_cubes_) cubes_.resize(std::max<size_t>(cubes_.size(), 2 * cube_.size * groups));
    for (int64_t image = first; image < last; image += tile_) {
      const int64_t images = std::min(tile_, last - image);
      if (images < tile_) stacks_.clear();  // else images of the tile before would follow the last
      stacks_.fill(image, images);
      const bool flush = channels_ > 1 || image + images == last;
      for (int64_t c = 0; c < channels_; ++c)
        if constexpr (kWide)
          count_channel_wide(c, images);
        else
          count_channel(c, image, images, flush);
    }
  }

  // The memory that chunk `chunk` of `chunks` of a tile prefetches while it counts: as large a part of what will be
  // quantised next, which is the next tile, or the first of the block that this thread will probably take.
  const char* ahead(int64_t tile_end, int64_t chunk, int64_t chunks) const {
    const FeatureMap<S>& map = a_.map;
    const int64_t run = channels_ * map.height * map.width,
                  piece = std::min<int64_t>(run, kChunk / 16 * kLine / sizeof(S));
    const bool tile_follows = tile_end < split_.image_end(task_);
    const int64_t pieces = (run + piece - 1) / piece, at = tile_ * pieces * chunk / chunks;
    const int64_t image = (tile_follows ? tile_end : split_.image(task_)) + at / pieces;
    const int64_t channel = channel_ + (tile_follows ? 0 : split_.workers * split_.channels_per_block);
    return reinterpret_cast<const char*>(map.data + image * map.image_stride + channel * map.channel_stride +
                                         at % pieces * piece);
  }

  // ---- counting: p runs from `before_` pixels before the first of the tile to `after_` behind the last

  int64_t pairs(const Displacement& d) const {
    return pairs_along(stacks_.height(), d.rows) * pairs_along(stacks_.width(), d.columns);
  }
  int64_t offset(int64_t d) const { return stacks_.layout().offset(a_.displacements[groups_.order[d]]); }
  int64_t places(int64_t images) const {
    return before_ + images * stacks_.layout().image() - stacks_.layout().reach() + after_;
  }

  // Which of the channel's binnings p, or q, of displacement d has.
  int place(int64_t c, int64_t d, int s) const { return stacks_.binnings(c).place(2 * (d - begin_) + s); }

  // Where p, or q, of displacement d starts in the stack of its bin numbers.
  const Bin* side(int64_t c, int64_t d, int s) {
    return stacks_.stack(c, place(c, d, s)) + stacks_.layout().margin() - before_ + (s == 0 ? 0 : offset(d));
  }

  // With zeros between, all pairs with a pixel in them were counted once. What was counted in all, less those that are
  // pairs of the padded images, had zeros on both sides. The number may be negative.
  int64_t zeros_missing(int64_t d, int64_t images) const {
    return stacks_.zeros_between() ? images * pairs(a_.displacements[groups_.order[d]]) - places(images) : 0;
  }
  int64_t zeros_cell(int64_t c, int64_t d, int64_t pitch) const {
    return stacks_.zero(c, place(c, d, 0)) * pitch + stacks_.zero(c, place(c, d, 1));
  }

  uint32_t* tables(int64_t d) { return tables_.data() + layout_.cells(d - begin_); }
  uint16_t* cubes(int64_t d) { return cubes_.data() + (d - begin_) / 4 * 2 * cube_.size; }
  bool in_cubes(int64_t c, int64_t d) const {
    return use_cubes_ && groups_.triangular[d / 4] && stacks_.binnings(c).count == 1;
  }

  void count_channel(int64_t c, int64_t image, int64_t images, bool last) {
    const int64_t n = places(images), chunks = (n + kChunk - 1) / kChunk;
    if (in_tables_ + n > kTableRoom) flush_tables(c);
    for (int64_t done = 0, step; done < n; done += step) {
      step = std::min({n - done, kChunk, use_cubes_ ? Cube::kRoom - in_cubes_ : kChunk});
      const char* soon = ahead(image + images, c * chunks + done / kChunk, channels_ * chunks);
      for (int64_t d = begin_; d < end_; d += 4)
        if (in_cubes(c, d))
          count_triangle(side(c, d, 0) + done, step, offset(d), offset(d + 1), offset(d + 3), soon, layout_, cubes(d),
                         cube_, tables(d + 3));
        else
          count_pairs(c, d, done, step, soon);
      in_cubes_ += step + step % 2;  // the even cube may have had one more
      if (use_cubes_ && in_cubes_ == Cube::kRoom) flush_cubes(c);
    }
    in_tables_ += n;
    for (int64_t d = begin_; d < end_; ++d)
      tables(d)[zeros_cell(c, d, layout_.pitch)] += static_cast<uint32_t>(zeros_missing(d, images));  // modulo 2^32
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
      count_wide(side(c, d, 0), side(c, d, 1), places(images), a_.bins[row(c, d)], a_.remove_near, counts(c, d),
                 a_.max_bins);
      counts(c, d)[zeros_cell(c, d, a_.max_bins)] += zeros_missing(d, images);
    }
  }

  int64_t* counts(int64_t c, int64_t d) { return a_.counts + row(c, d) * a_.max_bins * a_.max_bins; }

  // Slabs of one channel add to the same counts.
  std::unique_lock<std::mutex> lock_counts() {
    return split_.slabs > 1 ? std::unique_lock<std::mutex>(counts_in_use_) : std::unique_lock<std::mutex>();
  }

  // Pixels that cannot overflow a cell of two tables: more than any plane has.
  static constexpr int64_t kTableRoom = int64_t{1} << 31;

  const HistogramArguments<S>& a_;
  const Split& split_;
  std::mutex& counts_in_use_;
  BinStacks<S, Bin> stacks_;
  Tables layout_;
  Cube cube_;
  DisplacementGroups groups_;  // of the displacements that have pairs
  int64_t before_ = 0, after_ = 0;
  // of the current task and pass
  int64_t task_ = 0, channel_ = 0, channels_ = 0, begin_ = 0, end_ = 0, tile_ = 0;
  int64_t in_cubes_ = 0, in_tables_ = 0;  // pixels counted since the last flush
  int64_t flushes_ = 0;                   // of this pass
  bool use_cubes_ = false;
  std::vector<uint32_t> tables_;
  std::vector<uint16_t> cubes_;
};

// ---- all tasks

template <typename S>
void clear_unless_added_to(const HistogramArguments<S>& arguments) {
  if (arguments.add) return;
  std::fill_n(arguments.counts,
              arguments.map.channels * static_cast<int64_t>(arguments.displacements.size()) * arguments.max_bins *
                  arguments.max_bins,
              0);
}

template <typename S, typename Bin, typename Parallel>
void joint_histogram_tasks(const HistogramArguments<S>& arguments, int64_t threads, const Parallel& parallel) {
  const auto& map = arguments.map;
  Split split = split_work(map.images, map.channels, PlaneReader<S>::channels_together(map, 1 << 12), threads);
  constexpr bool wide = std::is_same_v<Bin, uint16_t>;
  if (wide) split.slabs = 1;  // it counts without private tables
  // The first tables of a channel that move into its counts clear them, while they are in L1; if there will be such
  // tables.
  const bool all_clear =
      !wide && split.slabs == 1 &&
      std::all_of(arguments.displacements.begin(), arguments.displacements.end(), [&](const auto& d) {
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
  if (map.images == 0 || map.channels == 0 || map.height == 0 || map.width == 0)
    return clear_unless_added_to(arguments);
  if (arguments.max_bins < 256)
    joint_histogram_tasks<S, uint8_t>(arguments, threads, parallel);
  else
    joint_histogram_tasks<S, uint16_t>(arguments, threads, parallel);
}

}  // namespace gradrep
