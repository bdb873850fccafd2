// Cuts the work of gradstats::gram into kernel launches: which rows of which parameters each one reads. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../walk.h"
#include "gram_kernel.cuh"

namespace gradstats::cuda {

// Ranges of entries that are summed apart: by sizes alone, never by the device, so that every device agrees. Many
// tasks bring many tiles and so need fewer slots to fill it.
inline int64_t num_slots(int64_t entries, int64_t num_tasks) {
  constexpr int64_t kBlocks = 1024, kMinSlots = 16, kMaxSlots = 512, kMinEntries = 1024;
  const int64_t tiles = num_tiles(static_cast<int>(num_tasks));
  const int64_t wanted = std::clamp(kBlocks / (tiles * (tiles + 1) / 2), kMinSlots, kMaxSlots);
  return std::clamp<int64_t>(entries / kMinEntries, 1, wanted);
}

// Whether the kernel can read a parameter where it lies: one contiguous run in every row.
inline bool is_dense(const Walk& walk) {
  if (walk.num_loops() > 1) return false;
  for (size_t row = 0; row < walk.data.size(); ++row)
    if (walk.data[row] != nullptr && walk.strides[row] != 1) return false;
  return true;
}

// Gathers dense parameters into launches and hands each to `submit` when it is full.
template <class Submit>
class LaunchPlan {
 public:
  LaunchPlan(int64_t num_tasks, bool has_metric, Submit submit)
      : num_tasks_(static_cast<int>(num_tasks)), has_metric_(has_metric), submit_(submit) {}

  void add(const Walk& walk) {
    if (count_ == capacity()) flush();
    pending_[count_++] = &walk;
  }

  // Submits what is gathered, once for each pair of task groups: a single one unless there are very many tasks.
  void flush() {
    for (int a = 0; count_ > 0 && a < num_tasks_; a += kGroup)
      for (int b = a; b < num_tasks_; b += kGroup) submit_(launch(a, b));
    count_ = 0;
  }

 private:
  int capacity() const { return std::min(kMaxSegments, kMaxRows / std::min(num_tasks_, kMaxRows)); }

  Launch launch(int first_a, int first_b) const {
    Launch out{};
    out.num_tasks = num_tasks_;
    out.num_segments = count_;
    out.first_a = first_a, out.num_a = std::min(kGroup, num_tasks_ - first_a);
    out.first_b = first_b, out.num_b = std::min(kGroup, num_tasks_ - first_b);
    const void** row = out.rows;
    for (int s = 0; s < count_; ++s) {
      const Walk& walk = *pending_[s];
      row = std::copy_n(walk.data.begin() + first_a, out.num_a, row);
      if (!out.one_group()) row = std::copy_n(walk.data.begin() + first_b, out.num_b, row);
      out.metric[s] = has_metric_ ? walk.data[num_tasks_] : nullptr;
      out.dtype[s] = walk.dtype;
      out.metric_dtype[s] = walk.metric_dtype;
      out.starts[s + 1] = out.starts[s] + walk.numel;
    }
    return out;
  }

  int num_tasks_;
  bool has_metric_;
  Submit submit_;
  int count_ = 0;
  const Walk* pending_[kMaxSegments] = {};
};

}  // namespace gradstats::cuda
