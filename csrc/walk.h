// How one parameter's gradients are walked: torch-free, shared by the CPU and the CUDA kernels.
//
// A dot product does not care in which order entries are visited, as long as every task visits them in the same
// one. So a parameter becomes the shortest list of nested loops that all its tensors can follow: a single
// contiguous run for any dense layout that the tasks share, and more only for what really is strided.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "float_types.h"

namespace gradstats {

// One parameter across tasks. `strides` holds, for each row, as many entries as `sizes` (outermost loop first, in
// elements); the rows are the tasks and then what belongs to the parameter itself. A null pointer is a row of zeros.
struct Walk {
  int64_t parameter = 0;  // its position in the argument list
  int64_t numel = 0;
  DType dtype = DType::float32;
  DType metric_dtype = DType::float32;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  std::vector<const void*> data;

  int64_t num_loops() const { return static_cast<int64_t>(sizes.size()); }
  const int64_t* row_strides(int64_t row) const { return strides.data() + row * num_loops(); }
};

namespace detail {

inline bool tasks_share_strides(const Walk& walk, int64_t num_tasks) {
  const int64_t n = walk.num_loops();
  const int64_t* first = nullptr;
  for (int64_t row = 0; row < num_tasks; ++row) {
    if (walk.data[row] == nullptr) continue;
    if (first == nullptr) first = walk.row_strides(row);
    if (!std::equal(first, first + n, walk.row_strides(row))) return false;
  }
  return true;
}

// Keeps the loops named by `order`, in that order.
inline void select_loops(Walk& walk, const std::vector<int64_t>& order) {
  const int64_t n = walk.num_loops();
  std::vector<int64_t> sizes, strides;
  for (int64_t d : order) sizes.push_back(walk.sizes[d]);
  for (size_t row = 0; row < walk.data.size(); ++row)
    for (int64_t d : order) strides.push_back(walk.strides[row * n + d]);
  walk.sizes = std::move(sizes);
  walk.strides = std::move(strides);
}

// Whether every row is one run in row-major order, as nearly all are.
inline bool is_row_major(const Walk& walk) {
  const int64_t n = walk.num_loops();
  for (size_t row = 0; row < walk.data.size(); ++row) {
    if (walk.data[row] == nullptr) continue;
    const int64_t* strides = walk.row_strides(row);
    int64_t run = 1;
    for (int64_t d = n - 1; d >= 0; run *= walk.sizes[d--])
      if (strides[d] != run) return false;
  }
  return true;
}

inline void make_run(Walk& walk) {
  walk.sizes.assign(1, walk.numel);
  walk.strides.assign(walk.data.size(), 1);
}

// Whether loop `outer` continues loop `inner` in every row, so that one longer loop does for both.
inline bool loops_merge(const Walk& walk, int64_t outer, int64_t inner) {
  for (size_t row = 0; row < walk.data.size(); ++row) {
    const int64_t* s = walk.row_strides(row);
    if (walk.data[row] != nullptr && s[outer] != s[inner] * walk.sizes[inner]) return false;
  }
  return true;
}

}  // namespace detail

// Reduces the loops to the fewest, but at least one, that visit the same entries: memory order where all tasks share
// strides, else the logical (row-major) order, which is the only one that they have in common.
inline void simplify(Walk& walk, int64_t num_tasks) {
  if (detail::is_row_major(walk)) return detail::make_run(walk);
  std::vector<int64_t> order;
  for (int64_t d = 0; d < walk.num_loops(); ++d)
    if (walk.sizes[d] != 1) order.push_back(d);
  detail::select_loops(walk, order);

  if (detail::tasks_share_strides(walk, num_tasks)) {
    const auto present = std::find_if(walk.data.begin(), walk.data.begin() + num_tasks, [](auto* p) { return p; });
    const int64_t* strides = walk.row_strides(present - walk.data.begin());
    order.resize(walk.sizes.size());
    std::iota(order.begin(), order.end(), 0);
    // Largest stride outermost. Stride 0 (an expanded loop) goes outside all, so that the innermost loop is a run.
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return static_cast<uint64_t>(strides[a] - 1) > static_cast<uint64_t>(strides[b] - 1);
    });
    detail::select_loops(walk, order);
  }

  std::vector<int64_t> kept;
  std::vector<int64_t> sizes = walk.sizes;
  for (int64_t d = 0; d < walk.num_loops(); ++d) {
    if (!kept.empty() && detail::loops_merge(walk, d - 1, d)) {
      sizes[d] *= sizes[d - 1];
      kept.back() = d;
    } else {
      kept.push_back(d);
    }
  }
  walk.sizes = sizes;
  detail::select_loops(walk, kept);
  if (kept.empty()) detail::make_run(walk);  // of one entry
}

}  // namespace gradstats
