// Rates of a GPU that the kernels' designs rest on: shared atomics by kind of contention, binary tensor-core products,
// reads, copies.
//
//     nvcc -std=c++17 -O3 -arch=sm_90 -o build/probe bench/probe.cu && build/probe
//
// A row a figure, then the same as JSON, a line each. The static CUDA runtime lets the program travel without a
// toolkit. Exit status: 0; 1 where a call failed or a table does not hold what was counted; 2 without a GPU.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr int kThreads = 256;
constexpr int kCells = 16;    // addresses that a thread holds in registers: the loop has no arithmetic but the adds
constexpr int kRounds = 256;  // over them; a 16-bit cell gets at most 8 warps x 16 x 256 = 32768
constexpr int kBins = 23;     // Sturges' number for 2560 images of 32 x 32
constexpr int kProducts = 8;  // independent accumulators hide the latency of a tensor-core product
constexpr int kProductRounds = 4096;
constexpr int kStreamThreads = 512;
constexpr int kAhead = 4;    // loads in flight
constexpr int kRepeats = 5;  // the first warms up, the fastest of the others counts

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "probe: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// -- shared atomics

enum class Table { kBankOfLane, kShared, kOneCell, kLanes16, kOwn16 };

// Which cells a warp's lanes hit: bins p and q are 0 with probability `zeros`, else uniform.
struct Pattern {
  Table table;
  int pitch;
  float zeros;
};

__device__ std::uint32_t hashed(std::uint32_t n) {
  n = (n ^ (n >> 16)) * 0x7feb352du;
  n = (n ^ (n >> 15)) * 0x846ca68bu;
  return n ^ (n >> 16);
}

__device__ int drawn_bin(std::uint32_t random, float zeros) {
  const float uniform = static_cast<float>(random >> 8) * 0x1p-24f;
  return uniform < zeros ? 0 : static_cast<int>(__umulhi(hashed(random), kBins));
}

template <Table table>
__global__ void __launch_bounds__(kThreads) count_cells(Pattern pattern, int words, unsigned long long* total) {
  extern __shared__ std::uint32_t counts[];
  for (int i = threadIdx.x; i < words; i += blockDim.x) counts[i] = 0;
  constexpr bool kHalves = table == Table::kLanes16 || table == Table::kOwn16;
  const int lane = threadIdx.x % 32;
  int word[kCells];
  std::uint32_t one[kCells];
#pragma unroll
  for (int k = 0; k < kCells; ++k) {
    const std::uint32_t random = hashed((blockIdx.x * blockDim.x + threadIdx.x) * kCells + k);
    const int p = drawn_bin(random, pattern.zeros), q = drawn_bin(hashed(~random), pattern.zeros);
    const int cell = table == Table::kOneCell ? 0 : p * pattern.pitch + q;
    word[k] = table == Table::kBankOfLane ? lane : kHalves ? cell / 2 * 32 + lane : cell;
    one[k] = cell % 2 == 0 ? 1u : 1u << 16;
  }
  __syncthreads();
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int k = 0; k < kCells; ++k) {
      if constexpr (table == Table::kOwn16) {
        counts[word[k]] += one[k];
      } else {
        atomicAdd(counts + word[k], kHalves ? one[k] : 1u);
      }
    }
    // A warp that owns its table would otherwise keep a cell in a register from one round to the next.
    if constexpr (table == Table::kOwn16) __syncwarp();
  }
  __syncthreads();
  unsigned long long sum = 0;
  for (int i = threadIdx.x; i < words; i += blockDim.x) {
    sum += kHalves ? (counts[i] & 0xffffu) + (counts[i] >> 16) : counts[i];
  }
  atomicAdd(total, sum);
}

// -- binary tensor-core products

__global__ void __launch_bounds__(kThreads) multiply_bits(std::uint32_t a, int* out) {
  int sums[kProducts][4] = {};
#pragma unroll 1
  for (int round = 0; round < kProductRounds; ++round) {
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      int* c = sums[k];
      asm volatile(
          "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
          : "r"(a), "r"(~a), "r"(a + 1), "r"(a + 2), "r"(a + 3), "r"(a + 4));
    }
  }
  int sum = 0;
  for (const auto& c : sums) sum += c[0] ^ c[1] ^ c[2] ^ c[3];
  if (sum == -1) *out = sum;  // never: counts are not negative, and the compiler does not know
}

// -- memory

template <class Word>
__device__ float folded(Word word) {
  if constexpr (sizeof(Word) == 16) {
    return word.x + word.y + word.z + word.w;
  } else {
    return word;
  }
}

// n is a multiple of kAhead words of each thread of the grid.
template <class Word>
__global__ void __launch_bounds__(kStreamThreads) read_all(const Word* from, std::size_t n, float* out) {
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x;
  float sum = 0;
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += kAhead * step) {
    Word ahead[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) ahead[k] = from[i + k * step];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) sum += folded(ahead[k]);
  }
  if (sum == -1.0f) *out = sum;  // never: all words are positive
}

// The accesses of an optimizer's step: weight, gradient and momentum are read, weight and momentum written.
__global__ void __launch_bounds__(kStreamThreads) like_a_step(float4* p, const float4* g, float4* v, std::size_t n) {
  const std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float4 weight = p[i], grad = g[i], momentum = v[i];
  const float4 moved = {momentum.x + grad.x, momentum.y + grad.y, momentum.z + grad.z, momentum.w + grad.w};
  v[i] = moved;
  p[i] = {weight.x - moved.x, weight.y - moved.y, weight.z - moved.z, weight.w - moved.w};
}

// -- the clock, and what it says

class Probe {
 public:
  Probe() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      std::fprintf(stderr, "probe: there is no GPU here\n");
      std::exit(2);
    }
    check(cudaGetDeviceProperties(&properties_, 0), "cudaGetDeviceProperties");
    check(cudaDeviceGetAttribute(&khz_, cudaDevAttrClockRate, 0), "the clock rate");
    check(cudaEventCreate(&start_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
    std::printf("%s, sm_%d%d, %d multiprocessors, at most %d MHz\n", properties_.name, properties_.major,
                properties_.minor, multiprocessors(), khz_ / 1000);
  }

  int multiprocessors() const { return properties_.multiProcessorCount; }

  template <class Launch>
  double seconds(Launch&& launch) {
    float fastest = 1e30f;
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      check(cudaEventRecord(start_), "cudaEventRecord");
      launch();
      check(cudaGetLastError(), "a launch");
      check(cudaEventRecord(end_), "cudaEventRecord");
      check(cudaEventSynchronize(end_), "a kernel");
      float ms = 0;
      check(cudaEventElapsedTime(&ms, start_, end_), "cudaEventElapsedTime");
      if (repeat > 0) fastest = std::min(fastest, ms);
    }
    return fastest * 1e-3;
  }

  // `work` is done on each multiprocessor, all of them at once.
  void per_multiprocessor(const std::string& what, int blocks, double work, double seconds, const char* of) {
    const double ns = seconds * 1e9 / work;
    std::printf("%-46s %s %8.3f ns a %s and SM (at most %.2f cycles)\n", what.c_str(), placed(blocks).c_str(), ns, of,
                ns * khz_ * 1e-6);
    json(what, blocks, ns, std::string("ns per ") + of + " and SM");
  }

  void rate(const std::string& what, int blocks, double bytes, double seconds) {
    const double terabytes = bytes / seconds * 1e-12;
    std::printf("%-46s %s %8.3f TB/s\n", what.c_str(), placed(blocks).c_str(), terabytes);
    json(what, blocks, terabytes, "TB/s");
  }

  void print_json() const {
    for (const auto& line : lines_) std::puts(line.c_str());
  }

 private:
  static std::string placed(int blocks) {
    return blocks > 0 ? std::to_string(blocks) + " blocks an SM" : "             ";
  }

  void json(const std::string& what, int blocks, double value, const std::string& unit) {
    std::ostringstream line;
    line << R"({"gpu": ")" << properties_.name << R"(", "figure": ")" << what << R"(", "blocks_per_sm": )" << blocks
         << R"(, "value": )" << value << R"(, "unit": ")" << unit << R"("})";
    lines_.push_back(line.str());
  }

  cudaDeviceProp properties_{};
  int khz_ = 0;
  cudaEvent_t start_{}, end_{};
  std::vector<std::string> lines_;
};

template <Table table>
void atomics(Probe& probe, const std::string& what, Pattern pattern, int blocks_per_sm, unsigned long long* total) {
  constexpr bool kHalves = table == Table::kLanes16 || table == Table::kOwn16;
  const int threads = table == Table::kOwn16 ? 32 : kThreads;  // who owns its table needs no atomics
  const int cells = kBins * pattern.pitch;
  const int words = table == Table::kBankOfLane ? 32 : kHalves ? (cells + 1) / 2 * 32 : cells;
  const auto shared = static_cast<int>(words * sizeof(std::uint32_t));
  check(cudaFuncSetAttribute(count_cells<table>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory");
  const int blocks = probe.multiprocessors() * blocks_per_sm;
  check(cudaMemset(total, 0, sizeof *total), "cudaMemset");
  const double seconds = probe.seconds([&] { count_cells<table><<<blocks, threads, shared>>>(pattern, words, total); });
  unsigned long long found = 0;
  check(cudaMemcpy(&found, total, sizeof found, cudaMemcpyDeviceToHost), "cudaMemcpy");
  const auto adds = static_cast<unsigned long long>(kCells) * kRounds * threads * blocks * kRepeats;
  if (found != adds) {
    std::fprintf(stderr, "probe: %s: counted %llu of %llu\n", what.c_str(), found, adds);
    std::exit(1);
  }
  probe.per_multiprocessor(what, blocks_per_sm, double{kCells} * kRounds * threads / 32 * blocks_per_sm, seconds,
                           "warp's add");
}

void all_atomics(Probe& probe) {
  unsigned long long* total = nullptr;
  check(cudaMalloc(&total, sizeof *total), "cudaMalloc");
  for (const int blocks : {2, 4, 8}) {
    atomics<Table::kBankOfLane>(probe, "atomics, a bank a lane", {Table::kBankOfLane, kBins, 0.0f}, blocks, total);
    for (const int pitch : {24, 25}) {
      const std::string at = ", pitch " + std::to_string(pitch);
      atomics<Table::kShared>(probe, "atomics, uniform" + at, {Table::kShared, pitch, 0.0f}, blocks, total);
      atomics<Table::kShared>(probe, "atomics, 60 % zeros" + at, {Table::kShared, pitch, 0.6f}, blocks, total);
      atomics<Table::kShared>(probe, "atomics, 90 % zeros" + at, {Table::kShared, pitch, 0.9f}, blocks, total);
    }
    atomics<Table::kOneCell>(probe, "atomics, one cell", {Table::kOneCell, 24, 0.0f}, blocks, total);
  }
  for (const int blocks : {2, 4, 6}) {  // 34 KB a block
    const Pattern uniform = {Table::kLanes16, kBins, 0.0f}, zeros = {Table::kLanes16, kBins, 0.9f};
    atomics<Table::kLanes16>(probe, "atomics, a lane's own 16 bits, uniform", uniform, blocks, total);
    atomics<Table::kLanes16>(probe, "atomics, a lane's own 16 bits, 90 % zeros", zeros, blocks, total);
    atomics<Table::kOwn16>(probe, "a warp a block, a lane's own 16 bits", uniform, blocks, total);
  }
  check(cudaFree(total), "cudaFree");
}

void products(Probe& probe) {
  int* out = nullptr;
  check(cudaMalloc(&out, sizeof *out), "cudaMalloc");
  for (const int blocks : {1, 2, 4}) {
    const double seconds =
        probe.seconds([&] { multiply_bits<<<probe.multiprocessors() * blocks, kThreads>>>(0x5a5a5a5au, out); });
    probe.per_multiprocessor("binary product, m16n8k256, and.popc", blocks,
                             double{kProducts} * kProductRounds * kThreads / 32 * blocks, seconds, "warp's product");
  }
  check(cudaFree(out), "cudaFree");
}

template <class Word>
void reads(Probe& probe, const std::string& what, int blocks_per_sm, const Word* from, std::size_t bytes, float* out) {
  const int blocks = probe.multiprocessors() * blocks_per_sm;
  const std::size_t round = sizeof(Word) * kAhead * kStreamThreads * blocks;
  bytes = bytes / round * round;
  const auto launch = [&] { read_all<<<blocks, kStreamThreads>>>(from, bytes / sizeof(Word), out); };
  probe.rate(what, blocks_per_sm, static_cast<double>(bytes), probe.seconds(launch));
}

void memory(Probe& probe) {
  std::size_t free = 0, all = 0;
  check(cudaMemGetInfo(&free, &all), "cudaMemGetInfo");
  // Forty times the L2 cache of an H100, and a part of what is free on a small GPU.
  const std::size_t third = std::min(std::size_t{2} << 30, free / 4) / 512 * 512;
  char* x = nullptr;
  check(cudaMalloc(&x, 3 * third), "cudaMalloc");
  check(cudaMemset(x, 0x3f, 3 * third), "cudaMemset");
  auto* words = reinterpret_cast<float4*>(x);
  auto* out = reinterpret_cast<float*>(x);
  for (const int blocks : {2, 4}) {
    reads<float4>(probe, "read, 16 bytes a thread", blocks, words, third, out);
    reads<float>(probe, "read, 4 bytes a thread", blocks, out, third, out);
  }
  const auto copy = [&] { check(cudaMemcpyAsync(x, x + third, third, cudaMemcpyDeviceToDevice), "a copy"); };
  probe.rate("copy, read and written", 0, 2.0 * static_cast<double>(third), probe.seconds(copy));
  const std::size_t n = third / sizeof(float4);
  const auto grid = static_cast<unsigned>((n + kStreamThreads - 1) / kStreamThreads);
  const auto step = [&] { like_a_step<<<grid, kStreamThreads>>>(words, words + n, words + 2 * n, n); };
  probe.rate("accesses of a step, 3 read and 2 written", 0, 5.0 * static_cast<double>(third), probe.seconds(step));
  check(cudaFree(x), "cudaFree");
}

}  // namespace

int main() {
  Probe probe;
  all_atomics(probe);
  products(probe);
  memory(probe);
  probe.print_json();
  return 0;
}
