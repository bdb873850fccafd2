// How the fast kernels read rows: 16 bytes at a time, as words in registers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "table.h"

#ifdef __CUDACC__
#include "ptx.cuh"
#endif  // else tests/cuda_on_host.cpp has defined the same

namespace gradstats::cuda {

template <class In>
constexpr int kWidth = 16 / sizeof(In);  // entries of a vector

using ptx::Words;

__device__ inline float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

template <class In>
__device__ uint32_t bits_of(In x) {
  if constexpr (std::is_same_v<In, float>)
    return __builtin_bit_cast(uint32_t, x);
  else
    return x.bits;
}

// The vector at entry `at` of a row that starts at a 16-byte boundary; zeros unless all of it is there.
template <class In>
__device__ Words load_vector(const In* row, int64_t at, int64_t numel) {
  return ptx::load_or_zeros(row != nullptr && at + kWidth<In> <= numel ? row + at : nullptr);
}

// The same of any row, with zeros for the entries that are not there: one by one, in few registers.
template <class In>
__device__ Words load_entries(const In* row, int64_t at, int64_t numel) {
  constexpr int kBits = 8 * sizeof(In);
  Words v{};
#pragma unroll 1
  for (int e = kWidth<In> - 1; e >= 0; --e) {
    const uint32_t entry = row != nullptr && at + e < numel ? bits_of(row[at + e]) : 0;
    v.w[3] = (uint64_t{v.w[3]} << 32 | v.w[2]) >> (32 - kBits);
    v.w[2] = (uint64_t{v.w[2]} << 32 | v.w[1]) >> (32 - kBits);
    v.w[1] = (uint64_t{v.w[1]} << 32 | v.w[0]) >> (32 - kBits);
    v.w[0] = uint64_t{v.w[0]} << kBits | entry;
  }
  return v;
}

// Whether load_vector leaves none of a segment's entries before `end` out.
template <class In, class Table>
__device__ bool is_whole(const Table& table, int segment, int64_t end) {
  return table.aligned[segment] && (table.numel[segment] % kWidth<In> == 0 || end <= table.numel[segment]);
}

// Entry e of a vector: float, or double for float64.
template <class In>
__device__ auto entry_of(const Words& v, int e) {
  if constexpr (sizeof(In) == 8)
    return __builtin_bit_cast(double, uint64_t{v.w[2 * e + 1]} << 32 | v.w[2 * e]);
  else if constexpr (sizeof(In) == 4)
    return bits_to_float(v.w[e]);
  else if constexpr (std::is_same_v<In, BFloat16>)
    return bits_to_float(e % 2 == 0 ? v.w[e / 2] << 16 : v.w[e / 2] & 0xffff0000u);
  else
    return ptx::to_float(Float16{static_cast<uint16_t>(v.w[e / 2] >> 16 * (e % 2))});
}

// What is written at once.
template <class In>
struct alignas(16) Entries {
  In entries[kWidth<In>];
};

// float32 and bfloat16 have entries whose products leave the range of float32.
template <class In>
constexpr bool kWideRange = std::is_same_v<In, float> || std::is_same_v<In, BFloat16>;

}  // namespace gradstats::cuda
