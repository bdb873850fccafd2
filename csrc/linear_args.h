// Reads the arguments of gradstats::linear_gram and linear_gram_combine (see gradstats/ops/__init__.py).
#pragma once

#include "combine_args.h"

namespace gradstats {

// A matrix where it lies; strides in elements.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t row_stride, column_stride;
};

// A part of a weight [fan_out, fan_in]: its first row and column, and how many of each.
struct Patch {
  int64_t output, input, outputs, inputs;
};

// What the weight gradients of a linear layer are products of, and the patches in which these are formed: a function
// of sizes alone, so that any number of threads adds the same numbers in the same order.
struct LinearLayer {
  static constexpr int64_t kOutputs = 24, kInputs = 32;  // patches are multiples of these

  int64_t rows, fan_in, fan_out;
  Matrix inputs;                     // [rows, fan_in]
  std::vector<Matrix> cotangents;    // of each task [rows, fan_out]
  bool is_wide;                      // whether sums are formed in float64
  int64_t patch_outputs, patch_inputs;
  const double* weights = nullptr;   // null: nothing is combined
  Matrix combined = {};              // [fan_out, fan_in], by rows

  int64_t num_tasks() const { return static_cast<int64_t>(cotangents.size()); }
  int64_t patches_across() const { return (fan_in + patch_inputs - 1) / patch_inputs; }
  int64_t num_patches() const { return (fan_out + patch_outputs - 1) / patch_outputs * patches_across(); }
  Patch patch(int64_t p) const {
    const int64_t output = p / patches_across() * patch_outputs, input = p % patches_across() * patch_inputs;
    return {output, input, std::min(patch_outputs, fan_out - output), std::min(patch_inputs, fan_in - input)};
  }
};

namespace detail {

inline Matrix read_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns,
                  "gradstats: expected inputs [N, k], and cotangents [N, o] of each task");
  const void* const data = tensor.numel() == 0 ? nullptr : tensor.const_data_ptr();
  return {data, dtype_of(tensor), tensor.stride(0), tensor.stride(1)};
}

// A multiple of `unit` up to `most`, and not above the first that covers `size`.
inline int64_t patch_side(int64_t most, int64_t unit, int64_t size) {
  const int64_t cover = std::max<int64_t>(1, (size + unit - 1) / unit);
  return std::clamp<int64_t>(most / unit, 1, cover) * unit;
}

}  // namespace detail

inline LinearLayer read_linear_layer(const Tensor& inputs, const std::vector<Tensor>& cotangents) {
  STD_TORCH_CHECK(!cotangents.empty() && inputs.dim() == 2 && cotangents[0].dim() == 2,
                  "gradstats: expected inputs [N, k], and cotangents [N, o] of at least one task");
  LinearLayer layer{inputs.size(0), inputs.size(1), cotangents[0].size(1)};
  layer.inputs = detail::read_matrix(inputs, layer.rows, layer.fan_in);
  layer.is_wide = layer.inputs.dtype == DType::float64;
  for (const Tensor& tensor : cotangents) {
    layer.cotangents.push_back(detail::read_matrix(tensor, layer.rows, layer.fan_out));
    layer.is_wide = layer.is_wide || layer.cotangents.back().dtype == DType::float64;
  }
  // As measured: packed rows should serve many products, and all that is at work on a patch should stay in cache.
  constexpr int64_t kMostEntries = 1 << 18, kMostOutputs = 128, kMostInputs = 256, kMostRows = 1024;
  const int64_t tasks = layer.num_tasks(), outputs = std::min(kMostOutputs, kMostRows / tasks);
  layer.patch_outputs = detail::patch_side(outputs, LinearLayer::kOutputs, layer.fan_out);
  const int64_t width = std::min(kMostInputs, kMostEntries / (tasks * layer.patch_outputs));
  layer.patch_inputs = detail::patch_side(width, LinearLayer::kInputs, layer.fan_in);
  return layer;
}

}  // namespace gradstats
