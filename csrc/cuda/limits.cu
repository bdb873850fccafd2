// What the GPU can do at most, for the shares that `gradstats bench` prints: operators that only read and that only
// multiply and add. Their schemas, and what they return, are in gradstats/ops/limits.py.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <vector>

namespace gradstats::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256, kBlocksPerSm = 4;  // which every multiprocessor holds at once

// ---- reading --------------------------------------------------------------------------------------------------------

constexpr int kWords = 4;                        // of 16 bytes, which a thread asks for at a time
constexpr int64_t kChunk = kThreads * kWords;    // words that a block reads at a time
constexpr int kMaxBuffers = 160;

// What one launch reads.
struct Buffers {
  const uint4* data[kMaxBuffers];
  int64_t bytes[kMaxBuffers];
  int64_t first_chunk[kMaxBuffers];
  int64_t chunks = 0;  // of all buffers
  int count = 0;
};
static_assert(sizeof(Buffers) + sizeof(void*) <= 4096, "kernel parameters are limited to 4 KB before CUDA 12.1");

// Adds the exclusive or of all bytes to `seen`, spread over those of a word.
__global__ void __launch_bounds__(kThreads) read_kernel(const __grid_constant__ Buffers buffers, unsigned* seen) {
  uint4 all = {};
  int buffer = 0;
  for (int64_t chunk = blockIdx.x; chunk < buffers.chunks; chunk += gridDim.x) {
    while (buffer + 1 < buffers.count && buffers.first_chunk[buffer + 1] <= chunk) ++buffer;
    const uint4* const data = buffers.data[buffer];
    const int64_t words = buffers.bytes[buffer] / 16;
    const int64_t first = (chunk - buffers.first_chunk[buffer]) * kChunk + threadIdx.x;
    uint4 read[kWords];
#pragma unroll
    for (int n = 0; n < kWords; ++n) {
      const int64_t at = first + n * kThreads;
      read[n] = at < words ? __ldcs(data + at) : uint4{};
    }
#pragma unroll
    for (const uint4& word : read) all.x ^= word.x, all.y ^= word.y, all.z ^= word.z, all.w ^= word.w;
  }
  if (blockIdx.x == 0)  // what is left behind the last whole words
    for (int b = threadIdx.x; b < buffers.count; b += kThreads) {
      const auto* const data = reinterpret_cast<const unsigned char*>(buffers.data[b]);
      for (int64_t at = buffers.bytes[b] / 16 * 16; at < buffers.bytes[b]; ++at) all.x ^= data[at];
    }
  const unsigned mine = __reduce_xor_sync(~0u, all.x ^ all.y ^ all.z ^ all.w);
  if (threadIdx.x % 32 == 0) atomicXor(seen, mine);
}

__global__ void fold_kernel(const unsigned* seen, uint8_t* out) {
  const unsigned halves = *seen ^ *seen >> 16;
  *out = static_cast<uint8_t>(halves ^ halves >> 8);
}

// ---- multiplying and adding -----------------------------------------------------------------------------------------

// Enough chains to hide the latency of each. Each counts its own steps, so that nothing can be left out; in pieces
// short enough for float32 to count exactly.
constexpr int kChains = 8, kPiece = 4096;

template <class T>
__global__ void __launch_bounds__(kThreads) multiply_add_kernel(T zero, T one, int64_t pieces, double* counted) {
  double mine = 0;
  for (; pieces > 0; --pieces) {
    T chains[kChains];
#pragma unroll
    for (int c = 0; c < kChains; ++c) chains[c] = zero * T(threadIdx.x + c);  // all different to the compiler
#pragma unroll 8
    for (int n = 0; n < kPiece; ++n)
#pragma unroll
      for (T& chain : chains) chain = fma(chain, one, one);
#pragma unroll
    for (const T& chain : chains) mine += chain;
  }
  atomicAdd(counted, mine);  // whole numbers, so the order does not matter
}

// ---- the operators --------------------------------------------------------------------------------------------------

struct Gpu {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  int blocks;

  explicit Gpu(const Tensor& tensor) : guard(tensor.get_device_index()) {
    const int32_t device = tensor.get_device_index();
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &handle));
    stream = static_cast<cudaStream_t>(handle);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device));
    blocks *= kBlocksPerSm;
  }
};

Tensor read(std::vector<Tensor> tensors, int64_t /*ahead*/) {
  STD_TORCH_CHECK(!tensors.empty(), "gradstats::_read: expected at least one tensor");
  const Gpu gpu(tensors[0]);
  Tensor seen = torch::stable::new_zeros(tensors[0], {}, ScalarType::Int);
  Tensor result = torch::stable::new_empty(tensors[0], {}, ScalarType::Byte);
  auto* const all = static_cast<unsigned*>(seen.mutable_data_ptr());
  Buffers buffers;
  const auto launch = [&] {
    read_kernel<<<gpu.blocks, kThreads, 0, gpu.stream>>>(buffers, all);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    buffers.count = 0, buffers.chunks = 0;
  };
  for (const Tensor& tensor : tensors) {
    const int64_t bytes = tensor.numel() * tensor.element_size();
    const auto* const data = static_cast<const uint4*>(tensor.const_data_ptr());
    STD_TORCH_CHECK(tensor.is_contiguous() && reinterpret_cast<uintptr_t>(data) % 16 == 0,
                    "gradstats::_read: expected contiguous tensors, aligned to 16 bytes");
    if (buffers.count == kMaxBuffers) launch();
    buffers.data[buffers.count] = data;
    buffers.bytes[buffers.count] = bytes;
    buffers.first_chunk[buffers.count++] = buffers.chunks;
    buffers.chunks += (bytes / 16 + kChunk - 1) / kChunk;
  }
  launch();
  fold_kernel<<<1, 1, 0, gpu.stream>>>(all, static_cast<uint8_t*>(result.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Tensor multiply_add(Tensor like, int64_t count) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || like.scalar_type() == ScalarType::Float,
                  "gradstats::_multiply_add: expected float32 or float64");
  const Gpu gpu(like);
  Tensor result = torch::stable::new_zeros(like, {}, ScalarType::Double);
  auto* const counted = static_cast<double*>(result.mutable_data_ptr());
  const int64_t in_piece = int64_t{gpu.blocks} * kThreads * kChains * kPiece;
  const int64_t pieces = (count + in_piece - 1) / in_piece;
  if (wide)
    multiply_add_kernel<double><<<gpu.blocks, kThreads, 0, gpu.stream>>>(0.0, 1.0, pieces, counted);
  else
    multiply_add_kernel<float><<<gpu.blocks, kThreads, 0, gpu.stream>>>(0.0f, 1.0f, pieces, counted);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace
}  // namespace gradstats::cuda

STABLE_TORCH_LIBRARY_IMPL(gradstats, CUDA, library) {
  library.impl("_read", TORCH_BOX(&gradstats::cuda::read));
  library.impl("_multiply_add", TORCH_BOX(&gradstats::cuda::multiply_add));
}
