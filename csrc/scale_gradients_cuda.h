// Gradients scaled in place by one number, in blocks of threads. No torch here (see cuda_blocks.h).
#pragma once

#include "launch_rows.h"

namespace gradrep {

template <typename S>
struct ScaleRow {
  S* grad;
  uint32_t numel;
  bool aligned;

  template <typename T>
  void take(const Piece& piece, const T*, const T*) {
    numel = static_cast<uint32_t>(piece.numel());
  }
};

template <typename S>
struct ScaleWork : LaunchRows<S, ScaleRow<S>, sizeof(void*)> {
  const Arithmetic<S>* factor;
};

template <typename S, int n>
GRADREP_HD GRADREP_INLINE void scale(S* at, Arithmetic<S> factor) {
  constexpr int part = Together<S, n>::kPart;
  Together<S, n> elements;
  elements.load(at);
#pragma unroll
  for (int k = 0; k < elements.kParts; ++k) {
    Arithmetic<S> g[part];
    elements.read(g);
#pragma unroll
    for (int i = 0; i < part; ++i) g[i] = g[i] * factor;
    elements.write(g);
    elements.turn();
  }
  elements.store(at);
}

// Where nothing is clipped, a block reads the factor and no more.
template <typename S>
GRADREP_HD GRADREP_INLINE void scale_block(const ScaleWork<S>& work, uint32_t block, int thread) {
  constexpr uint32_t width = kTogether<S>;
  const Arithmetic<S> factor = *work.factor;
  if (factor == 1) return;
  const ChunkOfRow chunk = work.chunk_of(block);
  S* const grad = work.row[chunk.row].grad;
  for (uint32_t at = chunk.begin + thread * width; at < chunk.wide_end; at += kThreads * width)
    scale<S, width>(grad + at, factor);
  for (uint32_t at = chunk.wide_end + thread; at < chunk.end; at += kThreads) scale<S, 1>(grad + at, factor);
}

}  // namespace gradrep
