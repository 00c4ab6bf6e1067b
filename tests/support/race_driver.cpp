// The torch-free loops of pair_ranges and joint_histogram on several std::threads, against one thread:
// test_sanitizers.py builds this with ThreadSanitizer, which through Python, OpenMP and a libtorch without it would
// drown in false reports.
#include "joint_histogram_cpu.h"
#include "pair_ranges_cpu.h"

#include <cstdio>
#include <random>
#include <thread>

using namespace gradrep;

namespace {

constexpr int64_t kThreads = 4;

struct Case {
  const char* desc;
  int64_t images, channels, height, width, radius, padding;
  int32_t bins;  // the most; 0: as many as there are, one after the other, by channel and displacement
  bool threads_share_a_channel = false;
};

constexpr Case kCases[] = {
    {"one channel, dealt by images: cubes and tables", 97, 1, 24, 24, 1, 1, 8, true},
    {"one channel, bins of each displacement", 41, 1, 12, 12, 1, 0, 0, true},
    {"two channels, tables alone, padding below the radius", 12, 2, 8, 7, 2, 1, 33, true},
    {"more than 255 bins", 9, 1, 8, 8, 1, 1, 257},
    {"blocks of channels", 3, 70, 9, 8, 1, 1, 7},
    {"blocks of channels and parts of the images", 10, 60, 6, 6, 1, 1, 7},
};

template <typename S>
S stored(float v) {
  if constexpr (std::is_same_v<S, BFloat16> || std::is_same_v<S, Half>) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits >>= 16;
    return {static_cast<uint16_t>(std::is_same_v<S, Half> ? bits & 0xbfffu : bits)};  // any finite number will do
  } else {
    return v;
  }
}

// All threads begin at once: one that starts late finds no task left.
int64_t most_at_once;
const auto parallel = [](int64_t n, const auto& f) {
  most_at_once = n;
  std::atomic<int64_t> waiting{n};
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n; ++i)
    threads.emplace_back([&] {
      waiting.fetch_sub(1, std::memory_order_relaxed);
      while (waiting.load(std::memory_order_relaxed) > 0) std::this_thread::yield();
      f();
    });
  for (std::thread& thread : threads) thread.join();
};

template <typename S>
struct Found {
  std::vector<Arithmetic<S>> ranges;
  std::vector<int64_t> n, counts;
  bool operator==(const Found&) const = default;
};

template <typename S>
Found<S> run(const Case& c, const FeatureMap<S>& map, const std::vector<Displacement>& displacements, bool remove_near,
             int64_t threads) {
  const int64_t rows = map.channels * displacements.size(), most = c.bins == 0 ? 20 : c.bins;
  std::vector<int32_t> bins(rows);
  for (int64_t row = 0; row < rows; ++row) bins[row] = c.bins == 0 ? 1 + row % most : c.bins;
  Found<S> found{std::vector<Arithmetic<S>>(rows * 4), std::vector<int64_t>(rows),
                 std::vector<int64_t>(rows * most * most)};
  pair_ranges(
      RangeArguments<S>{map, displacements, c.padding, c.padding, remove_near, found.ranges.data(), found.n.data()},
      threads, parallel);
  for (const bool add : {false, true})
    joint_histogram(HistogramArguments<S>{map, displacements, found.ranges.data(), bins.data(), most, c.padding,
                                          c.padding, remove_near, found.counts.data(), add},
                    threads, parallel);
  return found;
}

template <typename S>
int check(const Case& c, const char* dtype, bool channels_last, bool remove_near) {
  std::minstd_rand random;
  std::vector<S> values(c.images * c.channels * c.height * c.width);
  for (S& v : values) v = stored<S>(std::max(0.0f, static_cast<float>(random()) / random.max() - 0.4f));
  const int64_t pixels = c.height * c.width, across = channels_last ? c.channels : 1;
  const FeatureMap<S> map{
      values.data(),    c.images, c.channels, c.height, c.width, c.channels * pixels, channels_last ? 1 : pixels,
      c.width * across, across};
  std::vector<Displacement> displacements;
  for (int64_t i = 0; i <= c.radius; ++i)
    for (int64_t j = -c.radius; j <= c.radius; ++j)
      if (i > 0 || j > 0) displacements.push_back({i, j});
  const Found<S> one = run(c, map, displacements, remove_near, 1),
                 many = run(c, map, displacements, remove_near, kThreads);
  const bool shared = most_at_once > c.channels;
  if (one == many && (shared || !c.threads_share_a_channel)) return 0;
  std::printf("%s, %s, channels_last %d, remove_near %d: %s\n", c.desc, dtype, channels_last, remove_near,
              one == many ? "no threads shared a channel" : "not the results of one thread");
  return 1;
}

}  // namespace

int main() {
  int failures = 0;
  for (const Case& c : kCases)
    for (const bool channels_last : {false, true})
      for (const bool remove_near : {false, true}) {
        failures += check<float>(c, "float32", channels_last, remove_near);
        failures += check<double>(c, "float64", channels_last, remove_near);
        failures += check<BFloat16>(c, "bfloat16", channels_last, remove_near);
        failures += check<Half>(c, "float16", channels_last, remove_near);
      }
  return failures == 0 ? 0 : 1;
}
