// The instances of the fast kernels, and which of them a launch takes.
#pragma once

#include "gram_reduce.cuh"
#include "launch_plan.h"

namespace gradstats::cuda {

template <class Table>
using FastKernel = void (*)(Table, double*);

template <class In, class Table>
FastKernel<Table> fast_kernel(Kernel kernel, int num_tasks) {
  if (kernel == Kernel::registers)
    switch ((num_tasks + 1) / 2) {
      case 1: return register_kernel<In, 2, Table>;
      case 2: return register_kernel<In, 4, Table>;
      case 3: return register_kernel<In, 6, Table>;
      default: return register_kernel<In, 8, Table>;
    }
  if constexpr (!std::is_same_v<In, double>) {
    if (num_tasks <= 16) return fragment_kernel<In, 2, Table>;
    if (num_tasks <= kSideRows) return fragment_kernel<In, 4, Table>;
    return pair_kernel<In, Table>;
  }
  return nullptr;
}

template <class Table>
FastKernel<Table> fast_kernel(const FastLaunch& launch, const Table& table) {
  return with_dtype(launch.dtype, [&](auto in) {
    return fast_kernel<decltype(in), Table>(launch.kernel, table.num_tasks);
  });
}

}  // namespace gradstats::cuda
