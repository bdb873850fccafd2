// Cuts the work of gradstats::gram into kernel launches: which kernel reads which rows of which parameters, and in how
// many slots. By sizes, dtype and layout alone, never by the device, so that every device agrees. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <variant>
#include <vector>

#include "../walk.h"
#include "gram_fragment.cuh"
#include "gram_general.cuh"
#include "gram_register.cuh"
#include "gram_wide.cuh"

namespace gradstats::cuda {

enum class Kernel : uint8_t { general, registers, fragments, wide };

// The sums of 36 pairs leave registers for enough loads in flight; those of more do not.
constexpr int64_t kRegisterTasks = 8;

// The gradients of more tasks are not combined in the pass that multiplies them.
constexpr int64_t kCombinedTasks = kSideRows;

// Whether the kernels can read a parameter where it lies: one contiguous run in every row.
inline bool is_dense(const Walk& walk) {
  if (walk.num_loops() > 1) return false;
  for (size_t row = 0; row < walk.data.size(); ++row)
    if (walk.data[row] != nullptr && walk.strides[row] != 1) return false;
  return true;
}

inline bool is_aligned(const std::vector<const void*>& rows) {
  return std::all_of(rows.begin(), rows.end(), [](auto* row) { return reinterpret_cast<uintptr_t>(row) % 16 == 0; });
}

// `metric_dtype` counts where there is a metric.
inline Kernel choose_kernel(DType dtype, int64_t num_tasks, bool dense, Beside beside, DType metric_dtype) {
  const bool metric = beside == Beside::metric;
  if (!dense || num_tasks >= LargeTable::kMaxRows || (metric && metric_dtype != dtype)) return Kernel::general;
  if (num_tasks <= kRegisterTasks) return Kernel::registers;
  if (!metric && dtype != DType::float64) return Kernel::fragments;
  return num_tasks <= kWideTasks ? Kernel::wide : Kernel::general;
}

// Calls f with a value of the type that a dtype names.
template <class F>
auto with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::float64: return f(double{});
    case DType::float16: return f(Float16{});
    default: return f(BFloat16{});
  }
}

// How the blocks of a launch are laid out.
struct Geometry {
  int blocks_per_slot;
  int threads;
  int64_t chunk;  // entries of each row that a block reads at a time
  int most;       // blocks of all slots together, for each multiprocessor
};

// Some 16, in whole rounds of as many as a multiprocessor takes at a time: in a last round of few it would wait for them.
constexpr int in_rounds(int at_a_time) { return 16 / at_a_time * at_a_time; }

template <int kRowGroups>
int blocks_at_a_time(Kernel kernel) {
  return kernel == Kernel::wide ? kWideBlocks<kRowGroups> : kFragmentBlocks<kRowGroups>;
}

inline Geometry geometry(Kernel kernel, DType dtype, int64_t num_tasks) {
  return with_dtype(dtype, [&](auto in) -> Geometry {
    using In = decltype(in);
    const int tasks = static_cast<int>(num_tasks);
    if (kernel == Kernel::registers)
      return {1, kRegisterThreads, kRegisterChunk<In>, in_rounds(register_blocks(tasks, true))};
    const int sides = num_sides(tasks), pairs = sides * (sides + 1) / 2;
    if (pairs == 1) {
      const int at_a_time = tasks <= 16 ? blocks_at_a_time<2>(kernel) : blocks_at_a_time<4>(kernel);
      return {1, 32 * kFragmentWarps, kFragmentWarps * kWarpColumns<In>, in_rounds(at_a_time)};
    }
    const int blocks = (pairs + kPairWarps - 1) / kPairWarps;
    return {blocks, 32 * ((pairs + blocks - 1) / blocks), kWarpColumns<In>, 8};  // 2 or 4 at a time
  });
}

constexpr int64_t kMultiprocessors = 132;  // of an H100 or H200

// Ranges of entries that are summed apart: enough to fill any device a few times, but no more than the reading of
// their entries is worth.
inline int64_t num_slots(Kernel kernel, DType dtype, int64_t num_tasks, int64_t entries) {
  if (kernel == Kernel::general) {
    const int64_t tiles = num_tiles(static_cast<int>(num_tasks));
    return std::clamp<int64_t>(entries / 1024, 1, std::clamp<int64_t>(1024 / (tiles * (tiles + 1) / 2), 16, 512));
  }
  const Geometry shape = geometry(kernel, dtype, num_tasks);
  const int64_t chunks = (entries + shape.chunk - 1) / shape.chunk;
  const int64_t most = std::max<int64_t>(shape.most * kMultiprocessors / shape.blocks_per_slot, 8);
  if (kernel == Kernel::registers) return std::min(chunks, most);
  return std::clamp<int64_t>(entries / (8 * num_tasks), 1, std::min(chunks, most));
}

// One launch of a fast kernel.
struct FastLaunch {
  Kernel kernel;
  DType dtype;
  Beside beside;
  std::variant<SmallTable, LargeTable> table;
};

// What gradstats::gram does: the fast launches, and what is left for the general kernel.
struct Plan {
  int64_t num_slots = 0;  // of every launch
  std::vector<FastLaunch> fast;
  std::vector<const Walk*> general;
};

namespace detail {

template <class Table>
void append_segment(Table& table, const Walk& walk, int64_t chunk) {
  const int32_t s = table.num_segments++;
  std::copy(walk.data.begin(), walk.data.end(), table.rows + s * (table.num_tasks + 1));
  table.numel[s] = walk.numel;
  table.first_chunk[s + 1] = table.first_chunk[s] + static_cast<int32_t>((walk.numel + chunk - 1) / chunk);
  table.aligned[s] = is_aligned(walk.data);
}

// Segments that a table holds.
template <class Table>
size_t capacity(int64_t num_tasks) {
  return std::min<size_t>(Table::kMaxSegments, Table::kMaxRows / (num_tasks + 1));
}

// The launches of one kernel for parameters of one dtype.
template <class Table>
void append_launches(Plan& plan, Kernel kernel, DType dtype, int64_t num_tasks, Beside beside, const double* weights,
                     const std::vector<const Walk*>& walks) {
  const int64_t chunk = geometry(kernel, dtype, num_tasks).chunk;
  const size_t most = capacity<Table>(num_tasks);
  for (size_t first = 0; first < walks.size(); first += most) {
    Table table{};
    table.weights = weights;
    table.num_tasks = static_cast<int32_t>(num_tasks);
    for (size_t k = first; k < std::min(walks.size(), first + most); ++k) append_segment(table, *walks[k], chunk);
    table.add = !plan.fast.empty();
    plan.fast.push_back({kernel, dtype, beside, table});
  }
}

inline int64_t count_entries(const std::vector<const Walk*>& walks) {
  int64_t entries = 0;
  for (const Walk* walk : walks) entries += walk->numel;
  return entries;
}

}  // namespace detail

// The rows of the walks are the tasks, and what is beside them. `weights` are those of a combination.
inline Plan make_plan(const std::vector<Walk>& walks, int64_t num_tasks, Beside beside,
                      const double* weights = nullptr) {
  Plan plan;
  for (DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    const Kernel kernel = choose_kernel(dtype, num_tasks, true, beside, dtype);
    std::vector<const Walk*> fast;
    for (const Walk& walk : walks)
      if (walk.dtype == dtype) {
        const Kernel chosen = choose_kernel(dtype, num_tasks, is_dense(walk), beside, walk.metric_dtype);
        (chosen == Kernel::general ? plan.general : fast).push_back(&walk);
      }
    if (fast.empty()) continue;
    plan.num_slots = std::max(plan.num_slots, num_slots(kernel, dtype, num_tasks, detail::count_entries(fast)));
    const bool small = fast.size() <= detail::capacity<SmallTable>(num_tasks);
    (small ? detail::append_launches<SmallTable> : detail::append_launches<LargeTable>)(plan, kernel, dtype, num_tasks,
                                                                                        beside, weights, fast);
  }
  if (!plan.general.empty())
    plan.num_slots = std::max(plan.num_slots, num_slots(Kernel::general, DType::float64, num_tasks,
                                                        detail::count_entries(plan.general)));
  for (FastLaunch& launch : plan.fast)
    std::visit([&](auto& table) { table.num_slots = static_cast<int32_t>(plan.num_slots); }, launch.table);
  return plan;
}

// Gathers dense parameters into launches of the general kernel and hands each to `submit` when it is full.
template <class Submit>
class GeneralPlan {
 public:
  GeneralPlan(int64_t num_tasks, bool has_metric, int64_t num_slots, bool add, Submit submit)
      : num_tasks_(static_cast<int>(num_tasks)), has_metric_(has_metric), num_slots_(static_cast<int32_t>(num_slots)),
        add_(add), submit_(submit) {}

  void append(const Walk& walk) {
    if (count_ == capacity()) flush();
    pending_[count_++] = &walk;
  }

  // Submits what is gathered, once for each pair of task groups: a single one unless there are very many tasks.
  void flush() {
    if (count_ == 0) return;
    for (int a = 0; a < num_tasks_; a += kTaskGroup)
      for (int b = a; b < num_tasks_; b += kTaskGroup) submit_(launch(a, b));
    count_ = 0;
    add_ = true;
  }

 private:
  int capacity() const { return std::min(kGeneralSegments, kGeneralRows / std::min(num_tasks_, kGeneralRows)); }

  GeneralLaunch launch(int first_a, int first_b) const {
    GeneralLaunch out{};
    out.num_tasks = num_tasks_;
    out.num_slots = num_slots_;
    out.add = add_;
    out.num_segments = count_;
    out.first_a = first_a, out.num_a = std::min(kTaskGroup, num_tasks_ - first_a);
    out.first_b = first_b, out.num_b = std::min(kTaskGroup, num_tasks_ - first_b);
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
  int32_t num_slots_;
  bool add_;
  Submit submit_;
  int count_ = 0;
  const Walk* pending_[kGeneralSegments] = {};
};

}  // namespace gradstats::cuda
