// How a joint histogram is dealt to blocks of threads, and what of it lies in a block's shared memory. No torch here
// (see cuda_blocks.h).
//
// Why increments in one table for all threads? Instructions for 256 pixels of 3x3 (sm_90), filling included: 190. Two
// other ways were compiled and left out, with estimates for 167 M pixels on 132 multiprocessors at 1.7 GHz, if a pass
// of an increment takes two cycles. A table for each lane, of 16-bit cells, has no second pass, but 200 instructions
// and 147 KiB, so that one block runs alone and nothing hides its reads: 0.45 ms, as here. Binary tensor-core products
// of bit planes take 165 instructions and 0.2 ms, and for 7x7 0.9 ms where increments take 2.6. Their rate on sm_90 is
// not known, sm_100 has none (five times the instructions), and they would be a second path for at most 24 bins.
#pragma once

#include "joint_histogram_tiles.h"

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
  int32_t table_pitch, table_cells;
  // The tile holds bin numbers, a byte each. A gap has the number max_bins, for which tables have a row and a column
  // more. With remove_near each side of each displacement has bins of its own: then it holds the pixels, and a gap is
  // zeros, which drop.
  bool tiled;
  bool half_3x3;            // the group is (0, 1), (1, -1), (1, 0), (1, 1)
  bool quads_lie_together;  // four pixels of a row can be read at once
  TileLayout tile;
  int32_t fill_images;           // of which the threads fill each a part at the same time
  Division by_quads, by_places;  // of a row, of what a tile has of an image

  using PairWork<S>::PairWork;

  struct alignas(4 * sizeof(S)) Quad {
    S pixels[4];
  };
  static constexpr int64_t kCellBytes = sizeof(uint32_t);
  // Of a block: all of 7x7 with up to 24 bins, and three blocks fit into 228 KiB. Of several channels: four blocks.
  static constexpr int64_t kTableBytes = 60 << 10, kTablesBytes = 40 << 10;
  // With the tile: four blocks of a multiprocessor with 228 KiB. A longer tile would not make its pixels cheaper.
  static constexpr int64_t kBlockBytes = 56 << 10, kLeastTile = 8 << 10, kMostTile = 16 << 10;
  static constexpr int64_t kGroup = 32;  // displacements of a block at most

  GRADREP_HD int32_t cells() const { return max_bins * max_bins; }  // of the result; below 2^30, see kMaxBins
  // Where in a block's shared memory they are, in bytes: binnings, a flag, tables, the tile.
  GRADREP_HD int64_t tables() const { return int64_t{this->channels_together} * this->group; }
  GRADREP_HD int64_t tables_at() const {
    return (tables() * 2 * static_cast<int64_t>(sizeof(Binning<T>)) + 15) / 8 * 8;
  }
  GRADREP_HD int64_t tile_at() const {
    return (tables_at() + (private_tables ? tables() * table_cells * kCellBytes : 0) + 7) / 8 * 8;
  }
  GRADREP_HD int64_t pixel_bytes() const { return this->remove_near ? static_cast<int64_t>(sizeof(T)) : 1; }
  int64_t shared_bytes() const {
    return tile_at() + (tiled ? this->channels_together * tile.plane * pixel_bytes() : 0);
  }

  // Once the displacements are known; `most_shared`: bytes that a block can have.
  void plan(int64_t most_shared) {
    plan_tables();
    const int64_t table = table_cells * kCellBytes;
    private_tables = table + 64 <= most_shared;  // 64: what else a block has with one channel and one displacement
    tiled = half_3x3 = false;
    if (!private_tables) return this->take_groups(kGroup);
    // Half a sector of memory is read twice, which is less than to fill tiles for each two displacements anew.
    const int64_t all = std::min<int64_t>(this->displacements, kGroup);
    while (this->channels_together > 2 && this->channels_together * all * table > kTablesBytes)
      this->take_channels(this->channels_together / 2);
    const int64_t room = std::min(this->channels_together > 1 ? kTablesBytes : kTableBytes, most_shared / 2);
    while (this->channels_together > 1 && this->channels_together * table > room)
      this->take_channels(this->channels_together / 2);
    this->take_groups(std::clamp<int64_t>(room / (this->channels_together * table), 1, kGroup));
    if (!this->remove_near && max_bins > UINT8_MAX) return;
    plan_tile(most_shared - shared_bytes());
  }

  // At 32 banks an even pitch, or one next to a multiple of 32, lets rows and columns of cells share banks: of 32
  // pixels, 60 % zeros, an increment takes 2.6 passes at a pitch of 24, 2.3 at 33, and 1.9 to 2.0 at 25 and 35.
  void plan_tables() {
    const bool known = max_bins < kPitches[1];
    table_pitch = !known ? (max_bins + 1) | 1 : max_bins < kPitches[0] ? kPitches[0] : kPitches[1];
    while (table_pitch % 32 == 1 || table_pitch % 32 == 31) table_pitch += 2;
    table_cells = (known ? table_pitch : max_bins + 1) * table_pitch;
  }
  // Known to the compiler: those of up to 24 and of up to 34 bins, which Sturges' rule gives for 2^33 pairs. For a word
  // and four displacements that spares 12 of 88 instructions.
  static constexpr int32_t kPitches[2] = {25, 35};

  void plan_tile(int64_t room) {
    const int64_t pixel = this->channels_together * pixel_bytes(), most = room / pixel,
                  wanted = std::clamp(kBlockBytes - shared_bytes(), kLeastTile, kMostTile) / pixel;
    tiled = tile.plan(this->list, this->displacements, this->rows, this->columns, wanted, most);
    if (!tiled) return;
    const FeatureMap<S>& x = this->map;
    by_quads = Division((x.width + 3) / 4);
    const int64_t places = x.height * by_quads.by * this->channels_together;
    fill_images = static_cast<int32_t>(tile.whole ? std::max<int64_t>(1, kThreads / places) : 1);
    by_places = Division(fill_images > 1 ? places : kThreads);
    if (tile.whole) {
      this->take_lines(std::min(x.images, tile.images_in(std::min(most, wanted))) * this->rows);
    } else {
      const int64_t most_rows = tile.stored_rows - tile.up - tile.down,
                    bands = (this->rows + most_rows - 1) / most_rows;
      this->take_lines((this->rows + bands - 1) / bands);
    }
    tile.take_images(this->images_together);
    half_3x3 = this->groups == 1 && is_half_3x3();
    const auto fours = [](int64_t n) { return n % 4 == 0; };
    quads_lie_together = x.column_stride == 1 && fours(x.width) && fours(x.row_stride) && fours(x.channel_stride) &&
                         fours(x.image_stride) && reinterpret_cast<uintptr_t>(x.data) % sizeof(Quad) == 0;
  }

  // Whole images are dealt evenly: to slabs, and those of a slab to tiles.
  void take_slabs(int64_t blocks_at_once) {
    if (!tiled || !tile.whole)
      return PairWork<S>::take_slabs(blocks_at_once, 3.3 * table_cells / (this->rows_together * this->columns));
    const int64_t images = this->map.images, most = this->images_together;
    const auto of_tile = [&](int64_t n) {
      const int64_t of_slab = over(images, n);
      return over(of_slab, over(of_slab, most));
    };
    const int64_t slabs = this->best_slabs(
        blocks_at_once, images, images / std::max<int64_t>(1, INT32_MAX / tile.image) + 1, [&](int64_t n) {
          const int64_t some = of_tile(n);
          return static_cast<double>(over(over(images, some), n) * tile_cost(some) + block_cost());
        });
    this->take_lines(of_tile(slabs) * this->rows);
    this->slabs = std::min(slabs, this->tiles);
  }

  // Instructions of a thread, about: for a tile, in rounds of which the last takes as long as the others, and for what
  // a block does besides.
  int64_t tile_cost(int64_t images) const {
    const int64_t places = this->map.height * by_quads.by * this->channels_together,
                  counting = over(images * tile.image, this->remove_near ? kThreads : 4 * kThreads) *
                             (this->remove_near ? 24 : 16) * tables(),
                  filling = over(places, kThreads) * (90 + 33 * over(images, fill_images));
    return counting + filling + 60;
  }
  int64_t block_cost() const { return 300 + over(tables() * table_cells, kThreads) * 20; }
  static int64_t over(int64_t n, int64_t by) { return (n + by - 1) / by; }

  bool is_half_3x3() const {
    constexpr int32_t places[4][2] = {{0, 1}, {1, -1}, {1, 0}, {1, 1}};
    const auto equal = [](const Listed& d, const int32_t* place) {
      return d.rows == place[0] && d.columns == place[1];
    };
    return this->displacements == 4 && std::equal(this->list, this->list + 4, places, equal);
  }
};

enum class Tiles { none, numbers, pixels };  // what they hold; none: each pair is read from the map

// What a kernel is compiled for. Pitch: of the tables, 0: known at run time.
template <Tiles tiles_, int32_t pitch_ = 0, bool private_tables_ = true>
struct Counting {
  static constexpr Tiles tiles = tiles_;
  static constexpr int32_t pitch = pitch_;
  static constexpr bool private_tables = private_tables_;
};

template <typename S, typename Visit>
auto visit_counting(const HistogramWork<S>& work, const Visit& visit) {
  constexpr int32_t usual = HistogramWork<S>::kPitches[0], most = HistogramWork<S>::kPitches[1];
  if (!work.private_tables) return visit(Counting<Tiles::none, 0, false>());
  if (!work.tiled) return visit(Counting<Tiles::none>());
  if (work.remove_near) return visit(Counting<Tiles::pixels>());
  if (work.table_pitch == usual) return visit(Counting<Tiles::numbers, usual>());
  if (work.table_pitch == most) return visit(Counting<Tiles::numbers, most>());
  return visit(Counting<Tiles::numbers>());
}

}  // namespace gradrep
