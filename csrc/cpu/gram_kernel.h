// The CPU kernel: included once per instruction set, inside a namespace that defines kLanes and kTile.
//
// A chunk of every row is converted to float64 in a scratch block that stays in cache, and a register-tiled kernel
// adds the products of all pairs of rows. Products of float32, bfloat16 and float16 are exact in float64 and no
// product of theirs overflows or underflows, so no input needs a special case. Every pair (i, j) sees the same
// operations in the same order wherever its tile lies: permuting tasks permutes the result exactly.

using Vec [[gnu::vector_size(kLanes * sizeof(double))]] = double;

inline Vec load(const double* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline void store(double* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }

// ---- conversion -------------------------------------------------------------------------------------------------

// A contiguous run, one cache line of input at a time, asking for the line `ahead` entries further on.
template <class In>
void convert_run(const In* __restrict in, int64_t count, int64_t ahead, double* __restrict out) {
  constexpr int64_t kLine = 64 / sizeof(In);
  int64_t c = 0;
  for (; c + kLine <= count; c += kLine) {
    __builtin_prefetch(in + c + ahead);
    for (int64_t l = 0; l < kLine; ++l) out[c + l] = to_double(in[c + l]);
  }
  for (; c < count; ++c) out[c] = to_double(in[c]);
}

// Entries [begin, begin + count) of one row's walk.
template <class In>
void convert(const Walk& walk, int64_t row, int64_t begin, int64_t count, int64_t ahead, double* __restrict out) {
  const int64_t* strides = walk.row_strides(row);
  const int64_t last = walk.num_loops() - 1, inner = walk.sizes[last], step = strides[last];
  while (count > 0) {
    const int64_t at = begin % inner, run = std::min(count, inner - at);
    int64_t offset = at * step, outer = begin / inner;
    for (int64_t d = last - 1; d >= 0; outer /= walk.sizes[d--]) offset += outer % walk.sizes[d] * strides[d];
    const In* in = static_cast<const In*>(walk.data[row]) + offset;
    if (step == 1)
      convert_run(in, run, ahead, out);
    else
      for (int64_t c = 0; c < run; ++c) out[c] = to_double(in[c * step]);
    out += run, begin += run, count -= run;
  }
}

inline void convert_row(const Walk& walk, int64_t row, DType dtype, int64_t begin, int64_t count, int64_t ahead,
                        double* out) {
  if (walk.data[row] == nullptr) return void(std::fill_n(out, count, 0.0));
  switch (dtype) {
    case DType::float32: return convert<float>(walk, row, begin, count, ahead, out);
    case DType::float64: return convert<double>(walk, row, begin, count, ahead, out);
    case DType::float16: return convert<Float16>(walk, row, begin, count, ahead, out);
    case DType::bfloat16: return convert<BFloat16>(walk, row, begin, count, ahead, out);
  }
}

// ---- products ---------------------------------------------------------------------------------------------------

// Position of pair (i, j), i <= j, in the upper triangle stored row by row.
inline int64_t pair_index(int64_t i, int64_t j, int64_t num_tasks) { return i * (2 * num_tasks - i - 1) / 2 + j; }

// Adds the products of rows [i, i + R) with rows [j, j + C); on the diagonal (i == j) only those of the upper half.
template <int R, int C, bool kDiagonal>
void add_tile(const double* block, int64_t stride, int64_t i, int64_t j, int64_t count, int64_t num_tasks,
              double* sums) {
  const double* a = block + i * stride;
  const double* b = block + j * stride;
  double* at[R];
  Vec sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    at[r] = sums + (pair_index(i + r, j, num_tasks)) * kLanes;
#pragma GCC unroll 8
    for (int c = kDiagonal ? r : 0; c < C; ++c) sum[r][c] = load(at[r] + c * kLanes);
  }
  for (int64_t k = 0; k < count; k += kLanes) {
    Vec x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = load(a + r * stride + k);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec y = kDiagonal ? x[c] : load(b + c * stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < (kDiagonal ? c + 1 : R); ++r) sum[r][c] += x[r] * y;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = kDiagonal ? r : 0; c < C; ++c) store(at[r] + c * kLanes, sum[r][c]);
}

using TileFn = void (*)(const double*, int64_t, int64_t, int64_t, int64_t, int64_t, double*);

// Tiles are kTile rows high; only the last row and column of tiles are smaller.
inline TileFn tile_fn(int64_t width, bool diagonal) {
  static_assert(kTile == 3 || kTile == 4);
  switch (width) {
    case 1: return diagonal ? add_tile<1, 1, true> : add_tile<kTile, 1, false>;
    case 2: return diagonal ? add_tile<2, 2, true> : add_tile<kTile, 2, false>;
    case 3: return diagonal ? add_tile<3, 3, true> : add_tile<kTile, 3, false>;
    default: return diagonal ? add_tile<kTile, kTile, true> : add_tile<kTile, kTile, false>;
  }
}

inline void add_products(const double* block, int64_t stride, int64_t count, int64_t num_tasks, double* sums) {
  for (int64_t i = 0; i < num_tasks; i += kTile)
    for (int64_t j = i; j < num_tasks; j += kTile) {
      const int64_t width = std::min<int64_t>(kTile, num_tasks - j);
      tile_fn(width, i == j)(block, stride, i, j, count, num_tasks, sums);
    }
}

// ---- one slot -----------------------------------------------------------------------------------------------------

// Sums of the products of all pairs over entries [begin, end) of the concatenated parameters, into `sums`
// [num_tasks * (num_tasks + 1) / 2].
void gram_slot(const Problem& problem, int64_t begin, int64_t end, double* sums) {
  const int64_t num_tasks = problem.num_tasks, num_pairs = num_tasks * (num_tasks + 1) / 2;
  constexpr int64_t stride = kChunk + kRowPadding;
  // The next chunk's lines are asked for while this one is converted; with few tasks that of a later one.
  const int64_t ahead = std::max(kChunk, kPrefetchEntries / num_tasks);
  const auto scratch = allocate((num_tasks + 1) * stride + num_pairs * kLanes);
  double* const block = scratch.get();
  double* const root = block + num_tasks * stride;  // square roots of the metric
  double* const partial = root + stride;
  std::fill_n(partial, num_pairs * kLanes, 0.0);

  int64_t k = problem.parameter_at(begin);
  for (int64_t filled = 0; begin < end; filled = 0) {
    // Small parameters share a chunk.
    while (begin < end && filled < kChunk) {
      const Walk& walk = problem.walks[k];
      const int64_t from = begin - problem.starts[k];
      const int64_t count = std::min({kChunk - filled, end - begin, walk.numel - from});
      for (int64_t t = 0; t < num_tasks; ++t)
        convert_row(walk, t, walk.dtype, from, count, ahead, block + t * stride + filled);
      if (problem.has_metric) {
        convert_row(walk, num_tasks, walk.metric_dtype, from, count, ahead, root + filled);
        for (int64_t c = filled; c < filled + count; ++c) root[c] = __builtin_sqrt(root[c]);
      }
      filled += count, begin += count;
      if (from + count == walk.numel) ++k;
    }
    const int64_t padded = (filled + kLanes - 1) / kLanes * kLanes;
    for (int64_t t = 0; t < num_tasks; ++t) {
      double* row = block + t * stride;
      if (problem.has_metric)
        for (int64_t c = 0; c < filled; ++c) row[c] *= root[c];
      std::fill(row + filled, row + padded, 0.0);
    }
    add_products(block, stride, padded, num_tasks, partial);
  }

  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += partial[pair * kLanes + lane];
    sums[pair] = sum;
  }
}
