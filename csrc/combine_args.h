// What the weighted sums of gradstats::combine are written to, and its weights.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "gram_args.h"

namespace gradstats {
namespace detail {

// Strides along sides of length 1 mean nothing and are not compared.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d) || (a.size(d) != 1 && a.stride(d) != b.stride(d))) return false;
  return true;
}

// As empty_combination in gradstats/ops/reference.py: of the rows' layout, where they share a dense one. Dense strides,
// and only these, are those that torch gives a new tensor like it.
inline Tensor empty_combination(const std::vector<Tensor>& rows) {
  const auto has_entries = [](const Tensor& row) { return row.numel() > 0; };
  const auto found = std::find_if(rows.begin(), rows.end(), has_entries);
  const Tensor& first = found == rows.end() ? rows[0] : *found;
  const Tensor like = torch::stable::empty_like(first);
  const bool shared = std::all_of(rows.begin(), rows.end(), [&](const Tensor& row) {
    return !has_entries(row) || (same_layout(row, first) && same_layout(row, like));
  });
  return shared && found != rows.end() ? like : torch::stable::new_empty(first, first.sizes());
}

}  // namespace detail

inline std::vector<Tensor> empty_combinations(const std::vector<Tensor>& grads, int64_t num_tasks, bool stacked) {
  const int64_t num_params = count_parameters(grads, num_tasks, stacked);
  std::vector<Tensor> combined, rows;
  combined.reserve(num_params);
  for (int64_t k = 0; k < num_params; ++k) {
    rows.clear();
    if (stacked)
      rows.push_back(torch::stable::select(grads[k], 0, 0));
    else
      for (int64_t t = 0; t < num_tasks; ++t) rows.push_back(grads[t * num_params + k]);
    combined.push_back(detail::empty_combination(rows));
  }
  return combined;
}

inline Tensor read_weights(const Tensor& weights, int64_t num_tasks) {
  STD_TORCH_CHECK(weights.scalar_type() == torch::headeronly::ScalarType::Double && weights.dim() == 1 &&
                      weights.size(0) == num_tasks,
                  "gradstats: expected float64 weights of shape [", num_tasks, "]");
  return torch::stable::contiguous(weights);
}

}  // namespace gradstats
