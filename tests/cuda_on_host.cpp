// Runs the CUDA kernels of csrc/cuda on the CPU, and shows how their work is planned: a Python module that the tests
// build. Every thread of a block is a coroutine here, that runs until it meets a barrier. Tensor cores are emulated by
// the manual's drawing of their fragments and a published model of their additions, which cut bits off. This shows
// that the algorithm, its indexing and its rounding are right; it says nothing of speed, races or memory models.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../csrc/float_types.h"

// ---- threads --------------------------------------------------------------------------------------------------------

struct Index {
  unsigned x = 0, y = 0;
};
static Index threadIdx, blockIdx, blockDim;

namespace emulation {

enum class State { running, at_warp_barrier, at_block_barrier, done };

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  State state = State::done;
};
static std::vector<Thread> threads(256);
static ucontext_t scheduler;
static const std::function<void()>* body;

static void wait(State barrier) {
  const Index self = threadIdx;
  threads[self.x].state = barrier;
  swapcontext(&threads[self.x].context, &scheduler);
  threadIdx = self;
}

static void thread_main() {
  (*body)();
  threads[threadIdx.x].state = State::done;
}

// Lets threads [first, last) go on if those that have not ended all wait at `barrier`.
static bool release(unsigned first, unsigned last, State barrier) {
  bool any = false;
  for (unsigned t = first; t < last; ++t) {
    if (threads[t].state != State::done && threads[t].state != barrier) return false;
    any |= threads[t].state == barrier;
  }
  for (unsigned t = first; any && t < last; ++t)
    if (threads[t].state == barrier) threads[t].state = State::running;
  return any;
}

static void run_block() {
  for (unsigned t = 0; t < blockDim.x; ++t) {
    Thread& thread = threads[t];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, thread_main, 0);
    thread.state = State::running;
  }
  for (bool progress = true; progress;) {
    for (unsigned t = 0; t < blockDim.x; ++t)
      while (threads[t].state == State::running) {
        threadIdx = {t, 0};
        swapcontext(&scheduler, &threads[t].context);
      }
    progress = release(0, blockDim.x, State::at_block_barrier);
    for (unsigned w = 0; w < blockDim.x; w += 32) progress |= release(w, w + 32, State::at_warp_barrier);
  }
  for (unsigned t = 0; t < blockDim.x; ++t)
    if (threads[t].state != State::done) throw std::runtime_error("threads wait for each other at different barriers");
}

static void run_grid(Index grid, unsigned num_threads, const std::function<void()>& kernel) {
  body = &kernel;
  blockDim = {num_threads, 1};
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
}

// What all lanes of this warp bring. Two buffers in turn: who is ahead does not overwrite what others still read.
template <class T>
const std::array<T, 32>& exchange(const T& mine) {
  static std::array<T, 32> buffers[8][2];
  static bool turns[256];
  auto& buffer = buffers[threadIdx.x / 32][turns[threadIdx.x] = !turns[threadIdx.x]];
  buffer[threadIdx.x % 32] = mine;
  wait(State::at_warp_barrier);
  return buffer;
}

}  // namespace emulation

static void __syncthreads() { emulation::wait(emulation::State::at_block_barrier); }

static void __syncwarp() { emulation::wait(emulation::State::at_warp_barrier); }

static double __shfl_down_sync(unsigned, double value, int lanes) {
  return emulation::exchange(value)[std::min(31u, threadIdx.x % 32 + lanes)];
}

static uint32_t __reduce_or_sync(unsigned, uint32_t value) {
  uint32_t all = 0;
  for (uint32_t v : emulation::exchange(value)) all |= v;
  return all;
}

// ---- instructions ---------------------------------------------------------------------------------------------------

namespace gradstats::cuda::ptx {

struct alignas(16) Words {
  uint32_t w[4];
};

static Words load_or_zeros(const void* from) {
  Words v{};
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) throw std::runtime_error("a vector is not aligned");
  if (from != nullptr) std::memcpy(&v, from, sizeof v);
  return v;
}

static void prefetch(const void* at) { (void)*static_cast<const volatile char*>(at); }

static float to_float(Float16 x) { return static_cast<float>(to_double(x)); }

static uint16_t to_bfloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static uint32_t pack_bfloat16(float low, float high) { return to_bfloat16(low) | uint32_t{to_bfloat16(high)} << 16; }

static uint32_t max_bfloat16(uint32_t a, uint32_t b) {
  const auto larger = [](uint32_t x, uint32_t y) {
    return __builtin_bit_cast(uint32_t, std::fmax(__builtin_bit_cast(float, x), __builtin_bit_cast(float, y)));
  };
  return larger(a << 16, b << 16) >> 16 | larger(a & 0xffff0000u, b & 0xffff0000u);
}

// x without what lies below `unit`, a power of two.
static double cut(double x, double unit) { return std::trunc(x / unit) * unit; }

// How many products a tensor core adds at a time, and how many bits more than float32 it aligns them to: 8 and 1 in an
// A100, 16 and 2 in an H100, H200 and B200 (Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor Cores", 2025).
static int products_at_a_time = 16, extra_bits = 2;

// The sum of some numbers as tensor cores make it: each cut to the bits of the largest, and the sum cut to float32.
static float cutting_sum(const double* terms, int count) {
  double largest = 0.0, sum = 0.0;
  for (int k = 0; k < count; ++k) {
    sum += terms[k];
    largest = std::max(largest, std::abs(terms[k]));
  }
  if (!std::isfinite(sum) || largest == 0.0) return static_cast<float>(sum);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 23 - extra_bits);
  sum = 0.0;
  for (int k = 0; k < count; ++k) sum += cut(terms[k], unit);
  if (sum == 0.0) return 0.0f;
  return static_cast<float>(cut(sum, std::ldexp(1.0, std::max(std::ilogb(sum) - 23, -149))));
}

// Entry of a register that holds two.
template <class In>
double half(uint32_t word, int k) {
  return to_double(In{static_cast<uint16_t>(word >> 16 * k)});
}

template <class In>
void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const auto lanes = emulation::exchange(std::array<uint32_t, 6>{a0, a1, a2, a3, b0, b1});
  const int lane = threadIdx.x % 32;
  for (int c = 0; c < 4; ++c) {
    const int row = lane / 4 + 8 * (c / 2), column = lane % 4 * 2 + c % 2;
    // A [16, 16]: register 0 has rows 0-7, 1 rows 8-15, of columns 0-7; 2 and 3 the same of columns 8-15. A lane has
    // columns 2 * (lane % 4) and the next. B [16, 8] likewise, by columns.
    double terms[17];
    for (int first = 0; first < 16; first += products_at_a_time) {
      terms[0] = d[c];
      for (int k = first; k < first + products_at_a_time; ++k) {
        const uint32_t left = lanes[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
        const uint32_t right = lanes[column * 4 + k % 8 / 2][4 + k / 8];
        terms[k - first + 1] = half<In>(left, k % 2) * half<In>(right, k % 2);
      }
      d[c] = cutting_sum(terms, products_at_a_time + 1);
    }
  }
}

static void mma(double (&d)[2], double a, double b) {
  const auto lanes = emulation::exchange(std::array<double, 2>{a, b});
  const int lane = threadIdx.x % 32;
  for (int c = 0; c < 2; ++c)
    for (int k = 0; k < 4; ++k) d[c] = std::fma(lanes[lane / 4 * 4 + k][0], lanes[(lane % 4 * 2 + c) * 4 + k][1], d[c]);
}

}  // namespace gradstats::cuda::ptx

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
using std::fma, std::fmaxf, std::max, std::sqrt;

#include "../csrc/cuda/combine_plan.h"
#include "../csrc/cuda/kernels.cuh"

// ---- the module -----------------------------------------------------------------------------------------------------

using namespace gradstats;
using namespace gradstats::cuda;
namespace py = pybind11;

static const char* name_of(Kernel kernel) {
  constexpr const char* kNames[] = {"general", "registers", "fragments", "wide"};
  return kNames[static_cast<int>(kernel)];
}

// A parameter as Python gives it: pointers to rows (0: no gradient), the tasks' and what is beside them, the number of
// entries, their dtype, and that of the metric.
using Parameter = std::tuple<std::vector<uintptr_t>, int64_t, int, int>;

static std::vector<Walk> walks_of(const std::vector<Parameter>& parameters) {
  std::vector<Walk> walks;
  for (const auto& [rows, numel, dtype, metric_dtype] : parameters) {
    Walk walk;
    walk.numel = numel;
    walk.dtype = static_cast<DType>(dtype);
    walk.metric_dtype = static_cast<DType>(metric_dtype);
    walk.sizes = {numel};
    for (uintptr_t row : rows) walk.data.push_back(reinterpret_cast<const void*>(row));
    walk.strides.assign(walk.data.size(), 1);
    walks.push_back(walk);
  }
  return walks;
}

// The launches in order: (kernel, table, segments, blocks for each slot, threads), and the number of slots.
static py::tuple plan(int64_t num_tasks, const std::vector<Parameter>& parameters, Beside beside) {
  const std::vector<Walk> walks = walks_of(parameters);
  const Plan plan = make_plan(walks, num_tasks, beside);
  py::list launches;
  for (const FastLaunch& launch : plan.fast)
    std::visit(
        [&](const auto& table) {
          const Geometry shape = geometry(launch.kernel, launch.dtype, num_tasks);
          launches.append(py::make_tuple(name_of(launch.kernel), launch.table.index() == 0 ? "small" : "large",
                                         table.num_segments, shape.blocks_per_slot, shape.threads));
        },
        launch.table);
  GeneralPlan general(num_tasks, beside == Beside::metric, plan.num_slots, !plan.fast.empty(), [&](const GeneralLaunch& launch) {
    launches.append(
        py::make_tuple("general", "small", launch.num_segments, num_tile_pairs(launch), kGeneralThreads));
  });
  for (const Walk* walk : plan.general) general.append(*walk);
  general.flush();
  return py::make_tuple(launches, plan.num_slots);
}

// As run_gram of csrc/cuda/gram.cu.
static std::vector<double> gram(int64_t num_tasks, const std::vector<Parameter>& parameters, Beside beside,
                                const std::vector<double>& weights) {
  const std::vector<Walk> walks = walks_of(parameters);
  const Plan plan = make_plan(walks, num_tasks, beside, weights.data());
  std::vector<double> partial(num_pairs(num_tasks) * plan.num_slots, std::numeric_limits<double>::quiet_NaN());
  const auto slots = static_cast<unsigned>(plan.num_slots);
  for (const FastLaunch& launch : plan.fast)
    std::visit(
        [&](const auto& table) {
          const Geometry shape = geometry(launch.kernel, launch.dtype, num_tasks);
          emulation::run_grid({static_cast<unsigned>(shape.blocks_per_slot), slots}, shape.threads,
                              [&] { fast_kernel(launch, table)(table, partial.data()); });
        },
        launch.table);
  GeneralPlan general(num_tasks, beside == Beside::metric, plan.num_slots, !plan.fast.empty(), [&](const GeneralLaunch& launch) {
    emulation::run_grid({slots, static_cast<unsigned>(num_tile_pairs(launch))}, kGeneralThreads,
                        [&] { general_kernel(launch, partial.data()); });
  });
  for (const Walk* walk : plan.general) general.append(*walk);
  general.flush();

  std::vector<double> result(num_tasks * num_tasks, std::numeric_limits<double>::quiet_NaN());
  const auto tasks = static_cast<unsigned>(num_tasks);
  emulation::run_grid({tasks, tasks}, kReduceThreads,
                      [&] { reduce_kernel(partial.data(), slots, tasks, result.data()); });
  return result;
}

// As gradstats::combine of csrc/cuda/gram.cu; the last row of each parameter is written. Returns the number of launches.
static size_t combine(int64_t num_tasks, const std::vector<Parameter>& parameters, const std::vector<double>& weights) {
  const std::vector<Walk> walks = walks_of(parameters);
  std::vector<const Walk*> dense;
  for (const Walk& walk : walks) dense.push_back(&walk);
  const std::vector<CombineLaunch> launches = plan_combine(dense, num_tasks, weights.data());
  for (const CombineLaunch& launch : launches)
    std::visit(
        [&](const auto& table) {
          with_dtype(launch.dtype, [&](auto in) {
            emulation::run_grid({static_cast<unsigned>(table.num_slots), 1}, kCombineThreads,
                                [&] { combine_kernel<decltype(in)>(table); });
          });
        },
        launch.table);
  return launches.size();
}

PYBIND11_MODULE(cuda_on_host, module) {
  py::enum_<Beside>(module, "Beside")
      .value("nothing", Beside::nothing)
      .value("metric", Beside::metric)
      .value("combination", Beside::combination);
  module.def("choose_kernel", [](int dtype, int64_t num_tasks, bool dense, Beside beside, int metric_dtype) {
    return name_of(
        choose_kernel(static_cast<DType>(dtype), num_tasks, dense, beside, static_cast<DType>(metric_dtype)));
  });
  module.def("set_tensor_core", [](int at_a_time, int bits) {
    ptx::products_at_a_time = at_a_time;
    ptx::extra_bits = bits;
  });
  module.def("plan", &plan);
  module.def("gram", &gram);
  module.def("combine", &combine);
}
