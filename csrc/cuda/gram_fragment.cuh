// The fragment kernels: for more tasks. Tensor cores make the products of a tile of pairs; their operands come straight
// from memory into registers. Two facts make that short:
//
// - in X Xᵀ the columns of the right operand are rows of X, and a warp holds both operands of mma.m16n8k16 alike: what
//   a lane has of row r serves on the left and on the right;
// - the sum runs over columns in any order, so each lane may read 16 contiguous bytes of its rows and call them
//   whatever columns the instruction wants.
//
// Tensor cores cut off bits when they add, always towards zero, which would bias the norms: so a sum within them takes
// one step, or two of which the first is small. It is then added, rounding to nearest, to a float32 sum of few terms,
// and that to float64 in shared memory.
//
// A float32 entry is the sum of three bfloat16 (8 + 8 + 8 bits): x = big + middle + small. Of the nine products, the
// three that are left out (middle * small twice, small * small) are together below 6e-8 of x * x, and zero on average.
// (Two TF32 halves, without the product of the smaller ones, would take a few instructions less but lose up to 5e-7.)
//
// Where gradients are combined as well, a warp does that right after the products of its columns.
#pragma once

#include "combine.cuh"

namespace gradstats::cuda {

constexpr int kGroups = 8;     // of columns that a warp takes for a chunk; of each, a lane has a vector of its rows
constexpr int kSideRows = 32;  // tasks on each side of the pairs that a warp takes, where there are more than that
constexpr int kFragmentWarps = 4, kPairWarps = 6;
constexpr int kInAdvance = 4;  // groups by which pairs of sides ask for their columns, having no registers for them yet

// Blocks on a multiprocessor, which is to say registers: enough loads in flight, nothing in local memory.
template <int kRowGroups>
constexpr int kFragmentBlocks = kRowGroups == 2 ? 5 : 3;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kPairBlocks = 1;  // here the compiler needs a few registers more
#else
constexpr int kPairBlocks = 2;
#endif

template <class In>
constexpr int kGroupColumns = 4 * kWidth<In>;
template <class In>
constexpr int kWarpColumns = kGroups * kGroupColumns<In>;

// A vector of a row as operands of mma. `add_products` adds to `sum` the products of 16 rows (a lane has one in `upper`
// and another in `lower`) with 8 rows, `right`, over a group of columns.
template <class In>
struct Operands {  // bfloat16 and float16: the words as they are
  Words v;

  __device__ void set(const Words& words) { v = words; }

  __device__ static void add_products(float (&sum)[4], const Operands& upper, const Operands& lower,
                                      const Operands& right) {
    float d[2][4] = {};
    ptx::mma<In>(d[0], upper.v.w[0], lower.v.w[0], upper.v.w[1], lower.v.w[1], right.v.w[0], right.v.w[1]);
    ptx::mma<In>(d[1], upper.v.w[2], lower.v.w[2], upper.v.w[3], lower.v.w[3], right.v.w[2], right.v.w[3]);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] += d[0][c] + d[1][c];
  }
};

template <>
struct Operands<float> {
  uint32_t big[2], middle[2], small[2];

  __device__ void set(const Words& words) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float x0 = bits_to_float(words.w[2 * k]), x1 = bits_to_float(words.w[2 * k + 1]);
      big[k] = take(x0, x1);
      middle[k] = take(x0, x1);
      small[k] = take(x0, x1);
    }
  }

  // Rounds both to bfloat16 and leaves what is left of them, exactly.
  __device__ static uint32_t take(float& x0, float& x1) {
    const uint32_t pair = ptx::pack_bfloat16(x0, x1);
    x0 -= bits_to_float(pair << 16);
    x1 -= bits_to_float(pair & 0xffff0000u);
    return pair;
  }

  __device__ static void mma(float (&d)[4], const uint32_t (&upper)[2], const uint32_t (&lower)[2],
                             const uint32_t (&right)[2]) {
    ptx::mma<BFloat16>(d, upper[0], lower[0], upper[1], lower[1], right[0], right[1]);
  }

  __device__ static void add_products(float (&sum)[4], const Operands& upper, const Operands& lower,
                                      const Operands& right) {
    float large[4] = {}, left_big[4] = {}, right_big[4] = {};
    mma(large, upper.middle, lower.middle, right.middle);  // the smaller first
    mma(large, upper.big, lower.big, right.big);
    mma(left_big, upper.big, lower.big, right.small);
    mma(left_big, upper.big, lower.big, right.middle);
    mma(right_big, upper.small, lower.small, right.big);
    mma(right_big, upper.middle, lower.middle, right.big);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] += large[c] + (left_big[c] + right_big[c]);  // the same with sides exchanged
  }
};

// The largest magnitude of the entries that it is shown.
template <class In>
struct Magnitude {
  uint32_t largest = 0;  // bits of a float, or of two bfloat16

  __device__ void show(const Words& v) {
    if constexpr (kWideRange<In>)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (std::is_same_v<In, float>)
          largest = max(largest, v.w[w] & 0x7fffffffu);
        else
          largest = ptx::max_bfloat16(largest, v.w[w] & 0x7fff7fffu);
      }
  }

  // Whether products of such entries leave the range of float32.
  __device__ bool out_of_range() const {
    if constexpr (!kWideRange<In>) return false;
    float x = bits_to_float(largest);
    if constexpr (std::is_same_v<In, BFloat16>)
      x = fmaxf(bits_to_float(largest << 16), bits_to_float(largest & 0xffff0000u));
    return x != 0.0f && !(x >= 0x1p-50f && x <= 0x1p50f);
  }
};

// 8 * kRowGroups rows as this lane sees them: of each group of 8 rows it reads one, together with 3 other lanes.
template <class In, int kRowGroups>
struct Side {
  int first_task;
  const In* rows[kRowGroups];
  Magnitude<In> magnitude[kRowGroups];

  template <class Table>
  __device__ void enter(const Table& table, int segment) {
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g)
      rows[g] = row_of<In>(table, segment, first_task + 8 * g + threadIdx.x % 32 / 4);
  }

  __device__ void start() {
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g) magnitude[g] = {};
  }

  __device__ void load(Words (&words)[kRowGroups], int64_t at, int64_t numel, bool aligned, bool whole) const {
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g) words[g] = load_vector(rows[g], at, aligned ? numel : 0);
    if (whole) return;
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g)
      if (!aligned || at + kWidth<In> > numel) words[g] = load_entries(rows[g], at, numel);
    __syncwarp();  // mma wants all lanes together
  }

  // Asks for what the lane will read at entry `at`.
  __device__ void prefetch(int64_t at, int64_t numel) const {
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g)
      if (rows[g] != nullptr && at < numel) ptx::prefetch(rows[g] + at);
  }

  __device__ void convert(Operands<In> (&operands)[kRowGroups], const Words (&words)[kRowGroups]) {
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g) {
      operands[g].set(words[g]);
      magnitude[g].show(words[g]);
    }
  }

  // One bit for each row, the same in all lanes.
  __device__ uint32_t out_of_range() const {
    uint32_t out = 0;
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g)
      out |= uint32_t{magnitude[g].out_of_range()} << (8 * g + threadIdx.x % 32 / 4);
    return __reduce_or_sync(~0u, out);
  }
};

// What a warp makes: the products of the rows of one side with those of the other, or (kSelf) with themselves, without
// the tiles below the diagonal. A tile has 16 x 8 pairs, of which a lane holds 4.
template <class In, int kRowGroups, bool kSelf>
struct WarpProducts {
  // Groups of columns that are on their way from memory while one is multiplied: as many as there are registers for.
  static constexpr int kAhead = kSelf ? 4 / kRowGroups : 0, kBuffers = kAhead > 0 ? kAhead : 1;
  static constexpr int kTiles = kSelf ? kRowGroups / 2 * (kRowGroups / 2 + 1) : kRowGroups / 2 * kRowGroups;

  Side<In, kRowGroups> left, right;

  // The tiles of row m of tiles start at column first_tile(m).
  GRADSTATS_HOST_DEVICE static constexpr int first_tile(int m) { return kSelf ? 2 * m : 0; }
  GRADSTATS_HOST_DEVICE static constexpr int tile_index(int m, int n) {
    return kSelf ? m * (kRowGroups - m - 1) + n : m * kRowGroups + n;
  }

  // The rows whose product is value c of tile (m, n) in this lane.
  __device__ static int left_row(int m, int c) { return 16 * m + 8 * (c / 2) + threadIdx.x % 32 / 4; }
  __device__ static int right_row(int n, int c) { return 8 * n + threadIdx.x % 4 * 2 + c % 2; }

  template <class Table>
  __device__ void enter(const Table& table, int segment) {
    left.enter(table, segment);
    if (!kSelf) right.enter(table, segment);
  }

  // Adds the products over columns [begin, begin + kWarpColumns) of a segment to `sums` [4 * kTiles][lane].
  template <class Table>
  __device__ void add(const Table& table, int segment, int64_t begin, double (*sums)[32]) {
    const int64_t numel = table.numel[segment];
    const bool whole = is_whole<In>(table, segment, begin + kWarpColumns<In>);
    const bool aligned = table.aligned[segment];
    float tiles[kTiles][4] = {};
    left.start();
    right.start();
    const auto place = [begin](int group) {
      return begin + group * kGroupColumns<In> + threadIdx.x % 4 * kWidth<In>;
    };
    Words buffers[kBuffers][kRowGroups], right_words[kRowGroups];
#pragma unroll
    for (int group = 0; group < kAhead; ++group) left.load(buffers[group], place(group), numel, aligned, whole);
#pragma unroll kBuffers
    for (int group = 0; group < kGroups; ++group) {
      Words(&left_words)[kRowGroups] = buffers[group % kBuffers];
      if (kAhead == 0) left.load(left_words, place(group), numel, aligned, whole);
      if (!kSelf) right.load(right_words, place(group), numel, aligned, whole);
      // Of the pairs that a side is in, the one with itself asks for its rows.
      if (!kSelf && left.first_task == right.first_task) left.prefetch(place(group + kInAdvance), numel);
      Operands<In> a[kRowGroups], b[kRowGroups];
      left.convert(a, left_words);
      if (!kSelf) right.convert(b, right_words);
      if (kAhead > 0 && group + kAhead < kGroups) left.load(left_words, place(group + kAhead), numel, aligned, whole);
#pragma unroll
      for (int m = 0; m < kRowGroups / 2; ++m)
#pragma unroll
        for (int n = first_tile(m); n < kRowGroups; ++n) {
          if (!kSelf && n < 2 * m && left.first_task == right.first_task) continue;  // below the diagonal after all
          Operands<In>::add_products(tiles[tile_index(m, n)], a[2 * m], a[2 * m + 1], kSelf ? a[n] : b[n]);
        }
    }

    const uint32_t left_out = left.out_of_range(), right_out = kSelf ? left_out : right.out_of_range();
    const auto out_of_range = [&](int m, int n, int c) {
      return (left_out >> left_row(m, c) | right_out >> right_row(n, c)) & 1;
    };
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kRowGroups / 2; ++m)
#pragma unroll
      for (int n = first_tile(m); n < kRowGroups; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (!out_of_range(m, n, c)) sums[4 * tile_index(m, n) + c][lane] += tiles[tile_index(m, n)][c];
    if ((left_out | right_out) == 0) return;
#pragma unroll 1
    for (int m = 0; m < kRowGroups / 2; ++m)
#pragma unroll 1
      for (int n = first_tile(m); n < kRowGroups; ++n)
#pragma unroll 1
        for (int c = 0; c < 4; ++c)
          if (out_of_range(m, n, c))
            sums[4 * tile_index(m, n) + c][lane] +=
                exact_product(table, segment, begin, left_row(m, c), right_row(n, c));
    __syncwarp();
  }

  // In float64, entry by entry: slow, and rarely needed.
  template <class Table>
  __device__ double exact_product(const Table& table, int segment, int64_t begin, int left_row, int right_row) const {
    const In* x = row_of<In>(table, segment, left.first_task + left_row);
    const In* y = row_of<In>(table, segment, (kSelf ? left : right).first_task + right_row);
    const int64_t numel = table.numel[segment], end = begin + kWarpColumns<In>;
    double sum = 0.0;
    for (int64_t at = begin; at < end && at < numel; ++at)
      sum = fma(x != nullptr ? to_double(x[at]) : 0.0, y != nullptr ? to_double(y[at]) : 0.0, sum);
    return sum;
  }

  // Calls write(value, i, j) for the values of this lane that are those of tasks i <= j.
  template <class Write>
  __device__ void for_each_pair(int num_tasks, Write write) const {
    for (int m = 0; m < kRowGroups / 2; ++m)
      for (int n = first_tile(m); n < kRowGroups; ++n)
        for (int c = 0; c < 4; ++c) {
          const int i = left.first_task + left_row(m, c), j = (kSelf ? left : right).first_task + right_row(n, c);
          if (i <= j && j < num_tasks) write(4 * tile_index(m, n) + c, i, j);
        }
  }
};

// Writes the weighted sums of the columns that this warp has just read: a cache has them still.
template <class In, class Table>
__device__ void combine_columns(const Table& table, int segment, int64_t begin) {
  static_assert(kWarpColumns<In> == 32 * kWidth<In>);
  combine_entries<In, 32>(table, segment, begin, threadIdx.x % 32);
  __syncwarp();  // mma wants all lanes together
}

// Block y is slot y of at most 8 * kRowGroups tasks; its warps take columns in turn.
template <class In, int kRowGroups, Beside kBeside, class Table>
__global__ void __launch_bounds__(32 * kFragmentWarps, kFragmentBlocks<kRowGroups>)
    fragment_kernel(const __grid_constant__ Table table, double* partial) {
  WarpProducts<In, kRowGroups, true> products{};
  __shared__ double sums[kFragmentWarps][4 * products.kTiles][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (auto& values : sums[warp]) values[lane] = 0.0;

  Chunk chunk = first_chunk_of(table, blockIdx.y);
  for (bool entering = true; chunk.index < chunk.end; entering = advance(table, chunk)) {
    if (entering) products.enter(table, chunk.segment);
    const int64_t begin = (chunk.position * kFragmentWarps + warp) * kWarpColumns<In>;
    products.add(table, chunk.segment, begin, sums[warp]);
    if constexpr (kBeside == Beside::combination) combine_columns<In>(table, chunk.segment, begin);
  }
  __syncthreads();
  products.for_each_pair(table.num_tasks, [&](int value, int i, int j) {
    if (value % kFragmentWarps != warp) return;
    double sum = 0.0;
    for (const auto& values : sums) sum += values[value][lane];
    write_sum(table, partial, i, j, blockIdx.y, sum);
  });
}

GRADSTATS_HOST_DEVICE inline int num_sides(int num_tasks) { return (num_tasks + kSideRows - 1) / kSideRows; }

// Block (x, y) is slot y of some pairs of sides, of kSideRows tasks each; every one of its warps takes one of them.
template <class In, class Table>
__global__ void __launch_bounds__(32 * kPairWarps, kPairBlocks)
    pair_kernel(const __grid_constant__ Table table, double* partial) {
  using Products = WarpProducts<In, kSideRows / 8, false>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sides = num_sides(table.num_tasks);
  int left = 0, right = blockIdx.x * (blockDim.x / 32) + warp;  // of the pairs row by row
  for (; left < sides && right >= sides - left; ++left) right -= sides - left;
  if (left == sides) return;
  Products products{};
  products.left.first_task = left * kSideRows;
  products.right.first_task = (left + right) * kSideRows;

  __shared__ double all_sums[kPairWarps][4 * Products::kTiles][32];
  auto& sums = all_sums[warp];
  for (auto& values : sums) values[lane] = 0.0;
  Chunk chunk = first_chunk_of(table, blockIdx.y);
  for (bool entering = true; chunk.index < chunk.end; entering = advance(table, chunk)) {
    if (entering) products.enter(table, chunk.segment);
    products.add(table, chunk.segment, chunk.position * kWarpColumns<In>, sums);
    __syncthreads();  // only so that the warps of a block stay near each other and find their rows in L1
  }
  products.for_each_pair(table.num_tasks, [&](int value, int i, int j) {
    write_sum(table, partial, i, j, blockIdx.y, sums[value][lane]);
  });
}

}  // namespace gradstats::cuda
