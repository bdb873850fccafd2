// The instances of the fast kernels, and which of them a launch takes.
#pragma once

#include "gram_reduce.cuh"
#include "launch_plan.h"

namespace gradstats::cuda {

template <class Table>
using FastKernel = void (*)(Table, double*);

template <class In, Beside kBeside, class Table>
FastKernel<Table> register_kernel_for(int num_tasks) {
  switch ((num_tasks + 1) / 2) {
    case 1: return register_kernel<In, 2, kBeside, Table>;
    case 2: return register_kernel<In, 4, kBeside, Table>;
    case 3: return register_kernel<In, 6, kBeside, Table>;
    default: return register_kernel<In, 8, kBeside, Table>;
  }
}

template <class In, bool kMetric, class Table>
FastKernel<Table> wide_kernel_for(int num_tasks) {
  return num_tasks <= 16 ? wide_kernel<In, 2, kMetric, Table> : wide_kernel<In, 4, kMetric, Table>;
}

template <class In, class Table>
FastKernel<Table> fast_kernel(Kernel kernel, Beside beside, int num_tasks) {
  if (kernel == Kernel::registers)
    switch (beside) {
      case Beside::nothing: return register_kernel_for<In, Beside::nothing, Table>(num_tasks);
      case Beside::metric: return register_kernel_for<In, Beside::metric, Table>(num_tasks);
      case Beside::combination: return register_kernel_for<In, Beside::combination, Table>(num_tasks);
    }
  if (beside == Beside::metric) return wide_kernel_for<In, true, Table>(num_tasks);
  if constexpr (std::is_same_v<In, double>) {
    return wide_kernel_for<In, false, Table>(num_tasks);
  } else {
    if (num_tasks <= 16) return fragment_kernel<In, 2, Table>;
    if (num_tasks <= kSideRows) return fragment_kernel<In, 4, Table>;
    return pair_kernel<In, Table>;
  }
}

template <class Table>
FastKernel<Table> fast_kernel(const FastLaunch& launch, const Table& table) {
  return with_dtype(launch.dtype, [&](auto in) {
    return fast_kernel<decltype(in), Table>(launch.kernel, launch.beside, table.num_tasks);
  });
}

}  // namespace gradstats::cuda
