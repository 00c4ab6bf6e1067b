// Launching blocks of threads on the device and the stream of a tensor.
#pragma once

#include "common.h"
#include "cuda_blocks.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <map>
#include <string>
#include <tuple>

namespace gradrep {

class Launcher {
 public:
  explicit Launcher(const Tensor& x) : x_(x), guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  void* stream() const { return stream_; }
  bool capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }

  int64_t most_shared() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  int64_t threads_at_once() const {
    return int64_t{attribute(cudaDevAttrMultiProcessorCount)} * attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  }

  // Memory until the launcher ends; torch keeps it for this stream's later work.
  template <typename T>
  T* scratch(int64_t n) const {
    scratch_ = torch::stable::new_empty(
        x_, {n}, sizeof(T) == 8 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float);
    return static_cast<T*>(scratch_->mutable_data_ptr());
  }

 protected:
  // Blocks of a kernel that run at once, each with so much shared memory. The driver is asked once in a thread, and the
  // kernel may have the most from then on: a lower limit would fail the launches of other threads.
  template <typename Kernel>
  int64_t blocks_at_once(Kernel* kernel, int64_t shared) const {
    thread_local std::map<std::tuple<Kernel*, int64_t, int64_t>, int64_t> known;
    const std::tuple key{kernel, int64_t{x_.get_device_index()}, shared};
    if (const auto found = known.find(key); found != known.end()) return found->second;
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared())));
    int blocks = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared));
    return known[key] = int64_t{blocks} * attribute(cudaDevAttrMultiProcessorCount);
  }

  template <typename Work>
  void run(void (*kernel)(Work), const Work& work, int64_t blocks, int64_t shared = 0) const {
    STD_TORCH_CHECK(blocks <= kMostBlocks,
                    "gradrep_kernels: x has too many channels for one launch: " + std::to_string(blocks) + " blocks");
    // Not <<<>>>, whose stub would copy `work` once more: it may have 32 KB.
    void* arguments[] = {const_cast<Work*>(&work)};
    STD_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                    dim3(kThreads), arguments, static_cast<size_t>(shared), stream_));
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, x_.get_device_index()));
    return value;
  }

  const Tensor& x_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  mutable std::optional<Tensor> scratch_;
};

}  // namespace gradrep
