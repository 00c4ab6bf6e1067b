// The tensors of a launch over parameters, as the kernel's parameters hold them. No torch here (see cuda_blocks.h).
//
// A row is a piece of a tensor, and a block works on one chunk of one row. Rows that one launch has no room for are
// another launch's.
#pragma once

#include "mult_places.h"
#include "stored.h"

#include <memory>

namespace gradrep {

// Bytes of a kernel's parameters, from sm_70 and CUDA 12.1 on.
constexpr int64_t kMostParameters = 32764;

enum class Form : int8_t { kNone, kConstant, kGeneral };  // of a multiplier

template <typename T>
struct PlacedRow {
  const T *scale, *identity;  // of the piece; or null
  uint32_t numel;
  MultPlaces places;
  Form form;

  // A piece of a tensor whose multiplier is at `mult` and `ones` (or null).
  void take(const Piece& piece, const T* mult, const T* ones) {
    bool constant = ones == nullptr && piece.address.layers == 1;
    for (const Level& level : piece.address.levels) constant = constant && (level.size == 1 || level.stride == 0);
    form = mult == nullptr ? Form::kNone : constant ? Form::kConstant : Form::kGeneral;
    scale = mult == nullptr ? nullptr : mult + piece.scale;
    identity = ones == nullptr ? nullptr : ones + piece.identity;
    numel = static_cast<uint32_t>(piece.numel());
    places = MultPlaces(piece);
  }

  // M where it is one number.
  GRADREP_HD GRADREP_INLINE T constant() const { return form == Form::kConstant ? *scale : T(1); }
  // M where it is not.
  GRADREP_HD GRADREP_INLINE T multiplier(uint32_t place) const { return places.multiplier(place, scale, identity); }

  // The layers of a scale at a place: G, and then the |α| of the branches that reach it. Where there is no scale, G and
  // one α are 1.
  // They are values and indices. Of a reference to the row, and of a pointer that may be null, the compiler does not
  // see to which memory it leads.
  struct Layers {
    const T *scale, *identity;
    uint32_t index, outer, count, stride;
    bool there, tap;

    GRADREP_HD GRADREP_INLINE T first() const { return there ? scale[index] : T(1); }
    // f(|α|) for each, the identity's last.
    template <typename F>
    GRADREP_HD GRADREP_INLINE void each_alpha(const F& f) const {
      if (!there) {
        f(T(1));
        return;
      }
#if defined(__CUDACC__)
#pragma unroll 1
#endif
      for (uint32_t n = 1; n < count; ++n) f(scale[index + n * stride]);
      if (tap) f(identity[outer]);
    }
  };
  GRADREP_HD GRADREP_INLINE Layers layers(uint32_t place) const {
    const bool there = form != Form::kNone;
    MultPlaces::Found found{0, 0, false};
    if (there) found = places.find(place, identity != nullptr);
    return {scale, identity, found.index, found.outer, places.layers, places.layer_stride, there, found.tap};
  }

  // M of the gradient norm where it is not one number: of layers it is Σ α².
  GRADREP_HD GRADREP_INLINE T norm_multiplier(uint32_t place) const {
    if (places.layers == 1) return multiplier(place);
    T m = 0;
    layers(place).each_alpha([&](T alpha) { m = m + alpha * alpha; });
    return m;
  }
};

// What a block works on: the places [begin, end) of a row, in accesses of 16 bytes up to wide_end.
struct ChunkOfRow {
  uint32_t row, begin, wide_end, end;
};

// S: the stored dtype. kOthers: bytes of the kernel's other parameters.
template <typename S, typename Row, int64_t kOthers>
struct LaunchRows {
  static constexpr uint32_t kRows = (kMostParameters - kOthers - 16) / (sizeof(Row) + sizeof(uint32_t));
  static constexpr uint32_t kLeastChunk = kThreads * kTogether<S>, kMostChunk = 8192;
  // Chunks of a launch at least, where it can have them: 8 for each of an H100's multiprocessors.
  static constexpr int64_t kChunks = 1024;

  uint32_t rows = 0, chunk = 0, chunks = 0;  // chunk: elements of a block
  uint32_t first_chunk[kRows];               // of each row
  Row row[kRows];

  int64_t blocks() const { return chunks; }

  // Chunks are as large as they can be, so that few blocks search for their row.
  void take_chunks() {
    int64_t total = 0;
    for (uint32_t n = 0; n < rows; ++n) total += row[n].numel;
    chunk = kMostChunk;
    while (chunk > kLeastChunk && total / chunk < kChunks) chunk /= 2;
    chunks = 0;
    for (uint32_t n = 0; n < rows; ++n) {
      first_chunk[n] = chunks;
      chunks += (row[n].numel + chunk - 1) / chunk;
    }
  }

  GRADREP_HD GRADREP_INLINE ChunkOfRow chunk_of(uint32_t block) const {
    uint32_t low = 0, high = rows;
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      if (first_chunk[middle] <= block)
        low = middle;
      else
        high = middle;
    }
    const uint32_t begin = (block - first_chunk[low]) * chunk, left = row[low].numel - begin;
    const uint32_t end = begin + (left < chunk ? left : chunk);
    return {low, begin, row[low].aligned ? end - end % kTogether<S> : begin, end};  // chunks begin at such multiples
  }
};

// Where a row comes from: its tensor's number, and its first element there.
struct RowSource {
  size_t tensor;
  int64_t start;
};

// The launches of one dtype.
template <typename Work>
class Launches {
 public:
  // A new row, and room for it.
  auto& new_row(const RowSource& source) {
    if (works_.empty() || works_.back()->rows == Work::kRows) works_.push_back(std::make_unique<Work>());
    sources_.push_back(source);
    Work& last = *works_.back();
    return last.row[last.rows++];
  }

  // Rows for a tensor and its multiplier, in pieces of at most `most` elements. take(row, piece) for each.
  template <typename Mult, typename Take>
  void add(size_t tensor, const Mult& mult, int64_t most, const Take& take) {
    for (const Piece& piece : pieces_of(mult.address, most)) {
      auto& row = new_row({tensor, piece.start});
      row.take(piece, mult.scale, mult.identity);
      take(row, piece);
    }
  }

  bool empty() const { return works_.empty(); }

  template <typename F>
  void each(const F& f) const {
    for (const auto& work : works_) f(*work);
  }
  // f(row, source), in the order in which they were made.
  template <typename F>
  void each_row(const F& f) const {
    auto source = sources_.begin();
    for (const auto& work : works_)
      for (uint32_t n = 0; n < work->rows; ++n) f(work->row[n], *source++);
  }

 private:
  std::vector<std::unique_ptr<Work>> works_;
  std::vector<RowSource> sources_;
};

}  // namespace gradrep
