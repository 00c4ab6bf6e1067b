// The blocks of the CUDA kernels, run on the CPU: for each block its phases, for each phase all threads, one after
// another. Odd blocks run their threads backwards: a phase in which one thread needs what another does gives other
// results there.
#include "emulated_threads.h"
#include "joint_histogram_cuda.h"
#include "pair_ranges_cuda.h"

#include <memory>

using namespace gradrep;

namespace {

constexpr int64_t kGuard = 1 << 12;
constexpr char kUntouched = 0x5a;

// What the tests ask for and are told.
struct Facts {
  int64_t most_shared, blocks_at_once, plan_alone;  // given
  int64_t launches, blocks, shared, tiled, private_tables, wild_writes;
  int64_t tiles, most_tiles;  // of all blocks, of one
  int64_t table_pitch;
};

struct Emulator {
  Facts& facts;
  mutable std::vector<double> memory;

  int64_t threads_at_once() const { return facts.blocks_at_once * kThreads; }

  template <typename T>
  T* scratch(int64_t n) const {
    memory.assign(n, 0.0 / 0.0);
    return reinterpret_cast<T*>(memory.data());
  }

  template <typename Work>
  void operator()(Work work) const {
    if constexpr (requires { work.table_pitch; }) facts.table_pitch = work.table_pitch;
    if constexpr (requires { work.take_slabs(1); }) {
      work.take_slabs(facts.blocks_at_once);
      facts.tiles += work.tiles * work.channel_blocks * work.groups;
      facts.most_tiles = std::max(facts.most_tiles, (work.tiles + work.slabs - 1) / work.slabs);
    }
    if constexpr (requires { work.shared_bytes(); })
      each_block(work, work.shared_bytes());
    else
      each_block(work, 0);
  }

  template <typename Work>
  void each_block(const Work& work, int64_t bytes) const {
    facts.launches += 1;
    facts.blocks += work.blocks();
    facts.shared = std::max(facts.shared, bytes);
    if (facts.plan_alone) return;
    for (int64_t block = 0; block < work.blocks(); ++block) {
      std::vector<int64_t> shared((bytes + 7) / 8 + 2 * kGuard / 8);
      std::memset(shared.data(), kUntouched, shared.size() * 8);
      char* own = reinterpret_cast<char*>(shared.data()) + kGuard;
      run(work, block, own);
      const auto touched = [](char c) { return c != kUntouched; };
      facts.wild_writes +=
          std::count_if(own - kGuard, own, touched) + std::count_if(own + bytes, own + bytes + kGuard, touched);
    }
  }

  template <typename S>
  void run(const HistogramWork<S>& work, int64_t block, char* shared) const {
    const Phases phases{block % 2 == 1};
    facts.private_tables += work.private_tables;
    facts.tiled += visit_counting(
        work, [&](auto counting) { return joint_histogram_block<decltype(counting)>(work, block, shared, phases); });
  }
  template <typename S>
  void run(const ChannelWork<S>& work, int64_t block, char* shared) const {
    channel_ranges_block(work, block, shared, Phases{block % 2 == 1});
  }
  template <typename S>
  void run(const ExtremaWork<S>& work, int64_t block, char*) const {
    Phases{block % 2 == 1}([&](int thread) { image_extrema(work, block, thread); });
  }
  template <typename S>
  void run(const RangeWork<S>& work, int64_t block, char* shared) const {
    pair_ranges_block(work, block, shared, Phases{block % 2 == 1});
  }
  template <typename T>
  void run(const NumberWork<T>& work, int64_t block, char*) const {
    Phases{block % 2 == 1}([&](int thread) { set_numbers(work, block, thread); });
  }
  template <typename T>
  void run(const FinalWork<T>& work, int64_t block, char*) const {
    Phases{block % 2 == 1}([&](int thread) { ends_to_ranges(work, block, thread); });
  }
};

struct Arguments {  // as the ops have them; the layout is also in cuda_pairs.py
  int64_t dtype;    // 0: float32, 1: float64, 2: bfloat16, 3: float16
  const void* x;
  int64_t sizes[4], strides[4];
  const int64_t* displacements;
  int64_t count, pad_rows, pad_columns, remove_near;
  void* ranges;         // an argument of joint_histogram_, a result of the others
  const int32_t* bins;  // null: pair_ranges, or pair_ranges_ with max_bins below 0
  int64_t max_bins;
  int64_t* result;  // counts, or n
};

template <typename S>
void emulate_as(const Arguments& a, const Emulator& emulator) {
  std::vector<Displacement> displacements;
  for (int64_t d = 0; d < a.count; ++d) displacements.push_back({a.displacements[2 * d], a.displacements[2 * d + 1]});
  const FeatureMap<S> map{static_cast<const S*>(a.x),
                          a.sizes[0],
                          a.sizes[1],
                          a.sizes[2],
                          a.sizes[3],
                          a.strides[0],
                          a.strides[1],
                          a.strides[2],
                          a.strides[3]};
  auto* ranges = static_cast<Arithmetic<S>*>(a.ranges);
  const RangeOptions options{displacements, a.pad_rows, a.pad_columns, a.remove_near != 0};
  if (a.bins == nullptr && a.max_bins < 0) return pair_ranges_add_launches(map, options, ranges, a.result, emulator);
  if (a.bins == nullptr) return pair_ranges_launches(map, options, ranges, a.result, emulator);
  joint_histogram_launches(map, displacements, ranges, a.bins, a.max_bins, a.pad_rows, a.pad_columns, a.remove_near,
                           a.result, emulator.facts.most_shared, emulator);
}

}  // namespace

extern "C" void emulate(const Arguments* arguments, Facts* facts) {
  const Emulator emulator{*facts, {}};
  switch (arguments->dtype) {
    case 0: return emulate_as<float>(*arguments, emulator);
    case 1: return emulate_as<double>(*arguments, emulator);
    case 2: return emulate_as<BFloat16>(*arguments, emulator);
    default: return emulate_as<Half>(*arguments, emulator);
  }
}

extern "C" int64_t quotients_that_differ(int64_t divisor) {
  const Division division(divisor);
  int64_t differ = 0;
  for (int64_t multiple = 0; multiple <= INT32_MAX;
       multiple += std::max<int64_t>(1, (INT32_MAX / divisor / 1000)) * divisor)
    for (int64_t n = std::max<int64_t>(0, multiple - 2); n < multiple + 2 && n <= INT32_MAX; ++n)
      differ += division.quotient(n) != n / divisor;
  return differ;
}
