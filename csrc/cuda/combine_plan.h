// Cuts the work of gradstats::combine into kernel launches, by sizes and dtypes alone. Torch-free.
#pragma once

#include <algorithm>
#include <variant>
#include <vector>

#include "combine.cuh"
#include "launch_plan.h"

namespace gradstats::cuda {

// A launch has room for the rows of that many tasks, and one to write.
constexpr int64_t kMostCombined = LargeTable::kMaxRows - 1;

struct CombineLaunch {
  DType dtype;
  std::variant<SmallTable, LargeTable> table;
};

namespace detail {

template <class Table>
void append_combine_launches(std::vector<CombineLaunch>& launches, DType dtype, int64_t num_tasks,
                             const double* weights, const std::vector<const Walk*>& walks) {
  constexpr int64_t kMaxSlots = 64 * kMultiprocessors;  // a few times what any device holds at once
  const int64_t chunk = with_dtype(dtype, [](auto in) -> int64_t { return kCombineChunk<decltype(in)>; });
  const size_t most = capacity<Table>(num_tasks);
  for (size_t first = 0; first < walks.size(); first += most) {
    Table table{};
    table.weights = weights;
    table.num_tasks = static_cast<int32_t>(num_tasks);
    for (size_t k = first; k < std::min(walks.size(), first + most); ++k) append_segment(table, *walks[k], chunk);
    table.num_slots = static_cast<int32_t>(std::min<int64_t>(table.first_chunk[table.num_segments], kMaxSlots));
    launches.push_back({dtype, table});
  }
}

}  // namespace detail

// The launches for dense parameters, whose walks end with the row to write.
inline std::vector<CombineLaunch> plan_combine(const std::vector<const Walk*>& walks, int64_t num_tasks,
                                               const double* weights) {
  std::vector<CombineLaunch> launches;
  for (DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    std::vector<const Walk*> same;
    std::copy_if(walks.begin(), walks.end(), std::back_inserter(same), [&](auto* w) { return w->dtype == dtype; });
    const bool small = same.size() <= detail::capacity<SmallTable>(num_tasks);
    (small ? detail::append_combine_launches<SmallTable>
           : detail::append_combine_launches<LargeTable>)(launches, dtype, num_tasks, weights, same);
  }
  return launches;
}

}  // namespace gradstats::cuda
