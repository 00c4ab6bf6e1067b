// Bin numbers of pairs -> counts, in tables and cubes of one thread. No torch here.
//
// Reads downwards: tables and cubes -> cell numbers -> counting four displacements at once -> counting three by one
// increment -> moving tables into the counts.
#pragma once

#include "feature_map.h"
#include "targets.h"

namespace gradrep {

constexpr int64_t kChunk = 1024;  // pixels that are counted at once; even

// A table per displacement and parity of the pixel: where all data fall into one cell, each increment waits for the one
// before it in the same table.
struct Tables {
  int64_t pitch, size;  // cells of a row (at most 256: a cell's number fits uint16_t), of a table

  explicit Tables(int64_t pitch) : pitch(pitch), size(odd_lines<uint32_t>(pitch * pitch)) {}
  int64_t cells(int64_t displacements) const { return 2 * size * displacements; }
};

// Stores bound the counting of pairs: one increment a cycle. Where one of four displacements is the sum of two others,
// the three pairs among the pixels a, b = a + first, c = b + second need one increment between them: of cell (a, b, c)
// of a cube, summed over each side later. That leaves 2 increments of 4. Cells are uint16_t to stay in cache.
struct Cube {
  static constexpr int64_t kMostPitch = 32;         // two cubes of 64 KiB
  static constexpr int64_t kRoom = 2 * UINT16_MAX;  // pixels that cannot overflow a cell of two cubes

  int64_t size;  // cells

  explicit Cube(int64_t pitch) : size(odd_lines<uint16_t>(pitch * pitch * pitch)) {}
};

}  // namespace gradrep

#define GRADREP_LOOPS "counting_loops.h"
#include "for_each_target.h"

namespace gradrep {

using CountingLoops = PerTarget<base::CountingLoops, avx2::CountingLoops, avx512::CountingLoops>;

// Cell numbers of a chunk come ahead of its counting, with vectors: one by one they took 0.08 ns of 0.26 a pair. These
// functions are not inlined, so that the base loops, which would be, take no registers from the counting.
[[gnu::noinline]] inline void pair_cells(const uint8_t* p, const uint8_t* q, int64_t n, const Tables& layout,
                                         uint16_t* cells) {
  CountingLoops::on_best([&](auto loops) { loops.pair_cells(p, q, n, static_cast<uint16_t>(layout.pitch), cells); });
}

[[gnu::noinline]] inline void triangle_cells(const uint8_t* a, const uint8_t* b, const uint8_t* c, int64_t n,
                                             const Tables& layout, uint16_t* cells) {
  CountingLoops::on_best(
      [&](auto loops) { loops.triangle_cells(a, b, c, n, static_cast<uint16_t>(layout.pitch), cells); });
}

// step(i, parity) for all i < n. Counting leaves the memory idle, so each 16 of them ask for a line of what is read
// `ahead`: asked for all at once, lines are not fetched.
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

// K displacements in one loop, n <= kChunk: K independent chains of increments hide each other's latency.
template <int K>
void count_loop(const uint8_t* const* p, const uint8_t* const* q, int64_t n, const char* ahead, const Tables& layout,
                uint32_t* tables) {
  uint16_t cells[K][kChunk];
  uint32_t* table[K][2];
  for (int k = 0; k < K; ++k) {
    for (int parity = 0; parity < 2; ++parity) table[k][parity] = tables + (2 * k + parity) * layout.size;
    pair_cells(p[k], q[k], n, layout, cells[k]);
  }
  in_steps(n, ahead, [&](int64_t i, int parity) {
    for (int k = 0; k < K; ++k) ++table[k][parity][cells[k][i]];
  });
}

inline void count(int64_t displacements, const uint8_t* const* p, const uint8_t* const* q, int64_t n, const char* ahead,
                  const Tables& layout, uint32_t* tables) {
  const auto loops = {count_loop<1>, count_loop<2>, count_loop<3>, count_loop<4>};
  loops.begin()[displacements - 1](p, q, n, ahead, layout, tables);
}

// Counts displacements first, second, first + second in the cubes and `other` in the tables; b runs over n <= kChunk
// pixels.
inline void count_triangle(const uint8_t* b, int64_t n, int64_t first, int64_t second, int64_t other, const char* ahead,
                           const Tables& layout, uint16_t* cubes, const Cube& cube, uint32_t* tables) {
  uint16_t triangles[kChunk], pairs[kChunk];
  triangle_cells(b - first, b, b + second, n, layout, triangles);
  pair_cells(b, b + other, n, layout, pairs);
  uint16_t* const cubes_by[] = {cubes, cubes + cube.size};
  uint32_t* const tables_by[] = {tables, tables + layout.size};
  in_steps(n, ahead, [&](int64_t i, int parity) {
    ++cubes_by[parity][triangles[i]];
    ++tables_by[parity][pairs[i]];
  });
}

inline void move_cubes(uint16_t* cubes, const Cube& cube, const Tables& layout, uint32_t* first, uint32_t* second,
                       uint32_t* sum) {
  CountingLoops::on_best([&](auto loops) { loops.move_cubes(cubes, cube, layout, first, second, sum); });
}

inline void move_tables(uint32_t* tables, const Tables& layout, int64_t bins, bool remove_near, int64_t* counts,
                        int64_t max_bins) {
  CountingLoops::on_best([&](auto loops) { loops.move_tables(tables, layout, bins, remove_near, counts, max_bins); });
}

// More than 255 bins: tables would leave the cache, so pairs go straight into the counts.
inline void count_wide(const uint16_t* p, const uint16_t* q, int64_t n, int32_t bins, bool remove_near, int64_t* counts,
                       int64_t max_bins) {
  for (int64_t i = 0; i < n; ++i)
    if (p[i] < bins && q[i] < bins && !(remove_near && p[i] == q[i])) ++counts[p[i] * max_bins + q[i]];
}

}  // namespace gradrep
