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

template <class In, Beside kBeside, class Table>
FastKernel<Table> wide_kernel_for(int num_tasks) {
  return num_tasks <= 16 ? wide_kernel<In, 2, kBeside, Table> : wide_kernel<In, 4, kBeside, Table>;
}

template <class In, Beside kBeside, class Table>
FastKernel<Table> fragment_kernel_for(int num_tasks) {
  return num_tasks <= 16 ? fragment_kernel<In, 2, kBeside, Table> : fragment_kernel<In, 4, kBeside, Table>;
}

template <class In, Beside kBeside, class Table>
FastKernel<Table> fast_kernel(Kernel kernel, int num_tasks) {
  if (kernel == Kernel::registers) return register_kernel_for<In, kBeside, Table>(num_tasks);
  if constexpr (kBeside == Beside::metric || std::is_same_v<In, double>)
    return wide_kernel_for<In, kBeside, Table>(num_tasks);
  else
    return num_tasks <= kSideRows ? fragment_kernel_for<In, kBeside, Table>(num_tasks) : pair_kernel<In, Table>;
}

template <class Table>
FastKernel<Table> fast_kernel(const FastLaunch& launch, const Table& table) {
  return with_dtype(launch.dtype, [&](auto in) {
    using In = decltype(in);
    switch (launch.beside) {
      case Beside::metric: return fast_kernel<In, Beside::metric, Table>(launch.kernel, table.num_tasks);
      case Beside::combination: return fast_kernel<In, Beside::combination, Table>(launch.kernel, table.num_tasks);
      default: return fast_kernel<In, Beside::nothing, Table>(launch.kernel, table.num_tasks);
    }
  });
}

}  // namespace gradstats::cuda
