// Ends of ranges that many threads raise, and the reads of a whole map that need no pairs. No torch here (see
// cuda_blocks.h).
//
// Reads downwards: ends -> places of the map -> one range per channel -> extrema over the images.
#pragma once

#include "cuda_blocks.h"

#include <limits>

namespace gradrep {

// ---- ends: the greatest of -v and of v

template <typename T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

// The bits of a number, as a whole number that CUDA has atomics for: -0.0 as those of +0.0, NaN as the last of all.
template <typename T>
using Word = std::conditional_t<sizeof(T) == 8, long long, int32_t>;
template <typename T>
constexpr Word<T> kLastWord = std::numeric_limits<Word<T>>::max();

template <typename T>
GRADREP_HD GRADREP_INLINE Word<T> word_of(T v) {
  v = v != v ? kNaN<T> : v + T(0);
  Word<T> word;
  memcpy(&word, &v, sizeof word);
  return word;
}

// Words in the order of their numbers, for the block's own ends; the same again turns them back.
template <typename T>
GRADREP_HD GRADREP_INLINE Word<T> ordered(Word<T> word) {
  return word < 0 ? word ^ kLastWord<T> : word;
}

template <typename T>
GRADREP_HD GRADREP_INLINE T number_of(Word<T> word) {
  T v;
  memcpy(&v, &word, sizeof v);
  return v;
}

// Raises an end in the result. Numbers of one sign are in the order of their bits: a maximum of signed words raises to
// v >= 0, as all below 0 are below it, and a minimum of unsigned ones raises to v < 0, as all from 0 on are below it.
template <typename T>
GRADREP_HD GRADREP_INLINE void raise_end(T* end, T v) {
  using Unsigned = std::make_unsigned_t<Word<T>>;
  // Most blocks find it raised already. Volatile, because a line of L1 may be from before. A NaN of before may have
  // either sign.
  const T so_far = *static_cast<const volatile T*>(end);
  if (so_far != so_far || v <= so_far) return;
  Word<T> word = word_of(v);
#if defined(__CUDA_ARCH__)
  if (word < 0)
    atomicMin(reinterpret_cast<Unsigned*>(end), static_cast<Unsigned>(word));
  else
    atomicMax(reinterpret_cast<Word<T>*>(end), word);
#else
  Word<T> before;
  memcpy(&before, &so_far, sizeof before);
  if (word < 0)
    word = static_cast<Word<T>>(std::min(static_cast<Unsigned>(before), static_cast<Unsigned>(word)));
  else
    word = std::max(before, word);
  memcpy(end, &word, sizeof word);
#endif
}

// ---- places of the map [C, H, W] in the order of memory, and slabs of images: coalesced in every layout

template <typename S>
struct PlaceWork {
  using T = Arithmetic<S>;
  static constexpr int64_t kLeastImages = 4;  // of a slab, if there are so many

  const S* data;
  int64_t images, image_stride, places, slabs;
  struct Dimension {
    int64_t size, stride;
    int axis;
  } dimensions[3];  // in the order of memory, the closest first, which is also the order of places
  Division by_first, by_second;

  PlaceWork(const FeatureMap<S>& map, int64_t threads_at_once)
      : data(map.data),
        images(map.images),
        image_stride(map.image_stride),
        places(map.channels * map.height * map.width),
        slabs(std::clamp<int64_t>(threads_at_once / places, 1, std::max<int64_t>(1, images / kLeastImages))),
        dimensions{
            {map.width, map.column_stride, 2}, {map.height, map.row_stride, 1}, {map.channels, map.channel_stride, 0}} {
    std::stable_sort(dimensions, dimensions + 3,
                     [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
    by_first = Division(dimensions[0].size);
    by_second = Division(dimensions[1].size);
  }

  int64_t blocks() const { return (places + kThreads - 1) / kThreads * slabs; }

  GRADREP_HD int64_t slab(int64_t block) const { return block % slabs; }
  GRADREP_HD int64_t first_place(int64_t block) const { return block / slabs * kThreads; }
};

template <typename S>
bool places_fit(const FeatureMap<S>& map) {
  return map.channels * map.height * map.width <= INT32_MAX;
}

// Where a place lies along each dimension.
struct PlaceIndex {
  uint32_t at[3];

  // An index that only the launch knows would put the array into memory.
  GRADREP_HD uint32_t along(int32_t dimension) const { return dimension == 0 ? at[0] : dimension == 1 ? at[1] : at[2]; }

  template <typename S>
  GRADREP_HD PlaceIndex(const PlaceWork<S>& work, int64_t place) {
    const auto n = static_cast<uint32_t>(place);
    const uint32_t outer = work.by_first.quotient(n), outermost = work.by_second.quotient(outer);
    at[0] = n - outer * work.by_first.by;
    at[1] = outer - outermost * work.by_second.by;
    at[2] = outermost;
  }
};

template <typename S>
struct ImageExtrema {  // of one place, over the images of a slab
  using T = Arithmetic<S>;
  T least, greatest;

  GRADREP_HD ImageExtrema(const PlaceWork<S>& work, int64_t slab, const PlaceIndex& index) {
    const int64_t image = work.images * slab / work.slabs, end = work.images * (slab + 1) / work.slabs;
    const S* at = work.data + image * work.image_stride;
    for (int d = 0; d < 3; ++d) at += index.at[d] * work.dimensions[d].stride;
    least = greatest = widen(*at);
#pragma unroll 8
    for (int64_t i = image + 1; i < end; ++i) {
      const T v = widen(*(at += work.image_stride));
      least = lesser(least, v);
      greatest = greater(greatest, v);
    }
  }
};

// ---- one range per channel

template <typename S>
struct ChannelWork : PlaceWork<S> {
  using T = Arithmetic<S>;

  T* ends;                  // [C, D, 2, 2]
  int64_t cells, channels;  // cells: of a channel, 4 D
  bool zeros;               // of the padding, which are on both sides too
  int32_t channel_at;       // which dimension
  // Channels that the places of a block may be of. They follow one another, the first one after the last.
  int32_t slots;
  int32_t replicas;  // of a slot, so that the threads of a warp seldom want one number at once; a power of 2
  Division by_cells;

  ChannelWork(const FeatureMap<S>& map, int64_t threads_at_once, bool padded, int64_t displacements, T* all_ends)
      : PlaceWork<S>(map, threads_at_once),
        ends(all_ends),
        cells(4 * displacements),
        channels(map.channels),
        zeros(padded),
        channel_at(0),
        replicas(1),
        by_cells(cells) {
    int64_t run = 1;  // places of one channel that follow one another
    for (; this->dimensions[channel_at].axis != 0; ++channel_at) run *= this->dimensions[channel_at].size;
    slots = static_cast<int32_t>(std::min({channels, (kThreads - 2) / run + 2, int64_t{kThreads}}));
    while (replicas < kWarp && 2 * replicas * slots <= kThreads) replicas *= 2;
  }

  int64_t shared_bytes() const { return int64_t{2} * slots * replicas * sizeof(T); }

  static constexpr int32_t kWarp = 32;
};

template <typename S>
struct ChannelBlock {
  using T = Arithmetic<S>;
  const ChannelWork<S>& work;
  int64_t slab, first_place;
  uint32_t first_channel;
  Word<T>* own;  // [slots, replicas, 2]: ends of the block, ordered

  GRADREP_HD ChannelBlock(const ChannelWork<S>& w, int64_t block, char* shared)
      : work(w),
        slab(w.slab(block)),
        first_place(w.first_place(block)),
        first_channel(PlaceIndex(w, first_place).along(w.channel_at)),
        own(reinterpret_cast<Word<T>*>(shared)) {}

  GRADREP_HD void prepare(int thread) const {
    const Word<T> first = ordered<T>(word_of(work.zeros ? T(0) : kNothing<T>));
    for (int32_t i = thread; i < 2 * work.slots * work.replicas; i += kThreads) own[i] = first;
  }

  GRADREP_HD void gather(int thread) const {
    if (first_place + thread >= work.places) return;
    const PlaceIndex index(work, first_place + thread);
    const ImageExtrema<S> extrema(work, slab, index);
    const auto channels = static_cast<uint32_t>(work.channels);
    const uint32_t channel = index.along(work.channel_at);
    const uint32_t slot = channel >= first_channel ? channel - first_channel : channel + channels - first_channel;
    Word<T>* ends = own + 2 * (slot * work.replicas + (thread & (work.replicas - 1)));
    raise(ends, ordered<T>(word_of(-extrema.least)));
    raise(ends + 1, ordered<T>(word_of(extrema.greatest)));
  }

  GRADREP_HD void merge(int thread) const {
    for (int32_t i = thread; i < 2 * work.slots; i += kThreads) {
      Word<T>* ends = own + 2 * (i / 2) * work.replicas + i % 2;
      for (int32_t r = 1; r < work.replicas; ++r)
        if (ends[2 * r] > ends[0]) ends[0] = ends[2 * r];
    }
  }

  GRADREP_HD void flush(int thread) const {
    const auto all = static_cast<uint32_t>(work.slots * work.cells), channels = static_cast<uint32_t>(work.channels);
    for (uint32_t i = thread; i < all; i += kThreads) {
      const uint32_t slot = work.by_cells.quotient(i), cell = i - slot * work.by_cells.by;
      const uint32_t channel = first_channel + slot < channels ? first_channel + slot : first_channel + slot - channels;
      raise_end(work.ends + channel * work.cells + cell,
                number_of<T>(ordered<T>(own[2 * slot * work.replicas + cell % 2])));
    }
  }
};

template <typename S, typename Run>
GRADREP_HD void channel_ranges_block(const ChannelWork<S>& work, int64_t number, char* shared, const Run& run) {
  const ChannelBlock<S> block(work, number, shared);
  run([&](int thread) { block.prepare(thread); });
  run([&](int thread) { block.gather(thread); });
  run([&](int thread) { block.merge(thread); });
  run([&](int thread) { block.flush(thread); });
}

// ---- extrema over the images

template <typename S>
struct ExtremaWork : PlaceWork<S> {
  using T = Arithmetic<S>;
  static constexpr int64_t kFewImages = 8;  // are read as they are

  T* extrema = nullptr;  // [slabs, least | greatest, places]

  using PlaceWork<S>::PlaceWork;

  int64_t size() const { return 2 * this->slabs * this->places; }

  FeatureMap<T> map_of_extrema(const FeatureMap<S>& from) const {
    int64_t strides[3], by = 1;
    for (const auto& d : this->dimensions) {
      strides[d.axis] = by;
      by *= d.size;
    }
    return {extrema,      2 * this->slabs, from.channels, from.height, from.width,
            this->places, strides[0],      strides[1],    strides[2]};
  }
};

template <typename S>
GRADREP_HD void image_extrema(const ExtremaWork<S>& work, int64_t block, int thread) {
  const int64_t slab = work.slab(block), place = work.first_place(block) + thread;
  if (place >= work.places) return;
  const ImageExtrema<S> extrema(work, slab, PlaceIndex(work, place));
  work.extrema[2 * slab * work.places + place] = extrema.least;
  work.extrema[(2 * slab + 1) * work.places + place] = extrema.greatest;
}

}  // namespace gradrep
