// The work on many arrays as one parallel region: with a region per tensor, torch's own fused SGD loses bandwidth.
#pragma once

#include "common.h"

namespace gradrep {

// The arrays' elements in pieces, which threads share by the number of elements.
class Pieces {
 public:
  static constexpr int64_t kMost = 32768;  // elements of a piece

  struct Piece {
    size_t array;
    int64_t begin, end, before;  // elements of the array; elements of all pieces before this one
  };

  // The pieces of an array begin at multiples of `period`.
  void add(size_t array, int64_t numel, int64_t period) {
    const int64_t step = std::max<int64_t>(1, kMost / period) * period;
    for (int64_t begin = 0; begin < numel; begin += step) {
      const int64_t end = std::min(numel, begin + step);
      pieces_.push_back({array, begin, end, total_});
      total_ += end - begin;
    }
  }

  // f(piece, its number) for all pieces, or for one after the other where they are `serial`.
  template <typename F>
  void run(bool serial, const F& f) const {
    const auto run_some = [&](size_t from, size_t to) {
      for (size_t n = from; n < to; ++n) f(pieces_[n], n);
    };
    const int64_t threads = serial || total_ < kMost ? 1 : torch::stable::get_num_threads();
    if (threads <= 1) return run_some(0, pieces_.size());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
      run_some(share_begin(from, threads), share_begin(to, threads));
    });
  }

  // The sum of f(piece), in double. It does not depend on the threads.
  template <typename F>
  double sum(const F& f) const {
    std::vector<double> sums(pieces_.size());
    run(false, [&](const Piece& piece, size_t n) { sums[n] = f(piece); });
    double total = 0;
    for (const double one : sums) total += one;
    return total;
  }

 private:
  // The first piece of thread t's share, shares being equal in elements.
  size_t share_begin(int64_t t, int64_t threads) const {
    if (t >= threads) return pieces_.size();
    const int64_t share = total_ / threads * t;
    const auto is_before = [](const Piece& piece, int64_t at) { return piece.before < at; };
    return std::lower_bound(pieces_.begin(), pieces_.end(), share, is_before) - pieces_.begin();
  }

  std::vector<Piece> pieces_;
  int64_t total_ = 0;
};

}  // namespace gradrep
