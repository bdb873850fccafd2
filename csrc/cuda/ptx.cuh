// The few instructions that CUDA C++ has no plain word for. tests/cuda_on_host.cpp has the same functions for the CPU.
#pragma once

#include <cstdint>

#include "../float_types.h"

namespace gradstats::cuda::ptx {

struct alignas(16) Words {
  uint32_t w[4];
};

// Reads 16 bytes, or zeros from a null pointer without a branch. They are used once, perhaps by a few warps of a block
// at about the same time: they are the first to leave L1.
__device__ inline Words load_or_zeros(const void* from) {
  Words v;
  asm("{ .reg .pred p;\n"
      "  setp.ne.u64 p, %4, 0;\n"
      "  mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "  @p ld.global.nc.L1::evict_first.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4]; }"
      : "=&r"(v.w[0]), "=&r"(v.w[1]), "=&r"(v.w[2]), "=&r"(v.w[3])
      : "l"(from));
  return v;
}

// Asks for the memory at an address, so that it is in L2 when it is read.
__device__ inline void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

__device__ inline float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Both rounded to the nearest bfloat16; `low` in the low half.
__device__ inline uint32_t pack_bfloat16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The larger of the low halves and of the high ones, as bfloat16.
__device__ inline uint32_t max_bfloat16(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// d += A B for fragments of a 16 x 16 matrix A and a 16 x 8 matrix B, spread over the lanes of a warp as the PTX manual
// draws them for mma.m16n8k16: lane l has, of d, row l / 4 (d[0], d[1]) and row l / 4 + 8 (d[2], d[3]), columns
// 2 * (l % 4) and the next.
template <class In>
__device__ inline void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma<BFloat16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                     uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32\n"
      "  {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<Float16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32\n"
      "  {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same for matrices 8 x 4 and 4 x 8 of float64: lane l has a = A[l / 4][l % 4], b = B[l % 4][l / 4] and, of d, row
// l / 4, columns 2 * (l % 4) and the next.
__device__ inline void mma(double (&d)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(d[0]), "+d"(d[1])
      : "d"(a), "d"(b));
}

}  // namespace gradstats::cuda::ptx
