// gradstats::gram, combine and gram_combine for CUDA tensors: on the current stream, without host synchronisation.
#include <Python.h>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>

#include "../combine_args.h"
#include "../planned_calls.h"
#include "combine_plan.h"
#include "kernels.cuh"

namespace gradstats::cuda {
namespace {

using torch::headeronly::ScalarType;

void check_devices(const std::vector<Tensor>& tensors, int32_t device) {
  for (const Tensor& tensor : tensors)
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device,
                    "gradstats: expected all tensors on CUDA device ", device);
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Row-major copies of the tensors of parameter k, where they are not row-major already.
std::vector<Tensor> contiguous_parameter(const std::vector<Tensor>& grads, int64_t num_tasks, bool stacked, int64_t k) {
  if (stacked) return {torch::stable::contiguous(grads[k])};
  std::vector<Tensor> rows;
  const int64_t num_params = static_cast<int64_t>(grads.size()) / num_tasks;
  for (int64_t t = 0; t < num_tasks; ++t) rows.push_back(torch::stable::contiguous(grads[t * num_params + k]));
  return rows;
}

void launch_fast(const FastLaunch& launch, double* sums, cudaStream_t stream) {
  std::visit(
      [&](const auto& table) {
        const Geometry shape = geometry(launch.kernel, launch.dtype, table.num_tasks);
        const dim3 grid(shape.blocks_per_slot, table.num_slots);
        fast_kernel(launch, table)<<<grid, shape.threads, 0, stream>>>(table, sums);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      },
      launch.table);
}

void launch_combine(const CombineLaunch& launch, cudaStream_t stream) {
  with_dtype(launch.dtype, [&](auto in) {
    std::visit(
        [&](const auto& table) {
          combine_kernel<decltype(in)><<<table.num_slots, kCombineThreads, 0, stream>>>(table);
          STD_CUDA_KERNEL_LAUNCH_CHECK();
        },
        launch.table);
  });
}

// What gram makes of its arguments before it launches anything.
struct Work {
  std::vector<Walk> walks;
  Plan plan;  // points to the walks
  int64_t num_tasks;
  bool stacked;
};

// With rows to combine the gradients to, at most kCombinedTasks tasks and no metric.
Work make_work(const std::vector<Tensor>& grads, int64_t num_tasks, const std::vector<Tensor>& metric, bool stacked,
               const std::vector<Tensor>& combined = {}, const double* weights = nullptr) {
  const Beside beside = !metric.empty()     ? Beside::metric
                        : !combined.empty() ? Beside::combination
                                            : Beside::nothing;
  Work work{read_arguments(grads, num_tasks, metric, stacked, combined), {}, num_tasks, stacked};
  const int32_t device = grads[0].get_device_index();
  check_devices(grads, device);
  check_devices(metric, device);
  work.plan = make_plan(work.walks, num_tasks, beside, weights);
  return work;
}

// The Gramian, from the arguments that the work was made of. The rows to combine to are written as well.
Tensor run_gram(const Work& work, const std::vector<Tensor>& grads, const std::vector<Tensor>& metric,
                const std::vector<Tensor>& combined = {}, const double* weights = nullptr) {
  const Plan& plan = work.plan;
  const int64_t num_tasks = work.num_tasks;
  const int32_t device = grads[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);

  Tensor partial = torch::stable::new_empty(grads[0], {num_pairs(num_tasks), plan.num_slots}, ScalarType::Double);
  Tensor result = torch::stable::new_empty(grads[0], {num_tasks, num_tasks}, ScalarType::Double);
  auto* const sums = partial.mutable_data_ptr<double>();

  for (const FastLaunch& launch : plan.fast) launch_fast(launch, sums, stream);
  GeneralPlan general(num_tasks, !metric.empty(), plan.num_slots, !plan.fast.empty(), [&](const GeneralLaunch& launch) {
    const dim3 grid(launch.num_slots, num_tile_pairs(launch));
    general_kernel<<<grid, kGeneralThreads, 0, stream>>>(launch, sums);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  for (const Walk* walk : plan.general) {
    if (is_dense(*walk)) {
      general.append(*walk);
      continue;
    }
    // One copied parameter at a time: the allocator may reuse its memory behind the launch, on the same stream.
    const auto rows = contiguous_parameter(grads, num_tasks, work.stacked, walk->parameter);
    std::vector<Tensor> scale, sum;
    if (!metric.empty()) scale.push_back(torch::stable::contiguous(metric[walk->parameter]));
    if (!combined.empty()) sum.push_back(combined[walk->parameter]);  // row-major, where there is something to copy
    const std::vector<Walk> copied = read_arguments(rows, num_tasks, scale, work.stacked, sum);
    general.flush();
    general.append(copied[0]);
    general.flush();
    if (!combined.empty())
      for (const CombineLaunch& launch : plan_combine({&copied[0]}, num_tasks, weights)) launch_combine(launch, stream);
  }
  general.flush();
  reduce_kernel<<<dim3(num_tasks, num_tasks), kReduceThreads, 0, stream>>>(sums, plan.num_slots, num_tasks,
                                                                            result.mutable_data_ptr<double>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Tensor gram(std::vector<Tensor> grads, int64_t num_tasks, std::vector<Tensor> metric, bool stacked) {
  return run_gram(make_work(grads, num_tasks, metric, stacked), grads, metric);
}

int64_t plan_gram(std::vector<Tensor> grads, int64_t num_tasks, std::vector<Tensor> metric, bool stacked,
                  std::vector<int64_t> addresses) {
  Work work = make_work(grads, num_tasks, metric, stacked);
  return planned_calls<Work>().add(std::move(grads), std::move(metric), addresses, std::move(work));
}

std::optional<Tensor> planned_gram(Tensor, int64_t number) {
  const auto call = planned_calls<Work>().find(number);
  if (!call->is_current()) return std::nullopt;
  return run_gram(call->work, call->grads, call->metric);
}

void forget_plan(Tensor, int64_t number) { planned_calls<Work>().remove(number); }

std::vector<Tensor> combine(std::vector<Tensor> grads, int64_t num_tasks, Tensor weights, bool stacked) {
  weights = read_weights(weights, num_tasks);
  STD_TORCH_CHECK(num_tasks <= kMostCombined, "gradstats: expected at most ", kMostCombined, " tasks, got ", num_tasks);
  std::vector<Tensor> combined = empty_combinations(grads, num_tasks, stacked);
  const std::vector<Walk> walks = read_arguments(grads, num_tasks, {}, stacked, combined);
  const int32_t device = grads[0].get_device_index();
  check_devices(grads, device);
  check_devices({weights}, device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);

  const auto launch = [&](const std::vector<const Walk*>& dense) {
    for (const CombineLaunch& part : plan_combine(dense, num_tasks, weights.const_data_ptr<double>()))
      launch_combine(part, stream);
  };
  std::vector<const Walk*> dense;
  for (const Walk& walk : walks) {
    if (is_dense(walk)) {
      dense.push_back(&walk);
      continue;
    }
    // As in gram. Where there is something to copy, the result is row-major, too.
    const auto rows = contiguous_parameter(grads, num_tasks, stacked, walk.parameter);
    const std::vector<Walk> copied = read_arguments(rows, num_tasks, {}, stacked, {combined[walk.parameter]});
    launch({&copied[0]});
  }
  launch(dense);
  return combined;
}

std::tuple<Tensor, std::vector<Tensor>> gram_combine(std::vector<Tensor> grads, int64_t num_tasks, Tensor weights,
                                                     std::vector<Tensor> metric, bool stacked) {
  if (num_tasks > kCombinedTasks || !metric.empty())
    return {gram(grads, num_tasks, metric, stacked), combine(grads, num_tasks, weights, stacked)};
  weights = read_weights(weights, num_tasks);
  std::vector<Tensor> combined = empty_combinations(grads, num_tasks, stacked);
  check_devices({weights}, grads[0].get_device_index());
  const double* const data = weights.const_data_ptr<double>();
  return {run_gram(make_work(grads, num_tasks, {}, stacked, combined, data), grads, {}, combined, data), combined};
}

}  // namespace
}  // namespace gradstats::cuda

STABLE_TORCH_LIBRARY_IMPL(gradstats, CUDA, library) {
  library.impl("gram", TORCH_BOX(&gradstats::cuda::gram));
  library.impl("combine", TORCH_BOX(&gradstats::cuda::combine));
  library.impl("gram_combine", TORCH_BOX(&gradstats::cuda::gram_combine));
  library.impl("_plan_gram", TORCH_BOX(&gradstats::cuda::plan_gram));
  library.impl("_planned_gram", TORCH_BOX(&gradstats::cuda::planned_gram));
  library.impl("_forget_plan", TORCH_BOX(&gradstats::cuda::forget_plan));
}

// Importing the module is what loads the library; it has no Python functions of its own.
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
