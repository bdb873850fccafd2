// Calls of gradstats::gram that are planned: their arguments are read once, and then called for many times.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>

#include "gram_args.h"

namespace gradstats {

// All that was read of tensors: where they are and how they lie. On another device they have another address.
inline std::vector<int64_t> layout_of(const std::vector<Tensor>& tensors) {
  std::vector<int64_t> layout;
  layout.reserve(8 * tensors.size());
  for (const Tensor& tensor : tensors) {
    const RowArgument row = row_argument(tensor);
    layout.insert(layout.end(), {reinterpret_cast<intptr_t>(row.data), static_cast<int64_t>(row.dtype), row.dim});
    layout.insert(layout.end(), row.sizes, row.sizes + row.dim);
    layout.insert(layout.end(), row.strides, row.strides + row.dim);
  }
  return layout;
}

// The tensors are the caller's own, so that whatever is done to them shows. `Work` is what a backend makes of them.
template <class Work>
struct PlannedCall {
  std::vector<Tensor> grads, metric;
  Work work;
  std::vector<int64_t> grads_layout = layout_of(grads), metric_layout = layout_of(metric);

  bool is_current() const { return layout_of(grads) == grads_layout && layout_of(metric) == metric_layout; }
};

// The planned calls of a backend, by number. A call under way keeps what it works on, whoever removes it.
template <class Work>
class PlannedCalls {
  using Call = std::shared_ptr<const PlannedCall<Work>>;

 public:
  // Takes the call with the number that it returns. Not, and returns 0, if the tensors are not at `addresses`, those of
  // the caller's: then torch has made copies for this call alone, as it does to resolve negations.
  int64_t add(std::vector<Tensor> grads, std::vector<Tensor> metric, const std::vector<int64_t>& addresses, Work work) {
    auto address = addresses.begin();
    for (const auto* tensors : {&grads, &metric})
      for (const Tensor& tensor : *tensors)
        if (address == addresses.end() || reinterpret_cast<intptr_t>(tensor.const_data_ptr()) != *address++) return 0;
    Call call(new PlannedCall<Work>{std::move(grads), std::move(metric), std::move(work)});
    const std::lock_guard<std::mutex> lock(mutex_);
    calls_.emplace(++last_, std::move(call));
    return last_;
  }

  Call find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = calls_.find(number);
    STD_TORCH_CHECK(found != calls_.end(), "gradstats: expected the number of a planned call, got ", number);
    return found->second;
  }

  void remove(int64_t number) {
    const Call call = find(number);  // whose tensors are let go of after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    calls_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, Call> calls_;
  int64_t last_ = 0;
};

// Never destroyed, as tensors must not outlive torch.
template <class Work>
PlannedCalls<Work>& planned_calls() {
  static auto* const all = new PlannedCalls<Work>;
  return *all;
}

}  // namespace gradstats
