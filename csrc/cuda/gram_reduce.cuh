// The second stage: adds the slots of each pair, in an order that depends on their number alone, and mirrors.
#pragma once

#include "table.h"

namespace gradstats::cuda {

constexpr int kReduceThreads = 128;

// Block (x, y), x <= y, makes the sum of one pair of tasks from `partial` [pair][slot].
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const double* partial, int num_slots, int num_tasks,
                                                                double* gram) {
  const int64_t i = blockIdx.x, j = blockIdx.y;
  if (i > j) return;
  double sum = 0.0;
  for (int slot = threadIdx.x; slot < num_slots; slot += kReduceThreads)
    sum += partial[pair_index(i, j, num_tasks) * num_slots + slot];

  __shared__ double warps[kReduceThreads / 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(~0u, sum, lanes);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.0;
  for (double warp : warps) sum += warp;
  gram[i * num_tasks + j] = gram[j * num_tasks + i] = sum;
}

}  // namespace gradstats::cuda
