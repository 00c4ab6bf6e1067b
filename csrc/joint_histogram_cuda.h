// Joint histograms in blocks of threads: tables in shared memory, added to the result once. No torch here (see
// cuda_blocks.h).
//
// Reads downwards: one block, from tiles of pixels or pair by pair -> all launches.
#pragma once

#include "joint_histogram_plan.h"

namespace gradrep {

// ---- one block

template <typename S, typename Counting>
struct HistogramBlock : Share<S> {
  using T = Arithmetic<S>;
  static constexpr bool of_numbers = Counting::tiles == Tiles::numbers;
  using Pixel = std::conditional_t<of_numbers, uint8_t, T>;
  const HistogramWork<S>& work;
  char* shared;
  Binning<T>* binnings;  // [channels_together, group, 2]
  uint32_t* unlike;      // not 0: the pixels of a channel have more than one binning
  uint32_t* tables;      // [channels_together, group, table_cells]
  Pixel* pixels;         // [channels_together, plane]

  GRADREP_HD HistogramBlock(const HistogramWork<S>& w, int64_t block, char* memory)
      : Share<S>(w, block),
        work(w),
        shared(memory),
        binnings(reinterpret_cast<Binning<T>*>(shared)),
        unlike(reinterpret_cast<uint32_t*>(shared + w.tables_at()) - 1),
        tables(reinterpret_cast<uint32_t*>(shared + w.tables_at())),
        pixels(reinterpret_cast<Pixel*>(shared + w.tile_at())) {}

  GRADREP_HD int32_t table_pitch() const { return Counting::pitch > 0 ? Counting::pitch : work.table_pitch; }
  GRADREP_HD int32_t table_cells() const {
    return Counting::pitch > 0 ? Counting::pitch * Counting::pitch : work.table_cells;
  }
  // Of all pixels of a channel, if they have one.
  GRADREP_HD Binning<T> binning_of(int32_t c) const { return binnings[c * 2 * this->count]; }

  GRADREP_HD void prepare(int thread) const {
    if (thread == 0) *unlike = 0;
    for (int32_t i = thread; i < this->channels * this->count * 2; i += kThreads) {
      const int32_t c = i / (2 * this->count), g = i / 2 % this->count;
      const int64_t row = work.row(this->channel + c, this->first + g);
      // On the device no one has looked at them: a number out of range must not become a wild write.
      int32_t bins = work.bins[row];
      bins = bins < 1 ? 1 : bins > work.max_bins ? work.max_bins : bins;
      const T* range = work.ranges + row * 4 + i % 2 * 2;
      Binning<T> b = binning(range[0], range[1], bins);
      if (b.inv == 0) b = {T(0), T(0), T(0)};  // all in bin 0, wherever the range is
      binnings[i] = b;
    }
    if (Counting::private_tables)
      for (int32_t i = thread; i < this->channels * this->count * table_cells(); i += kThreads) tables[i] = 0;
    if (Counting::tiles != Tiles::none)
      for (int32_t i = thread; i < this->channels * work.tile.plane; i += kThreads)
        pixels[i] = static_cast<Pixel>(of_numbers ? work.max_bins : 0);
  }

  // Padding no smaller than the radius and nothing dropped: one range per channel, so each pixel has one bin number.
  GRADREP_HD void compare(int thread) const {
    for (int32_t i = thread; i < this->channels * this->count * 2; i += kThreads) {
      const Binning<T> mine = binnings[i], its = binning_of(i / (2 * this->count));
      if (!(mine.lo == its.lo && mine.inv == its.inv && mine.top == its.top)) raise(unlike, 1u);
    }
  }

  // The padding. What a band has of it differs from the next, and so does what lies outside.
  GRADREP_HD void frame(const Tile& tile, int thread) const {
    const TileLayout& in = work.tile;
    const int32_t lines = work.images_together * in.stored_rows, between = work.columns - work.map.width;
    for (int32_t n = thread / 32; n < this->channels * lines; n += kThreads / 32) {
      const int32_t c = n / lines, line = n - c * lines, image = line / in.stored_rows,
                    stored = line - image * in.stored_rows, row = in.first_row(tile) + stored;
      const bool beside = within(row - work.pad_rows, work.map.height);
      Pixel number = 0;
      if constexpr (of_numbers)
        number = static_cast<uint8_t>(within(row, work.rows) ? bin_number(T(0), binning_of(c)) : work.max_bins);
      Pixel* to = pixels + c * in.plane + in.before + image * in.image + stored * in.pitch;
      for (int32_t i = thread % 32; i < (beside ? between : work.columns); i += 32)
        to[beside && i >= work.pad_columns ? i + work.map.width : i] = number;
    }
  }

  // The pixels of a tile and of the rows around it that its pairs reach, four of a row at a time. A thread has the same
  // place in one image after another.
  GRADREP_HD void fill(const Tile& tile, int thread) const {
    const TileLayout& in = work.tile;
    const int32_t first = in.first_row(tile) - work.pad_rows, from = first > 0 ? first : 0,
                  end = lesser_of(first + in.stored_rows, work.map.height),
                  first_image = static_cast<int32_t>(work.by_places.quotient(thread));
    const uint32_t places = (end - from) * work.by_quads.by * work.by_channels.by;
    if (first_image >= work.fill_images || from >= end) return;  // a band of padding has no pixels
    for (uint32_t n = thread - first_image * work.by_places.by; n < places; n += kThreads) {
      const uint32_t quad = work.by_channels.quotient(n), line = work.by_quads.quotient(quad);
      const auto c = static_cast<int32_t>(n - quad * work.by_channels.by), row = from + static_cast<int32_t>(line),
                 column = static_cast<int32_t>(quad - line * work.by_quads.by) * 4;
      if (c >= this->channels) continue;
      const S* at =
          this->plane(c, tile.image + first_image) + row * work.map.row_stride + column * work.map.column_stride;
      Pixel* to = pixels + c * in.plane + in.before + first_image * in.image + (row - first) * in.pitch +
                  work.pad_columns + column;
      const int32_t images = tile.images - first_image;
      if (work.quads_lie_together)
        fill_place<true>(at, 4, to, images, binning_of(c));
      else
        fill_place<false>(at, lesser_of(4, work.map.width - column), to, images, binning_of(c));
    }
  }
  template <bool together>
  GRADREP_HD GRADREP_INLINE void fill_place(const S* at, int32_t left, Pixel* to, int32_t images,
                                            const Binning<T>& its) const {
    const int64_t step = work.fill_images * work.map.image_stride;
    const int32_t to_step = work.fill_images * work.tile.image;
    constexpr int at_once = sizeof(T) == 4 ? 2 : 1;  // registers
    for (; images > 0; images -= at_once * work.fill_images) {
      // All are read before one is written, which might be anything to a compiler.
      T values[at_once][4];
#pragma unroll
      for (int i = 0; i < at_once; ++i)
        if (images > i * work.fill_images) read_four<together>(at + i * step, left, values[i]);
#pragma unroll
      for (int i = 0; i < at_once; ++i)
        if (images > i * work.fill_images) write_four<together>(to + i * to_step, left, values[i], its);
      at += at_once * step;
      to += at_once * to_step;
    }
  }
  template <bool together>
  GRADREP_HD GRADREP_INLINE void read_four(const S* at, int32_t left, T* values) const {
    if constexpr (together) {
      const auto read = *reinterpret_cast<const typename HistogramWork<S>::Quad*>(at);
      for (int i = 0; i < 4; ++i) values[i] = widen(read.pixels[i]);
    } else {
      for (int i = 0; i < 4; ++i)
        if (i < left) values[i] = widen(at[i * work.map.column_stride]);
    }
  }
  template <bool together>
  GRADREP_HD GRADREP_INLINE void write_four(Pixel* to, int32_t left, const T* values, const Binning<T>& its) const {
    for (int i = 0; i < 4; ++i) {
      if (!together && i >= left) continue;
      if constexpr (of_numbers)
        to[i] = static_cast<uint8_t>(bin_number(values[i], its));
      else
        to[i] = values[i];
    }
  }

  GRADREP_HD void count_tile(const Tile& tile, int thread) const {
    const int32_t places = work.tile.places(tile);
    for (int32_t c = 0; c < this->channels; ++c) {
      const Pixel* first = pixels + c * work.tile.plane + work.tile.first_p();
      if constexpr (of_numbers) {
        const auto* words = reinterpret_cast<const uint32_t*>(first);
        count_numbers({words + thread, words + (places + 3) / 4}, c);
      } else {
        for (int32_t g = 0; g < this->count; ++g) count_values(first + thread, first + places, c, g);
      }
    }
  }

  GRADREP_HD int32_t distance(int32_t g) const { return work.tile.distance(work.list[this->first + g]); }
  GRADREP_HD Tables tables_from(int32_t c, int32_t g) const {
    const int64_t cell = (c * this->count + g) * table_cells();
    return {shared, static_cast<uint32_t>(work.tables_at() + cell * work.kCellBytes), table_pitch(), table_cells()};
  }

  GRADREP_HD void count_numbers(const Words& words, int32_t c) const {
    if (Counting::pitch > 0 && work.half_3x3) return count_half_3x3(words, distance(1), tables_from(c, 0));
    int32_t g = 0;
    for (; g + 4 <= this->count; g += 4) {
      const int32_t four[4] = {distance(g), distance(g + 1), distance(g + 2), distance(g + 3)};
      count_displacements<4>(words, four, tables_from(c, g));
    }
    for (; g < this->count; ++g) {
      const int32_t one[1] = {distance(g)};
      count_displacements<1>(words, one, tables_from(c, g));
    }
  }

  // Zeros drop, and pairs whose two bin numbers are equal.
  GRADREP_HD void count_values(const T* at, const T* end, int32_t c, int32_t g) const {
    const Binning<T>* binning = binnings + 2 * (c * this->count + g);
    const Binning<T> of_p = binning[0], of_q = binning[1];
    const Tables table = tables_from(c, g);
    const int32_t to_q = distance(g);
    const auto count = [&](T p, T q) {
      const int32_t bin_p = bin_number(p, of_p), bin_q = bin_number(q, of_q);
      if (p != 0 && q != 0 && bin_p != bin_q) table.count(table.row(bin_p), bin_q, 0);
    };
    for (; at + 3 * kThreads < end; at += 4 * kThreads) {
#pragma unroll
      for (int i = 0; i < 4; ++i) count(at[i * kThreads], at[i * kThreads + to_q]);
    }
    for (; at < end; at += kThreads) count(at[0], at[to_q]);
  }

  GRADREP_HD void count_pairs(const Tile& tile, int thread) const {
    this->template each_pair<0>(tile, thread, [&](int32_t c, int32_t g, T p, T q) {
      const Binning<T>* b = binnings + 2 * (c * this->count + g);
      const int32_t bin_p = bin_number(p, b[0]), bin_q = bin_number(q, b[1]);
      if (work.remove_near && bin_p == bin_q) return;
      if (Counting::private_tables)
        add(tables + (c * this->count + g) * table_cells() + bin_p * table_pitch() + bin_q, 1u);
      else
        add(counts(c, g) + bin_p * work.max_bins + bin_q, Count{1});
    });
  }

  GRADREP_HD void flush(int thread) const {
    for (int32_t c = 0; c < this->channels; ++c)
      for (int32_t g = 0; g < this->count; ++g) {
        const uint32_t* table = tables + (c * this->count + g) * table_cells();
        for (int32_t i = thread; i < table_cells(); i += kThreads)
          if (const int32_t p = i / table_pitch(), q = i - p * table_pitch();
              table[i] > 0 && p < work.max_bins && q < work.max_bins)
            add(counts(c, g) + p * work.max_bins + q, static_cast<Count>(table[i]));
      }
  }

  GRADREP_HD Count* counts(int32_t c, int32_t g) const {
    return work.counts + work.row(this->channel + c, this->first + g) * work.cells();
  }
};

// run(phase): phase(thread) for every thread of the block; all are through before it returns. Returns whether the block
// has counted from tiles.
template <typename Counting, typename S, typename Run>
GRADREP_HD bool joint_histogram_block(const HistogramWork<S>& work, int64_t number, char* shared, const Run& run) {
  const HistogramBlock<S, Counting> block(work, number, shared);
  run([&](int thread) { block.prepare(thread); });
  bool tiled = Counting::tiles != Tiles::none;
  if constexpr (Counting::tiles == Tiles::numbers) {
    run([&](int thread) { block.compare(thread); });
    tiled = *block.unlike == 0;
  }
  for (int64_t n = block.tile; n < block.tile_end; ++n) {
    const Tile tile = block.tile_at(n);
    if constexpr (Counting::tiles != Tiles::none) {
      if (tiled) {
        const bool framed = work.tile.whole && n > block.tile;
        run([&](int thread) {
          if (!framed) block.frame(tile, thread);
          block.fill(tile, thread);
        });
        run([&](int thread) { block.count_tile(tile, thread); });
        continue;
      }
    }
    if constexpr (Counting::tiles != Tiles::pixels) run([&](int thread) { block.count_pairs(tile, thread); });
  }
  if (Counting::private_tables) run([&](int thread) { block.flush(thread); });
  return tiled;
}

// ---- all launches

// Adds to `counts`; launch(work) chooses the slabs and runs the blocks, each with at most `most_shared` bytes.
template <typename S, typename Launch>
void joint_histogram_launches(const FeatureMap<S>& map, const std::vector<Displacement>& displacements,
                              const Arithmetic<S>* ranges, const int32_t* bins, int64_t max_bins, int64_t pad_rows,
                              int64_t pad_columns, bool remove_near, int64_t* counts, int64_t most_shared,
                              const Launch& launch) {
  if (is_empty(map)) return;
  HistogramWork<S> work(map, pad_rows, pad_columns, remove_near);
  work.ranges = ranges;
  work.bins = bins;
  work.max_bins = static_cast<int32_t>(max_bins);
  work.counts = reinterpret_cast<Count*>(counts);
  each_launch(work, displacements, [&](HistogramWork<S>& some) {
    some.plan(most_shared);
    launch(some);
  });
}

}  // namespace gradrep
