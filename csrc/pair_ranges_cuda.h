// Ranges of both sides of the pairs, and how many pairs, in blocks of threads. No torch here (see cuda_blocks.h).
//
// Reads downwards: keys -> extrema over the images -> extrema over the pairs, one block -> keys to ranges -> all
// launches. Which pixels take part depends on their place alone, unless zeros drop: so extrema over the images come
// first, in one read at the speed of memory, and the pairs are those of a small map of extrema.
#pragma once

#include "cuda_blocks.h"

#include <cmath>

namespace gradrep {

// ---- keys: whole numbers in the order of the numbers they stand for, for atomic maxima. 0: no number, NaN: the last.

template <typename T>
using Key = std::conditional_t<sizeof(T) == 8, Count, uint32_t>;

template <typename T>
GRADREP_HD GRADREP_INLINE Key<T> key_of(T v) {
  constexpr Key<T> sign = Key<T>{1} << (8 * sizeof(T) - 1);
  Key<T> bits;
  memcpy(&bits, &v, sizeof bits);
  return v != v ? ~Key<T>{0} : bits & sign ? ~bits : bits | sign;
}

// The number as bits; no number: -infinity.
template <typename T>
GRADREP_HD GRADREP_INLINE T number_of(Key<T> key) {
  constexpr Key<T> sign = Key<T>{1} << (8 * sizeof(T) - 1);
  if (key == 0) return -static_cast<T>(INFINITY);
  if (key == ~Key<T>{0}) return static_cast<T>(NAN);
  const Key<T> bits = key & sign ? key ^ sign : ~key;
  T v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// ---- extrema over the images

template <typename S>
struct ExtremaWork {
  using T = Arithmetic<S>;
  static constexpr int64_t kFewImages = 8;  // are read as they are

  const S* data;
  T* extrema;  // [slabs, least | greatest, places]
  int64_t images, image_stride, places, slabs;
  struct Dimension {
    int64_t size, stride;
    int axis;
  } dimensions[3];  // in the order of memory, the closest first, which is also the order of places
  Division by_first, by_second;

  ExtremaWork(const FeatureMap<S>& map)
      : data(map.data),
        images(map.images),
        image_stride(map.image_stride),
        places(map.channels * map.height * map.width),
        dimensions{
            {map.width, map.column_stride, 2}, {map.height, map.row_stride, 1}, {map.channels, map.channel_stride, 0}} {
    std::stable_sort(dimensions, dimensions + 3,
                     [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  }

  bool worth_while() const { return images >= kFewImages && places <= INT32_MAX; }

  void plan(int64_t threads_at_once) {
    slabs = std::clamp<int64_t>(threads_at_once / places, 1, images / (kFewImages / 2));
    by_first = Division(dimensions[0].size);
    by_second = Division(dimensions[1].size);
  }

  int64_t size() const { return 2 * slabs * places; }
  int64_t blocks() const { return (places + kThreads - 1) / kThreads * slabs; }

  FeatureMap<T> map_of_extrema(const FeatureMap<S>& from) const {
    int64_t strides[3], by = 1;
    for (const Dimension& d : dimensions) {
      strides[d.axis] = by;
      by *= d.size;
    }
    return {extrema, 2 * slabs, from.channels, from.height, from.width, places, strides[0], strides[1], strides[2]};
  }
};

template <typename S>
GRADREP_HD void image_extrema(const ExtremaWork<S>& work, int64_t block, int thread) {
  using T = Arithmetic<S>;
  const int64_t slab = block % work.slabs, place = block / work.slabs * kThreads + thread;
  if (place >= work.places) return;
  const auto n = static_cast<uint32_t>(place);
  const uint32_t outer = work.by_first.quotient(n), outermost = work.by_second.quotient(outer);
  const int64_t image = work.images * slab / work.slabs, end = work.images * (slab + 1) / work.slabs;
  const S* at = work.data + image * work.image_stride + (n - outer * work.by_first.by) * work.dimensions[0].stride +
                (outer - outermost * work.by_second.by) * work.dimensions[1].stride +
                outermost * work.dimensions[2].stride;
  T least = widen(*at), greatest = least;
#pragma unroll 8
  for (int64_t i = image + 1; i < end; ++i) {
    const T v = widen(*(at += work.image_stride));
    least = lesser(least, v);
    greatest = greater(greatest, v);
  }
  work.extrema[2 * slab * work.places + place] = least;
  work.extrema[(2 * slab + 1) * work.places + place] = greatest;
}

// ---- extrema over the pairs

template <typename S>
struct RangeWork : PairWork<S> {
  using T = Arithmetic<S>;
  static constexpr int kGroup = 4;

  Key<T>* ends;    // [C, D, 2, 2]: keys of the greatest of -v and v
  Count* n;        // [C, D]
  int64_t images;  // of the op's map, of which this one may hold the extrema

  using PairWork<S>::PairWork;

  int64_t shared_bytes() const {
    return this->channels_together * kGroup * static_cast<int64_t>(4 * sizeof(Key<T>) + sizeof(uint32_t));
  }
};

template <typename S>
struct RangeBlock : Share<S> {
  using T = Arithmetic<S>;
  static constexpr int kGroup = RangeWork<S>::kGroup;
  const RangeWork<S>& work;
  Key<T>* ends;    // [channels_together, kGroup, 4]
  uint32_t* left;  // [channels_together, kGroup]; a slab has fewer than 2^31 pixels

  GRADREP_HD RangeBlock(const RangeWork<S>& w, int64_t block, char* shared)
      : Share<S>(w, block),
        work(w),
        ends(reinterpret_cast<Key<T>*>(shared)),
        left(reinterpret_cast<uint32_t*>(ends + w.channels_together * kGroup * 4)) {}

  GRADREP_HD void prepare(int thread) const {
    for (int i = thread; i < work.channels_together * kGroup; i += kThreads) left[i] = 0;
    for (int i = thread; i < work.channels_together * kGroup * 4; i += kThreads) ends[i] = 0;
  }

  // A thread meets one channel only: their number divides that of the threads.
  GRADREP_HD void gather(int thread) const {
    T extrema[kGroup][4];
    uint32_t kept[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      kept[g] = 0;
      for (T& end : extrema[g]) end = -static_cast<T>(INFINITY);
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
      for (int e = 0; e < 4; ++e) raise(ends + (first + g) * 4 + e, key_of(extrema[g][e]));
    }
  }

  GRADREP_HD void flush(int thread) const {
    for (int32_t i = thread; i < this->channels * kGroup; i += kThreads) {
      const int32_t c = i / kGroup, g = i % kGroup;
      if (g >= this->count) continue;
      const Listed& d = work.list[this->first + g];
      const int64_t row = work.row(this->channel + c, this->first + g);
      for (int e = 0; e < 4 && left[i] > 0; ++e) raise(work.ends + row * 4 + e, ends[i * 4 + e]);
      if (work.remove_near)
        add(work.n + row, static_cast<Count>(left[i]));
      else if (this->slab == 0)
        work.n[row] = static_cast<Count>(work.images * work.pairs(d.rows, d.columns));
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

// ---- keys to ranges, in place

template <typename T>
struct KeyWork {
  Key<T>* ends;
  int64_t count;

  int64_t blocks() const { return (count + kThreads - 1) / kThreads; }
};

template <typename T>
GRADREP_HD void keys_to_ranges(const KeyWork<T>& work, int64_t block, int thread) {
  const int64_t i = block * kThreads + thread;
  if (i >= work.count) return;
  const T v = number_of<T>(work.ends[i]), end = (i % 2 == 0 ? -v : v) + T(0);  // -0.0 becomes +0.0
  memcpy(work.ends + i, &end, sizeof end);
}

// ---- all launches

// `ranges` and `n` hold zeros. launch(work) runs the blocks; launch.threads_at_once() of them run at once, and
// launch.template scratch<T>(n) is memory for n numbers.
template <typename S, typename Launch>
void pair_ranges_launches(const FeatureMap<S>& map, const std::vector<Displacement>& displacements, int64_t pad_rows,
                          int64_t pad_columns, bool remove_near, Arithmetic<S>* ranges, int64_t* n,
                          const Launch& launch) {
  using T = Arithmetic<S>;
  auto* ends = reinterpret_cast<Key<T>*>(ranges);
  const auto ranges_of = [&](const auto& of) {
    using Work = RangeWork<std::remove_cv_t<std::remove_pointer_t<decltype(of.data)>>>;
    Work work(of, pad_rows, pad_columns, remove_near);
    work.ends = ends;
    work.n = reinterpret_cast<Count*>(n);
    work.images = map.images;
    each_launch(work, displacements, [&](Work& some) {
      some.take_groups(Work::kGroup);
      launch(some);
    });
  };
  if (!is_empty(map)) {
    ExtremaWork<S> first(map);
    if (remove_near || !first.worth_while()) {
      ranges_of(map);
    } else {
      first.plan(launch.threads_at_once());
      first.extrema = launch.template scratch<T>(first.size());
      launch(first);
      ranges_of(first.map_of_extrema(map));
    }
  }
  if (const KeyWork<T> last{ends, map.channels * static_cast<int64_t>(displacements.size()) * 4}; last.count > 0)
    launch(last);
}

}  // namespace gradrep
