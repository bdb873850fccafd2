// The weighted sums on the CPU: included once per instruction set, after gram_kernel.h, for its vectors and walks.
//
// A block of entries is summed over all tasks in registers, in float32 (float64 for float64), and rounded once. Every
// entry sees the same operations wherever it lies in a block.

constexpr int kSums = 8;  // vectors in a block

template <class In>
constexpr int64_t kBlock = kSums * kLanes<Sum<In>>;

// The gradients that are there, and their weights.
template <class In>
struct Terms {
  std::vector<int64_t> rows;
  std::vector<Sum<In>> weights;
  Sum<In> zeros = 0;  // the others' part: NaN where a weight is not finite

  explicit Terms(const Problem& problem, const Walk& walk) {
    for (int64_t t = 0; t < problem.num_tasks; ++t) {
      const auto weight = static_cast<Sum<In>>(problem.weights[t]);
      if (walk.data[t] == nullptr) {
        zeros += weight * 0;
        continue;
      }
      rows.push_back(t);
      weights.push_back(weight);
    }
  }
};

// Sums one block; `entries(row)` is where a task's entries of it lie.
template <class In, class Entries>
void combine_block(const Terms<In>& terms, const Entries& entries, In* out) {
  using Acc = Sum<In>;
  // What is written should be on its way from memory in time, as measured: all that is read may come from cache.
  for (int64_t c = 0; c < kBlock<In>; c += kLine<In>) ask_for<true>(out + c, 4096);
  Vec<Acc> sum[kSums];
#pragma GCC unroll 8
  for (int v = 0; v < kSums; ++v) sum[v] = Vec<Acc>{} + terms.zeros;
  for (size_t r = 0; r < terms.rows.size(); ++r) {
    const In* const in = entries(terms.rows[r]);
    const Acc weight = terms.weights[r];
#pragma GCC unroll 8
    for (int v = 0; v < kSums; ++v) sum[v] += weight * load<Acc>(in + v * kLanes<Acc>);
  }
  alignas(64) Acc sums[kBlock<In>];
#pragma GCC unroll 8
  for (int v = 0; v < kSums; ++v) store(sums + v * kLanes<Acc>, sum[v]);
  for (int64_t c = 0; c < kBlock<In>; ++c) round_to(out + c, sums[c]);
}

template <class In>
void combine_as(const Problem& problem, const Walk& walk, int64_t from, int64_t stop) {
  const Terms<In> terms(problem, walk);
  const int64_t out_row = static_cast<int64_t>(walk.data.size()) - 1;
  auto* const out = static_cast<In*>(const_cast<void*>(walk.data[out_row]));  // the only row that is not read
  bool runs = walk.num_loops() == 1 && walk.strides[out_row] == 1;
  for (int64_t row : terms.rows) runs = runs && walk.strides[row] == 1;
  if (runs)
    for (; stop - from >= kBlock<In>; from += kBlock<In>)
      combine_block(terms, [&](int64_t row) { return static_cast<const In*>(walk.data[row]) + from; }, out + from);

  alignas(64) In gathered[kBlock<In>] = {}, sums[kBlock<In>];
  for (int64_t count; from < stop; from += count) {
    count = std::min(kBlock<In>, stop - from);
    const auto gather = [&](int64_t row) {
      In* to = gathered;
      for_each_stretch<In>(walk, row, from, count, [&](const In* in, int64_t step, int64_t run) {
        for (int64_t c = 0; c < run; ++c) *to++ = in[c * step];
      });
      return gathered;
    };
    combine_block(terms, gather, sums);
    const In* sum = sums;
    for_each_stretch<In>(walk, out_row, from, count, [&](const In* at, int64_t step, int64_t run) {
      In* const to = const_cast<In*>(at);
      for (int64_t c = 0; c < run; ++c) to[c * step] = *sum++;
    });
  }
}

void combine(const Problem& problem, int64_t k, int64_t from, int64_t stop) {
  const Walk& walk = problem.walks[k];
  switch (walk.dtype) {
    case DType::float32: return combine_as<float>(problem, walk, from, stop);
    case DType::float64: return combine_as<double>(problem, walk, from, stop);
    case DType::float16: return combine_as<Float16>(problem, walk, from, stop);
    case DType::bfloat16: return combine_as<BFloat16>(problem, walk, from, stop);
  }
}

// Writes the weighted sums of entries [begin, end) of the concatenated parameters.
void combine_slot(const Problem& problem, int64_t begin, int64_t end) {
  for (int64_t k = problem.parameter_at(begin); begin < end; ++k) {
    const int64_t stop = std::min(problem.walks[k].numel, end - problem.starts[k]);
    combine(problem, k, begin - problem.starts[k], stop);
    begin = problem.starts[k] + stop;
  }
}
