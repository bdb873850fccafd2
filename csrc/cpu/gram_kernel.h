// The CPU kernel: included once per instruction set, inside a namespace that defines kVectorBytes, kTile (rows on each
// side of a tile whose sums fit in registers), `widen` (16 to 32 and 32 to 64 bits), `half` and `total` of vectors.
//
// The products of all pairs of rows are added a chunk at a time by register-tiled kernels, in one of two types:
//
// - float32, where many tasks have contiguous runs of float32, bfloat16 or float16. It does twice as many products
//   at a time, but rounds: a sum takes kChain terms at most before it is folded into float64, which bounds its error by
//   3e-7 of the norms.
// - float64 for all else: float64 itself, few tasks, a metric, what is strided, missing or shorter than a chunk, and
//   any chunk whose products leave the range of float32. Products of the narrower types are exact in it and in range.
//
// Rows that several tiles need are kept in a block that stays in cache, in the type of the products. Every pair (i, j)
// sees the same operations in the same order wherever its tile lies, and the type depends on the set of rows alone:
// permuting tasks permutes the result exactly.

constexpr int kChain = 16;  // of 64 terms, constants would lose 9e-7

template <class Acc>
constexpr int64_t kLanes = kVectorBytes / sizeof(Acc);
template <class Acc>
using Vec = Vector<Acc, kLanes<Acc>>;

// Entries of each row that are multiplied at a time.
template <class Acc>
constexpr int64_t kChunk = std::is_same_v<Acc, float> ? kChain * kLanes<float> : 128;
// Distance of two rows in the block: a line more than a chunk, so that they do not meet in the same cache sets.
template <class Acc>
constexpr int64_t kStride = (1024 + 64) / sizeof(Acc);

template <class V>
V load_as(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <int N>
Vector<float, N> load_floats(const float* from) {
  return load_as<Vector<float, N>>(from);
}

template <int N>
Vector<float, N> load_floats(const BFloat16* from) {
  return (Vector<float, N>)(widen(load_as<Vector<uint16_t, N>>(from)) << 16);
}

// As to_double(Float16) in float_types.h.
template <int N>
Vector<float, N> load_floats(const Float16* from) {
  using Floats = Vector<float, N>;
  using Words = Vector<uint32_t, N>;
  const Words bits = widen(load_as<Vector<uint16_t, N>>(from)), magnitude = bits & 0x7fffu;
  const Words rebias = magnitude >= 0x7c00u ? Words{} + 0x70000000u : Words{} + 0x38000000u;
  const Words normal = (magnitude << 13) + rebias;
  const Words subnormal = (Words)(__builtin_convertvector((Vector<int32_t, N>)magnitude, Floats) * 0x1p-24f);
  const Words value = magnitude < 0x0400u ? subnormal : normal;
  return (Floats)(value | (bits & 0x8000u) << 16);
}

// A vector of Acc from as many entries of type In.
template <class Acc, class In>
Vec<Acc> load(const In* from) {
  if constexpr (std::is_same_v<Acc, In>)
    return load_as<Vec<Acc>>(from);
  else if constexpr (std::is_same_v<Acc, double>)
    return widen(load_floats<kLanes<double>>(from));
  else
    return load_floats<kLanes<float>>(from);
}

inline void store(float* to, Vec<float> v) { __builtin_memcpy(to, &v, sizeof v); }

inline void store(double* to, Vec<double> v) { __builtin_memcpy(to, &v, sizeof v); }

inline void add_to(double* sum, Vec<double> v) { store(sum, load<double>(sum) + v); }

// Two lanes of float32 are added before they become one of float64: exactly, where they are alike.
inline void add_to(double* sum, Vec<float> v) { add_to(sum, widen(half<0>(v) + half<1>(v))); }

// Asks for the cache line that its row needs a few chunks later.
template <bool kSingleTile, class In>
void ask(const In* from) {
  __builtin_prefetch(reinterpret_cast<const char*>(from) + kPrefetchBytes<In, kSingleTile>);
}

// ---- conversion -------------------------------------------------------------------------------------------------

// A contiguous run, one cache line of input at a time.
template <class In>
void convert_run(const In* __restrict in, int64_t count, double* __restrict out) {
  constexpr int64_t kLine = 64 / sizeof(In);
  int64_t c = 0;
  for (; c + kLine <= count; c += kLine) {
    ask<false>(in + c);
    for (int64_t l = 0; l < kLine; l += kLanes<double>) store(out + c + l, load<double>(in + c + l));
  }
  for (; c < count; ++c) out[c] = to_double(in[c]);
}

// Calls `function(data, step, count)` for each stretch of equal steps in entries [begin, begin + count) of a row's walk.
template <class In, class Function>
void for_each_stretch(const Walk& walk, int64_t row, int64_t begin, int64_t count, const Function& function) {
  const int64_t* strides = walk.row_strides(row);
  const int64_t last = walk.num_loops() - 1, inner = walk.sizes[last], step = strides[last];
  while (count > 0) {
    const int64_t at = begin % inner, run = std::min(count, inner - at);
    int64_t offset = at * step, outer = begin / inner;
    for (int64_t d = last - 1; d >= 0; outer /= walk.sizes[d--]) offset += outer % walk.sizes[d] * strides[d];
    function(static_cast<const In*>(walk.data[row]) + offset, step, run);
    begin += run, count -= run;
  }
}

// Entries [begin, begin + count) of one row's walk.
template <class In>
void convert(const Walk& walk, int64_t row, int64_t begin, int64_t count, double* __restrict out) {
  for_each_stretch<In>(walk, row, begin, count, [&](const In* in, int64_t step, int64_t run) {
    if (step == 1)
      convert_run(in, run, out);
    else
      for (int64_t c = 0; c < run; ++c) out[c] = to_double(in[c * step]);
    out += run;
  });
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

// Memory is asked for evenly, as measured: tiles that only multiply must keep it busy too. So where there are several
// tiles, a diagonal one asks for its first kOwn rows only, and the tiles above the diagonal ask for the others.
constexpr int kOwn = 2;

// What one tile above the diagonal asks for: kTile rows, such that all these tiles together ask for all the others.
template <class In>
struct Others {
  const In* rows[kTile];

  Others(const void* const* all_rows, int64_t from, int64_t i, int64_t j, int64_t num_tasks) {
    constexpr int64_t kLeft = kTile - kOwn;  // of each group of kTile
    const int64_t side = (num_tasks + kTile - 1) / kTile, column = j / kTile;
    const int64_t tile = column * (column - 1) / 2 + i / kTile, num_tiles = side * (side - 1) / 2;
    for (int64_t r = 0; r < kTile; ++r) {
      const int64_t other = tile * side * kLeft / num_tiles + r;
      const int64_t row = std::min(other / kLeft * kTile + kOwn + other % kLeft, num_tasks - 1);
      rows[r] = static_cast<const In*>(all_rows[row]) + from;
    }
  }
};

// Multiplies rows [i, i + R) among themselves. The rows come from `rows`, and are kept in `block` where other tiles
// want them too. The sums go to `squares`, for the caller to look at before they are added.
template <int R, bool kKeep, class In, class Acc>
void multiply_diagonal_tile(const void* const* rows, int64_t from, int64_t count, int64_t i, Acc* block, Acc* squares) {
  constexpr int kAsk = kKeep ? std::min(R, kOwn) : R;
  constexpr int64_t kLine = 64 / sizeof(In);
  const In* in[R];
  Vec<Acc> sum[R][R] = {};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) in[r] = static_cast<const In*>(rows[i + r]) + from;
  for (int64_t line = 0; line < count; line += kLine) {
#pragma GCC unroll 8
    for (int r = 0; r < kAsk; ++r) ask<!kKeep>(in[r] + line);
    for (int64_t k = line; k < line + kLine; k += kLanes<Acc>) {
      Vec<Acc> x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        x[r] = load<Acc>(in[r] + k);
        if (kKeep) store(block + (i + r) * kStride<Acc> + k, x[r]);
#pragma GCC unroll 8
        for (int c = 0; c <= r; ++c) sum[c][r] += x[c] * x[r];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = r; c < R; ++c) store(squares + ((i + r) * kTile + c) * kLanes<Acc>, sum[r][c]);
}

// Adds the products of rows [i, i + kTile) with rows [j, j + C), i + kTile <= j.
template <int C, class In, class Acc>
void add_tile(const Others<In>& others, const Acc* block, int64_t count, int64_t i, int64_t j, int64_t num_tasks,
              double* sums) {
  const Acc* a = block + i * kStride<Acc>;
  const Acc* b = block + j * kStride<Acc>;
  Vec<Acc> sum[kTile][C] = {};
  for (int64_t k = 0; k < count; k += kLanes<Acc>) {
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) ask<false>(others.rows[r] + k);
    Vec<Acc> x[kTile];
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) x[r] = load<Acc>(a + r * kStride<Acc> + k);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec<Acc> y = load<Acc>(b + c * kStride<Acc> + k);
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) sum[r][c] += x[r] * y;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) add_to(sums + (pair_index(i + r, j, num_tasks) + c) * kLanes<double>, sum[r][c]);
}

// Calls `function(j, C)` for each group of rows [j, j + C) that meet in one tile.
template <class Function>
void for_each_group(int64_t num_tasks, const Function& function) {
  static_assert(kTile == 3 || kTile == 4);
  for (int64_t j = 0; j < num_tasks; j += kTile) switch (std::min<int64_t>(kTile, num_tasks - j)) {
      case 1: function(j, std::integral_constant<int, 1>{}); break;
      case 2: function(j, std::integral_constant<int, 2>{}); break;
      case 3: function(j, std::integral_constant<int, 3>{}); break;
      default: function(j, std::integral_constant<int, kTile>{}); break;
    }
}

template <class In>
bool is_zero(const In* row, int64_t count) {
  Vec<uint32_t> bits = {};
  for (int64_t k = 0; k < count; k += kLanes<float>) bits |= (Vec<uint32_t>)load<float>(row + k) << 1;
  for (int lane = 1; lane < kLanes<float>; ++lane) bits[0] |= bits[lane];
  return bits[0] == 0;
}

// Whether float32 could hold the products of the chunk's rows. By Cauchy and Schwarz no sum exceeds the largest sum of
// squares, and what underflows is nothing beside rows that are not tiny. NaN and inf are left to float64.
template <class In>
bool in_range(const void* const* rows, int64_t from, int64_t count, int64_t num_tasks, const float* squares) {
  for (int64_t t = 0; t < num_tasks; ++t) {
    const Vec<float> lanes = load<float>(squares + (t * kTile + t % kTile) * kLanes<float>);
    const float square = total(half<0>(lanes) + half<1>(lanes));
    if (!(square <= 0x1p100f)) return false;
    if (square < 0x1p-90f && !is_zero(static_cast<const In*>(rows[t]) + from, count)) return false;
  }
  return true;
}

struct Scratch {
  Buffer block;    // the rows of a chunk, then the roots of the metric
  Buffer squares;  // the sums of a chunk's diagonal tiles
  Buffer sums;     // of each pair, a vector

  explicit Scratch(int64_t num_tasks)
      : block(allocate((num_tasks + 1) * kStride<double>)),
        squares(allocate(num_tasks * kTile * kLanes<double>)),
        sums(allocate(num_tasks * (num_tasks + 1) / 2 * kLanes<double>)) {}
};

// Adds the products of entries [from, from + count) of all rows; `count` is a multiple of a cache line. False: float32
// cannot hold them and nothing was added.
template <class In, class Acc>
bool add_products(const void* const* rows, int64_t from, int64_t count, int64_t num_tasks, const Scratch& scratch) {
  Acc* const block = reinterpret_cast<Acc*>(scratch.block.get());
  Acc* const squares = reinterpret_cast<Acc*>(scratch.squares.get());
  double* const sums = scratch.sums.get();
  for_each_group(num_tasks, [&](int64_t j, auto width) {
    constexpr int C = decltype(width)::value;
    const auto multiply =
        num_tasks > kTile ? multiply_diagonal_tile<C, true, In, Acc> : multiply_diagonal_tile<C, false, In, Acc>;
    multiply(rows, from, count, j, block, squares);
  });
  if constexpr (std::is_same_v<Acc, float>)
    if (!in_range<In>(rows, from, count, num_tasks, squares)) return false;
  for_each_group(num_tasks, [&](int64_t j, auto width) {
    constexpr int C = decltype(width)::value;
    for (int64_t r = 0; r < C; ++r)
      for (int64_t c = r; c < C; ++c)
        add_to(sums + pair_index(j + r, j + c, num_tasks) * kLanes<double>,
               load<Acc>(squares + ((j + r) * kTile + c) * kLanes<Acc>));
    for (int64_t i = 0; i < j; i += kTile)
      add_tile<C>(Others<In>(rows, from, i, j, num_tasks), block, count, i, j, num_tasks, sums);
  });
  return true;
}

// ---- one slot -----------------------------------------------------------------------------------------------------

// Writes the weighted sums of entries [from, stop) of parameter k (combine_kernel.h).
void combine(const Problem& problem, int64_t k, int64_t from, int64_t stop);

// Entries of a parameter that stay in cache from their products to their weighted sums. The products are cut like that
// where nothing is combined, too: in whole chunks, to give the same sums.
inline int64_t span_entries(DType dtype, int64_t num_tasks) {
  constexpr int64_t kSpanBytes = 1 << 16, kChunks = std::max(kChunk<float>, kChunk<double>);
  return std::max<int64_t>(1, kSpanBytes / (num_tasks * element_size(dtype) * kChunks)) * kChunks;
}

struct Slot {
  const Problem& problem;
  int64_t num_tasks = problem.num_tasks;
  int64_t num_pairs = num_tasks * (num_tasks + 1) / 2;
  Scratch scratch{num_tasks};
  std::vector<const void*> block_rows = std::vector<const void*>(num_tasks);
  int64_t filled = 0;  // columns of the block, in which small pieces gather

  // Adds whole chunks of a parameter whose rows are runs, straight from where they lie. Returns where they end.
  template <class In>
  int64_t add_runs(const Walk& walk, int64_t from, int64_t stop) {
    const void* const* const rows = walk.data.data();
    // Where a single tile does it all, float64 keeps up with the memory, and no row is needed again.
    if (num_tasks <= kTile) {
      const int64_t count = (stop - from) / kChunk<double> * kChunk<double>;
      add_products<In, double>(rows, from, count, num_tasks, scratch);
      return from + count;
    }
    using Acc = std::conditional_t<std::is_same_v<In, double>, double, float>;
    for (; stop - from >= kChunk<Acc>; from += kChunk<Acc>)
      if (!add_products<In, Acc>(rows, from, kChunk<Acc>, num_tasks, scratch)) add_exactly(walk, from, kChunk<Acc>);
    return from;
  }

  // Adds a few entries of a parameter in float64.
  void add_exactly(const Walk& walk, int64_t from, int64_t count) {
    for (int64_t part; count > 0; from += part, count -= part) {
      part = std::min(count, kChunk<double>);
      convert_piece(walk, from, part, 0);
      add_block(part);
    }
  }

  int64_t add_runs(const Walk& walk, int64_t from, int64_t stop) {
    switch (walk.dtype) {
      case DType::float32: return add_runs<float>(walk, from, stop);
      case DType::float64: return add_runs<double>(walk, from, stop);
      case DType::float16: return add_runs<Float16>(walk, from, stop);
      case DType::bfloat16: return add_runs<BFloat16>(walk, from, stop);
    }
    return from;
  }

  // Converts a piece of any parameter to column `filled` of the block.
  void convert_piece(const Walk& walk, int64_t from, int64_t count, int64_t filled) {
    double* const root = scratch.block.get() + num_tasks * kStride<double> + filled;
    if (problem.has_metric) {
      convert_row(walk, num_tasks, walk.metric_dtype, from, count, root);
      for (int64_t c = 0; c < count; ++c) root[c] = __builtin_sqrt(root[c]);
    }
    for (int64_t t = 0; t < num_tasks; ++t) {
      double* const row = scratch.block.get() + t * kStride<double> + filled;
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
      double* const row = scratch.block.get() + t * kStride<double>;
      std::fill(row + filled, row + count, 0.0);
      block_rows[t] = row;
    }
    add_products<double, double>(block_rows.data(), 0, count, num_tasks, scratch);
  }

  // Adds entries [from, stop) of parameter k.
  void add(int64_t k, int64_t from, int64_t stop) {
    const Walk& walk = problem.walks[k];
    if (problem.is_run[k]) {
      // Whole chunks need the block for themselves.
      if (filled > 0 && stop - from >= std::min(kChunk<float>, kChunk<double>)) add_block(std::exchange(filled, 0));
      from = add_runs(walk, from, stop);
    }
    while (from < stop) {
      const int64_t count = std::min(kChunk<double> - filled, stop - from);
      convert_piece(walk, from, count, filled);
      from += count, filled += count;
      if (filled == kChunk<double>) add_block(std::exchange(filled, 0));
    }
  }

  void run(int64_t begin, int64_t end) {
    std::fill_n(scratch.sums.get(), num_pairs * kLanes<double>, 0.0);
    for (int64_t k = problem.parameter_at(begin); begin < end; ++k) {
      const int64_t stop = std::min(problem.walks[k].numel, end - problem.starts[k]);
      const int64_t span = span_entries(problem.walks[k].dtype, num_tasks);
      for (int64_t next, from = begin - problem.starts[k]; from < stop; from = next) {
        next = std::min(stop, from + span);
        add(k, from, next);
        if (problem.weights != nullptr) combine(problem, k, from, next);
      }
      begin = problem.starts[k] + stop;
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
    const double* const lanes = slot.scratch.sums.get() + pair * kLanes<double>;
    for (int lane = 0; lane < kLanes<double>; ++lane) out[pair] += lanes[lane];
  }
}
