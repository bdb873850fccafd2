// The general kernel: any number of tasks, any dtype, with a metric of any, in float64. Simple, not fast: it takes what
// the others do not.
#pragma once

#include <cstdint>

#include "table.h"

namespace gradstats::cuda {

constexpr int kTile = 16;                       // tasks on each side of a tile of pairs
constexpr int kGeneralThreads = kTile * kTile;  // one thread a pair
constexpr int kGeneralChunk = 64;               // entries of each row in shared memory at a time
constexpr int kGeneralSegments = 48;            // parameters in one launch
constexpr int kGeneralRows = 352;               // rows of all these parameters together
constexpr int kTaskGroup = kGeneralRows / 2;    // tasks on each side of what one launch covers
static_assert(kTaskGroup % kTile == 0 && kGeneralThreads % kGeneralChunk == 0);
static_assert(kTile % (kGeneralThreads / kGeneralChunk) == 0);

// What one launch reads, passed by value: nothing is copied to the device beforehand. It covers the pairs of two
// groups of tasks (mostly one group with itself: all tasks) over the entries of a few parameters, its segments.
struct GeneralLaunch {
  const void* rows[kGeneralRows];           // by segment: group A, then group B where that is another; null = zeros
  const void* metric[kGeneralSegments];     // null = ones
  int64_t starts[kGeneralSegments + 1];     // where each segment's entries start among all, and their number
  DType dtype[kGeneralSegments];
  DType metric_dtype[kGeneralSegments];
  int32_t num_segments;
  int32_t num_tasks;
  int32_t first_a, num_a;
  int32_t first_b, num_b;
  int32_t num_slots;  // of entries that are summed apart
  bool add;           // to what earlier launches have written

  GRADSTATS_HOST_DEVICE bool one_group() const { return first_a == first_b; }
  GRADSTATS_HOST_DEVICE int rows_per_segment() const { return one_group() ? num_a : num_a + num_b; }
};
static_assert(sizeof(GeneralLaunch) + sizeof(double*) <= 4096);

GRADSTATS_HOST_DEVICE inline int num_tiles(int num_tasks) { return (num_tasks + kTile - 1) / kTile; }

struct TilePair {
  int i, j;
};

// The n-th tile of the upper triangle (one group) or of the rectangle (two).
GRADSTATS_HOST_DEVICE inline TilePair tile_pair(const GeneralLaunch& launch, int n) {
  const int tiles_b = num_tiles(launch.num_b);
  if (!launch.one_group()) return {n / tiles_b, n % tiles_b};
  int i = 0;
  for (int in_row = tiles_b; n >= in_row; n -= in_row--) ++i;
  return {i, i + n};
}

GRADSTATS_HOST_DEVICE inline int num_tile_pairs(const GeneralLaunch& launch) {
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

GRADSTATS_HOST_DEVICE inline int segment_of(const GeneralLaunch& launch, int64_t entry) {
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

GRADSTATS_HOST_DEVICE inline Column column(const GeneralLaunch& launch, int64_t entry) {
  const int s = segment_of(launch, entry);
  Column c{launch.rows + s * launch.rows_per_segment(), launch.dtype[s], entry - launch.starts[s], 1.0};
  if (launch.metric[s] != nullptr) c.scale = sqrt(load_entry(launch.metric[s], launch.metric_dtype[s], c.at));
  return c;
}

// Fills one row tile of the chunk; rows and columns outside are zeros.
__device__ inline void fill(double (&tile)[kTile][kGeneralChunk + 1], const Column& c, int first_row, int num_rows) {
  const int col = threadIdx.x % kGeneralChunk;
  for (int r = threadIdx.x / kGeneralChunk; r < kTile; r += kGeneralThreads / kGeneralChunk)
    tile[r][col] = c.rows != nullptr && r < num_rows ? c.scale * load_entry(c.rows[first_row + r], c.dtype, c.at) : 0.0;
}

// Writes the sums over this slot's entries. Block (x, y) is slot x and the y-th tile of the launch.
__global__ void __launch_bounds__(kGeneralThreads) general_kernel(const __grid_constant__ GeneralLaunch launch,
                                                           double* partial) {
  __shared__ double a[kTile][kGeneralChunk + 1];
  __shared__ double b[kTile][kGeneralChunk + 1];
  const TilePair tile = tile_pair(launch, blockIdx.y);
  const bool diagonal = launch.one_group() && tile.i == tile.j;
  const int row_a = tile.i * kTile, row_b = tile.j * kTile;
  const int offset_b = launch.one_group() ? 0 : launch.num_a;

  const int64_t entries = launch.starts[launch.num_segments];
  const int64_t begin = blockIdx.x * entries / launch.num_slots, end = (blockIdx.x + 1) * entries / launch.num_slots;
  double sum = 0.0;
  for (int64_t chunk = begin; chunk < end; chunk += kGeneralChunk) {
    const int64_t entry = chunk + threadIdx.x % kGeneralChunk;
    const Column c = entry < end ? column(launch, entry) : Column{};
    fill(a, c, row_a, launch.num_a - row_a);
    if (!diagonal) fill(b, c, offset_b + row_b, launch.num_b - row_b);
    __syncthreads();
    const double(&other)[kTile][kGeneralChunk + 1] = diagonal ? a : b;
    for (int k = 0; k < kGeneralChunk; ++k) sum = fma(a[threadIdx.x / kTile][k], other[threadIdx.x % kTile][k], sum);
    __syncthreads();
  }

  const int i = launch.first_a + row_a + threadIdx.x / kTile, j = launch.first_b + row_b + threadIdx.x % kTile;
  if (i <= j && j < launch.num_tasks) write_sum(launch, partial, i, j, blockIdx.x, sum);
}

}  // namespace gradstats::cuda
