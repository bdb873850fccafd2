// The CUDA kernels, in plain CUDA C++ (no warp intrinsics), so that a host compiler can run them in a test.
//
// First version: simple and exact, not yet fast. Two stages without atomics, so the result is bitwise reproducible:
// gram_partial_kernel adds the float64 products of each slot of entries, gram_reduce_kernel sums the slots in order.
#pragma once

#include <cstdint>

#include "../float_types.h"

namespace gradstats::cuda {

constexpr int kTile = 16;                     // tasks on each side of a tile of pairs
constexpr int kThreads = kTile * kTile;       // one thread a pair
constexpr int kChunk = 64;                    // entries of each row in shared memory at a time
constexpr int kMaxSegments = 48;              // parameters in one launch
constexpr int kMaxRows = 352;                 // rows of all these parameters together
constexpr int kGroup = kMaxRows / 2;          // tasks on each side of what one launch covers
static_assert(kGroup % kTile == 0 && kThreads % kChunk == 0 && kTile % (kThreads / kChunk) == 0);

// What one launch reads, passed by value: nothing is copied to the device beforehand. It covers the pairs of two
// groups of tasks (mostly one group with itself: all tasks) over the entries of a few parameters, its segments.
struct Launch {
  const void* rows[kMaxRows];           // by segment: group A, then group B where that is another; null = zeros
  const void* metric[kMaxSegments];     // null = ones
  int64_t starts[kMaxSegments + 1];     // where each segment's entries start among all, and their number
  DType dtype[kMaxSegments];
  DType metric_dtype[kMaxSegments];
  int32_t num_segments;
  int32_t num_tasks;
  int32_t first_a, num_a;
  int32_t first_b, num_b;
  int64_t slot_entries;

  GRADSTATS_HOST_DEVICE bool one_group() const { return first_a == first_b; }
  GRADSTATS_HOST_DEVICE int rows_per_segment() const { return one_group() ? num_a : num_a + num_b; }
};
static_assert(sizeof(Launch) + sizeof(double*) <= 4096, "kernel parameters are limited to 4 KB before CUDA 12.1");

GRADSTATS_HOST_DEVICE inline int num_tiles(int num_tasks) { return (num_tasks + kTile - 1) / kTile; }

// Position of tile (i, j), i <= j, in the upper triangle of tiles stored row by row.
GRADSTATS_HOST_DEVICE inline int tile_index(int i, int j, int tiles) { return i * (2 * tiles - i - 1) / 2 + j; }

struct TilePair {
  int i, j;
};

// The n-th tile of the upper triangle (one group) or of the rectangle (two).
GRADSTATS_HOST_DEVICE inline TilePair tile_pair(const Launch& launch, int n) {
  const int tiles_b = num_tiles(launch.num_b);
  if (!launch.one_group()) return {n / tiles_b, n % tiles_b};
  int i = 0;
  for (int in_row = tiles_b; n >= in_row; n -= in_row--) ++i;
  return {i, i + n};
}

GRADSTATS_HOST_DEVICE inline int num_tile_pairs(const Launch& launch) {
  const int a = num_tiles(launch.num_a), b = num_tiles(launch.num_b);
  return launch.one_group() ? a * (a + 1) / 2 : a * b;
}

GRADSTATS_HOST_DEVICE inline double load_entry(const void* data, DType dtype, int64_t at) {
  if (data == nullptr) return 0.0;
  switch (dtype) {
    case DType::float32: return to_double(static_cast<const float*>(data)[at]);
    case DType::float64: return to_double(static_cast<const double*>(data)[at]);
    case DType::float16: return to_double(static_cast<const Float16*>(data)[at]);
    default: return to_double(static_cast<const BFloat16*>(data)[at]);
  }
}

GRADSTATS_HOST_DEVICE inline int segment_of(const Launch& launch, int64_t entry) {
  int low = 0, high = launch.num_segments;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (entry < launch.starts[middle] ? high : low) = middle;
  }
  return low;
}

// One column of a chunk: where this thread finds the entry in every row, and what it multiplies the entry by.
struct Column {
  const void* const* rows = nullptr;
  DType dtype = DType::float32;
  int64_t at = 0;
  double scale = 0.0;
};

GRADSTATS_HOST_DEVICE inline Column column(const Launch& launch, int64_t entry) {
  const int s = segment_of(launch, entry);
  Column c{launch.rows + s * launch.rows_per_segment(), launch.dtype[s], entry - launch.starts[s], 1.0};
  if (launch.metric[s] != nullptr) c.scale = sqrt(load_entry(launch.metric[s], launch.metric_dtype[s], c.at));
  return c;
}

// Fills one row tile of the chunk; rows and columns outside are zeros.
__device__ inline void fill(double (&tile)[kTile][kChunk + 1], const Column& c, int first_row, int num_rows) {
  const int col = threadIdx.x % kChunk;
  for (int r = threadIdx.x / kChunk; r < kTile; r += kThreads / kChunk)
    tile[r][col] = c.rows != nullptr && r < num_rows ? c.scale * load_entry(c.rows[first_row + r], c.dtype, c.at) : 0.0;
}

// Adds to partial [slot, tile of pairs, kThreads] the products over this slot's entries. Block (x, y) is slot x and
// the y-th tile of the launch; launches on one stream follow each other, so the sum needs no atomics.
__global__ void __launch_bounds__(kThreads) gram_partial_kernel(const __grid_constant__ Launch launch, double* partial) {
  __shared__ double a[kTile][kChunk + 1];
  __shared__ double b[kTile][kChunk + 1];
  const TilePair tile = tile_pair(launch, blockIdx.y);
  const bool diagonal = launch.one_group() && tile.i == tile.j;
  const int row_a = tile.i * kTile, row_b = tile.j * kTile;
  const int offset_b = launch.one_group() ? 0 : launch.num_a;

  const int64_t entries = launch.starts[launch.num_segments];
  const int64_t begin = blockIdx.x * launch.slot_entries;
  const int64_t end = begin + launch.slot_entries < entries ? begin + launch.slot_entries : entries;
  const int i = threadIdx.x / kTile, j = threadIdx.x % kTile;
  double sum = 0.0;
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const int64_t entry = chunk + threadIdx.x % kChunk;
    const Column c = entry < end ? column(launch, entry) : Column{};
    fill(a, c, row_a, launch.num_a - row_a);
    if (!diagonal) fill(b, c, offset_b + row_b, launch.num_b - row_b);
    __syncthreads();
    const double(&other)[kTile][kChunk + 1] = diagonal ? a : b;
    for (int k = 0; k < kChunk; ++k) sum = fma(a[i][k], other[j][k], sum);
    __syncthreads();
  }

  const int tiles = num_tiles(launch.num_tasks);
  const int global = tile_index(launch.first_a / kTile + tile.i, launch.first_b / kTile + tile.j, tiles);
  const int64_t all = int64_t{tiles} * (tiles + 1) / 2;
  partial[(blockIdx.x * all + global) * kThreads + threadIdx.x] += sum;
}

// Sums the slots in order and mirrors: block x is one tile of the upper triangle, a thread one pair of it.
__global__ void __launch_bounds__(kThreads) gram_reduce_kernel(const double* partial, int num_slots, int num_tasks,
                                                               double* gram) {
  const int tiles = num_tiles(num_tasks);
  int i = 0, n = blockIdx.x;
  for (int in_row = tiles; n >= in_row; n -= in_row--) ++i;
  const int64_t row = i * kTile + threadIdx.x / kTile, col = (i + n) * kTile + threadIdx.x % kTile;
  const int64_t all = int64_t{tiles} * (tiles + 1) / 2;
  double sum = 0.0;
  for (int slot = 0; slot < num_slots; ++slot) sum += partial[(slot * all + blockIdx.x) * kThreads + threadIdx.x];
  if (row < num_tasks && col < num_tasks && row <= col) gram[row * num_tasks + col] = gram[col * num_tasks + row] = sum;
}

}  // namespace gradstats::cuda
