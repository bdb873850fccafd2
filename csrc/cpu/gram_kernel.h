// The CPU kernel: included once per instruction set, inside a namespace that defines kVectorBytes, kTile (rows on each
// side of a tile whose sums fit in registers), `widen` (16 to 32 and 32 to 64 bits), `half` of a vector and `totals` of
// as many vectors as one has entries.
//
// The products of all pairs of rows are added tile by tile, a few vectors of each row at a time, in one of two types:
//
// - float32, where many tasks have contiguous runs of float32, bfloat16 or float16. It does twice as many products
//   at a time, but rounds: the terms of a step are added in registers, the sums of several steps in memory, and these
//   are folded into float64 before a term has passed through more than kRoundings additions. That bounds the error of
//   any sum by 1e-6 of the norms, and of constants by 3e-7. Rows of bfloat16 are multiplied as they are where the
//   processor can do so: two terms a lane at a time, added and rounded one after the other.
// - float64 for all else: float64 itself, few tasks, a metric, what is strided, missing or shorter than a step, and
//   any chunk whose products leave the range of float32. Products of the narrower types are exact in it and in range.
//
// Every pair (i, j) sees the same operations in the same order wherever its tile lies, and the type depends on the set
// of rows alone: permuting tasks permutes the result exactly.

// Terms that a tile adds to each lane of its sums at a time, at most.
constexpr int kStep = 8;
// Additions that a term may pass through between two folds, those of its step and one for each step; each loses 2^-24.
constexpr int kRoundings = 16;
// Lines of a row that are read one after another where the memory is the limit: it gives neighbours faster than one
// line of each row in turn.
constexpr int kBurst = 4;
// Most rows for which the memory is the limit, not the arithmetic.
constexpr int64_t kFewRows = 16;
// Rows whose tiles stay in cache over a chunk, a group.
constexpr int64_t kGroup = 16 * kTile;

template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);
// Of bfloat16, its bits.
template <class T>
using Vec = Vector<std::conditional_t<std::is_same_v<T, BFloat16>, uint16_t, T>, kLanes<T>>;

// Entries of a line of the cache.
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

// Entries of each row that a tile multiplies before it is the next one's turn, a step. Of few rows it is short, so that
// the memory is asked often.
template <class In, class Factor, bool kFew>
constexpr int64_t kStepEntries =
    kFew ? std::min(kBurst * kLine<In>, kStep * kLanes<Sum<Factor>>) : kStep * kLanes<Sum<Factor>>;

// Most entries between two folds, a chunk, of steps of so many.
template <class Acc>
constexpr int64_t chunk_entries(int64_t step) {
  return (kRoundings - step / kLanes<Acc>) * step;
}

// Entries that are gathered in float64 before they are multiplied, and the distance of two rows of them: a line more,
// so that they do not meet in the same cache sets.
constexpr int64_t kGathered = 128, kGatheredStride = kGathered + kLine<double>;

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

// Sums of the products of a tile's rows r and columns c; on the diagonal, of r <= c.
template <class Acc>
struct Tile {
  Vec<Acc> sum[kTile][kTile];
};

template <bool kDiagonal, int R, int C, class Acc>
void add_to_tile(const Vec<Acc> (*sum)[C], Tile<Acc>& tile) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = kDiagonal ? r : 0; c < C; ++c) tile.sum[r][c] += sum[r][c];
}

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
                                                     const Keep& keep, const Ahead<In, N>& ahead,
                                                     Tile<Sum<Factor>>& tile) {
  const In* in[R];
  Vec<Sum<Factor>> sum[R][R] = {};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) in[r] = static_cast<const In*>(rows[J + r]) + from;
#pragma GCC unroll 4
  for (int64_t line = 0; line < count; line += kLine<In>) {
    ahead.ask(line);
#pragma GCC unroll 2
    for (int64_t k = line; k < line + kLine<In>; k += kLanes<Factor>) {
      Vec<Factor> x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        x[r] = load<Factor>(in[r] + k);
        keep(r, k, x[r]);
#pragma GCC unroll 8
        for (int c = 0; c <= r; ++c) add_product(sum[c][r], x[c], x[r]);
      }
    }
  }
  add_to_tile<true, R, R>(sum, tile);
}

// As add_diagonal_tile, of a step, and keeps the rows in `block` for other tiles.
template <int J, int R, bool kFew, class In, class Factor, int N>
[[gnu::noinline]] void add_and_keep(const void* const* rows, int64_t from, Factor* block, const Ahead<In, N>& ahead,
                                    Tile<Sum<Factor>>& tile) {
  constexpr int64_t kStride = kStepEntries<In, Factor, kFew>;
  const auto keep = [&](int r, int64_t k, const Vec<Factor>& x) { store(block + (J + r) * kStride + k, x); };
  add_diagonal_tile<J, R, Factor>(rows, from, kStride, keep, ahead, tile);
}

// Adds the products of kTile kept rows at `a` with C kept rows at `b`.
template <int C, bool kFew, class In, class Factor, int N>
[[gnu::noinline]] void add_tile(const Factor* a, const Factor* b, const Ahead<In, N>& ahead,
                                Tile<Sum<Factor>>& tile) {
  constexpr int64_t kStride = kStepEntries<In, Factor, kFew>;
  Vec<Sum<Factor>> sum[kTile][C] = {};
#pragma GCC unroll 1
  for (int64_t k = 0; k < kStride; k += kLanes<Factor>) {
    if (k % kLine<In> == 0) ahead.ask(k);
    Vec<Factor> x[kTile];
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) x[r] = load<Factor>(a + r * kStride + k);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec<Factor> y = load<Factor>(b + c * kStride + k);
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) add_product(sum[r][c], x[r], y);
    }
  }
  add_to_tile<false, kTile, C>(sum, tile);
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

// Calls `function(j, C)` for the rows [j, j + C) of each tile on the diagonal.
template <class Function>
void for_each_width(int64_t num_rows, const Function& function) {
  for (int64_t j = 0; j < num_rows; j += kTile) with_width(num_rows - j, [&](auto width) { function(j, width); });
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
void add_alone(const void* const* rows, int64_t num_rows, int64_t from, int64_t count, Tile<double>& tile) {
  with_width(num_rows, [&](auto width) {
    constexpr int C = decltype(width)::value;
    const auto drop = [](int, int64_t, const Vec<double>&) {};
    const auto ahead = ahead_of<C, In>(rows, from + kPrefetchBytes<In> / sizeof(In));
    add_diagonal_tile<0, C, double>(rows, from, count, drop, ahead, tile);
  });
}

// The rows of a group's next step, shared among its tiles: one or two for each, until all are asked for.
template <class In>
struct NextRows {
  const void* const* rows;
  int64_t num_rows, from, share = num_rows > num_tiles(num_rows) ? 2 : 1, asked = 0;

  const In* row(int64_t r) const { return static_cast<const In*>(rows[std::min(r, num_rows - 1)]) + from; }

  Ahead<In, 2> operator()() {
    asked += share;
    return {row(asked - share), row(asked - 1)};
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
// rows in `block`. Few rows are asked for by the tile that reads them, three steps ahead; many by all tiles in turn.
// Every J has code of its own: the processor foresees what a load will read by where the load stands in the program.
template <bool kFew, int J, int C, class In, class Factor>
void add_column(const void* const* rows, int64_t from, Factor* block, NextRows<In>& next, Tile<Sum<Factor>>* tile) {
  constexpr int64_t kStride = kStepEntries<In, Factor, kFew>;
  const auto add = [&](const auto& ahead_of_diagonal, const auto& ahead_of_other) {
    add_and_keep<J, C, kFew>(rows, from, block, ahead_of_diagonal(), *tile++);
    for (int64_t i = 0; i < J; i += kTile)
      add_tile<C, kFew>(block + i * kStride, block + J * kStride, ahead_of_other(), *tile++);
  };
  if constexpr (kFew)
    add([&] { return ahead_of<C, In>(rows + J, from + 3 * kStride); }, [] { return Ahead<In, 0>{}; });
  else
    add([&] { return next(); }, [&] { return next(); });
}

// Adds the products of a step of a group's rows to its tiles, and keeps the rows in `block`.
template <bool kFew, class In, class Factor, int... kColumns>
void add_group(const void* const* rows, int64_t num_rows, int64_t from, Factor* block, Tile<Sum<Factor>>* tiles,
               std::integer_sequence<int, kColumns...>) {
  NextRows<In> next{rows, num_rows, from + kStepEntries<In, Factor, kFew>};
  const auto add = [&](auto column) {
    constexpr int J = decltype(column)::value * kTile;
    if (J >= num_rows) return false;
    with_width(num_rows - J, [&](auto width) {
      add_column<kFew, J, decltype(width)::value>(rows, from, block, next, tiles + num_tiles(J));
    });
    return true;
  };
  (void)(add(std::integral_constant<int, kColumns>{}) && ...);
}

// Adds the products of a step of the rows at `a`, a whole group, with those of another group at `b`. Returns the end
// of the tiles.
template <class In, class Factor>
Tile<Sum<Factor>>* add_groups(const Factor* a, const Factor* b, int64_t num_rows, Tile<Sum<Factor>>* tile) {
  constexpr int64_t kStride = kStepEntries<In, Factor, false>;
  for_each_width(num_rows, [&](int64_t j, auto width) {
    for (int64_t i = 0; i < kGroup; i += kTile)
      add_tile<decltype(width)::value, false>(a + i * kStride, b + j * kStride, Ahead<In, 0>{}, *tile++);
  });
  return tile;
}

// The totals of as many vectors of sums in float32 as one of float64 has entries, and clears them. Two lanes of float32
// are added before they become one of float64: exactly, where they are alike.
inline Vec<double> take_totals(Vec<float>* sums) {
  Vec<double> x[kLanes<double>];
#pragma GCC unroll 8
  for (int k = 0; k < kLanes<double>; ++k) {
    x[k] = widen(half<0>(sums[k]) + half<1>(sums[k]));
    sums[k] = Vec<float>{};
  }
  return totals(x);
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

constexpr int64_t kTileSums = kTile * kTile;

// So many sums, rounded up to what take_totals takes at once.
constexpr int64_t padded(int64_t num_sums) {
  return (num_sums + kLanes<double> - 1) / kLanes<double> * kLanes<double>;
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
    return is_strip(num_tasks) ? j * (j + 1) / 2 + i : tile(i, j) * kTileSums + i % kTile * kTile + j % kTile;
  }
};

// Adds the products of a chunk of kTile + C rows to the totals of all chunks. False: float32 cannot hold them, and
// nothing was added. So few totals stay in registers, and the memory hardly has to wait for them.
template <int C, class In, class Factor>
[[gnu::noinline]] bool add_strip_chunk(const void* const* rows, int64_t from, int64_t count, Vec<float>* sums,
                                       double* totals) {
  constexpr int R = kTile + C, kVectors = padded(R * (R + 1) / 2) / kLanes<double>;
  add_strip<C, In, Factor>(rows, from, count, sums);
  Vec<double> chunk[kVectors];
#pragma GCC unroll 16
  for (int k = 0; k < kVectors; ++k) chunk[k] = take_totals(sums + k * kLanes<double>);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int64_t k = Layout{R}.sum(r, r);
    const double square = chunk[k / kLanes<double>][k % kLanes<double>];
    if (!in_range(square, static_cast<const In*>(rows[r]) + from, count)) return false;
  }
#pragma GCC unroll 16
  for (int k = 0; k < kVectors; ++k) add_to(totals + k * kLanes<double>, chunk[k]);
  return true;
}

// ---- one slot -----------------------------------------------------------------------------------------------------

// Writes the weighted sums of entries [from, stop) of parameter k (combine_kernel.h).
void combine(const Problem& problem, int64_t k, int64_t from, int64_t stop);

// Entries of a parameter that stay in cache from their products to their weighted sums.
inline int64_t span_entries(DType dtype, int64_t num_tasks) {
  constexpr int64_t kSpanBytes = 1 << 16;
  // Whole chunks, of the short steps of few rows as well: a parameter may be cut there without another sum.
  const int64_t chunks = (num_tasks <= kFewRows ? 3 : 1) * chunk_entries<float>(kStep * kLanes<float>);
  return std::max<int64_t>(1, kSpanBytes / (num_tasks * element_size(dtype) * chunks)) * chunks;
}

// Rows of bfloat16 are multiplied as BFloat16Factor.
template <class BFloat16Factor = float>
struct Slot {
  const Problem& problem;
  int64_t num_tasks = problem.num_tasks;
  Layout layout{num_tasks};
  int64_t kept_steps = layout.has_groups() ? kRoundings - kStep : 1;  // rows are kept over a chunk where several groups need them
  Buffer block = allocate(num_tasks * kept_steps * kStep * kVectorBytes);
  Buffer gathered = allocate((num_tasks + 1) * kGatheredStride * sizeof(double));  // then the roots of the metric
  // Of the chunk: sums in float32, enough for the tiles of any two groups, too; then their totals.
  Buffer chunk_sums = allocate(padded(layout.own_tiles() * kTileSums) * sizeof(Vec<float>));
  Buffer chunk_totals = allocate(padded(layout.own_tiles() * kTileSums) * sizeof(double));
  // Of all chunks in float32, and of all that is added in float64, once there is any.
  Buffer all_totals = allocate(layout.tiles() * kTileSums * sizeof(double));
  Buffer all_sums;
  int64_t filled = 0;  // columns gathered

  explicit Slot(const Problem& problem) : problem(problem) {}

  bool has_few_rows() const { return num_tasks <= kFewRows; }
  double* totals() const { return static_cast<double*>(all_totals.get()); }
  Tile<double>* sum_tiles() {
    if (all_sums == nullptr) all_sums = allocate(layout.tiles() * sizeof(Tile<double>));
    return static_cast<Tile<double>*>(all_sums.get());
  }

  // Takes the totals of the chunk's tiles, the first so many.
  const double* take_chunk(int64_t num_tiles) {
    Vec<float>* const sums = static_cast<Vec<float>*>(chunk_sums.get());
    double* const to = static_cast<double*>(chunk_totals.get());
    for (int64_t k = 0; k < num_tiles * kTileSums; k += kLanes<double>) store(to + k, take_totals(sums + k));
    return to;
  }

  static void add_totals(const double* __restrict from, int64_t num_tiles, double* __restrict to) {
    for (int64_t k = 0; k < num_tiles * kTileSums; ++k) to[k] += from[k];
  }

  // As add_products, of rows that a strip holds.
  template <int C, class In, class Factor>
  bool add_strip_products(const void* const* rows, int64_t from, int64_t count) {
    if constexpr (std::is_same_v<Sum<Factor>, float>)
      return add_strip_chunk<C, In, Factor>(rows, from, count, static_cast<Vec<float>*>(chunk_sums.get()), totals());
    add_strip<C, In, double>(rows, from, count, &sum_tiles()->sum[0][0]);
    return true;
  }

  // Adds the products of entries [from, from + count) of all rows, at most a chunk. False: float32 cannot hold them
  // and nothing was added.
  template <class In, class Factor>
  bool add_products(const void* const* rows, int64_t from, int64_t count) {
    if (!is_strip(num_tasks))
      return has_few_rows() ? add_tile_products<true, In, Factor>(rows, from, count)
                            : add_tile_products<false, In, Factor>(rows, from, count);

    bool added = false;
    with_width(num_tasks - kTile, [&](auto width) {
      added = add_strip_products<decltype(width)::value, In, Factor>(rows, from, count);
    });
    return added;
  }

  // As add_products, of rows that no strip holds.
  template <bool kFew, class In, class Factor>
  bool add_tile_products(const void* const* rows, int64_t from, int64_t count) {
    using Acc = Sum<Factor>;
    constexpr bool kFolds = std::is_same_v<Acc, float>;
    constexpr int64_t kStride = kStepEntries<In, Factor, kFew>;
    Tile<Acc>* const tiles = static_cast<Tile<Acc>*>(kFolds ? chunk_sums.get() : sum_tiles());
    // Where the rows from g on lie, of the step at k.
    const auto kept = [&](int64_t g, int64_t k) {
      return reinterpret_cast<Factor*>(block.get()) + (layout.has_groups() ? num_tasks * k : 0) + g * kStride;
    };

    Tile<Acc>* tile = tiles;
    for (int64_t g = 0; g < num_tasks; g += kGroup) {
      const int64_t num_rows = std::min(kGroup, num_tasks - g);
      constexpr auto columns = std::make_integer_sequence<int, ((kFew ? kFewRows : kGroup) + kTile - 1) / kTile>{};
      for (int64_t k = 0; k < count; k += kStride)
        add_group<kFew, In>(rows + g, num_rows, from + k, kept(g, k), tile, columns);
      tile += num_tiles(num_rows);
    }
    if constexpr (kFolds) {
      const double* const chunk = take_chunk(layout.own_tiles());
      for (int64_t t = 0; t < num_tasks; ++t)
        if (!in_range(chunk[layout.sum(t, t)], static_cast<const In*>(rows[t]) + from, count)) return false;
      add_totals(chunk, layout.own_tiles(), totals());
    }

    int64_t first = layout.own_tiles();
    for (int64_t h = kGroup; h < num_tasks; h += kGroup)
      for (int64_t g = 0; g < h; g += kGroup) {
        Tile<Acc>* const begin = kFolds ? tiles : tiles + first;
        Tile<Acc>* end = begin;
        for (int64_t k = 0; k < count; k += kStride)
          end = add_groups<In>(kept(g, k), kept(h, k), std::min(kGroup, num_tasks - h), begin);
        if constexpr (kFolds) add_totals(take_chunk(end - begin), end - begin, totals() + first * kTileSums);
        first += end - begin;
      }
    return true;
  }

  // Adds whole steps of a parameter whose rows are runs, straight from where they lie. Returns where they end.
  template <class In, class Factor = Sum<In>>
  int64_t add_runs(const Walk& walk, int64_t from, int64_t stop) {
    const void* const* const rows = walk.data.data();
    // Where a single tile does it all, float64 keeps up with the memory, and no row is needed again.
    if (num_tasks <= kTile) {
      stop -= (stop - from) % kGathered;
      for (int64_t count; from < stop; from += count) {
        count = std::min(chunk_entries<double>(kStep * kLanes<double>), stop - from);
        add_alone<In>(rows, num_tasks, from, count, *sum_tiles());
      }
      return from;
    }
    const int64_t step = has_few_rows() ? kStepEntries<In, Factor, true> : kStepEntries<In, Factor, false>;
    stop -= (stop - from) % step;
    for (int64_t count; from < stop; from += count) {
      count = std::min(chunk_entries<Sum<Factor>>(step), stop - from);
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
    constexpr int64_t kMultiple = std::max(kBurst * kLine<double>, kStep * kLanes<double>);  // any whole step
    const int64_t count = (filled + kMultiple - 1) / kMultiple * kMultiple;
    std::vector<const void*> rows(num_tasks);
    for (int64_t t = 0; t < num_tasks; ++t) {
      std::fill(gathered_row(t) + filled, gathered_row(t) + count, 0.0);
      rows[t] = gathered_row(t);
    }
    filled = 0;
    if (num_tasks <= kTile) return add_alone<double>(rows.data(), num_tasks, 0, count, *sum_tiles());
    add_products<double, double>(rows.data(), 0, count);
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
    const Vec<double>* const sums = static_cast<Vec<double>*>(all_sums.get());
    for (int64_t i = 0; i < num_tasks; ++i)
      for (int64_t j = i; j < num_tasks; ++j, ++out) {
        const int64_t k = layout.sum(i, j);
        *out = totals()[k];
        for (int lane = 0; sums != nullptr && lane < kLanes<double>; ++lane) *out += sums[k][lane];
      }
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
