// The 16-bit formats, read by arithmetic on their bits: one form for host and device, which compilers vectorise and
// which no flush-to-zero mode touches.
#pragma once

#include <cstdint>

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

}  // namespace gradstats
