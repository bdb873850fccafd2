// The 16-bit formats, read and written by arithmetic on their bits: one form for host and device, which compilers
// vectorise and which no flush-to-zero mode touches.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define GRADSTATS_HOST_DEVICE __host__ __device__
#else
#define GRADSTATS_HOST_DEVICE
#endif

namespace gradstats {

enum class DType : uint8_t { float32, float64, float16, bfloat16 };

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

GRADSTATS_HOST_DEVICE inline double to_double(float x) { return x; }

GRADSTATS_HOST_DEVICE inline double to_double(double x) { return x; }

GRADSTATS_HOST_DEVICE inline double to_double(BFloat16 x) {
  return __builtin_bit_cast(float, uint32_t{x.bits} << 16);
}

GRADSTATS_HOST_DEVICE inline double to_double(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t rebias = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // inf and NaN keep a full exponent
  const float normal = __builtin_bit_cast(float, (magnitude << 13) + rebias);
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const float value = magnitude < 0x0400u ? subnormal : normal;
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, value) | sign);
}

// What sums of entries of a type are formed in before they are rounded to it.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

GRADSTATS_HOST_DEVICE inline void round_to(float* to, float x) { *to = x; }

GRADSTATS_HOST_DEVICE inline void round_to(double* to, double x) { *to = x; }

// To nearest, ties to even; a NaN stays one.
GRADSTATS_HOST_DEVICE inline void round_to(BFloat16* to, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t nearest = bits + 0x7fffu + (bits >> 16 & 1u);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>((is_nan ? bits | 0x00400000u : nearest) >> 16);
}

GRADSTATS_HOST_DEVICE inline void round_to(Float16* to, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
  // Beside 0.5 the steps of float32 are those of subnormal numbers, so that the addition rounds.
  const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  to->bits = static_cast<uint16_t>((magnitude >= 0x47800000u ? special : finite) | (bits >> 16 & 0x8000u));
}

}  // namespace gradstats
