// The weighted sums on the GPU: each thread reads a vector of every row and writes one of sums.
//
// Sums are formed in float32 (float64 for float64) in the order of the tasks, and rounded once.
#pragma once

#include "vectors.cuh"

namespace gradstats::cuda {

constexpr int kCombineThreads = 256;
constexpr int kAtOnce = 4;  // rows whose vectors are on their way together

template <class In>
constexpr int kCombineChunk = kCombineThreads * kWidth<In>;

template <class In, class Table>
__device__ void combine_vector(const Table& table, int segment, int64_t at) {
  Sum<In> sums[kWidth<In>] = {};
  for (int first = 0; first < table.num_tasks; first += kAtOnce) {
    Words rows[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      rows[r] = load_vector(row_of<In>(table, segment, first + r), at, table.numel[segment]);
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const auto weight = static_cast<Sum<In>>(first + r < table.num_tasks ? table.weights[first + r] : 0.0);
#pragma unroll
      for (int e = 0; e < kWidth<In>; ++e) sums[e] = fma(weight, entry_of<In>(rows[r], e), sums[e]);
    }
  }
  Entries<In> rounded;
#pragma unroll
  for (int e = 0; e < kWidth<In>; ++e) round_to(rounded.entries + e, sums[e]);
  *reinterpret_cast<Entries<In>*>(row_beside<In>(table, segment) + at) = rounded;
}

template <class In, class Table>
__device__ void combine_entry(const Table& table, int segment, int64_t at) {
  Sum<In> sum = 0;
  for (int t = 0; t < table.num_tasks; ++t) {
    const In* const row = row_of<In>(table, segment, t);
    const auto entry = static_cast<Sum<In>>(row != nullptr ? to_double(row[at]) : 0.0);
    sum = fma(static_cast<Sum<In>>(table.weights[t]), entry, sum);
  }
  round_to(row_beside<In>(table, segment) + at, sum);
}

// Writes the weighted sums of the next kThreads vectors from entry `begin` on, as thread `thread` of so many.
template <class In, int kThreads, class Table>
__device__ void combine_entries(const Table& table, int segment, int64_t begin, int thread) {
  const int64_t numel = table.numel[segment], next = begin + kThreads * kWidth<In>;
  if (is_whole<In>(table, segment, next)) {
    const int64_t at = begin + thread * kWidth<In>;
    if (at < numel) combine_vector<In>(table, segment, at);
  } else {
    for (int64_t at = begin + thread; at < next && at < numel; at += kThreads) combine_entry<In>(table, segment, at);
  }
}

// Block x writes the weighted sums over the chunks of slot x.
template <class In, class Table>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const __grid_constant__ Table table) {
  for (Chunk chunk = first_chunk_of(table, blockIdx.x); chunk.index < chunk.end; advance(table, chunk))
    combine_entries<In, kCombineThreads>(table, chunk.segment, chunk.position * kCombineChunk<In>, threadIdx.x);
}

}  // namespace gradstats::cuda
