// Every loop as it was compiled for each instruction set of this machine, against the base: the results must have the
// same bits. Prints how many results it compared for each set.
#include "bin_stacks.h"
#include "pair_counting.h"
#include "pair_ranges_cpu.h"
#include "rep_adamw_update.h"
#include "rep_sgd_update.h"
#include "rounding.h"
#include "step_tail.h"
#include "stored.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <utility>

#define GRADREP_LOOPS "rep_grad_norm_loops.h"
#include "for_each_target.h"
#define GRADREP_LOOPS "tail_loops.h"
#include "for_each_target.h"
#define GRADREP_LOOPS "step_loops.h"
#include "for_each_target.h"
#define GRADREP_LOOPS "adamw_loops.h"
#include "for_each_target.h"

using namespace gradrep;

namespace {

using GradNormLoops = PerTarget<base::GradNormLoops, avx2::GradNormLoops, avx512::GradNormLoops>;
using AdamwLoops = PerTarget<base::AdamwLoops, avx2::AdamwLoops, avx512::AdamwLoops>;
using TailLoops = PerTarget<base::TailLoops, avx2::TailLoops, avx512::TailLoops>;

constexpr int64_t kSizes[] = {
    0, 1, 15, 16, 33, 64, 127, 1000, 16 * 49 * 2 + 5};  // tails and whole vectors of any width
constexpr int64_t kMost = 2000, kPitch = 9;

int compared[3], failures;

// Numbers with everything that rounds or compares in a way of its own.
template <typename S>
std::vector<S> values(int64_t n, int seed, bool finite = false) {
  std::minstd_rand random(seed);
  std::vector<S> made(n);
  for (S& value : made) {
    float v = static_cast<float>(random()) / random.max() * 4 - 2;
    const auto kind = random() % 16;
    if (kind == 0) v = 0;
    if (kind == 1) v = -0.0f;
    if (kind == 2) v *= 1e-30f * 1e-10f;
    if (kind == 3 && !finite) v = INFINITY;
    if (kind == 4 && !finite) v = NAN;
    if constexpr (std::is_same_v<S, BFloat16> || std::is_same_v<S, Half>) {
      uint32_t bits;
      std::memcpy(&bits, &v, sizeof bits);
      value.bits = static_cast<uint16_t>(bits >> 16);
    } else {
      value = static_cast<S>(v) * (1 + static_cast<S>(random()) * static_cast<S>(1e-12));
    }
  }
  return made;
}

std::vector<uint8_t> bin_numbers(int64_t n, int seed) {
  std::minstd_rand random(seed);
  std::vector<uint8_t> made(n);
  for (uint8_t& number : made) number = static_cast<uint8_t>(random() % kPitch);
  return made;
}

template <typename E>
bool same(E a, E b) {
  return (a != a && b != b) || std::memcmp(&a, &b, sizeof a) == 0;  // which NaN it is depends on the order of operands
}

// result(target) runs a loop on data of its own and returns arrays.
template <typename Result>
void check(const std::string& desc, const Result& result) {
  const auto expected = result(Target::kBase);
  for (const Target target : {Target::kAvx2, Target::kAvx512}) {
    if (!supports(target)) continue;
    const auto given = result(target);
    bool equal = given.size() == expected.size();
    for (size_t i = 0; equal && i < given.size(); ++i) equal = same(given[i], expected[i]);
    ++compared[static_cast<int>(target)];
    if (equal) continue;
    ++failures;
    std::printf("%s, %s: not the bits of the base\n", desc.c_str(), target == Target::kAvx2 ? "avx2" : "avx512");
  }
}

template <typename T>
std::vector<T> joined(std::vector<T> a, const std::vector<T>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// One loop of a step, by instruction set. Without `taps`, the loops are those for one number or for an array.
template <typename T>
struct StepLoop {
  using Loop = void (*)(T*, const T*, const T*, int64_t, SgdUpdate::Numbers<T>, T*);
  using TapsLoop = void (*)(T*, const T*, const T*, int64_t, SgdUpdate::Numbers<T>, int64_t, T, T*);
  Loop loop[3] = {};
  TapsLoop taps[3] = {};
};

template <typename T>
void check_step(const char* desc, const StepLoop<T>& loops) {
  static const auto g = values<T>(kMost, 3), m = values<T>(kMost, 4);
  const SgdUpdate::Numbers<T> h{T(0.1), T(0.9), T(0.8), T(1e-4)};
  for (const int64_t n : kSizes)
    for (const int64_t odd : {-1, 3, 500, 999}) {
      if (odd >= n || (odd >= 0 && loops.taps[0] == nullptr)) continue;
      check(desc, [&](Target target) {
        const auto set = static_cast<int>(target);
        auto p = values<T>(kMost, 1), buffer = values<T>(kMost, 2);
        if (loops.taps[0] == nullptr)
          loops.loop[set](p.data(), g.data(), m.data(), n, h, buffer.data());
        else
          loops.taps[set](p.data(), g.data(), m.data(), n, h, odd, T(1.5), buffer.data());
        return joined(p, buffer);
      });
    }
}

template <typename T, int variant>
void check_variant() {
  using Base = base::StepLoops::Of<SgdUpdate, variant, T, T>;
  using Avx2 = avx2::StepLoops::Of<SgdUpdate, variant, T, T>;
  using Avx512 = avx512::StepLoops::Of<SgdUpdate, variant, T, T>;
  check_step<T>("constant", {{Base::constant, Avx2::constant, Avx512::constant}, {}});
  check_step<T>("array", {{Base::array, Avx2::array, Avx512::array}, {}});
  if constexpr (SgdUpdate::is_frequent(variant))
    check_step<T>("9 taps", {{}, {Base::template taps<9>, Avx2::template taps<9>, Avx512::template taps<9>}});
}

// With weight decay: without, every variant does the same but for one product and one sum.
template <typename T>
void check_steps() {
  check_variant<T, 2 * SgdUpdate::kNone + 1>();
  check_variant<T, 2 * SgdUpdate::kPlain + 1>();
  check_variant<T, 2 * SgdUpdate::kNesterov + 1>();
  check_variant<T, 2 * SgdUpdate::kFirst + 1>();
  check_variant<T, 2 * SgdUpdate::kFirstNesterov + 1>();
  using Base = base::StepLoops::Of<SgdUpdate, 2 * SgdUpdate::kPlain, T, T>;
  using Avx2 = avx2::StepLoops::Of<SgdUpdate, 2 * SgdUpdate::kPlain, T, T>;
  using Avx512 = avx512::StepLoops::Of<SgdUpdate, 2 * SgdUpdate::kPlain, T, T>;
  check_step<T>("25 taps", {{}, {Base::template taps<25>, Avx2::template taps<25>, Avx512::template taps<25>}});
  check_step<T>("49 taps", {{}, {Base::template taps<49>, Avx2::template taps<49>, Avx512::template taps<49>}});
}

// A run of AdamW, whole, of one and two branches, and in parts.
template <typename T, int variant>
void check_adamw_variant() {
  static const auto g = values<T>(kMost, 40), factor = values<T>(kMost, 41);
  static const auto first = values<T>(kMost, 42), second = values<T>(kMost, 43);
  const AdamwUpdate::Numbers<T> h{T(0.1), T(0.1), T(0.9), T(0.99), T(0.01), T(1e-8), T(0.999), T(3)};
  for (const int64_t n : kSizes)
    for (const int branches : {0, 1, 2, 3})
      check("adamw of " + std::to_string(branches) + " branches", [&](Target target) {
        auto p = values<T>(kMost, 44), m = values<T>(kMost, 45), v = values<T>(kMost, 46), x = values<T>(kMost, 47);
        std::vector<T> n_of(kMost), s_of(kMost), sum(kMost);
        AdamwLoops::on(target, [&]<typename Loops>(Loops loops) {
          using Of = typename Loops::template Of<variant, T>;
          if (branches == 0) {
            Of::whole(p.data(), g.data(), n, h, T(-1), m.data(), v.data(), x.data());
          } else if (branches == 1) {
            Of::one_branch(p.data(), g.data(), factor.data(), first.data(), n, h, m.data(), v.data(), x.data());
          } else if (branches == 2) {
            Of::two_branches(p.data(), g.data(), factor.data(), first.data(), second.data(), n, h, m.data(), v.data(),
                             x.data());
          } else {
            Of::shared(g.data(), factor.data(), n, h, m.data(), v.data(), x.data(), n_of.data(), s_of.data());
            Of::first(n_of.data(), s_of.data(), first.data(), n, h, sum.data());
            Of::further(n_of.data(), s_of.data(), second.data(), n, h, sum.data());
            Of::move(p.data(), sum.data(), n, h);
            loops.add_square(second.data(), n, sum.data());
          }
        });
        return joined(joined(joined(p, m), joined(v, x)), sum);
      });
}

template <typename T>
void check_adamw() {
  check_adamw_variant<T, 0>();
  check_adamw_variant<T, 1>();
  check_adamw_variant<T, 2>();
  check_adamw_variant<T, 3>();
}

template <typename S>
std::vector<float> widened(const std::vector<S>& stored) {
  std::vector<float> wide;
  for (const S value : stored) wide.push_back(widen(value));
  return wide;
}

// A step with an average or random bits, by variant, in the loops of one instruction set.
template <typename Loops, int variant, bool averages, typename State>
std::vector<float> tail_step(int64_t n, uint64_t element) {
  using Of = typename Loops::template Of<SgdUpdate, variant, averages, float, State>;
  static const auto g = values<float>(kMost, 21), m = values<float>(kMost, 22);
  const SgdUpdate::Numbers<float> h{0.1f, 0.9f, 0.8f, 1e-4f};
  auto p = values<float>(kMost, 23), e = values<float>(kMost, 24);
  auto state = values<State>(kMost, 25);
  if constexpr (std::is_same_v<State, float>)
    Of::array(p.data(), g.data(), m.data(), n, h, 0.7f, e.data(), 0.1f, state.data());
  else
    Of::random(p.data(), g.data(), m.data(), n, h, 0.7f, e.data(), 0.1f, RandomStream(1, 2, 3), element, state.data());
  return joined(joined(p, e), widened(state));
}

template <int variant, bool averages, typename State>
void check_tail_step(const char* desc) {
  for (const int64_t n : kSizes)
    for (const uint64_t element : {uint64_t{0}, uint64_t{5}, (uint64_t{1} << 35) - 64})
      check(desc, [&](Target target) {
        if (target == Target::kAvx512) return tail_step<avx512::TailStepLoops, variant, averages, State>(n, element);
        if (target == Target::kAvx2) return tail_step<avx2::TailStepLoops, variant, averages, State>(n, element);
        return tail_step<base::TailStepLoops, variant, averages, State>(n, element);
      });
}

template <typename S>
void check_stored(const std::string& dtype) {
  using T = Arithmetic<S>;
  const auto stored = values<S>(kMost, 26);
  const auto wide = values<T>(kMost, 27);
  const auto bits = bin_numbers(2 * kMost, 28);
  for (const int64_t n : kSizes)
    check("loops of the tail " + dtype, [&](Target target) {
      auto made = values<T>(kMost, 29), multiplied = values<T>(kMost, 34);
      auto average = values<T>(kMost, 30), divided = values<T>(kMost, 31);
      auto narrowed = values<S>(kMost, 32), scaled = stored;
      auto rounded = values<BFloat16>(kMost, 33);
      TailLoops::on(target, [&](auto loops) {
        if constexpr (!std::is_same_v<S, T>) {
          loops.widen_all(stored.data(), n, made.data());
          loops.narrow_all(wide.data(), n, narrowed.data());
        }
        loops.multiply(wide.data(), T(0.3), n, multiplied.data());
        loops.round_all(wide.data(), reinterpret_cast<const uint16_t*>(bits.data()), n, rounded.data());
        loops.divide(divided.data(), n, T(3));
        loops.scale(scaled.data(), n, T(0.3));
        loops.average(stored.data(), n, average.data(), T(0.1));
      });
      std::vector<T> all = joined(joined(made, multiplied), joined(average, divided));
      for (const S value : joined(narrowed, scaled)) all.push_back(widen(value));
      for (const BFloat16 value : rounded) all.push_back(widen(value));
      return all;
    });
}

// Philox against kat_vectors of Random123, and the draws of each instruction set against one element at a time.
void check_random_bits() {
  const RandomWords answers[3] = {{{0x5f6fb709u, 0x0d893f64u, 0x4f121f81u, 0x4f730a48u}},
                                  {{0x5207ddc2u, 0x45165e59u, 0x4d8ee751u, 0x8c52f662u}},
                                  {{0x4dfccabau, 0x190a87f0u, 0xc47362bau, 0xb6b5242au}}};
  const RandomWords given[3] = {
      philox(0, 0, 0, 0, 0, 0), philox(~0u, ~0u, ~0u, ~0u, ~0u, ~0u),
      philox(0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0xa4093822u, 0x299f31d0u)};
  if (std::memcmp(answers, given, sizeof answers) != 0) ++failures, std::printf("philox: not the known answers\n");
  const RandomStream stream((uint64_t{5} << 32) + 7, 9, 11);
  for (const uint64_t group : {uint64_t{0}, uint64_t{3}, (uint64_t{1} << 32) - 2})  // the counter wraps
    for (const Target target : {Target::kBase, Target::kAvx2, Target::kAvx512}) {
      if (!supports(target)) continue;
      std::vector<uint16_t> drawn(kMost + base::RandomBits::kDrawn);
      TailLoops::on(target, [&](auto loops) { loops.random_bits(stream, 1, group, kMost, drawn.data()); });
      int unlike = 0;
      for (int64_t i = 0; i < kMost; ++i) unlike += drawn[i] != stream.words(8 * group + i, 1).of(i);
      if (unlike > 0) ++failures, std::printf("random_bits: %d are not those of their elements\n", unlike);
    }
}

void check_tails() {
  check_random_bits();
  check_tail_step<2 * SgdUpdate::kNone + 1, true, float>("average");
  check_tail_step<2 * SgdUpdate::kPlain + 1, true, float>("average");
  check_tail_step<2 * SgdUpdate::kNesterov, true, float>("average");
  check_tail_step<2 * SgdUpdate::kPlain, false, BFloat16>("random bits");
  check_tail_step<2 * SgdUpdate::kNesterov + 1, false, BFloat16>("random bits");
  check_tail_step<2 * SgdUpdate::kPlain + 1, true, BFloat16>("average and random bits");
  check_stored<float>("float32");
  check_stored<double>("float64");
  check_stored<BFloat16>("bfloat16");
  check_stored<Half>("float16");
}

template <typename S>
void check_norm(const std::string& dtype) {
  using M = std::conditional_t<std::is_same_v<S, double>, double, float>;  // as M is computed for gradients of S
  const auto g = values<S>(kMost, 5, true);
  const auto m = values<M>(kMost, 6, true);
  for (const int64_t n : kSizes)
    check("add_squares " + dtype, [&](Target target) {
      std::vector<double> sums(2 * base::GradNormLoops::kLanes, 0.5);
      GradNormLoops::on(target, [&](auto loops) {
        loops.add_squares(g.data(), n, sums.data(), m.data());
        loops.add_squares(g.data(), n, sums.data() + base::GradNormLoops::kLanes);
      });
      return sums;
    });
}

template <typename S>
void check_ranges(const std::string& dtype) {
  using T = Arithmetic<S>;
  const auto p = values<S>(kMost, 7), q = values<S>(kMost, 8);
  for (const int64_t n : kSizes) {
    check("merge_rows " + dtype, [&](Target target) {
      auto least = values<T>(kMost, 9), greatest = values<T>(kMost, 10);
      RangeLoops::on(target, [&](auto loops) {
        loops.merge_rows(p.data(), n == 0 ? 0 : kMost / n, n, n, least.data(), greatest.data());
      });
      return joined(least, greatest);
    });
    check("merge_lanes " + dtype, [&](Target target) {
      auto least = values<T>(kLanes, 11), greatest = values<T>(kLanes, 12);
      RangeLoops::on(target, [&](auto loops) {
        loops.merge_lanes(p.data(), n / kLanes, kLanes, q.data(), least.data(), greatest.data());
      });
      return joined(least, greatest);
    });
    check("merge_near " + dtype, [&](Target target) {
      NearExtrema<T> e{};
      const int64_t whole = n / kNearLanes * kNearLanes;
      const auto merge = [&](auto loops) { return loops.merge_near(p.data(), q.data(), whole, e); };
      std::vector<T> result{static_cast<T>(RangeLoops::on(target, merge))};
      for (int j = 0; j < kNearLanes; ++j)
        for (const T number :
             {e.least_p[j], e.greatest_p[j], e.least_q[j], e.greatest_q[j], T(e.nan_p[j]), T(e.nan_q[j])})
          result.push_back(number);
      return result;
    });
  }
}

template <typename S, typename Bin, bool zeros_drop>
void check_quantise(const std::string& dtype) {
  using T = Arithmetic<S>;
  const auto x = values<S>(kMost, 13);
  const auto lo = values<T>(kMost, 14, true), inv = values<T>(kMost, 15, true);
  const std::vector<T> top(kMost, T(sizeof(Bin) == 1 ? 200 : 5000));
  for (const int64_t n : kSizes)
    for (const bool each : {false, true})
      check("quantise " + dtype, [&](Target target) {
        std::vector<Bin> numbers(kMost);
        QuantiseLoops::on(target, [&](auto loops) {
          if (each)
            loops.template quantise<zeros_drop>(x.data(), n, Binnings<T>{lo.data(), inv.data(), top.data()},
                                                numbers.data());
          else
            loops.template quantise<zeros_drop>(x.data(), n, binning(T(-1.25), T(1.5), top[0]), numbers.data());
        });
        return numbers;
      });
}

template <typename S>
void check_pairs_of(const std::string& dtype) {
  check_ranges<S>(dtype);
  check_quantise<S, uint8_t, false>(dtype);
  check_quantise<S, uint8_t, true>(dtype);
  check_quantise<S, uint16_t, false>(dtype);
  check_quantise<S, uint16_t, true>(dtype);
}

void check_counting() {
  const auto a = bin_numbers(kMost, 16), b = bin_numbers(kMost, 17), c = bin_numbers(kMost, 18);
  for (const int64_t n : kSizes) {
    check("pair_cells", [&](Target target) {
      std::vector<uint16_t> cells(kMost);
      CountingLoops::on(target, [&](auto loops) { loops.pair_cells(a.data(), b.data(), n, kPitch, cells.data()); });
      return cells;
    });
    check("triangle_cells", [&](Target target) {
      std::vector<uint16_t> cells(kMost);
      CountingLoops::on(
          target, [&](auto loops) { loops.triangle_cells(a.data(), b.data(), c.data(), n, kPitch, cells.data()); });
      return cells;
    });
  }
  for (const int64_t pitch : {1, 2, 9, 24, 32}) {
    const Tables layout(pitch);
    const Cube cube(pitch);
    check("move_cubes", [&](Target target) {
      std::vector<uint16_t> cubes(2 * cube.size);
      for (size_t i = 0; i < cubes.size(); ++i) cubes[i] = static_cast<uint16_t>(i * 31);
      std::vector<uint32_t> tables(3 * layout.size, 5);
      uint32_t* first = tables.data();
      CountingLoops::on(target, [&](auto loops) {
        loops.move_cubes(cubes.data(), cube, layout, first, first + layout.size, first + 2 * layout.size);
      });
      for (const uint16_t cell : cubes) tables.push_back(cell);
      return tables;
    });
    for (const bool remove_near : {false, true})
      check("move_tables", [&](Target target) {
        std::vector<uint32_t> tables(layout.cells(1));
        for (size_t i = 0; i < tables.size(); ++i) tables[i] = static_cast<uint32_t>(i * 2654435761u);
        std::vector<int64_t> counts(40 * 40, 7);
        CountingLoops::on(target, [&](auto loops) {
          loops.move_tables(tables.data(), layout, pitch, remove_near, counts.data(), 40);
        });
        for (const uint32_t cell : tables) counts.push_back(cell);
        return counts;
      });
  }
}

}  // namespace

int main() {
  check_steps<float>();
  check_steps<double>();
  check_adamw<float>();
  check_adamw<double>();
  check_tails();
  check_norm<float>("float32");
  check_norm<double>("float64");
  check_norm<BFloat16>("bfloat16");
  check_norm<Half>("float16");
  check_pairs_of<float>("float32");
  check_pairs_of<double>("float64");
  check_pairs_of<BFloat16>("bfloat16");
  check_pairs_of<Half>("float16");
  check_counting();
  for (const auto& [target, name] : {std::pair{Target::kAvx2, "avx2"}, std::pair{Target::kAvx512, "avx512"}})
    if (supports(target)) std::printf("%s %d\n", name, compared[static_cast<int>(target)]);
  return failures == 0 ? 0 : 1;
}
