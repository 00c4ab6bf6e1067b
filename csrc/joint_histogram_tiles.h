// Tiles of bin numbers in shared memory, and counting their pairs four pixels at a time. No torch here (see
// cuda_blocks.h).
//
// Reads downwards: where pixels are in a tile -> reading displaced pixels -> counting.
#pragma once

#include "cuda_blocks.h"

namespace gradrep {

// The pixels of a channel lie flat: rows `pitch` apart, images `image` apart, and between them gaps as wide as the
// displacements reach. A pair that leaves its image ends in a gap, so it needs no test, and a displacement is one
// distance wherever the pair begins.
struct TileLayout {
  int32_t up, down, gap;  // rows above and below, columns on either side, that pairs reach
  bool whole;             // images, else a band of one
  int32_t pitch, image;   // in pixels
  int32_t stored_rows;    // of an image: its own, or those of a band and of the rows that its pairs reach
  int32_t before, plane;  // where the first row is; pixels of a channel
  static constexpr int64_t kReadOver = 12;  // a word of pixels and two displaced ones are read to their ends

  // Whole images as long as one takes at most `wanted` pixels of a channel, else bands; false: pairs reach too far for
  // `most` pixels.
  bool plan(const Listed* list, int32_t displacements, int64_t rows, int64_t columns, int64_t wanted, int64_t most) {
    up = down = gap = 0;
    for (int32_t d = 0; d < displacements; ++d) {
      up = std::max(up, -list[d].rows);
      down = std::max(down, list[d].rows);
      gap = std::max({gap, list[d].columns, -list[d].columns});
    }
    const int64_t wide = columns + gap, words = fours(wide), reach = int64_t{up} + down;
    // The last word of an image ends in its gap.
    const int64_t one = rows * wide + std::max<int64_t>(std::max(up, down) * wide, 3);
    const int64_t in_bands = std::min((most - margin(0)) / words, std::max(wanted / words, 2 * reach + 1));
    whole = one + margin(wide) <= most && (one + margin(wide) <= wanted || in_bands - reach >= rows);
    if (!whole && in_bands <= reach) return false;
    pitch = static_cast<int32_t>(whole ? wide : words);
    stored_rows = static_cast<int32_t>(whole ? rows : std::min(in_bands, rows - 1 + reach));
    image = static_cast<int32_t>(whole ? one : stored_rows * words);
    before = static_cast<int32_t>(fours((whole ? up * wide : 0) + gap));
    return true;
  }
  int64_t images_in(int64_t pixels) const { return std::max<int64_t>(1, (pixels - margin(pitch)) / image); }
  // An odd number of words: channels begin on unlike banks.
  void take_images(int64_t images) {
    plane = static_cast<int32_t>(fours(before + images * image + gap + kReadOver));
    plane += plane % 8 == 0 ? 4 : 0;
  }

  GRADREP_HD int32_t first_p() const { return before + (whole ? 0 : up * pitch); }
  GRADREP_HD int32_t first_row(const Tile& tile) const { return whole ? 0 : tile.row - up; }  // that is stored
  GRADREP_HD int32_t places(const Tile& tile) const { return (tile.images - 1) * image + tile.rows * pitch; }
  GRADREP_HD int32_t distance(const Listed& d) const { return d.rows * pitch + d.columns; }

  static int64_t fours(int64_t n) { return (n + 3) / 4 * 4; }

 private:
  int64_t margin(int64_t row) const { return fours(up * row + gap) + gap + kReadOver + 8; }
};

// ---- reading displaced pixels

// The bytes from bit `bits` of `low` on; bits < 32.
GRADREP_HD GRADREP_INLINE uint32_t shifted(uint32_t low, uint32_t high, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, bits);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> bits);
#endif
}

GRADREP_HD GRADREP_INLINE uint32_t byte_of(uint32_t word, int i) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(word, 0, 0x4440 + i);
#else
  return word >> 8 * i & 255;
#endif
}

struct Shift {
  int32_t words;
  uint32_t bits;

  GRADREP_HD explicit Shift(int32_t distance) : words(distance >> 2), bits((distance & 3) * 8) {}
};

// ---- counting

struct Words {  // of a thread, kThreads apart
  const uint32_t* at;
  const uint32_t* end;
};

// Tables in a block's shared memory, the first at byte `at`: `cells` apart, and their rows `pitch`.
struct Tables {
  char* shared;
  uint32_t at;
  int32_t pitch, cells;

  // An address within shared memory. The compiler would add up its parts in an order that takes two instructions a
  // cell, not one.
  GRADREP_HD GRADREP_INLINE uint32_t row(uint32_t p) const {
    const uint32_t row = at + p * pitch * sizeof(uint32_t);
#if defined(__CUDA_ARCH__)
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + row;
    asm("" : "+r"(address));
    return address;
#else
    return row;
#endif
  }
  GRADREP_HD GRADREP_INLINE void count(uint32_t row, uint32_t q, int32_t table) const {
    const uint32_t address = row + (q + table * cells) * sizeof(uint32_t);
#if defined(__CUDA_ARCH__)
    add(static_cast<uint32_t*>(__cvta_shared_to_generic(address)), 1u);
#else
    add(reinterpret_cast<uint32_t*>(shared + address), 1u);
#endif
  }
};

// n displacements for each word at a time.
template <int n>
GRADREP_HD GRADREP_INLINE void count_displacements(const Words& words, const int32_t* distances, const Tables& tables) {
  const uint32_t* q[n];
  uint32_t bits[n];
#pragma unroll
  for (int d = 0; d < n; ++d) {
    const Shift shift(distances[d]);
    q[d] = words.at + shift.words;
    bits[d] = shift.bits;
  }
  for (const uint32_t* at = words.at; at < words.end; at += kThreads) {
    uint32_t rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = tables.row(byte_of(*at, i));
#pragma unroll
    for (int d = 0; d < n; ++d) {
      const uint32_t four = shifted(q[d][0], q[d][1], bits[d]);
#pragma unroll
      for (int i = 0; i < 4; ++i) tables.count(rows[i], byte_of(four, i), d);
      q[d] += kThreads;
    }
  }
}

// (0, 1), (1, -1), (1, 0), (1, 1): the last three share what they read. `below`: the distance of (1, -1).
GRADREP_HD GRADREP_INLINE void count_half_3x3(const Words& words, int32_t below, const Tables& tables) {
  const Shift shift(below);
  for (const uint32_t* at = words.at; at < words.end; at += kThreads) {
    const uint32_t* q = at + shift.words;
    const uint32_t p = at[0], next = at[1], low = shifted(q[0], q[1], shift.bits),
                   high = shifted(q[1], q[2], shift.bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t row = tables.row(byte_of(p, i));
      tables.count(row, i < 3 ? byte_of(p, i + 1) : byte_of(next, 0), 0);
#pragma unroll
      for (int d = 1; d < 4; ++d) tables.count(row, byte_of(i + d < 5 ? low : high, (i + d + 3) % 4), d);
    }
  }
}

}  // namespace gradrep
