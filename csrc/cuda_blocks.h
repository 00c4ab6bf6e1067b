// Pairs of pixels dealt to blocks of threads, for the CUDA kernels. No torch here, and nothing that a host compiler
// does not know: a block is a sequence of phases, each a function of the thread, so that the tests can run blocks on
// the CPU.
#pragma once

#include "feature_map.h"

namespace gradrep {

constexpr int kThreads = 256;  // of a block
// Displacements of a launch. They are among the kernel's arguments, which have room for 4 KiB.
constexpr int kMostDisplacements = 128;
constexpr int64_t kMostBlocks = INT32_MAX;

// ---- threads: N is uint32_t or unsigned long long, which CUDA has atomics for

using Count = unsigned long long;

template <typename N>
GRADREP_HD GRADREP_INLINE void add(N* cell, N n) {
#if defined(__CUDA_ARCH__)
  atomicAdd(cell, n);
#else
  *cell += n;
#endif
}

template <typename N>
GRADREP_HD GRADREP_INLINE void raise(N* cell, N n) {
#if defined(__CUDA_ARCH__)
  atomicMax(cell, n);
#else
  *cell = std::max(*cell, n);
#endif
}

// How a kernel goes through the phases of a block; the tests have a loop over the threads instead.
struct ThisThread {
  template <typename Phase>
  GRADREP_HD void operator()([[maybe_unused]] const Phase& phase) const {
#if defined(__CUDA_ARCH__)
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
#endif
  }
};

// n / by for n < 2^31, as a multiplication.
struct Division {
  uint32_t by, magic, shift;

  Division(int64_t divisor = 1) : by(static_cast<uint32_t>(divisor)), shift(0) {
    while (int64_t{1} << shift < divisor) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }
  GRADREP_HD uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>(static_cast<uint64_t>(n) * magic >> 32) + n) >> shift;
  }
};

// ---- the work: channels in blocks, displacements in groups, images in tiles, and tiles in slabs

struct Listed {
  int32_t rows, columns, number;  // number: which of the op's displacements
};

template <typename S>
struct PairWork {
  using T = Arithmetic<S>;
  FeatureMap<S> map;
  bool remove_near;
  int32_t pad_rows, pad_columns;                  // 0 with remove_near, which drops the padding with all other zeros
  int32_t rows, columns;                          // of a padded plane
  int32_t channels_together;                      // of a block: a power of 2, at most kThreads
  int32_t images_together, rows_together, bands;  // a tile: some images, or one of the bands of an image
  int32_t displacements, group, groups;
  int64_t all_displacements, channel_blocks, tiles, slabs;
  Division by_channels, by_columns, by_rows;
  Listed list[kMostDisplacements];  // those that have pairs

  // x is not empty.
  PairWork(const FeatureMap<S>& x, int64_t padding_rows, int64_t padding_columns, bool near)
      : map(x),
        remove_near(near),
        pad_rows(near ? 0 : static_cast<int32_t>(padding_rows)),
        pad_columns(near ? 0 : static_cast<int32_t>(padding_columns)),
        rows(static_cast<int32_t>(x.height) + 2 * pad_rows),
        columns(static_cast<int32_t>(x.width) + 2 * pad_columns),
        by_columns(columns) {
    // Channels closer in memory than a sector of a cache line (channels_last, tiny planes) are read together.
    const int64_t apart = x.channel_stride * static_cast<int64_t>(sizeof(S));
    int64_t together = 1;
    while (apart > 0 && 2 * together * apart <= kSector && together < x.channels &&
           2 * together * columns <= kTilePlaces)
      together *= 2;
    take_channels(together);
    take_lines(std::max<int64_t>(1, kTilePlaces / (together * columns)));
  }

  void take_channels(int64_t together) {
    channels_together = static_cast<int32_t>(together);
    channel_blocks = (map.channels + together - 1) / together;
    by_channels = Division(together);
  }

  // Tiles of so many rows, of one image or several.
  void take_lines(int64_t lines) {
    rows_together = static_cast<int32_t>(std::min<int64_t>(lines, rows));
    images_together = static_cast<int32_t>(std::clamp<int64_t>(lines / rows, 1, map.images));
    bands = (rows + rows_together - 1) / rows_together;
    tiles = (map.images + images_together - 1) / images_together * bands;
    by_rows = Division(rows_together);
  }

  // The displacements of one launch, from number `from` on; returns the number after them.
  int64_t take_displacements(const std::vector<Displacement>& all, int64_t from) {
    all_displacements = all.size();
    displacements = 0;
    for (; from < all_displacements && displacements < kMostDisplacements; ++from)
      if (pairs(all[from].rows, all[from].columns) > 0)
        list[displacements++] = {static_cast<int32_t>(all[from].rows), static_cast<int32_t>(all[from].columns),
                                 static_cast<int32_t>(from)};
    return from;
  }
  void take_groups(int64_t most) {  // as even as they can be
    groups = static_cast<int32_t>((displacements + most - 1) / most);
    group = (displacements + groups - 1) / groups;
  }

  // Slabs whose blocks end together, of fewer than 2^31 pixels. `besides`: what a block does besides its tiles, in
  // tiles.
  void take_slabs(int64_t blocks_at_once, double besides = 0.5) {
    const int64_t pixels = int64_t{images_together} * rows_together * columns;
    slabs = best_slabs(blocks_at_once, tiles, tiles / std::max<int64_t>(1, INT32_MAX / pixels) + 1,
                       [&](int64_t n) { return static_cast<double>((tiles + n - 1) / n) + besides; });
  }

  // Blocks run in waves, and a wave takes as long as the longest block: cost(slabs). `parts`: what can be dealt.
  template <typename Cost>
  int64_t best_slabs(int64_t blocks_at_once, int64_t parts, int64_t least, const Cost& cost) const {
    const int64_t others = channel_blocks * groups, fit = blocks_at_once / others,
                  most = std::min(parts, std::max(least, std::min(4 * fit + 4, fit + 16)));
    const auto time = [&](int64_t n) {
      return static_cast<double>((others * n + blocks_at_once - 1) / blocks_at_once) * cost(n);
    };
    int64_t best = std::min(parts, std::max(least, fit / 2));
    double least_time = time(best);
    for (int64_t n = best + 1; n <= most; ++n)
      if (const double its = time(n); its < least_time) {
        best = n;
        least_time = its;
      }
    return best;
  }
  int64_t blocks() const { return channel_blocks * groups * slabs; }

  GRADREP_HD int64_t pairs(int64_t d_rows, int64_t d_columns) const {
    return pairs_along(rows, d_rows) * pairs_along(columns, d_columns);
  }
  // The row of the result.
  GRADREP_HD int64_t row(int64_t channel, int32_t listed) const {
    return channel * all_displacements + list[listed].number;
  }

  static constexpr int64_t kSector = 32;  // bytes
  static constexpr int64_t kTilePlaces = 8192;
};

template <typename S>
bool is_empty(const FeatureMap<S>& map) {
  return map.images == 0 || map.channels == 0 || map.height == 0 || map.width == 0;
}

// give(work) with the displacements of one launch, for each launch.
template <typename Work, typename Give>
void each_launch(const Work& work, const std::vector<Displacement>& displacements, const Give& give) {
  for (int64_t from = 0, all = displacements.size(); from < all;) {
    Work some = work;
    from = some.take_displacements(displacements, from);
    if (some.displacements > 0) give(some);
  }
}

// ---- a block's part of it

GRADREP_HD GRADREP_INLINE int32_t lesser_of(int32_t a, int64_t b) { return a < b ? a : static_cast<int32_t>(b); }
// 0 <= n < size
GRADREP_HD GRADREP_INLINE bool within(int32_t n, int64_t size) {
  return static_cast<uint32_t>(n) < static_cast<uint32_t>(size);
}

struct Tile {
  int64_t image;
  int32_t images, row, rows;
};

struct Place {
  int32_t channel, line, column;  // channel of the block; line: row of the rows that are looked at, image after image
};

template <typename S>
struct Share {
  using T = Arithmetic<S>;
  const PairWork<S>& work;
  int64_t channel, slab, tile, tile_end;
  int32_t channels, first, count;  // count displacements from the first on

  GRADREP_HD Share(const PairWork<S>& w, int64_t block) : work(w) {
    // Neighbouring blocks have neighbouring channels, which share cache lines.
    channel = block % w.channel_blocks * w.channels_together;
    block /= w.channel_blocks;
    first = static_cast<int32_t>(block % w.groups) * w.group;
    slab = block / w.groups;
    tile = w.tiles * slab / w.slabs;
    tile_end = w.tiles * (slab + 1) / w.slabs;
    channels = lesser_of(w.channels_together, w.map.channels - channel);
    count = lesser_of(w.group, w.displacements - first);
  }

  GRADREP_HD Tile tile_at(int64_t n) const {
    const int64_t image = n / work.bands * work.images_together;
    const auto row = static_cast<int32_t>(n % work.bands) * work.rows_together;
    return {image, lesser_of(work.images_together, work.map.images - image), row,
            lesser_of(work.rows_together, work.rows - row)};
  }

  // Neighbouring threads take neighbouring channels, then neighbouring columns.
  GRADREP_HD uint32_t places(int32_t lines) const {
    return static_cast<uint32_t>(lines) * work.columns * work.channels_together;
  }
  GRADREP_HD Place place(uint32_t n) const {
    const uint32_t pixel = work.by_channels.quotient(n), line = work.by_columns.quotient(pixel);
    const uint32_t c = n - pixel * work.by_channels.by, column = pixel - line * work.by_columns.by;
    return {static_cast<int32_t>(c), static_cast<int32_t>(line), static_cast<int32_t>(column)};
  }

  GRADREP_HD const S* plane(int32_t c, int64_t image) const {
    return work.map.data + image * work.map.image_stride + (channel + c) * work.map.channel_stride;
  }

  GRADREP_HD T pixel(const S* plane, int32_t row, int32_t column) const {
    row -= work.pad_rows;
    column -= work.pad_columns;
    if (!within(row, work.map.height) || !within(column, work.map.width)) return T(0);
    return widen(plane[row * work.map.row_stride + column * work.map.column_stride]);
  }

  // visit(channel of the block, number in the group, p, q) for a thread's part of the pairs of a tile that are left.
  // Groups of at most `most` displacements are unrolled, so that arrays over them can stay in registers; 0: of any
  // number.
  template <int most, typename Visit>
  GRADREP_HD GRADREP_INLINE void each_pair(const Tile& tile, int thread, const Visit& visit) const {
    const uint32_t all = places(tile.images * tile.rows);
    for (uint32_t n = thread; n < all; n += kThreads) {
      const Place at = place(n);
      if (at.channel >= channels) continue;
      const auto image = static_cast<int32_t>(work.by_rows.quotient(at.line));
      const int32_t row = tile.row + at.line - image * work.rows_together;
      const S* values = plane(at.channel, tile.image + image);
      const T p = pixel(values, row, at.column);
      if (work.remove_near && p == 0) continue;
#pragma unroll(most > 0 ? most : 1)
      for (int32_t g = 0; g < (most > 0 ? most : count); ++g) {
        if (most > 0 && g >= count) continue;
        const Listed d = work.list[first + g];
        const int32_t q_row = row + d.rows, q_column = at.column + d.columns;
        if (!within(q_row, work.rows) || !within(q_column, work.columns)) continue;
        const T q = pixel(values, q_row, q_column);
        if (!(work.remove_near && q == 0)) visit(at.channel, g, p, q);
      }
    }
  }
};

}  // namespace gradrep
