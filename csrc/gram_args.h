// Reads the arguments of the operators (see gradstats/ops/__init__.py) into one Walk per parameter.
//
// gradstats.pairwise gives the user clear errors first; the checks here are the cheap ones that keep a direct call
// of an operator from reading out of bounds.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "walk.h"

namespace gradstats {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  static const int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64();
  static const int32_t float16 = aoti_torch_dtype_float16(), bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  if (dtype == float32) return DType::float32;
  if (dtype == bfloat16) return DType::bfloat16;
  if (dtype == float16) return DType::float16;
  STD_TORCH_CHECK(dtype == float64, "gradstats: expected float32, float64, float16 or bfloat16 tensors");
  return DType::float64;
}

// One row of a parameter: a tensor, or one task's slice of a stacked block.
struct RowArgument {
  const void* data;  // null: no entries
  DType dtype;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dim;

  // Only so does a tensor stand for a gradient of zeros, whatever the parameter's shape and dtype.
  bool is_missing() const { return dim == 1 && sizes[0] == 0; }
};

// Asks the tensor's handle once for each fact. There are many tensors, and torch::stable::Tensor's own functions take
// several times as long together.
inline RowArgument row_argument(const Tensor& tensor) {
  const AtenTensorHandle handle = tensor.get();
  int64_t dim, *sizes, *strides;
  const void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &data));
  const bool empty = std::find(sizes, sizes + dim, 0) != sizes + dim;
  STD_TORCH_CHECK(empty || data != nullptr, "gradstats: expected tensors with memory, got one whose storage is empty");
  return {empty ? nullptr : data, dtype_of(tensor), sizes, strides, dim};
}

// Appends a row whose shape and dtype must be those of the rows before it.
inline void append_row(Walk& walk, const RowArgument& row) {
  STD_TORCH_CHECK(row.dim == walk.num_loops() && std::equal(row.sizes, row.sizes + row.dim, walk.sizes.data()),
                  "gradstats: tensors of one parameter differ in shape");
  walk.data.push_back(row.data);
  walk.strides.insert(walk.strides.end(), row.strides, row.strides + row.dim);
}

inline void append_missing(Walk& walk) {
  walk.data.push_back(nullptr);
  walk.strides.resize(walk.strides.size() + walk.sizes.size());
}

inline void set_shape(Walk& walk, const int64_t* sizes, int64_t dim, DType dtype, int64_t num_rows) {
  walk.sizes.assign(sizes, sizes + dim);
  walk.numel = 1;
  for (int64_t size : walk.sizes) walk.numel *= size;
  walk.dtype = dtype;
  walk.data.reserve(num_rows);
  walk.strides.reserve(num_rows * dim);
}

inline Walk walk_of_list(const std::vector<Tensor>& grads, int64_t num_tasks, int64_t num_params, int64_t k) {
  std::vector<RowArgument> rows;
  rows.reserve(num_tasks);
  for (int64_t t = 0; t < num_tasks; ++t) rows.push_back(row_argument(grads[t * num_params + k]));
  const auto present = std::find_if(rows.begin(), rows.end(), [](const RowArgument& row) { return !row.is_missing(); });
  Walk walk;
  if (present == rows.end()) return walk;
  set_shape(walk, present->sizes, present->dim, present->dtype, num_tasks + 2);
  for (const RowArgument& row : rows) {
    if (row.is_missing()) {
      append_missing(walk);
      continue;
    }
    STD_TORCH_CHECK(row.dtype == walk.dtype, "gradstats: tensors of one parameter differ in dtype");
    append_row(walk, row);
  }
  return walk;
}

inline int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

inline Walk walk_of_block(const Tensor& block, int64_t num_tasks) {
  const RowArgument whole = row_argument(block);
  STD_TORCH_CHECK(whole.dim >= 1 && whole.sizes[0] == num_tasks,
                  "gradstats: expected stacked blocks of shape [num_tasks, ...]");
  Walk walk;
  if (whole.data == nullptr) return walk;
  set_shape(walk, whole.sizes + 1, whole.dim - 1, whole.dtype, num_tasks + 2);
  const int64_t row_bytes = whole.strides[0] * element_size(whole.dtype);
  for (int64_t t = 0; t < num_tasks; ++t) {
    const void* data = static_cast<const char*>(whole.data) + t * row_bytes;
    append_row(walk, {data, whole.dtype, whole.sizes + 1, whole.strides + 1, whole.dim - 1});
  }
  return walk;
}

inline int64_t count_parameters(const std::vector<Tensor>& grads, int64_t num_tasks, bool stacked) {
  STD_TORCH_CHECK(num_tasks >= 1 && !grads.empty(), "gradstats: expected at least one task and one tensor");
  const int64_t count = static_cast<int64_t>(grads.size());
  STD_TORCH_CHECK(stacked || count % num_tasks == 0, "gradstats: ", count,
                  " tensors are not a multiple of num_tasks = ", num_tasks);
  return stacked ? count : count / num_tasks;
}

// The walks of all parameters that have entries; the rows are the tasks, then the metric and then what the gradients
// are combined to, where there are such.
inline std::vector<Walk> read_arguments(const std::vector<Tensor>& grads, int64_t num_tasks,
                                        const std::vector<Tensor>& metric, bool stacked,
                                        const std::vector<Tensor>& combined = {}) {
  const int64_t num_params = count_parameters(grads, num_tasks, stacked);
  STD_TORCH_CHECK(metric.empty() || static_cast<int64_t>(metric.size()) == num_params,
                  "gradstats: expected a metric of ", num_params, " tensors, got ", metric.size());
  std::vector<Walk> walks;
  walks.reserve(num_params);
  for (int64_t k = 0; k < num_params; ++k) {
    Walk walk = stacked ? walk_of_block(grads[k], num_tasks) : walk_of_list(grads, num_tasks, num_params, k);
    if (walk.numel == 0) continue;
    walk.parameter = k;
    if (!metric.empty()) {
      const RowArgument row = row_argument(metric[k]);
      walk.metric_dtype = row.dtype;
      append_row(walk, row);
    }
    if (!combined.empty()) append_row(walk, row_argument(combined[k]));
    simplify(walk, num_tasks);
    walks.push_back(std::move(walk));
  }
  return walks;
}

}  // namespace gradstats
