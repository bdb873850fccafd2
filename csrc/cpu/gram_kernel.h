// The CPU kernel: included once per instruction set, inside a namespace that defines kLanes (of float64 in a vector),
// kTile (rows on each side of a tile whose sums fit in registers), and `widen` for 32 to 64 and 16 to 32 bits.
//
// A chunk of every row becomes float64 in a scratch block that stays in cache, and register-tiled kernels add the
// products of all pairs of rows. Plain runs are converted by the tile that first needs them, anything else beforehand.
// Products of float32, bfloat16 and float16 are exact in float64 and no product of theirs overflows or underflows, so
// no input needs a special case. Every pair (i, j) sees the same operations in the same order wherever its tile lies:
// permuting tasks permutes the result exactly.

using Vec = Vector<double, kLanes>;
using Floats = Vector<float, kLanes>;
using Words = Vector<uint32_t, kLanes>;

inline Vec load(const double* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline Vec load(const float* from) {
  Floats v;
  __builtin_memcpy(&v, from, sizeof v);
  return widen(v);
}

inline Words load_bits(const void* from) {
  Vector<uint16_t, kLanes> v;
  __builtin_memcpy(&v, from, sizeof v);
  return widen(v);
}

inline Vec load(const BFloat16* from) { return widen((Floats)(load_bits(from) << 16)); }

// As to_double(Float16) in float_types.h.
inline Vec load(const Float16* from) {
  using Ints = Vector<int32_t, kLanes>;
  const Words bits = load_bits(from), magnitude = bits & 0x7fffu;
  const Words rebias = magnitude >= 0x7c00u ? Words{} + 0x70000000u : Words{} + 0x38000000u;
  const Words normal = (magnitude << 13) + rebias;
  const Words subnormal = (Words)(__builtin_convertvector((Ints)magnitude, Floats) * 0x1p-24f);
  const Words value = magnitude < 0x0400u ? subnormal : normal;
  return widen((Floats)(value | (bits & 0x8000u) << 16));
}

inline void store(double* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }

// Asks for the cache line that its row needs a few chunks later.
template <class In>
void prefetch_ahead(const In* from) {
  __builtin_prefetch(reinterpret_cast<const char*>(from) + kPrefetchBytes<In>);
}

// ---- conversion -------------------------------------------------------------------------------------------------

// A contiguous run, one cache line of input at a time.
template <class In>
void convert_run(const In* __restrict in, int64_t count, double* __restrict out) {
  constexpr int64_t kLine = 64 / sizeof(In);
  int64_t c = 0;
  for (; c + kLine <= count; c += kLine) {
    prefetch_ahead(in + c);
    for (int64_t l = 0; l < kLine; l += kLanes) store(out + c + l, load(in + c + l));
  }
  for (; c < count; ++c) out[c] = to_double(in[c]);
}

// Entries [begin, begin + count) of one row's walk.
template <class In>
void convert(const Walk& walk, int64_t row, int64_t begin, int64_t count, double* __restrict out) {
  const int64_t* strides = walk.row_strides(row);
  const int64_t last = walk.num_loops() - 1, inner = walk.sizes[last], step = strides[last];
  while (count > 0) {
    const int64_t at = begin % inner, run = std::min(count, inner - at);
    int64_t offset = at * step, outer = begin / inner;
    for (int64_t d = last - 1; d >= 0; outer /= walk.sizes[d--]) offset += outer % walk.sizes[d] * strides[d];
    const In* in = static_cast<const In*>(walk.data[row]) + offset;
    if (step == 1)
      convert_run(in, run, out);
    else
      for (int64_t c = 0; c < run; ++c) out[c] = to_double(in[c * step]);
    out += run, begin += run, count -= run;
  }
}

inline void convert_row(const Walk& walk, int64_t row, DType dtype, int64_t begin, int64_t count, double* out) {
  if (walk.data[row] == nullptr) return void(std::fill_n(out, count, 0.0));
  switch (dtype) {
    case DType::float32: return convert<float>(walk, row, begin, count, out);
    case DType::float64: return convert<double>(walk, row, begin, count, out);
    case DType::float16: return convert<Float16>(walk, row, begin, count, out);
    case DType::bfloat16: return convert<BFloat16>(walk, row, begin, count, out);
  }
}

// ---- products ---------------------------------------------------------------------------------------------------

// Position of pair (i, j), i <= j, in the upper triangle stored row by row.
inline int64_t pair_index(int64_t i, int64_t j, int64_t num_tasks) { return i * (2 * num_tasks - i - 1) / 2 + j; }

// What one tile above the diagonal asks for: a few rows, such that all tiles together ask for every row, evenly spread.
// From four tiles a side on, this keeps the memory busier than asking in the diagonal tiles, which come too seldom.
template <class In>
struct Asked {
  const In* rows[kTile];

  Asked(const void* const* all_rows, int64_t from, int64_t i, int64_t j, int64_t num_tasks) {
    const int64_t side = (num_tasks + kTile - 1) / kTile, column = j / kTile;
    const int64_t tile = column * (column - 1) / 2 + i / kTile, num_tiles = side * (side - 1) / 2;
    for (int64_t r = 0; r < kTile; ++r) {
      const int64_t row = std::min(tile * num_tasks / num_tiles + r, num_tasks - 1);
      rows[r] = static_cast<const In*>(all_rows[row]) + from;
    }
  }

  void prefetch(int64_t k) const {
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) prefetch_ahead(rows[r] + k);
  }
};

// Adds the products of rows [i, i + R) among themselves. The rows come from `rows`, and are kept in `block` where other
// tiles want them too.
template <int R, bool kKeep, bool kAsk, class In>
void add_diagonal_tile(const void* const* rows, int64_t from, int64_t count, int64_t i, int64_t num_tasks,
                       double* block, double* sums) {
  constexpr int64_t kLine = 64 / sizeof(In);
  const In* in[R];
  double* at[R];
  Vec sum[R][R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    in[r] = static_cast<const In*>(rows[r]) + from;
    at[r] = sums + pair_index(i + r, i, num_tasks) * kLanes;
#pragma GCC unroll 8
    for (int c = r; c < R; ++c) sum[r][c] = load(at[r] + c * kLanes);
  }
  for (int64_t line = 0; line < count; line += kLine) {
#pragma GCC unroll 8
    for (int r = 0; kAsk && r < R; ++r) prefetch_ahead(in[r] + line);
    for (int64_t k = line; k < line + kLine; k += kLanes) {
      Vec x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        x[r] = load(in[r] + k);
        if (kKeep) store(block + (i + r) * kStride + k, x[r]);
#pragma GCC unroll 8
        for (int c = 0; c <= r; ++c) sum[c][r] += x[c] * x[r];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = r; c < R; ++c) store(at[r] + c * kLanes, sum[r][c]);
}

// Adds the products of rows [i, i + kTile) with rows [j, j + C), i + kTile <= j.
template <int C, bool kAsk, class In>
void add_tile(const Asked<In>& asked, const double* block, int64_t count, int64_t i, int64_t j, int64_t num_tasks,
              double* sums) {
  const double* a = block + i * kStride;
  const double* b = block + j * kStride;
  double* at[kTile];
  Vec sum[kTile][C];
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r) {
    at[r] = sums + pair_index(i + r, j, num_tasks) * kLanes;
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = load(at[r] + c * kLanes);
  }
  for (int64_t k = 0; k < count; k += kLanes) {
    if (kAsk) asked.prefetch(k);
    Vec x[kTile];
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) x[r] = load(a + r * kStride + k);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec y = load(b + c * kStride + k);
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) sum[r][c] += x[r] * y;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(at[r] + c * kLanes, sum[r][c]);
}

// The tiles of columns [j, j + C): the diagonal one first, which brings their rows into cache, then those above it.
template <int C, bool kSpread, class In>
void add_tile_column(const void* const* rows, int64_t from, int64_t count, int64_t j, int64_t num_tasks,
                     double* block, double* sums) {
  const bool keep = num_tasks > kTile;
  const auto diagonal = keep ? add_diagonal_tile<C, true, !kSpread, In> : add_diagonal_tile<C, false, !kSpread, In>;
  diagonal(rows + j, from, count, j, num_tasks, block, sums);
  for (int64_t i = 0; i < j; i += kTile)
    add_tile<C, kSpread>(Asked<In>(rows, from, i, j, num_tasks), block, count, i, j, num_tasks, sums);
}

// Adds the products of entries [from, from + count) of all rows; `count` is a multiple of a cache line.
template <class In>
void add_products(const void* const* rows, int64_t from, int64_t count, int64_t num_tasks, double* block,
                  double* sums) {
  static_assert(kTile == 3 || kTile == 4);
  for (int64_t j = 0; j < num_tasks; j += kTile) {
    const auto add = [&](auto width) {
      constexpr int C = decltype(width)::value;
      const auto column = num_tasks > 3 * kTile ? add_tile_column<C, true, In> : add_tile_column<C, false, In>;
      column(rows, from, count, j, num_tasks, block, sums);
    };
    switch (std::min<int64_t>(kTile, num_tasks - j)) {
      case 1: add(std::integral_constant<int, 1>{}); break;
      case 2: add(std::integral_constant<int, 2>{}); break;
      case 3: add(std::integral_constant<int, 3>{}); break;
      default: add(std::integral_constant<int, kTile>{}); break;
    }
  }
}

// ---- one slot -----------------------------------------------------------------------------------------------------

struct Slot {
  const Problem& problem;
  int64_t num_tasks = problem.num_tasks;
  int64_t num_pairs = num_tasks * (num_tasks + 1) / 2;
  Buffer block = allocate((num_tasks + 1) * kStride);  // the rows of a chunk, then the roots of the metric
  Buffer sums = allocate(num_pairs * kLanes);
  std::vector<const void*> block_rows = std::vector<const void*>(num_tasks);

  // Adds a piece of a parameter whose rows are runs, straight from where they lie.
  void add_runs(const Walk& walk, int64_t from, int64_t count) {
    const auto add = [&](auto kernel) {
      kernel(walk.data.data(), from, count, num_tasks, block.get(), sums.get());
    };
    switch (walk.dtype) {
      case DType::float32: return add(add_products<float>);
      case DType::float64: return add(add_products<double>);
      case DType::float16: return add(add_products<Float16>);
      case DType::bfloat16: return add(add_products<BFloat16>);
    }
  }

  // Converts a piece of any parameter to column `filled` of the block.
  void convert_piece(const Walk& walk, int64_t from, int64_t count, int64_t filled) {
    double* const root = block.get() + num_tasks * kStride + filled;
    if (problem.has_metric) {
      convert_row(walk, num_tasks, walk.metric_dtype, from, count, root);
      for (int64_t c = 0; c < count; ++c) root[c] = __builtin_sqrt(root[c]);
    }
    for (int64_t t = 0; t < num_tasks; ++t) {
      double* const row = block.get() + t * kStride + filled;
      convert_row(walk, t, walk.dtype, from, count, row);
      if (problem.has_metric)
        for (int64_t c = 0; c < count; ++c) row[c] *= root[c];
    }
  }

  // Adds what is in the first columns of the block.
  void add_block(int64_t filled) {
    constexpr int64_t kLine = 64 / sizeof(double);
    const int64_t count = (filled + kLine - 1) / kLine * kLine;
    for (int64_t t = 0; t < num_tasks; ++t) {
      double* const row = block.get() + t * kStride;
      std::fill(row + filled, row + count, 0.0);
      block_rows[t] = row;
    }
    add_products<double>(block_rows.data(), 0, count, num_tasks, block.get(), sums.get());
  }

  void run(int64_t begin, int64_t end) {
    std::fill_n(sums.get(), num_pairs * kLanes, 0.0);
    int64_t filled = 0;  // small pieces gather in the block
    for (int64_t k = problem.parameter_at(begin); begin < end; ++k) {
      const Walk& walk = problem.walks[k];
      int64_t from = begin - problem.starts[k];
      const int64_t stop = std::min(walk.numel, end - problem.starts[k]);
      begin += stop - from;
      if (problem.is_run[k]) {
        // Whole chunks, and all of them at once where no other tile needs the rows again.
        if (filled > 0 && stop - from >= kChunk) add_block(std::exchange(filled, 0));
        const int64_t step = num_tasks > kTile ? kChunk : (stop - from) / kChunk * kChunk;
        for (; stop - from >= kChunk; from += step) add_runs(walk, from, step);
      }
      while (from < stop) {
        const int64_t count = std::min(kChunk - filled, stop - from);
        convert_piece(walk, from, count, filled);
        from += count, filled += count;
        if (filled == kChunk) add_block(std::exchange(filled, 0));
      }
    }
    if (filled > 0) add_block(filled);
  }
};

// Sums of the products of all pairs over entries [begin, end) of the concatenated parameters, into `out`
// [num_tasks * (num_tasks + 1) / 2].
void gram_slot(const Problem& problem, int64_t begin, int64_t end, double* out) {
  Slot slot{problem};
  slot.run(begin, end);
  for (int64_t pair = 0; pair < slot.num_pairs; ++pair) {
    out[pair] = 0;
    for (int lane = 0; lane < kLanes; ++lane) out[pair] += slot.sums.get()[pair * kLanes + lane];
  }
}
