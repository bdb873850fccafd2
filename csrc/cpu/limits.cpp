// What the processor can do at most, for the shares that `gradstats bench` prints: operators that only read and that
// only multiply and add. Their schemas, and what they return, are in gradstats/ops/limits.py.
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "clones.h"

namespace gradstats {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls `work(thread)` once for each thread.
template <class Work>
void on_every_thread(int64_t threads, const Work& work) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) work(t);
  });
}

// ---- reading --------------------------------------------------------------------------------------------------------

// The exclusive or of all bytes, spread over those of a word.
GRADSTATS_CLONES uint64_t read_run(const char* from, int64_t bytes, int64_t ahead) {
  using Line [[gnu::vector_size(64), gnu::aligned(1), gnu::may_alias]] = uint64_t;
  constexpr int64_t kLine = sizeof(Line);
  Line a{}, b{}, c{}, d{};
  int64_t at = 0;
  for (; at + 4 * kLine <= bytes; at += 4 * kLine) {
    // The processor alone stops asking at the end of each page.
    for (int64_t line = 0; line < 4 && ahead > 0; ++line) __builtin_prefetch(from + at + ahead + line * kLine);
    const Line* lines = reinterpret_cast<const Line*>(from + at);
    a ^= lines[0], b ^= lines[1], c ^= lines[2], d ^= lines[3];
  }
  a ^= b ^ c ^ d;
  uint64_t seen = 0;
  for (; at < bytes; ++at) seen ^= static_cast<unsigned char>(from[at]);
  for (int lane = 0; lane < 8; ++lane) seen ^= a[lane];
  return seen;
}

Tensor read(std::vector<Tensor> tensors, int64_t ahead) {
  STD_TORCH_CHECK(!tensors.empty(), "gradstats::_read: expected at least one tensor");
  std::vector<const char*> data;
  std::vector<int64_t> starts = {0};
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_contiguous(), "gradstats::_read: expected contiguous tensors");
    data.push_back(static_cast<const char*>(tensor.const_data_ptr()));
    starts.push_back(starts.back() + tensor.numel() * tensor.element_size());
  }
  constexpr int64_t kWorthThread = 1 << 17;  // bytes
  const int64_t threads = std::clamp<int64_t>(starts.back() / kWorthThread, 1, torch::stable::get_num_threads());
  std::vector<uint64_t> seen(threads);
  on_every_thread(threads, [&](int64_t t) {
    const int64_t begin = starts.back() * t / threads, end = starts.back() * (t + 1) / threads;
    for (size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1; i < data.size(); ++i) {
      const int64_t from = std::max(begin, starts[i]), to = std::min(end, starts[i + 1]);
      if (from >= end) break;
      seen[t] ^= read_run(data[i] + (from - starts[i]), to - from, ahead);
    }
  });
  uint64_t all = 0;
  for (uint64_t word : seen) all ^= word;
  for (int shift : {32, 16, 8}) all ^= all >> shift;
  Tensor result = torch::stable::new_empty(tensors[0], {}, ScalarType::Byte);
  *result.mutable_data_ptr<uint8_t>() = static_cast<uint8_t>(all);
  return result;
}

// ---- multiplying and adding -----------------------------------------------------------------------------------------

// Enough chains to hide the latency of each, few enough for the registers of any instruction set. Each counts its own
// steps, so that nothing can be left out; in pieces short enough for float32 to count exactly.
constexpr int64_t kChains = 12, kPiece = 4096;

template <class T, int kVectorBytes>
[[gnu::always_inline]] inline double count_up(int64_t pieces) {
  using Vector [[gnu::vector_size(kVectorBytes)]] = T;
  const volatile T zero = 0, one = 1;  // which the compiler cannot know
  const Vector step = Vector{} + one;
  double counted = 0;
  for (; pieces > 0; --pieces) {
    Vector chains[kChains];
#pragma GCC unroll 12
    for (Vector& chain : chains) chain = Vector{} + zero;
    for (int64_t n = 0; n < kPiece; ++n)
#pragma GCC unroll 12
      for (Vector& chain : chains) chain = chain * step + step;
    for (const Vector& chain : chains)
      for (int64_t lane = 0; lane < int64_t{kVectorBytes / sizeof(T)}; ++lane) counted += chain[lane];
  }
  return counted;
}

struct CountUp {
  double (*run)(int64_t pieces);
  int64_t vector_bytes;
};

#ifdef GRADSTATS_X86
template <class T>
[[gnu::target("avx512f,prefer-vector-width=512")]] double count_up_avx512(int64_t pieces) {
  return count_up<T, 64>(pieces);
}
template <class T>
[[gnu::target("avx2,fma")]] double count_up_avx2(int64_t pieces) {
  return count_up<T, 32>(pieces);
}
#endif

template <class T>
CountUp best_count_up() {
#ifdef GRADSTATS_X86
  if (__builtin_cpu_supports("avx512f")) return {count_up_avx512<T>, 64};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {count_up_avx2<T>, 32};
#endif
  return {count_up<T, 16>, 16};
}

Tensor multiply_add(Tensor like, int64_t count) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || like.scalar_type() == ScalarType::Float,
                  "gradstats::_multiply_add: expected float32 or float64");
  const CountUp count_up = wide ? best_count_up<double>() : best_count_up<float>();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t in_piece = kChains * kPiece * count_up.vector_bytes / like.element_size();
  const int64_t pieces = (count + threads * in_piece - 1) / (threads * in_piece);
  std::vector<double> counted(threads);
  on_every_thread(threads, [&](int64_t t) { counted[t] = count_up.run(pieces); });
  Tensor result = torch::stable::new_empty(like, {}, ScalarType::Double);
  double* const out = result.mutable_data_ptr<double>();
  *out = 0;
  for (double n : counted) *out += n;
  return result;
}

}  // namespace
}  // namespace gradstats

STABLE_TORCH_LIBRARY_IMPL(gradstats, CPU, library) {
  library.impl("_read", TORCH_BOX(&gradstats::read));
  library.impl("_multiply_add", TORCH_BOX(&gradstats::multiply_add));
}
