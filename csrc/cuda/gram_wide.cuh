// The wide kernel: in float64, for more tasks than the register kernel takes, of float64 gradients or with a metric.
// Tensor cores multiply float64, too, and round as fused multiply-adds do.
//
// As in the fragment kernels a warp holds both operands of an instruction alike, here mma.m8n8k4, and its lanes call
// the entries that they read whatever columns it wants.
#pragma once

#include "gram_fragment.cuh"

namespace gradstats::cuda {

constexpr int64_t kWideTasks = kSideRows;

// Blocks on a multiprocessor, which is to say registers: enough loads in flight, nothing in local memory.
template <int kRowGroups>
constexpr int kWideBlocks = kRowGroups == 2 ? 6 : 3;

// The products of 8 * kRowGroups rows with themselves, in tiles of 8 x 8 without those below the diagonal. Of each group
// of 8 rows a lane reads one, together with 3 other lanes, and of each tile it holds 2 values.
template <class In, int kRowGroups, bool kMetric>
struct WideProducts {
  static constexpr int kTiles = kRowGroups * (kRowGroups + 1) / 2;

  const In* rows[kRowGroups];
  const In* metric;
  double tiles[kTiles][2];

  template <class Table>
  __device__ void enter(const Table& table, int segment) {
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g) rows[g] = row_of<In>(table, segment, 8 * g + threadIdx.x % 32 / 4);
    metric = kMetric ? row_beside<In>(table, segment) : nullptr;
  }

  // Adds the products of one column for each lane of four. The root of the metric on each side weighs a product alike
  // for both of its tasks.
  __device__ void add(double (&x)[kRowGroups], double weight) {
    if constexpr (kMetric) {
      const double root = sqrt(weight);
#pragma unroll
      for (int g = 0; g < kRowGroups; ++g) x[g] *= root;
    }
#pragma unroll
    for (int m = 0, tile = 0; m < kRowGroups; ++m)
#pragma unroll
      for (int n = m; n < kRowGroups; ++n, ++tile) ptx::mma(tiles[tile], x[m], x[n]);
  }

  // Adds the products over columns [begin, begin + kWarpColumns) of a segment, all of it in whole vectors.
  __device__ void add_vectors(int64_t begin, int64_t numel) {
#pragma unroll(8 / kRowGroups)
    for (int group = 0; group < kGroups; ++group) {
      const int64_t at = begin + group * kGroupColumns<In> + threadIdx.x % 4 * kWidth<In>;
      Words words[kRowGroups], weights{};
#pragma unroll
      for (int g = 0; g < kRowGroups; ++g) words[g] = load_vector(rows[g], at, numel);
      if constexpr (kMetric) weights = load_vector(metric, at, numel);
#pragma unroll
      for (int e = 0; e < kWidth<In>; ++e) {
        double x[kRowGroups];
#pragma unroll
        for (int g = 0; g < kRowGroups; ++g) x[g] = entry_of<In>(words[g], e);
        add(x, entry_of<In>(weights, e));
      }
    }
  }

  // The same entry by entry.
  __device__ void add_entries(int64_t begin, int64_t numel) {
    const auto entry = [&](const In* row, int64_t at) { return row != nullptr && at < numel ? to_double(row[at]) : 0.0; };
#pragma unroll 1
    for (int64_t at = begin + threadIdx.x % 4; at < begin + kWarpColumns<In>; at += 4) {
      double x[kRowGroups];
#pragma unroll
      for (int g = 0; g < kRowGroups; ++g) x[g] = entry(rows[g], at);
      add(x, entry(metric, at));
    }
  }
};

// Block y is slot y of at most 8 * kRowGroups tasks; its warps take columns in turn.
template <class In, int kRowGroups, Beside kBeside, class Table>
__global__ void __launch_bounds__(32 * kFragmentWarps, kWideBlocks<kRowGroups>)
    wide_kernel(const __grid_constant__ Table table, double* partial) {
  WideProducts<In, kRowGroups, kBeside == Beside::metric> products{};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Chunk chunk = first_chunk_of(table, blockIdx.y);
  for (bool entering = true; chunk.index < chunk.end; entering = advance(table, chunk)) {
    if (entering) products.enter(table, chunk.segment);
    const int64_t numel = table.numel[chunk.segment];
    const int64_t begin = (chunk.position * kFragmentWarps + warp) * kWarpColumns<In>;
    if (is_whole<In>(table, chunk.segment, begin + kWarpColumns<In>))
      products.add_vectors(begin, numel);
    else
      products.add_entries(begin, numel);
    if constexpr (kBeside == Beside::combination) combine_columns<In>(table, chunk.segment, begin);
  }

  __shared__ double sums[kFragmentWarps][2 * products.kTiles][32];
#pragma unroll
  for (int tile = 0; tile < products.kTiles; ++tile)
#pragma unroll
    for (int c = 0; c < 2; ++c) sums[warp][2 * tile + c][lane] = products.tiles[tile][c];
  __syncthreads();
  for (int m = 0, value = 0; m < kRowGroups; ++m)
    for (int n = m; n < kRowGroups; ++n)
      for (int c = 0; c < 2; ++c, ++value) {
        const int i = 8 * m + lane / 4, j = 8 * n + lane % 4 * 2 + c;
        if (value % kFragmentWarps != warp || i > j || j >= table.num_tasks) continue;
        double sum = 0.0;
        for (const auto& values : sums) sum += values[value][lane];
        write_sum(table, partial, i, j, blockIdx.y, sum);
      }
}

}  // namespace gradstats::cuda
