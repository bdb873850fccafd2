// The register kernel: for few tasks. Each thread reads a vector of every row and keeps the sums of all pairs in its
// registers, so there is nothing between memory and the multiply-adds.
//
// Sums of float32 products take kChain terms at most before they go to float64: that bounds their error at 2e-7 of the
// norms even on constants. Every pair sees the same operations in the same order, so permuting tasks permutes the
// result exactly. With a metric, products are formed in float64.
//
// The row beside those of the tasks is read, or written, in the same pass.
#pragma once

#include "vectors.cuh"

namespace gradstats::cuda {

constexpr int kRegisterThreads = 128;
constexpr int kChain = 16;

// Blocks on a multiprocessor, which is to say registers: enough loads in flight, nothing in local memory.
constexpr int register_blocks(int num_tasks, bool alone) {
  return num_tasks > 6 ? 3 : num_tasks > 4 ? 4 : num_tasks > 2 ? (alone ? 5 : 4) : (alone ? 12 : 6);
}

template <class In>
constexpr int kVectors = kChain / kWidth<In>;  // of each row that a thread reads for a chunk

template <>
constexpr int kVectors<double> = 4;

template <class In>
constexpr int kRegisterChunk = kVectors<In> * kWidth<In> * kRegisterThreads;

template <int T>
constexpr int kPairs = T * (T + 1) / 2;

// pairs += the products of x[i] and x[j] for i <= j.
template <int T, class Sum>
__device__ void add_products(Sum (&pairs)[kPairs<T>], const Sum (&x)[T]) {
#pragma unroll
  for (int i = 0; i < T; ++i)
#pragma unroll
    for (int j = i; j < T; ++j) {
      Sum& sum = pairs[i * (2 * T - i - 1) / 2 + j];
      sum = fma(x[i], x[j], sum);
    }
}

// Whether float32 products have left their range: by the squares of each row, if its bits say that it is not zeros.
template <class In, int T>
__device__ bool out_of_range(const float (&pairs)[kPairs<T>], const uint32_t (&bits)[T]) {
  constexpr uint32_t kMagnitude = sizeof(In) == 4 ? 0x7fffffffu : 0x7fff7fffu;
  bool out = false;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const float square = pairs[t * (2 * T - t - 1) / 2 + t];
    out |= (bits[t] & kMagnitude) != 0 && !(square >= 0x1p-100f && square <= 0x1p100f);
  }
  return out;
}

// The root of the metric on each side weighs a product alike for both of its tasks.
template <int T>
__device__ void weigh(double (&x)[T], double metric) {
  const double root = sqrt(metric);
#pragma unroll
  for (int t = 0; t < T; ++t) x[t] *= root;
}

// The weighted sum of the entries, in the order of the tasks: as combine_kernel does it.
template <class In, int T, class Entry>
__device__ In weighted_sum(const Sum<In> (&weights)[T], const Entry (&x)[T]) {
  Sum<In> sum = 0;
#pragma unroll
  for (int t = 0; t < T; ++t) sum = fma(weights[t], static_cast<Sum<In>>(x[t]), sum);
  In rounded;
  round_to(&rounded, sum);
  return rounded;
}

// Adds what this thread reads of the chunk that begins at entry `begin`, all of it in whole vectors. Returns false, and
// adds nothing, where it takes float64.
template <class In, int T, Beside kBeside, class Table>
__device__ bool add_vectors(double (&sums)[kPairs<T>], const Sum<In> (&weights)[T], const Table& table, int segment,
                            int64_t begin) {
  constexpr bool kWide = std::is_same_v<In, double> || kBeside == Beside::metric;
  constexpr bool kCheckRange = kWideRange<In> && !kWide;
  const int64_t numel = table.numel[segment];
  float chain[kPairs<T>] = {};
  uint32_t bits[T] = {};  // of each row's entries, all together
#pragma unroll(8 / T)
  for (int v = 0; v < kVectors<In>; ++v) {
    const int64_t at = begin + (v * kRegisterThreads + threadIdx.x) * kWidth<In>;
    Words rows[T];
#pragma unroll
    for (int t = 0; t < T; ++t) {
      rows[t] = load_vector(row_of<In>(table, segment, t), at, numel);
      if constexpr (kCheckRange) bits[t] |= rows[t].w[0] | rows[t].w[1] | rows[t].w[2] | rows[t].w[3];
    }
    Words metric;
    if constexpr (kBeside == Beside::metric) metric = load_vector(row_beside<In>(table, segment), at, numel);
    Entries<In> combined;
#pragma unroll
    for (int e = 0; e < kWidth<In>; ++e) {
      std::conditional_t<kWide, double, float> x[T];
#pragma unroll
      for (int t = 0; t < T; ++t) x[t] = entry_of<In>(rows[t], e);
      if constexpr (kBeside == Beside::metric) weigh<T>(x, entry_of<In>(metric, e));
      if constexpr (kBeside == Beside::combination) combined.entries[e] = weighted_sum<In>(weights, x);
      if constexpr (kWide)
        add_products<T>(sums, x);
      else
        add_products<T>(chain, x);
    }
    if constexpr (kBeside == Beside::combination)
      if (at < numel) *reinterpret_cast<Entries<In>*>(row_beside<In>(table, segment) + at) = combined;
  }
  if constexpr (kCheckRange)
    if (out_of_range<In, T>(chain, bits)) return false;
  if constexpr (!kWide)
#pragma unroll
    for (int p = 0; p < kPairs<T>; ++p) sums[p] += chain[p];
  return true;
}

// The same in float64, entry by entry.
template <class In, int T, Beside kBeside, class Table>
__device__ void add_entries(double (&sums)[kPairs<T>], const Sum<In> (&weights)[T], const Table& table, int segment,
                            int64_t begin) {
  const int64_t numel = table.numel[segment];
#pragma unroll 1
  for (int v = 0; v < kVectors<In> * kWidth<In>; ++v) {
    const int64_t at = begin + (v / kWidth<In> * kRegisterThreads + threadIdx.x) * kWidth<In> + v % kWidth<In>;
    double x[T];
#pragma unroll
    for (int t = 0; t < T; ++t) {
      const In* row = row_of<In>(table, segment, t);
      x[t] = row != nullptr && at < numel ? to_double(row[at]) : 0.0;
    }
    if (at < numel) {
      if constexpr (kBeside == Beside::metric) weigh<T>(x, to_double(row_beside<In>(table, segment)[at]));
      if constexpr (kBeside == Beside::combination) row_beside<In>(table, segment)[at] = weighted_sum<In>(weights, x);
    }
    add_products<T>(sums, x);
  }
}

// Block y writes the sums of slot y over the pairs of at most T tasks.
template <class In, int T, Beside kBeside, class Table>
__global__ void __launch_bounds__(kRegisterThreads, register_blocks(T, kBeside == Beside::nothing))
    register_kernel(const __grid_constant__ Table table, double* partial) {
  double sums[kPairs<T>] = {};
  Sum<In> weights[T] = {};
  if constexpr (kBeside == Beside::combination)
#pragma unroll
    for (int t = 0; t < T; ++t) weights[t] = static_cast<Sum<In>>(t < table.num_tasks ? table.weights[t] : 0.0);
  for (Chunk chunk = first_chunk_of(table, blockIdx.y); chunk.index < chunk.end; advance(table, chunk)) {
    const int64_t begin = chunk.position * kRegisterChunk<In>;
    const bool whole = is_whole<In>(table, chunk.segment, begin + kRegisterChunk<In>);
    if (!whole || !add_vectors<In, T, kBeside>(sums, weights, table, chunk.segment, begin))
      add_entries<In, T, kBeside>(sums, weights, table, chunk.segment, begin);
  }

  __shared__ double warps[kRegisterThreads / 32][kPairs<T>];
#pragma unroll
  for (int p = 0; p < kPairs<T>; ++p) {
    double sum = sums[p];
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(~0u, sum, lanes);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][p] = sum;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < T * T; at += kRegisterThreads) {
    const int i = at / T, j = at % T;
    if (i > j || j >= table.num_tasks) continue;
    double sum = 0.0;
    for (const auto& warp : warps) sum += warp[pair_index(i, j, T)];
    write_sum(table, partial, i, j, blockIdx.y, sum);
  }
}

}  // namespace gradstats::cuda
