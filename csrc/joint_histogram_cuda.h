// Joint histograms in blocks of threads: tables in shared memory, added to the result once. No torch here (see
// cuda_blocks.h).
//
// Reads downwards: plan of a launch -> one block, from tiles of bin numbers or pair by pair -> all launches.
#pragma once

#include "cuda_blocks.h"

namespace gradrep {

template <typename S>
struct HistogramWork : PairWork<S> {
  using T = Arithmetic<S>;
  const T* ranges;      // [C, D, 2, 2]
  const int32_t* bins;  // [C, D]
  int32_t max_bins;
  Count* counts;  // [C, D, max_bins, max_bins]

  // Tables of a group fit into shared memory, else pairs are added to the result itself.
  bool private_tables;
  // The tile of bin numbers, a byte each: rows `pitch` apart, with gaps between them as wide as the displacements
  // reach. A gap has the number max_bins, for which tables have a row and a column more: so a pair needs no test.
  bool tiled;
  int32_t up, down, gap, pitch, stored_rows, plane;  // rows beyond a band that its pairs reach; bytes of a channel
  bool quads_lie_together;                           // four pixels of a row can be read at once
  Division by_words, by_lines, by_stored_rows, by_quads;

  using PairWork<S>::PairWork;

  struct alignas(4 * sizeof(S)) Quad {
    S pixels[4];
  };
  static constexpr int64_t kCellBytes = sizeof(uint32_t);
  // Of a block: all of 7x7 with up to 26 bins. With a tile two or three blocks fit into 228 KiB.
  static constexpr int64_t kTableBytes = 72 << 10;
  static constexpr int64_t kTileBytes = 8 << 10;
  static constexpr int64_t kGroup = 32;  // displacements of a block at most

  GRADREP_HD int32_t cells() const { return max_bins * max_bins; }  // of the result; below 2^30, see kMaxBins
  GRADREP_HD int32_t table_cells() const { return (max_bins + 1) * (max_bins + 1); }
  // Where in a block's shared memory they are, in bytes: binnings, a flag, tables, the tile.
  GRADREP_HD int64_t tables() const { return int64_t{this->channels_together} * this->group; }
  GRADREP_HD int64_t tables_at() const {
    return (tables() * 2 * static_cast<int64_t>(sizeof(Binning<T>)) + 15) / 8 * 8;
  }
  GRADREP_HD int64_t tile_at() const {
    return tables_at() + (private_tables ? tables() * table_cells() * kCellBytes : 0);
  }
  int64_t shared_bytes() const { return tile_at() + (tiled ? int64_t{this->channels_together} * plane : 0); }

  // Once the displacements are known; `most_shared`: bytes that a block can have.
  void plan(int64_t most_shared) {
    const int64_t table = table_cells() * kCellBytes, room = std::min(kTableBytes, most_shared / 2);
    private_tables = table + 64 <= most_shared;  // 64: what else a block has with one channel and one displacement
    tiled = false;
    if (!private_tables) return this->take_groups(kGroup);
    while (this->channels_together > 1 && this->channels_together * table > room)
      this->take_channels(this->channels_together / 2);
    this->take_groups(std::clamp<int64_t>(room / (this->channels_together * table), 1, kGroup));
    if (this->remove_near || max_bins > UINT8_MAX) return;
    plan_tile((most_shared - shared_bytes()) / this->channels_together);
  }

  void plan_tile(int64_t most_bytes) {
    up = down = gap = 0;
    for (int32_t d = 0; d < this->displacements; ++d) {
      const Listed& to = this->list[d];
      up = std::max(up, -to.rows);
      down = std::max(down, to.rows);
      gap = std::max({gap, to.columns, -to.columns});
    }
    const int64_t wide = words(int64_t{this->columns} + gap) * 4, margin = before() + gap + 16,
                  reach = int64_t{up} + down;
    // A band has at least as many rows as are read again for the next one.
    const int64_t wanted =
        std::max(kTileBytes / this->channels_together / wide, std::min<int64_t>(this->rows, 2 * reach + 1));
    const int64_t lines = std::min((most_bytes - margin) / wide, wanted);
    if (lines < this->rows && lines <= reach) return;  // pairs reach too far
    tiled = true;
    this->take_lines(lines < this->rows ? lines - reach : lines);
    pitch = static_cast<int32_t>(wide);
    stored_rows = std::min(this->rows, this->rows_together + up + down);
    const int64_t all_rows = int64_t{this->images_together} * stored_rows;
    // An odd number of words: channels begin on unlike banks.
    plane = static_cast<int32_t>((words(all_rows * pitch + margin - 8) | 1) * 4);
    by_words = Division(words(this->columns));
    by_lines = Division(int64_t{this->images_together} * this->rows_together);
    by_stored_rows = Division(stored_rows);
    const FeatureMap<S>& x = this->map;
    by_quads = Division(words(x.width));
    const auto fours = [](int64_t n) { return n % 4 == 0; };
    quads_lie_together = x.column_stride == 1 && fours(x.width) && fours(x.row_stride) && fours(x.channel_stride) &&
                         fours(x.image_stride) && reinterpret_cast<uintptr_t>(x.data) % sizeof(Quad) == 0;
  }

  GRADREP_HD static int64_t words(int64_t bytes) { return (bytes + 3) / 4; }
  GRADREP_HD int32_t before() const { return static_cast<int32_t>(words(gap) * 4); }  // the first row of a channel
};

// ---- one block

template <typename S>
struct HistogramBlock : Share<S> {
  using T = Arithmetic<S>;
  const HistogramWork<S>& work;
  Binning<T>* binnings;  // [channels_together, group, 2]
  uint32_t* unlike;      // not 0: the pixels of a channel have more than one binning
  uint32_t* tables;      // [channels_together, group, max_bins + 1, max_bins + 1]
  uint8_t* numbers;      // [channels_together, plane]

  GRADREP_HD HistogramBlock(const HistogramWork<S>& w, int64_t block, char* shared)
      : Share<S>(w, block),
        work(w),
        binnings(reinterpret_cast<Binning<T>*>(shared)),
        unlike(reinterpret_cast<uint32_t*>(shared + w.tables_at()) - 1),
        tables(reinterpret_cast<uint32_t*>(shared + w.tables_at())),
        numbers(reinterpret_cast<uint8_t*>(shared + w.tile_at())) {}

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
    if (work.private_tables)
      for (int64_t i = thread; i < int64_t{this->channels} * this->count * work.table_cells(); i += kThreads)
        tables[i] = 0;
  }

  // Padding no smaller than the radius and nothing dropped: one range per channel, so each pixel has one bin number.
  GRADREP_HD void compare(int thread) const {
    for (int32_t i = thread; i < this->channels * this->count * 2; i += kThreads) {
      const Binning<T> mine = binnings[i], its = binning_of(i / (2 * this->count));
      if (!(mine.lo == its.lo && mine.inv == its.inv && mine.top == its.top)) raise(unlike, 1u);
    }
  }

  GRADREP_HD int32_t stored_from(const Tile& tile) const { return tile.row > work.up ? tile.row - work.up : 0; }

  // Of all pixels of a channel, if they have one.
  GRADREP_HD Binning<T> binning_of(int32_t c) const { return binnings[c * 2 * this->count]; }

  // What is the same in all tiles: the padding left and right of the images, and the gaps.
  GRADREP_HD void frame(int thread) const {
    for (int32_t i = thread; i < this->channels * work.plane; i += kThreads) {
      const int32_t c = i / work.plane, at = i % work.plane - work.before(), line = at / work.pitch;
      const bool inside = at >= 0 && at % work.pitch < work.columns && line < work.images_together * work.stored_rows;
      numbers[i] = static_cast<uint8_t>(inside ? bin_number(T(0), binning_of(c)) : work.max_bins);
    }
  }

  // Bin numbers of a tile and of the rows around it that its pairs reach, four pixels of a row at a time.
  GRADREP_HD void fill(const Tile& tile, int thread) const {
    const int32_t from = stored_from(tile), end = lesser_of(work.rows, tile.row + tile.rows + work.down);
    const uint32_t all = static_cast<uint32_t>(tile.images * (end - from)) * work.by_quads.by * work.by_channels.by;
    const auto width = static_cast<int32_t>(work.map.width);
#pragma unroll 2
    for (uint32_t n = thread; n < all; n += kThreads) {
      const uint32_t quad = work.by_channels.quotient(n), line = work.by_quads.quotient(quad);
      const auto c = static_cast<int32_t>(n - quad * work.by_channels.by),
                 column = static_cast<int32_t>(quad - line * work.by_quads.by) * 4;
      if (c >= this->channels) continue;
      const auto image = static_cast<int32_t>(work.by_stored_rows.quotient(line));
      const int32_t row = from + static_cast<int32_t>(line) - image * work.stored_rows - work.pad_rows;
      const S* at = this->plane(c, tile.image + image) + row * work.map.row_stride + column * work.map.column_stride;
      // Read before the numbers are written, which might be anything to a compiler.
      const Binning<T> its = binning_of(c);
      T values[4] = {};  // zeros above and below the image
      if (within(row, work.map.height)) {
        if (work.quads_lie_together) {
          const auto read = *reinterpret_cast<const typename HistogramWork<S>::Quad*>(at);
          for (int j = 0; j < 4; ++j) values[j] = widen(read.pixels[j]);
        } else {
          for (int j = 0; j < 4; ++j)
            if (column + j < width) values[j] = widen(at[j * work.map.column_stride]);
        }
      }
      uint8_t* to = numbers + c * work.plane + work.before() + static_cast<int32_t>(line) * work.pitch +
                    work.pad_columns + column;
      for (int j = 0; j < 4; ++j)
        if (column + j < width) to[j] = static_cast<uint8_t>(bin_number(values[j], its));
    }
  }

  // Four pixels of a row and their neighbours at a time.
  GRADREP_HD void count_tile(const Tile& tile, int thread) const {
    const int32_t from = stored_from(tile), lines = static_cast<int32_t>(work.by_lines.by),
                  here = tile.images * tile.rows;
    const uint32_t all = static_cast<uint32_t>(this->channels) * lines * work.by_words.by;
    const auto* fours = reinterpret_cast<const uint32_t*>(numbers);
    for (uint32_t n = thread; n < all; n += kThreads) {
      const uint32_t any_line = work.by_words.quotient(n), c = work.by_lines.quotient(any_line);
      const auto line = static_cast<int32_t>(any_line - c * lines);
      if (line >= here) continue;
      const auto image = static_cast<int32_t>(work.by_rows.quotient(line));
      const int32_t row = tile.row + line - image * work.rows_together;
      const int32_t at = static_cast<int32_t>(c) * work.plane + work.before() +
                         (image * work.stored_rows + row - from) * work.pitch +
                         static_cast<int32_t>(n - any_line * work.by_words.by) * 4;
      const uint32_t p = fours[at >> 2];
      const uint32_t table_pitch = work.max_bins + 1;
      const uint32_t table_rows[4] = {(p & 255) * table_pitch, (p >> 8 & 255) * table_pitch,
                                      (p >> 16 & 255) * table_pitch, (p >> 24) * table_pitch};
      uint32_t* table = tables + static_cast<int32_t>(c) * this->count * work.table_cells();
      for (int32_t g = 0; g < this->count; ++g, table += work.table_cells()) {
        const Listed d = work.list[this->first + g];
        if (!within(row + d.rows, work.rows)) continue;
        const int32_t q_at = at + d.rows * work.pitch + d.columns;
        const uint64_t both = static_cast<uint64_t>(fours[(q_at >> 2) + 1]) << 32 | fours[q_at >> 2];
        const auto q = static_cast<uint32_t>(both >> (q_at & 3) * 8);
#pragma unroll
        for (int j = 0; j < 4; ++j) add(table + table_rows[j] + (q >> 8 * j & 255), 1u);
      }
    }
  }

  template <bool private_tables>
  GRADREP_HD void count_pairs(const Tile& tile, int thread) const {
    this->template each_pair<0>(tile, thread, [&](int32_t c, int32_t g, T p, T q) {
      const Binning<T>* b = binnings + 2 * (c * this->count + g);
      const int32_t bin_p = bin_number(p, b[0]), bin_q = bin_number(q, b[1]);
      if (work.remove_near && bin_p == bin_q) return;
      if (private_tables)
        add(tables + (c * this->count + g) * work.table_cells() + bin_p * (work.max_bins + 1) + bin_q, 1u);
      else
        add(counts(c, g) + bin_p * work.max_bins + bin_q, Count{1});
    });
  }

  GRADREP_HD void flush(int thread) const {
    const int32_t pitch = work.max_bins + 1;
    for (int32_t c = 0; c < this->channels; ++c)
      for (int32_t g = 0; g < this->count; ++g) {
        const uint32_t* table = tables + (c * this->count + g) * work.table_cells();
        for (int32_t i = thread; i < work.table_cells(); i += kThreads)
          if (const int32_t p = i / pitch, q = i - p * pitch; table[i] > 0 && p < work.max_bins && q < work.max_bins)
            add(counts(c, g) + p * work.max_bins + q, static_cast<Count>(table[i]));
      }
  }

  GRADREP_HD Count* counts(int32_t c, int32_t g) const {
    return work.counts + work.row(this->channel + c, this->first + g) * work.cells();
  }
};

// run(phase): phase(thread) for every thread of the block; all are through before it returns.
template <bool private_tables, typename S, typename Run>
GRADREP_HD void joint_histogram_block(const HistogramWork<S>& work, int64_t number, char* shared, const Run& run) {
  const HistogramBlock<S> block(work, number, shared);
  run([&](int thread) { block.prepare(thread); });
  run([&](int thread) { block.compare(thread); });
  const bool tiled = private_tables && work.tiled && *block.unlike == 0;
  if (tiled) run([&](int thread) { block.frame(thread); });
  for (int64_t n = block.tile; n < block.tile_end; ++n) {
    const Tile tile = block.tile_at(n);
    if (tiled) {
      run([&](int thread) { block.fill(tile, thread); });
      run([&](int thread) { block.count_tile(tile, thread); });
    } else {
      run([&](int thread) { block.template count_pairs<private_tables>(tile, thread); });
    }
  }
  if (private_tables) run([&](int thread) { block.flush(thread); });
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
