// The parts of the counting that use vectors, compiled once per instruction set: see for_each_target.h.

namespace gradrep::GRADREP_TARGET {

struct CountingLoops {
  // Bin numbers -> cell numbers of pairs.
  static void pair_cells(const uint8_t* __restrict p, const uint8_t* __restrict q, int64_t n, uint16_t pitch,
                         uint16_t* __restrict cells) {
    for (int64_t i = 0; i < n; ++i) cells[i] = static_cast<uint16_t>(p[i] * pitch + q[i]);
  }

  // Bin numbers -> cell numbers of three pixels.
  static void triangle_cells(const uint8_t* __restrict a, const uint8_t* __restrict b, const uint8_t* __restrict c,
                             int64_t n, uint16_t pitch, uint16_t* __restrict cells) {
    for (int64_t i = 0; i < n; ++i) cells[i] = static_cast<uint16_t>((a[i] * pitch + b[i]) * pitch + c[i]);
  }

  // Both cubes move into the tables of the three displacements.
  static void move_cubes(uint16_t* __restrict even, const Cube& cube, const Tables& layout, uint32_t* __restrict first,
                         uint32_t* __restrict second, uint32_t* __restrict sum) {
    const int64_t pitch = layout.pitch, cells = cube.size;
    const uint16_t* odd = even + cells;
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
    memset(even, 0, 2 * cells * sizeof *even);
  }

  // Both tables of a displacement are added to its counts.
  static void move_tables(uint32_t* __restrict tables, const Tables& layout, int64_t bins, bool remove_near,
                          int64_t* __restrict counts, int64_t max_bins) {
    const int64_t pitch = layout.pitch, cells = layout.size;
    for (int64_t p = 0; p < bins; ++p) {
      uint32_t *even = tables + p * pitch, *odd = even + cells;
      if (remove_near) even[p] = odd[p] = 0;
      for (int64_t q = 0; q < bins; ++q) counts[p * max_bins + q] += even[q] + odd[q];
    }
    memset(tables, 0, 2 * cells * sizeof *tables);
  }
};

}  // namespace gradrep::GRADREP_TARGET
