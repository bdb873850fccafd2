// gradstats::gram, combine, gram_combine, linear_gram and linear_gram_combine for CPU tensors.
#include <Python.h>

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../linear_args.h"
#include "../planned_calls.h"

namespace gradstats {
namespace {

bool is_intel() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// How far ahead of its use memory is asked for where a single tile reads it, as measured.
template <class In>
constexpr int64_t kPrefetchBytes = sizeof(In) < 8 ? 3072 : 1024;

// The same where a strip reads it, as measured: AMD's processors (Zen 5) foresee best what nobody asks for, Intel's
// (Emerald Rapids) read a tenth more so.
const int64_t kStripPrefetchBytes = is_intel() ? 1024 : 0;

// Ranges of a parameter begin at multiples of it, whole chunks (gram_kernel.h).
constexpr int64_t kGrain = 768;

struct Problem {
  std::vector<Walk> walks;
  int64_t num_tasks;
  bool has_metric;
  const double* weights;  // null: nothing is combined, and the walks have no row for it
  std::vector<int64_t> starts = {0};  // of each parameter in the concatenation of all, and the end
  std::vector<bool> is_run = {};      // whether a parameter can be read without conversion beforehand

  int64_t parameter_at(int64_t entry) const {
    return std::upper_bound(starts.begin(), starts.end(), entry) - starts.begin() - 1;
  }

  // The first entry from `entry` on that lies a multiple of kGrain into its parameter, or begins the next one: vectors
  // that lie across two lines of the cache are read more slowly.
  int64_t aligned(int64_t entry) const {
    if (entry >= starts.back()) return starts.back();
    const int64_t k = parameter_at(entry), grains = (entry - starts[k] + kGrain - 1) / kGrain;
    return std::min(starts[k] + grains * kGrain, starts[k + 1]);
  }
};

// Whether every task has this parameter's gradient, and as one contiguous run.
bool is_run(const Walk& walk, int64_t num_tasks) {
  if (walk.num_loops() != 1) return false;
  for (int64_t t = 0; t < num_tasks; ++t)
    if (walk.data[t] == nullptr || walk.strides[t] != 1) return false;
  return true;
}

Problem make_problem(std::vector<Walk> walks, int64_t num_tasks, bool has_metric, const double* weights) {
  Problem problem{std::move(walks), num_tasks, has_metric, weights};
  for (const Walk& walk : problem.walks) {
    problem.starts.push_back(problem.starts.back() + walk.numel);
    problem.is_run.push_back(!has_metric && is_run(walk, num_tasks));
  }
  return problem;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

// Asks for the memory so many bytes after `at`, whoever owns it. Always inlined, since GCC drops calls of a function
// that does nothing else.
template <bool kToWrite = false>
[[gnu::always_inline]] inline void ask_for(const void* at, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + bytes), kToWrite);
}

// Bytes that are zero.
Buffer allocate(int64_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  STD_TORCH_CHECK(p != nullptr, "gradstats: out of memory");
  return Buffer(std::memset(p, 0, bytes));
}

// ---- one source, several instruction sets ---------------------------------------------------------------------------

template <class T, int N>
using Vector [[gnu::vector_size(N * sizeof(T))]] = T;

namespace portable {
constexpr int kVectorBytes = 16, kTile = 3, kStrip = 4;
inline Vector<uint32_t, 2> widen(Vector<uint16_t, 2> v) { return __builtin_convertvector(v, Vector<uint32_t, 2>); }
inline Vector<uint32_t, 4> widen(Vector<uint16_t, 4> v) { return __builtin_convertvector(v, Vector<uint32_t, 4>); }
inline Vector<double, 2> widen(Vector<float, 2> v) { return __builtin_convertvector(v, Vector<double, 2>); }
template <int kSide>
Vector<float, 2> half(Vector<float, 4> v) {
  return Vector<float, 2>{v[2 * kSide], v[2 * kSide + 1]};
}
#include "gram_kernel.h"
#include "combine_kernel.h"
#include "linear_gram_kernel.h"
}  // namespace portable

struct Kernels {
  void (*gram_slot)(const Problem&, int64_t begin, int64_t end, double* sums);
  void (*combine_slot)(const Problem&, int64_t begin, int64_t end);
  void (*linear_gram_slots)(const LinearLayer&, int64_t num_slots, int64_t first, int64_t last, double* sums);
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// GCC 12 splits __builtin_convertvector into halves here, hence the intrinsics.
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kVectorBytes = 32, kTile = 3, kStrip = 6;
inline Vector<uint32_t, 4> widen(Vector<uint16_t, 4> v) {
  return (Vector<uint32_t, 4>)_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&v)));
}
inline Vector<uint32_t, 8> widen(Vector<uint16_t, 8> v) {
  return (Vector<uint32_t, 8>)_mm256_cvtepu16_epi32((__m128i)v);
}
inline Vector<double, 4> widen(Vector<float, 4> v) { return _mm256_cvtps_pd(v); }
template <int kSide>
Vector<float, 4> half(Vector<float, 8> v) {
  return _mm256_extractf128_ps(v, kSide);
}
#include "gram_kernel.h"
#include "combine_kernel.h"
#include "linear_gram_kernel.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int kVectorBytes = 64, kTile = 4, kStrip = 8;
using avx2::widen;
inline Vector<uint32_t, 16> widen(Vector<uint16_t, 16> v) {
  return (Vector<uint32_t, 16>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
}
inline Vector<double, 8> widen(Vector<float, 8> v) { return _mm512_maskz_cvtps_pd(0xff, v); }
template <int kSide>
Vector<float, 8> half(Vector<float, 16> v) {
  return _mm512_maskz_extractf32x8_ps(0xff, v, kSide);
}
// Adds two products to each sum, in a way that gives the same with x and y exchanged. Spelled out, since not every
// processor with AVX-512 knows it.
inline void add_product(Vector<float, 16>& sum, Vector<uint16_t, 32> x, Vector<uint16_t, 32> y) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
}
#include "gram_kernel.h"
#include "combine_kernel.h"
#include "linear_gram_kernel.h"
}  // namespace avx512
#pragma GCC pop_options

// The best that the processor has; GRADSTATS_CPU_ISA (portable, avx2, avx512) holds it back for tests.
Kernels choose_kernels() {
  const char* const limit = std::getenv("GRADSTATS_CPU_ISA");
  const auto allows = [&](const char* lesser) { return limit == nullptr || std::strcmp(limit, lesser) != 0; };
  const bool allow_avx2 = allows("portable"), allow_avx512 = allow_avx2 && allows("avx2");
  if (allow_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if __GNUC__ >= 11  // an older one may not know the name
    if (allows("avx512") && __builtin_cpu_supports("avx512bf16"))
      return {avx512::gram_slot<BFloat16>, avx512::combine_slot, avx512::linear_gram_slots};
#endif
    return {avx512::gram_slot<float>, avx512::combine_slot, avx512::linear_gram_slots};
  }
  if (allow_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {avx2::gram_slot<float>, avx2::combine_slot, avx2::linear_gram_slots};
  return {portable::gram_slot<float>, portable::combine_slot, portable::linear_gram_slots};
}
#else
Kernels choose_kernels() { return {portable::gram_slot<float>, portable::combine_slot, portable::linear_gram_slots}; }
#endif

// ---- the operator ---------------------------------------------------------------------------------------------------

// How many ranges the entries are cut into. A function of the sizes alone, so that any number of threads adds the
// same numbers in the same order: enough ranges to feed many cores, each long enough to be worth a thread, and the sums
// of all pairs that it begins and ends with.
int64_t num_slots(int64_t entries, int64_t num_tasks) {
  constexpr int64_t kMaxSlots = 128, kMinReads = int64_t{1} << 17, kMinEntries = 1536;
  constexpr int64_t kMaxSums = int64_t{1} << 21;  // of all ranges together: 16 MiB of partial sums
  const int64_t most = std::clamp<int64_t>(kMaxSums / (num_tasks * (num_tasks + 1) / 2), 1, kMaxSlots);
  return std::clamp<int64_t>(std::min(entries * num_tasks / kMinReads, entries / kMinEntries), 1, most);
}

const Kernels& kernels() {
  static const Kernels chosen = choose_kernels();
  return chosen;
}

// Calls `function(slot, begin, end)` for the ranges of the entries, on all cores.
template <class Function>
void for_each_slot(const Problem& problem, int64_t slots, const Function& function) {
  const int64_t slot_entries = (problem.starts.back() + slots - 1) / slots;
  torch::stable::parallel_for(0, slots, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s)
      function(s, problem.aligned(s * slot_entries), problem.aligned((s + 1) * slot_entries));
  });
}

// A float64 tensor [T, T]. torch::stable::new_empty looks its operator up by name each time, which small problems
// notice.
Tensor empty_gramian(int64_t num_tasks) {
  const int64_t sizes[] = {num_tasks, num_tasks}, strides[] = {num_tasks, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_float64(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The Gramian of the sums of the products of all pairs in each slot.
Tensor add_slots(const std::vector<double>& sums, int64_t num_tasks) {
  const int64_t num_pairs = num_tasks * (num_tasks + 1) / 2, slots = static_cast<int64_t>(sums.size()) / num_pairs;
  Tensor result = empty_gramian(num_tasks);
  double* out = result.mutable_data_ptr<double>();
  for (int64_t i = 0, pair = 0; i < num_tasks; ++i)
    for (int64_t j = i; j < num_tasks; ++j, ++pair) {
      double sum = 0;
      for (int64_t s = 0; s < slots; ++s) sum += sums[s * num_pairs + pair];
      out[i * num_tasks + j] = out[j * num_tasks + i] = sum;
    }
  return result;
}

// The Gramian; on the way the weighted sums, where the problem has weights.
Tensor run_gram(const Problem& problem) {
  const int64_t num_tasks = problem.num_tasks, num_pairs = num_tasks * (num_tasks + 1) / 2;
  const int64_t slots = num_slots(problem.starts.back(), num_tasks);
  std::vector<double> sums(slots * num_pairs);
  for_each_slot(problem, slots, [&](int64_t slot, int64_t begin, int64_t end) {
    kernels().gram_slot(problem, begin, end, sums.data() + slot * num_pairs);
  });
  return add_slots(sums, num_tasks);
}

Tensor gram(std::vector<Tensor> grads, int64_t num_tasks, std::vector<Tensor> metric, bool stacked) {
  auto walks = read_arguments(grads, num_tasks, metric, stacked);
  return run_gram(make_problem(std::move(walks), num_tasks, !metric.empty(), nullptr));
}

std::vector<Tensor> combine(std::vector<Tensor> grads, int64_t num_tasks, Tensor weights, bool stacked) {
  weights = read_weights(weights, num_tasks);
  std::vector<Tensor> combined = empty_combinations(grads, num_tasks, stacked);
  auto walks = read_arguments(grads, num_tasks, {}, stacked, combined);
  const Problem problem = make_problem(std::move(walks), num_tasks, false, weights.const_data_ptr<double>());
  for_each_slot(problem, num_slots(problem.starts.back(), num_tasks), [&](int64_t, int64_t begin, int64_t end) {
    kernels().combine_slot(problem, begin, end);
  });
  return combined;
}

std::tuple<Tensor, std::vector<Tensor>> gram_combine(std::vector<Tensor> grads, int64_t num_tasks, Tensor weights,
                                                     std::vector<Tensor> metric, bool stacked) {
  weights = read_weights(weights, num_tasks);
  std::vector<Tensor> combined = empty_combinations(grads, num_tasks, stacked);
  auto walks = read_arguments(grads, num_tasks, metric, stacked, combined);
  const double* const data = weights.const_data_ptr<double>();
  Tensor gramian = run_gram(make_problem(std::move(walks), num_tasks, !metric.empty(), data));
  return {gramian, combined};
}

// As run_gram, of the weight gradients of a linear layer.
Tensor run_linear_gram(const LinearLayer& layer) {
  const int64_t num_tasks = layer.num_tasks(), products = layer.rows * layer.fan_in * layer.fan_out;
  const int64_t slots = std::min(std::max<int64_t>(1, layer.num_patches()), num_slots(products, num_tasks));
  std::vector<double> sums(slots * num_tasks * (num_tasks + 1) / 2);
  torch::stable::parallel_for(0, slots, 1, [&](int64_t first, int64_t last) {
    kernels().linear_gram_slots(layer, slots, first, last, sums.data());
  });
  return add_slots(sums, num_tasks);
}

Tensor linear_gram(Tensor inputs, std::vector<Tensor> cotangents) {
  return run_linear_gram(read_linear_layer(inputs, cotangents));
}

std::tuple<Tensor, Tensor> linear_gram_combine(Tensor inputs, std::vector<Tensor> cotangents, Tensor weights) {
  LinearLayer layer = read_linear_layer(inputs, cotangents);
  weights = read_weights(weights, layer.num_tasks());
  Tensor combined = torch::stable::new_empty(cotangents[0], {layer.fan_out, layer.fan_in});
  layer.weights = weights.const_data_ptr<double>();
  layer.combined = detail::read_matrix(combined, layer.fan_out, layer.fan_in);
  return {run_linear_gram(layer), combined};
}

int64_t plan_gram(std::vector<Tensor> grads, int64_t num_tasks, std::vector<Tensor> metric, bool stacked,
                  std::vector<int64_t> addresses) {
  auto walks = read_arguments(grads, num_tasks, metric, stacked);
  Problem problem = make_problem(std::move(walks), num_tasks, !metric.empty(), nullptr);
  return planned_calls<Problem>().add(std::move(grads), std::move(metric), addresses, std::move(problem));
}

std::optional<Tensor> planned_gram(Tensor, int64_t number) {
  const auto call = planned_calls<Problem>().find(number);
  if (!call->is_current()) return std::nullopt;
  return run_gram(call->work);
}

void forget_plan(Tensor, int64_t number) { planned_calls<Problem>().remove(number); }

}  // namespace
}  // namespace gradstats

STABLE_TORCH_LIBRARY_IMPL(gradstats, CPU, library) {
  library.impl("gram", TORCH_BOX(&gradstats::gram));
  library.impl("combine", TORCH_BOX(&gradstats::combine));
  library.impl("gram_combine", TORCH_BOX(&gradstats::gram_combine));
  library.impl("linear_gram", TORCH_BOX(&gradstats::linear_gram));
  library.impl("linear_gram_combine", TORCH_BOX(&gradstats::linear_gram_combine));
  library.impl("_plan_gram", TORCH_BOX(&gradstats::plan_gram));
  library.impl("_planned_gram", TORCH_BOX(&gradstats::planned_gram));
  library.impl("_forget_plan", TORCH_BOX(&gradstats::forget_plan));
}

// Importing the module is what loads the library; it has no Python functions of its own.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
