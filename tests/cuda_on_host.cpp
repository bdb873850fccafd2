// Runs the CUDA kernels of csrc/cuda/gram_kernel.cuh on the CPU: every thread of a block is a thread here, and
// __syncthreads a barrier. Blocks run one after another. Shows that the algorithm and its indexing are right; says
// nothing about speed, races or memory models of a GPU.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

struct Index {
  unsigned x = 0, y = 0;
};
static thread_local Index threadIdx, blockIdx;
static std::unique_ptr<std::barrier<>> block_barrier;
static void __syncthreads() { block_barrier->arrive_and_wait(); }

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static
using std::fma, std::sqrt;

#include "../csrc/cuda/launch_plan.h"

using namespace gradstats;
using namespace gradstats::cuda;

static void run_grid(Index grid, const std::function<void()>& kernel) {
  block_barrier = std::make_unique<std::barrier<>>(kThreads);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      threadIdx = {t, 0};
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
          kernel();
          block_barrier->arrive_and_wait();
        }
    });
  for (std::thread& thread : threads) thread.join();
}

// rows: [parameter][task] pointers to contiguous entries, null where a task has no gradient; dtype: a DType for each
// parameter; metric: null, or float32 pointers. Returns the number of launches.
extern "C" int gram_on_host(int num_tasks, int num_params, const void* const* rows, const int64_t* numel,
                            const uint8_t* dtype, const void* const* metric, double* gram) {
  std::vector<Walk> walks(num_params);
  int64_t entries = 0;
  for (int k = 0; k < num_params; ++k) {
    Walk& walk = walks[k];
    walk.numel = numel[k];
    walk.dtype = static_cast<DType>(dtype[k]);
    walk.sizes = {numel[k]};
    walk.data.assign(rows + k * num_tasks, rows + (k + 1) * num_tasks);
    if (metric != nullptr) walk.data.push_back(metric[k]);
    walk.strides.assign(walk.data.size(), 1);
    entries += walk.numel;
  }
  const int64_t slots = num_slots(entries, num_tasks), tiles = num_tiles(num_tasks);
  const unsigned tile_pairs = tiles * (tiles + 1) / 2;
  std::vector<double> partial(slots * tile_pairs * kThreads);
  int launches = 0;
  LaunchPlan plan(num_tasks, metric != nullptr, [&](Launch launch) {
    ++launches;
    launch.slot_entries = (launch.starts[launch.num_segments] + slots - 1) / slots;
    const Index grid{static_cast<unsigned>(slots), static_cast<unsigned>(num_tile_pairs(launch))};
    run_grid(grid, [&] { gram_partial_kernel(launch, partial.data()); });
  });
  for (const Walk& walk : walks) plan.add(walk);
  plan.flush();
  run_grid({tile_pairs, 1}, [&] { gram_reduce_kernel(partial.data(), slots, num_tasks, gram); });
  return launches;
}
