// The CPU kernel: included once per instruction set, inside a namespace that defines kVectorBytes, kTile (rows on each
// side of a tile whose sums fit in registers), `widen` (16 to 32 and 32 to 64 bits) and `half` of a vector.
//
// The products of all pairs of rows are added tile by tile, a few vectors of each row at a time, a step. The lanes of a
// tile's sums are then added up in registers, all sums side by side, and their totals kept in float64. The type of
// products and sums is one of two:
//
// - float32, where many tasks have contiguous runs of float32, bfloat16 or float16. It does twice as many products
//   at a time, but rounds: no term passes through more than kRoundings additions before it is float64. That bounds the
//   error of any sum by 1e-6 of the norms, and of constants by 3e-7. Rows of bfloat16 are multiplied as they are where
//   the processor can do so: two terms a lane at a time, added and rounded one after the other.
// - float64 for all else: float64 itself, few tasks, a metric, what is strided, missing or shorter than a step, and
//   any chunk whose products leave the range of float32. Products of the narrower types are exact in it and in range.
//
// Every pair (i, j) sees the same operations in the same order wherever its tile lies, and the type depends on the set
// of rows alone: permuting tasks permutes the result exactly.

// Terms that a tile adds to each lane of its sums in a step.
constexpr int kStep = 12;
// Additions in float32 that a term may pass through; each loses 2^-24.
constexpr int kRoundings = 16;
// Lines of a row that are read one after another where the memory is the limit: it gives neighbours faster than one
// line of each row in turn.
constexpr int kBurst = 4;
// Rows of which a step stays in the first cache, beside what is asked for meanwhile, a group.
constexpr int64_t kGroup = std::min(16, 24576 / (kStep * kVectorBytes * kTile)) * kTile;

template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);
// Of bfloat16, its bits.
template <class T>
using Vec = Vector<std::conditional_t<std::is_same_v<T, BFloat16>, uint16_t, T>, kLanes<T>>;

// Entries of a line of the cache.
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

// Additions that add up the lanes of a sum, one for each halving.
constexpr int kLevels = __builtin_ctzll(kLanes<float>);
static_assert(kStep + kLevels <= kRoundings);

// Entries of each row that a tile multiplies before it is the next one's turn.
template <class Factor>
constexpr int64_t kStepEntries = kStep * kLanes<Sum<Factor>>;

// Entries of each row between two looks at whether float32 holds their products, a chunk: whole steps of any type.
constexpr int64_t kChunk = 768;
static_assert(kChunk % kStepEntries<float> == 0 && kChunk % kStepEntries<double> == 0);
static_assert(kGrain % kChunk == 0);

// Entries that are gathered in float64 before they are multiplied, and the distance of two rows of them: a line more,
// so that they do not meet in the same cache sets.
constexpr int64_t kGathered = 192, kGatheredStride = kGathered + kLine<double>;

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

// A vector of T from as many entries of type In.
template <class T, class In>
Vec<T> load(const In* from) {
  if constexpr (std::is_same_v<T, In>)
    return load_as<Vec<T>>(from);
  else if constexpr (std::is_same_v<T, double>)
    return widen(load_floats<kLanes<double>>(from));
  else
    return load_floats<kLanes<float>>(from);
}

inline void store(BFloat16* to, Vec<BFloat16> v) { __builtin_memcpy(to, &v, sizeof v); }

inline void store(float* to, Vec<float> v) { __builtin_memcpy(to, &v, sizeof v); }

inline void store(double* to, Vec<double> v) { __builtin_memcpy(to, &v, sizeof v); }

inline void add_to(double* sum, Vec<double> v) { store(sum, load<double>(sum) + v); }

// ---- conversion -------------------------------------------------------------------------------------------------

// A contiguous run, one cache line of input at a time.
template <class In>
void convert_run(const In* __restrict in, int64_t count, double* __restrict out) {
  int64_t c = 0;
  for (; c + kLine<In> <= count; c += kLine<In>) {
    ask_for(in + c, kPrefetchBytes<In>);
    for (int64_t l = 0; l < kLine<In>; l += kLanes<double>) store(out + c + l, load<double>(in + c + l));
  }
  for (; c < count; ++c) out[c] = to_double(in[c]);
}

// Calls `function(data, step, count)` for each stretch of equal steps in a row's entries [begin, begin + count).
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

// Rows of type In are multiplied as Factor, and the products added in Sum<Factor>. Of bfloat16 an instruction set may
// have an add_product of its own.
template <class V>
void add_product(V& sum, const V& x, const V& y) {
  sum += x * y;
}

// Each lane kFrom of `a` and then `b`.
template <int... kFrom, class V>
V select(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, Vector<Index, sizeof...(kFrom)>{kFrom...});
#endif
}

// Adds each lane to the one whose number differs in `kBit` alone. What `a` gives fills the lanes without that bit, what
// `b` gives those with it.
template <int kBit, class V, int... kLane>
V add_lanes(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int N = sizeof...(kLane);
  return select<(kLane & kBit ? N + kLane : kLane)...>(a, b) +
         select<(kLane & kBit ? N + (kLane ^ kBit) : kLane ^ kBit)...>(a, b);
}

// The totals of N vectors, at most as many as one has lanes, each in the lane of its vector's number. The lanes of any
// vector are added in the same order. Lanes from N on mean nothing.
template <class Acc, int N, int kBit = kLanes<Acc> / 2>
[[gnu::always_inline]] inline Vec<Acc> totals(Vec<Acc>* x) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<Acc>>{};
  constexpr int kLeft = std::min(N, kBit);
#pragma GCC unroll 8
  for (int k = 0; k < kLeft; ++k) x[k] = add_lanes<kBit>(x[k], x[k + kBit < N ? k + kBit : k], lanes);
  if constexpr (kBit > 1) return totals<Acc, kLeft, kBit / 2>(x);
  return x[0];
}

// Adds the totals of N sums to `to`, which ends with a whole vector.
template <class Acc, int N>
[[gnu::always_inline]] inline void add_totals(Vec<Acc>* sums, double* to) {
  constexpr int kOnce = std::min<int>(N, kLanes<Acc>);
  const Vec<Acc> x = totals<Acc, kOnce>(sums);
  if constexpr (std::is_same_v<Acc, double>) {
    add_to(to, x);
  } else {
    add_to(to, widen(half<0>(x)));
    if constexpr (kOnce > kLanes<double>) add_to(to + kLanes<double>, widen(half<1>(x)));
  }
  if constexpr (N > kOnce) add_totals<Acc, N - kOnce>(sums + kOnce, to + kOnce);
}

// So many totals, rounded up to whole vectors.
constexpr int64_t padded(int64_t num_sums) {
  return (num_sums + kLanes<double> - 1) / kLanes<double> * kLanes<double>;
}

// Totals of a tile: that of row r and column c at c * kTile + r; on the diagonal, of r <= c.
constexpr int64_t kTileSums = padded(kTile * kTile);

template <class Acc, int R, int C>
[[gnu::always_inline]] inline void add_to_tile(const Vec<Acc> (&sum)[C][R], double* tile) {
  Vec<Acc> sums[C * kTile] = {};
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[c * kTile + r] = sum[c][r];
  add_totals<Acc, C * kTile>(sums, tile);
}

// Bytes ahead of a tile that rows are asked for, whole steps of any type.
constexpr int64_t kAheadBytes = 768;
static_assert(kAheadBytes % (kStep * kVectorBytes) == 0);

// Lines of N rows that a tile asks for while it multiplies: memory should never wait for the arithmetic.
template <class In, int N>
struct Ahead {
  std::array<const In*, N> rows;

  void ask(int64_t k) const {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) __builtin_prefetch(rows[n] + k);
  }
};

// Adds the products of rows [J, J + R) among themselves over `count` entries, and passes every vector to `keep`.
template <int J, int R, class Factor, class In, class Keep, int N>
[[gnu::always_inline]] inline void add_diagonal_tile(const void* const* rows, int64_t from, int64_t count,
                                                     const Keep& keep, const Ahead<In, N>& ahead, double* tile) {
  const In* in[R];
  Vec<Sum<Factor>> sum[R][R] = {};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) in[r] = static_cast<const In*>(rows[J + r]) + from;
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; k += kLanes<Factor>) {
    if (k % kLine<In> == 0) ahead.ask(k);
    Vec<Factor> x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      x[r] = load<Factor>(in[r] + k);
      keep(r, k, x[r]);
#pragma GCC unroll 8
      for (int c = 0; c <= r; ++c) add_product(sum[r][c], x[c], x[r]);
    }
  }
  add_to_tile<Sum<Factor>>(sum, tile);
}

// As add_diagonal_tile, of a step, and keeps the rows in `block` for other tiles.
template <int J, int R, class In, class Factor>
[[gnu::noinline]] void add_and_keep(const void* const* rows, int64_t from, Factor* block, const Ahead<In, 2>& ahead,
                                    double* tile) {
  constexpr int64_t kStride = kStepEntries<Factor>;
  const auto keep = [&](int r, int64_t k, const Vec<Factor>& x) { store(block + (J + r) * kStride + k, x); };
  add_diagonal_tile<J, R, Factor>(rows, from, kStride, keep, ahead, tile);
}

// Adds the products of kTile kept rows at `a` with C kept rows at `b`.
template <int C, class In, class Factor>
[[gnu::noinline]] void add_tile(const Factor* a, const Factor* b, const Ahead<In, 2>& ahead, double* tile) {
  constexpr int64_t kStride = kStepEntries<Factor>;
  Vec<Sum<Factor>> sum[C][kTile] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < kStride; k += kLanes<Factor>) {
    if (k % kLine<In> == 0) ahead.ask(k);
    Vec<Factor> x[kTile];
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) x[r] = load<Factor>(a + r * kStride + k);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec<Factor> y = load<Factor>(b + c * kStride + k);
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) add_product(sum[c][r], x[r], y);
    }
  }
  add_to_tile<Sum<Factor>>(sum, tile);
}

// Asks for kBurst lines of each of the rows [first, last), kStripPrefetchBytes on, those of one row after another.
template <class In>
[[gnu::always_inline]] inline void ask_for_bursts(const In* const* rows, int first, int last) {
#pragma GCC unroll 8
  for (int r = first; r < last; ++r)
#pragma GCC unroll 4
    for (int line = 0; line < kBurst; ++line) ask_for(rows[r], line * 64 + kStripPrefetchBytes);
}

// Adds the products of kTile + C rows over kBurst lines to their sums, that of rows i <= j at j * (j + 1) / 2 + i. In
// three tiles: the first rows among themselves, these with the last ones, and the last ones among themselves. Asks for
// these very lines, or for those kStripPrefetchBytes on, half of the rows at a time. Not inlined, where the
// compiler keeps all the addresses and runs out of registers.
template <int C, class In, class Factor>
[[gnu::noinline]] void add_strip_step(const void* const* rows, int64_t from, Vec<Sum<Factor>>* sums) {
  constexpr int R = kTile + C;
  const In* in[R];
  Vec<Sum<Factor>> first[kTile][kTile], between[kTile][C], last[C][C];
  const auto add = [](Vec<Sum<Factor>>& sum, int64_t k, const Vec<Factor>& x, const Vec<Factor>& y) {
    if (k == 0) sum = Vec<Sum<Factor>>{};
    add_product(sum, x, y);
  };
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) in[r] = static_cast<const In*>(rows[r]) + from;
#pragma GCC unroll 4
  for (int line = 0; line < kBurst; ++line) {
    if (line % 2 == 0) ask_for_bursts(in, R * line / kBurst, R * (line + 2) / kBurst);
#pragma GCC unroll 2
    for (int64_t k = line * kLine<In>; k < (line + 1) * kLine<In>; k += kLanes<Factor>) {
      Vec<Factor> x[kTile];
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) {
        x[j] = load<Factor>(in[j] + k);
#pragma GCC unroll 8
        for (int i = 0; i <= j; ++i) add(first[i][j], k, x[i], x[j]);
      }
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) {
        const Vec<Factor> y = load<Factor>(in[kTile + j] + k);
#pragma GCC unroll 8
        for (int i = 0; i < kTile; ++i) add(between[i][j], k, x[i], y);
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < R; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < kTile && i <= j; ++i)
      sums[j * (j + 1) / 2 + i] += j < kTile ? first[i][j % kTile] : between[i][j % kTile];
#pragma GCC unroll 8
  for (int64_t k = 0; k < kBurst * kLine<In>; k += kLanes<Factor>) {
    Vec<Factor> x[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      x[j] = load<Factor>(in[kTile + j] + k);
#pragma GCC unroll 8
      for (int i = 0; i <= j; ++i) add(last[i][j], k, x[i], x[j]);
    }
  }
#pragma GCC unroll 8
  for (int j = kTile; j < R; ++j)
#pragma GCC unroll 8
    for (int i = kTile; i <= j; ++i) sums[j * (j + 1) / 2 + i] += last[i - kTile][j - kTile];
}

// Calls `function(C)` for the rows of a tile where so many are left.
template <class Function>
void with_width(int64_t num_rows, const Function& function) {
  static_assert(kTile == 3 || kTile == 4);
  switch (num_rows) {
    case 1: return function(std::integral_constant<int, 1>{});
    case 2: return function(std::integral_constant<int, 2>{});
    case 3: return function(std::integral_constant<int, 3>{});
    default: return function(std::integral_constant<int, kTile>{});
  }
}

// Tiles of a group of rows with itself.
constexpr int64_t num_tiles(int64_t num_rows) {
  const int64_t side = (num_rows + kTile - 1) / kTile;
  return side * (side + 1) / 2;
}

// The same rows from entry `from` on.
template <int N, class In>
Ahead<In, N> ahead_of(const void* const* rows, int64_t from) {
  Ahead<In, N> ahead;
  for (int n = 0; n < N; ++n) ahead.rows[n] = static_cast<const In*>(rows[n]) + from;
  return ahead;
}

// Adds the products of rows that a single tile holds.
template <class In>
void add_alone(const void* const* rows, int64_t num_rows, int64_t from, int64_t count, double* tile) {
  with_width(num_rows, [&](auto width) {
    constexpr int C = decltype(width)::value;
    const auto drop = [](int, int64_t, const Vec<double>&) {};
    const auto ahead = ahead_of<C, In>(rows, from + kPrefetchBytes<In> / sizeof(In));
    add_diagonal_tile<0, C, double>(rows, from, count, drop, ahead, tile);
  });
}

// The rows of a later step, shared out evenly among the tiles of this one: at most two for each.
template <class In>
struct RowsAhead {
  const void* const* rows;
  int64_t from = 0;
  uint64_t share, shared = 0;  // of rows, in units of 2^-32

  RowsAhead(const void* const* rows, int64_t num_rows, int64_t num_tiles)
      : rows(rows), share(((uint64_t(num_rows) << 32) + num_tiles - 1) / num_tiles) {}

  void begin(int64_t entry) { from = entry, shared = 0; }

  const In* row(uint64_t r) const { return static_cast<const In*>(rows[r]) + from; }

  Ahead<In, 2> next() {
    const uint64_t first = shared >> 32, end = (shared += share) >> 32;
    return {row(first), row(std::max(first + 1, end) - 1)};
  }
};

// Whether rows are multiplied by a strip: more than kTile, at most twice as many, and no more sums than registers.
constexpr bool is_strip(int64_t num_rows) { return kTile == 4 && kTile < num_rows && num_rows <= 2 * kTile; }

// Adds the products of whole steps of kTile + C rows. Asks for the next step, so that the memory has work meanwhile.
template <int C, class In, class Factor>
void add_strip(const void* const* rows, int64_t from, int64_t count, Vec<Sum<Factor>>* sums) {
  constexpr int R = kTile + C;
  const int64_t stop = from + count;
  for (; from < stop; from += kBurst * kLine<In>) add_strip_step<C, In, Factor>(rows, from, sums);
  const In* next[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) next[r] = static_cast<const In*>(rows[r]) + stop;
  ask_for_bursts(next, 0, R);
}

// Adds the products of a step of rows [J, J + C) with themselves and with those before to their tiles, and keeps the
// rows in `block`. Every J has code of its own: the processor foresees what a load will read by where the load stands
// in the program.
template <int J, int C, class In, class Factor>
void add_column(const void* const* rows, int64_t from, Factor* block, RowsAhead<In>& ahead, double* tile) {
  constexpr int64_t kStride = kStepEntries<Factor>;
  add_and_keep<J, C>(rows, from, block, ahead.next(), tile);
  for (int64_t i = 0; i < J; i += kTile)
    add_tile<C>(block + i * kStride, block + J * kStride, ahead.next(), tile += kTileSums);
}

// Adds the products of a step of a group's rows to its tiles, and keeps the rows in `block`.
template <class In, class Factor, int... kColumns>
void add_group(const void* const* rows, int64_t num_rows, int64_t from, Factor* block, RowsAhead<In>& ahead,
               double* tiles, std::integer_sequence<int, kColumns...>) {
  const auto add = [&](auto column) {
    constexpr int J = decltype(column)::value * kTile;
    if (J >= num_rows) return false;
    with_width(num_rows - J, [&](auto width) {
      add_column<J, decltype(width)::value>(rows, from, block, ahead, tiles + num_tiles(J) * kTileSums);
    });
    return true;
  };
  (void)(add(std::integral_constant<int, kColumns>{}) && ...);
}

// Adds the products of a step of the rows at `a`, a whole group, with those of another group at `b`. Returns the end
// of the tiles.
template <class In, class Factor>
double* add_groups(const Factor* a, const Factor* b, int64_t num_rows, RowsAhead<In>& ahead, double* tile) {
  constexpr int64_t kStride = kStepEntries<Factor>;
  for (int64_t j = 0; j < num_rows; j += kTile)
    with_width(num_rows - j, [&](auto width) {
      for (int64_t i = 0; i < kGroup; i += kTile, tile += kTileSums)
        add_tile<decltype(width)::value>(a + i * kStride, b + j * kStride, ahead.next(), tile);
    });
  return tile;
}

template <class In>
bool is_zero(const In* row, int64_t count) {
  Vec<uint32_t> bits = {};
  for (int64_t k = 0; k < count; k += kLanes<float>) bits |= (Vec<uint32_t>)load<float>(row + k) << 1;
  for (int lane = 1; lane < kLanes<float>; ++lane) bits[0] |= bits[lane];
  return bits[0] == 0;
}

// Whether float32 could hold the products of a chunk's row with others that it could hold, to judge by its sum of
// squares. By Cauchy and Schwarz no sum exceeds the largest sum of squares, and what underflows is nothing beside rows
// that are not tiny: 2e-8 of their norms at most where all below 2^-126 is taken for zero, as in products of bfloat16.
// NaN and inf are left to float64.
template <class In>
bool in_range(double square, const In* row, int64_t count) {
  return square <= 0x1p100 && (square >= 0x1p-90 || is_zero(row, count));
}

// Where the sums lie: the tiles of each group with itself, one group after another and column by column with the tile
// on the diagonal first; then those of each two groups. Those of a strip close together, without tiles.
struct Layout {
  int64_t num_tasks;

  bool has_groups() const { return num_tasks > kGroup; }
  int64_t own_tiles() const { return num_tasks / kGroup * num_tiles(kGroup) + num_tiles(num_tasks % kGroup); }
  int64_t tiles() const {
    constexpr int64_t kSide = kGroup / kTile;
    const int64_t groups = num_tasks / kGroup, rest = (num_tasks % kGroup + kTile - 1) / kTile;
    return own_tiles() + groups * (groups - 1) / 2 * kSide * kSide + groups * kSide * rest;
  }
  // The tile of rows i <= j.
  int64_t tile(int64_t i, int64_t j) const {
    constexpr int64_t kSide = kGroup / kTile;
    const int64_t g = i / kGroup, h = j / kGroup, row = i % kGroup / kTile, column = j % kGroup / kTile;
    if (g == h) return g * num_tiles(kGroup) + column * (column + 1) / 2 + (row == column ? 0 : 1 + row);
    const int64_t columns = (std::min(kGroup, num_tasks - h * kGroup) + kTile - 1) / kTile;
    return own_tiles() + h * (h - 1) / 2 * kSide * kSide + (g * columns + column) * kSide + row;
  }
  // The sum of rows i <= j.
  int64_t sum(int64_t i, int64_t j) const {
    return is_strip(num_tasks) ? j * (j + 1) / 2 + i : tile(i, j) * kTileSums + j % kTile * kTile + i % kTile;
  }
};

// Entries that a strip adds up before their totals are float64: as many steps as kRoundings leaves.
template <class Acc, class In>
constexpr int64_t kStripChunk = (kRoundings - kLevels - kBurst * kLine<In> / kLanes<Acc>) * kBurst * kLine<In>;

// Adds the products of a chunk of kTile + C rows to `totals`. False: float32 cannot hold them, and nothing was added.
// So few sums stay in cache, and the memory hardly has to wait for them.
template <int C, class In, class Factor>
[[gnu::noinline]] bool add_strip_chunk(const void* const* rows, int64_t from, int64_t count, double* totals) {
  constexpr int R = kTile + C, kNumSums = R * (R + 1) / 2;
  Vec<Sum<Factor>> sums[kNumSums] = {};
  add_strip<C, In, Factor>(rows, from, count, sums);
  double chunk[padded(kNumSums)] = {};
  add_totals<Sum<Factor>, kNumSums>(sums, chunk);
  if constexpr (std::is_same_v<Sum<Factor>, float>)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      if (!in_range(chunk[Layout{R}.sum(r, r)], static_cast<const In*>(rows[r]) + from, count)) return false;
#pragma GCC unroll 16
  for (int64_t k = 0; k < kNumSums; k += kLanes<double>) add_to(totals + k, load<double>(chunk + k));
  return true;
}

// ---- one slot -----------------------------------------------------------------------------------------------------

// Writes the weighted sums of entries [from, stop) of parameter k (combine_kernel.h).
void combine(const Problem& problem, int64_t k, int64_t from, int64_t stop);

// Entries of a parameter that stay in cache from their products to their weighted sums.
inline int64_t span_entries(DType dtype, int64_t num_tasks) {
  constexpr int64_t kSpanBytes = 1 << 16;
  // Whole chunks, however many rows there are: a parameter may be cut there without another sum.
  constexpr int64_t kChunks = std::lcm(kChunk, kStripChunk<float, float>);
  return std::max<int64_t>(1, kSpanBytes / (num_tasks * element_size(dtype) * kChunks)) * kChunks;
}

// Rows of bfloat16 are multiplied as BFloat16Factor.
template <class BFloat16Factor = float>
struct Slot {
  const Problem& problem;
  int64_t num_tasks = problem.num_tasks;
  Layout layout{num_tasks};
  Buffer block = allocate(num_tasks * kStep * kVectorBytes);  // the rows of a step
  Buffer gathered = allocate((num_tasks + 1) * kGatheredStride * sizeof(double));  // then the roots of the metric
  Buffer chunk_totals = allocate(layout.own_tiles() * kTileSums * sizeof(double));  // of products in float32
  Buffer all_totals = allocate(layout.tiles() * kTileSums * sizeof(double));
  int64_t filled = 0;  // columns gathered

  explicit Slot(const Problem& problem) : problem(problem) {}

  double* totals() const { return static_cast<double*>(all_totals.get()); }

  // Most entries of a chunk. Where groups need each other's rows it is the step that is kept.
  template <class In, class Factor>
  int64_t chunk_entries() const {
    if (is_strip(num_tasks)) return kStripChunk<Sum<Factor>, In>;
    return layout.has_groups() ? kStepEntries<Factor> : kChunk;
  }

  // Adds the products of entries [from, from + count) of all rows, at most a chunk. False: float32 cannot hold them
  // and nothing was added.
  template <class In, class Factor>
  bool add_products(const void* const* rows, int64_t from, int64_t count) {
    if (!is_strip(num_tasks)) return add_tile_products<In, Factor>(rows, from, count);

    bool added = false;
    with_width(num_tasks - kTile, [&](auto width) {
      added = add_strip_chunk<decltype(width)::value, In, Factor>(rows, from, count, totals());
    });
    return added;
  }

  // As add_products, of rows that no strip holds.
  template <class In, class Factor>
  bool add_tile_products(const void* const* rows, int64_t from, int64_t count) {
    constexpr bool kChecks = std::is_same_v<Sum<Factor>, float>;
    constexpr int64_t kStride = kStepEntries<Factor>;
    double* const own = kChecks ? static_cast<double*>(chunk_totals.get()) : totals();
    Factor* const kept = reinterpret_cast<Factor*>(block.get());
    RowsAhead<In> ahead(rows, num_tasks, layout.tiles());
    for (int64_t k = from; k < from + count; k += kStride) {
      ahead.begin(k + kAheadBytes / sizeof(In));
      double* tile = own;
      for (int64_t g = 0; g < num_tasks; g += kGroup) {
        const int64_t num_rows = std::min(kGroup, num_tasks - g);
        constexpr auto columns = std::make_integer_sequence<int, kGroup / kTile>{};
        add_group(rows + g, num_rows, k, kept + g * kStride, ahead, tile, columns);
        tile += num_tiles(num_rows) * kTileSums;
      }
    }
    if constexpr (kChecks) {
      bool held = true;
      for (int64_t t = 0; t < num_tasks && held; ++t)
        held = in_range(own[layout.sum(t, t)], static_cast<const In*>(rows[t]) + from, count);
      take_chunk(held);
      if (!held) return false;
    }
    double* tile = totals() + layout.own_tiles() * kTileSums;
    for (int64_t h = kGroup; h < num_tasks; h += kGroup)
      for (int64_t g = 0; g < h; g += kGroup)
        tile = add_groups(kept + g * kStride, kept + h * kStride, std::min(kGroup, num_tasks - h), ahead, tile);
    return true;
  }

  // Clears the totals of the chunk, and adds them to those of all if they are any good.
  void take_chunk(bool held) {
    double* const chunk = static_cast<double*>(chunk_totals.get());
    const int64_t num_sums = layout.own_tiles() * kTileSums;
    for (int64_t k = 0; k < num_sums && held; k += kLanes<double>) add_to(totals() + k, load<double>(chunk + k));
    std::fill_n(chunk, num_sums, 0.0);
  }

  // Adds whole steps of a parameter whose rows are runs, straight from where they lie. Returns where they end.
  template <class In, class Factor = Sum<In>>
  int64_t add_runs(const Walk& walk, int64_t from, int64_t stop) {
    const void* const* const rows = walk.data.data();
    // Where a single tile does it all, float64 keeps up with the memory, and no row is needed again.
    if (num_tasks <= kTile) {
      stop -= (stop - from) % kGathered;
      for (int64_t count; from < stop; from += count) {
        count = std::min(kChunk, stop - from);
        add_alone<In>(rows, num_tasks, from, count, totals());
      }
      return from;
    }
    stop -= (stop - from) % (is_strip(num_tasks) ? kBurst * kLine<In> : kStepEntries<Factor>);
    for (int64_t count; from < stop; from += count) {
      count = std::min(chunk_entries<In, Factor>(), stop - from);
      if (!add_products<In, Factor>(rows, from, count)) gather(walk, from, count);
    }
    return from;
  }

  int64_t add_runs(const Walk& walk, int64_t from, int64_t stop) {
    switch (walk.dtype) {
      case DType::float32: return add_runs<float>(walk, from, stop);
      case DType::float64: return add_runs<double>(walk, from, stop);
      case DType::float16: return add_runs<Float16>(walk, from, stop);
      case DType::bfloat16: return add_runs<BFloat16, BFloat16Factor>(walk, from, stop);
    }
    return from;
  }

  // Converts entries of any parameter to float64, to be added with others when there are enough.
  void gather(const Walk& walk, int64_t from, int64_t count) {
    for (int64_t part; count > 0; from += part, count -= part) {
      part = std::min(kGathered - filled, count);
      convert_piece(walk, from, part);
      filled += part;
      if (filled == kGathered) add_gathered();
    }
  }

  // Converts a piece of any parameter to column `filled`.
  void convert_piece(const Walk& walk, int64_t from, int64_t count) {
    double* const root = gathered_row(num_tasks) + filled;
    if (problem.has_metric) {
      convert_row(walk, num_tasks, walk.metric_dtype, from, count, root);
      for (int64_t c = 0; c < count; ++c) root[c] = __builtin_sqrt(root[c]);
    }
    for (int64_t t = 0; t < num_tasks; ++t) {
      double* const row = gathered_row(t) + filled;
      convert_row(walk, t, walk.dtype, from, count, row);
      if (problem.has_metric)
        for (int64_t c = 0; c < count; ++c) row[c] *= root[c];
    }
  }

  double* gathered_row(int64_t t) const { return reinterpret_cast<double*>(gathered.get()) + t * kGatheredStride; }

  void add_gathered() {
    constexpr int64_t kMultiple = std::lcm(kBurst * kLine<double>, kStepEntries<double>);  // any whole step
    const int64_t count = (filled + kMultiple - 1) / kMultiple * kMultiple;
    std::vector<const void*> rows(num_tasks);
    for (int64_t t = 0; t < num_tasks; ++t) {
      std::fill(gathered_row(t) + filled, gathered_row(t) + count, 0.0);
      rows[t] = gathered_row(t);
    }
    filled = 0;
    if (num_tasks <= kTile) return add_alone<double>(rows.data(), num_tasks, 0, count, totals());
    for (int64_t k = 0; k < count; k += chunk_entries<double, double>())
      add_products<double, double>(rows.data(), k, std::min(chunk_entries<double, double>(), count - k));
  }

  // Adds entries [begin, end) of the concatenated parameters, and combines them.
  void add(int64_t begin, int64_t end) {
    for (int64_t k = problem.parameter_at(begin); begin < end; ++k) {
      const Walk& walk = problem.walks[k];
      const int64_t stop = std::min(walk.numel, end - problem.starts[k]);
      const int64_t span = problem.weights == nullptr ? stop : span_entries(walk.dtype, num_tasks);
      for (int64_t next, from = begin - problem.starts[k]; from < stop; from = next) {
        next = std::min(stop, from + span);
        const int64_t rest = problem.is_run[k] ? add_runs(walk, from, next) : from;
        gather(walk, rest, next - rest);
        if (problem.weights != nullptr) combine(problem, k, from, next);
      }
      begin = problem.starts[k] + stop;
    }
  }

  // Writes the sums of all pairs (i, j), i <= j, row by row.
  void finish(double* out) {
    if (filled > 0) add_gathered();
    for (int64_t i = 0; i < num_tasks; ++i)
      for (int64_t j = i; j < num_tasks; ++j) *out++ = totals()[layout.sum(i, j)];
  }
};

// Sums of the products of all pairs over entries [begin, end) of the concatenated parameters, into `out`
// [num_tasks * (num_tasks + 1) / 2].
template <class BFloat16Factor = float>
void gram_slot(const Problem& problem, int64_t begin, int64_t end, double* out) {
  Slot<BFloat16Factor> slot(problem);
  slot.add(begin, end);
  slot.finish(out);
}
