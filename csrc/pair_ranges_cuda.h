// Ranges of both sides of the pairs, and how many pairs, in blocks of threads. No torch here (see cuda_blocks.h).
//
// Reads downwards: extrema over the pairs, one block -> from nothing, and to ranges -> all launches. What needs no
// pairs is in map_ranges_cuda.h.
//
// Which pixels take part depends on their place alone, unless zeros drop. Launches of pair_ranges_ for up to 128
// displacements, n not asked for:
//
//   padding >= every displacement, both ways   1  one range per channel: each of its pixels is on both sides of them
//                                                 all. For any number of displacements
//   less padding, kFewImages images or more    2  extrema over the images, in one read at the speed of memory, and the
//                                                 pairs of a small map of extrema
//   less padding, fewer images                 1  the pairs
//   remove_near                                1  the pairs
//
// Places are whole numbers below 2^31: in a map [C, H, W] of more, the pairs are looked at in every case. n takes one
// launch more, except with remove_near. pair_ranges begins with that launch, and ends with one that makes ranges.
#pragma once

#include "map_ranges_cuda.h"

#include <cstdlib>

namespace gradrep {

// ---- extrema over the pairs

template <typename S>
struct RangeWork : PairWork<S> {
  using T = Arithmetic<S>;
  static constexpr int kGroup = 4;

  T* ends = nullptr;    // [C, D, 2, 2]
  Count* n = nullptr;   // [C, D]
  bool counts = false;  // into n

  using PairWork<S>::PairWork;

  int64_t shared_bytes() const {
    return this->channels_together * kGroup * static_cast<int64_t>(4 * sizeof(T) + sizeof(uint32_t));
  }
};

template <typename S>
struct RangeBlock : Share<S> {
  using T = Arithmetic<S>;
  static constexpr int kGroup = RangeWork<S>::kGroup;
  const RangeWork<S>& work;
  Word<T>* ends;   // [channels_together, kGroup, 4], ordered
  uint32_t* left;  // [channels_together, kGroup]; a slab has fewer than 2^31 pixels

  GRADREP_HD RangeBlock(const RangeWork<S>& w, int64_t block, char* shared)
      : Share<S>(w, block),
        work(w),
        ends(reinterpret_cast<Word<T>*>(shared)),
        left(reinterpret_cast<uint32_t*>(ends + w.channels_together * kGroup * 4)) {}

  GRADREP_HD void prepare(int thread) const {
    for (int i = thread; i < work.channels_together * kGroup; i += kThreads) left[i] = 0;
    for (int i = thread; i < work.channels_together * kGroup * 4; i += kThreads)
      ends[i] = ordered<T>(word_of(kNothing<T>));
  }

  // A thread meets one channel only: their number divides that of the threads.
  GRADREP_HD void gather(int thread) const {
    T extrema[kGroup][4];
    uint32_t kept[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      kept[g] = 0;
      for (T& end : extrema[g]) end = kNothing<T>;
    }
    for (int64_t n = this->tile; n < this->tile_end; ++n)
      this->template each_pair<kGroup>(this->tile_at(n), thread, [&](int32_t, int32_t g, T p, T q) {
        ++kept[g];
        extrema[g][0] = greater(extrema[g][0], -p);
        extrema[g][1] = greater(extrema[g][1], p);
        extrema[g][2] = greater(extrema[g][2], -q);
        extrema[g][3] = greater(extrema[g][3], q);
      });
    const int32_t first = thread % work.channels_together * kGroup;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (kept[g] == 0) continue;
      add(left + first + g, kept[g]);
      for (int e = 0; e < 4; ++e) raise(ends + (first + g) * 4 + e, ordered<T>(word_of(extrema[g][e])));
    }
  }

  GRADREP_HD void flush(int thread) const {
#pragma unroll 1
    for (int32_t i = thread; i < this->channels * kGroup; i += kThreads) {
      const int32_t c = i / kGroup, g = i % kGroup;
      if (g >= this->count || left[i] == 0) continue;
      const int64_t row = work.row(this->channel + c, this->first + g);
      for (int e = 0; e < 4; ++e) raise_end(work.ends + row * 4 + e, number_of<T>(ordered<T>(ends[i * 4 + e])));
      if (work.counts) add(work.n + row, static_cast<Count>(left[i]));
    }
  }
};

template <typename S, typename Run>
GRADREP_HD void pair_ranges_block(const RangeWork<S>& work, int64_t number, char* shared, const Run& run) {
  const RangeBlock<S> block(work, number, shared);
  run([&](int thread) { block.prepare(thread); });
  run([&](int thread) { block.gather(thread); });
  run([&](int thread) { block.flush(thread); });
}

// ---- pairs that follow from the shapes, from nothing, and to ranges

template <typename T>
struct NumberWork {
  T* ends;     // [C, D, 2, 2], which begin with nothing; or null: n is added to
  int64_t* n;  // [C, D]
  int64_t channels, all_displacements;
  int32_t from, count;  // displacements of this launch
  int64_t numbers[kMostDisplacements];

  int64_t rows() const { return channels * count; }
  int64_t blocks() const { return (rows() + kThreads - 1) / kThreads; }
};

template <typename T>
GRADREP_HD void set_numbers(const NumberWork<T>& work, int64_t block, int thread) {
  const int64_t i = block * kThreads + thread;
  if (i >= work.channels * work.count) return;
  const int64_t d = i % work.count, row = i / work.count * work.all_displacements + work.from + d;
  work.n[row] = work.numbers[d] + (work.ends == nullptr ? work.n[row] : 0);
  for (int e = 0; e < 4 && work.ends != nullptr; ++e) work.ends[row * 4 + e] = kNothing<T>;
}

template <typename T>
struct FinalWork {
  T* ends;  // become ranges in place
  int64_t sides;

  int64_t blocks() const { return (sides + kThreads - 1) / kThreads; }
};

template <typename T>
GRADREP_HD void ends_to_ranges(const FinalWork<T>& work, int64_t block, int thread) {
  const int64_t side = block * kThreads + thread;
  if (side < work.sides) work.ends[2 * side] = -work.ends[2 * side] + T(0);  // -0.0 becomes +0.0
}

// ---- all launches

struct RangeOptions {
  const std::vector<Displacement>& displacements;
  int64_t pad_rows, pad_columns;
  bool remove_near;

  // Whether every pixel of a channel is on both sides of all displacements.
  bool one_range() const {
    return !remove_near && std::all_of(displacements.begin(), displacements.end(), [&](const Displacement& d) {
      return std::abs(d.rows) <= pad_rows && std::abs(d.columns) <= pad_columns;
    });
  }
};

template <typename S, typename Launch>
void launch_pairs(const FeatureMap<S>& map, const RangeOptions& options, Arithmetic<S>* ends, int64_t* n,
                  const Launch& launch) {
  RangeWork<S> work(map, options.pad_rows, options.pad_columns, options.remove_near);
  work.ends = ends;
  work.n = reinterpret_cast<Count*>(n);
  work.counts = n != nullptr;
  each_launch(work, options.displacements, [&](RangeWork<S>& some) {
    some.take_groups(RangeWork<S>::kGroup);
    launch(some);
  });
}

// Raises ends. launch(work) runs the blocks; launch.threads_at_once() of them run at once, and
// launch.template scratch<T>(n) is memory for n numbers. n: null without remove_near.
template <typename S, typename Launch>
void raise_ends(const FeatureMap<S>& map, const RangeOptions& options, Arithmetic<S>* ends, int64_t* n,
                const Launch& launch) {
  using T = Arithmetic<S>;
  const auto count = static_cast<int64_t>(options.displacements.size());
  if (is_empty(map) || count == 0) return;
  if (!places_fit(map) || options.remove_near) {
    launch_pairs(map, options, ends, n, launch);
  } else if (options.one_range()) {
    launch(ChannelWork<S>(map, launch.threads_at_once(), options.pad_rows > 0 || options.pad_columns > 0, count, ends));
  } else if (map.images < ExtremaWork<S>::kFewImages) {
    launch_pairs(map, options, ends, n, launch);
  } else {
    ExtremaWork<S> first(map, launch.threads_at_once());
    first.extrema = launch.template scratch<T>(first.size());
    launch(first);
    launch_pairs(first.map_of_extrema(map), options, ends, n, launch);
  }
}

// Sets n to the pairs that follow from the shapes, and ends to nothing. ends is null: adds to n.
template <typename S, typename Launch>
void launch_numbers(const FeatureMap<S>& map, const RangeOptions& options, Arithmetic<S>* ends, int64_t* n,
                    const Launch& launch) {
  const std::vector<Displacement>& all = options.displacements;
  const bool none = options.remove_near || is_empty(map);
  NumberWork<Arithmetic<S>> work{ends, n, map.channels, static_cast<int64_t>(all.size()), 0, 0, {}};
  for (size_t from = 0; from < all.size() && map.channels > 0; from += work.count) {
    work.from = static_cast<int32_t>(from);
    work.count = static_cast<int32_t>(std::min<size_t>(all.size() - from, kMostDisplacements));
    for (int32_t d = 0; d < work.count; ++d)
      work.numbers[d] = none ? 0
                             : map.images * pairs_along(map.height + 2 * options.pad_rows, all[from + d].rows) *
                                   pairs_along(map.width + 2 * options.pad_columns, all[from + d].columns);
    launch(work);
  }
}

// The op `pair_ranges_`; n may be null.
template <typename S, typename Launch>
void pair_ranges_add_launches(const FeatureMap<S>& map, const RangeOptions& options, Arithmetic<S>* ends, int64_t* n,
                              const Launch& launch) {
  if (n != nullptr && !options.remove_near) launch_numbers<S>(map, options, nullptr, n, launch);
  raise_ends(map, options, ends, options.remove_near ? n : nullptr, launch);
}

// The op `pair_ranges`. `ranges` and `n` hold anything.
template <typename S, typename Launch>
void pair_ranges_launches(const FeatureMap<S>& map, const RangeOptions& options, Arithmetic<S>* ranges, int64_t* n,
                          const Launch& launch) {
  launch_numbers(map, options, ranges, n, launch);
  raise_ends(map, options, ranges, options.remove_near ? n : nullptr, launch);
  const auto sides = 2 * map.channels * static_cast<int64_t>(options.displacements.size());
  if (sides > 0) launch(FinalWork<Arithmetic<S>>{ranges, sides});
}

}  // namespace gradrep
