// The weight gradients of a linear layer on the CPU: included once per instruction set, after combine_kernel.h, inside
// a namespace that also defines kStrip, how many outputs of the layer a block of sums in registers spans.
//
// A task's gradient is the product of its cotangents, transposed, and the layer's inputs. Patch by patch those of all
// tasks are formed in cache, and there multiplied, or summed, like gradients that lie in memory (gram_kernel.h).
//
// Sums over the layer's rows are formed in the type of the operands: of kChain terms in registers, of the chains of
// kPackedRows, and of these with compensation. So an entry is within 4e-7 of the sum of its terms' sizes, however many
// there are.

constexpr int64_t kChain = 16, kPackedRows = 128;

// Inputs of the layer that a block spans.
template <class Acc>
constexpr int64_t kPanel = 2 * kLanes<Acc>;

template <class Acc>
constexpr int64_t kBlockEntries = kStrip * kPanel<Acc>;

static_assert(LinearLayer::kOutputs % kStrip == 0 && LinearLayer::kInputs % kPanel<float> == 0);

// Adds to a block [kStrip, kPanel] the products of packed rows, `strip` [rows, kStrip] and `panel` [rows, kPanel]. What
// `sum` has lost by rounding is kept in `lost`; both begin with the first rows.
template <class Acc>
void add_block(const Acc* strip, const Acc* panel, int64_t rows, bool is_first, Acc* sum, Acc* lost) {
  Vec<Acc> added[kStrip][2] = {};
  for (int64_t stop, from = 0; from < rows; from = stop) {
    stop = std::min(rows, from + kChain);
    Vec<Acc> chain[kStrip][2] = {};
    for (int64_t n = from; n < stop; ++n) {
      const Acc* const in = panel + n * kPanel<Acc>;
      const Vec<Acc> x[2] = {load<Acc>(in), load<Acc>(in + kLanes<Acc>)};
#pragma GCC unroll 8
      for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) chain[r][c] += strip[n * kStrip + r] * x[c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) added[r][c] += chain[r][c];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kStrip; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c, sum += kLanes<Acc>, lost += kLanes<Acc>) {
      const Vec<Acc> before = is_first ? Vec<Acc>{} : load<Acc>(sum), owed = is_first ? Vec<Acc>{} : load<Acc>(lost);
      const Vec<Acc> due = added[r][c] - owed, after = before + due;
      store(sum, after);
      store(lost, (after - before) - due);
    }
}

// ---- packing --------------------------------------------------------------------------------------------------------

template <int64_t kWidth, class In, class Acc>
void convert_piece(const In* __restrict in, Acc* __restrict out) {
#pragma GCC unroll 32
  for (int64_t c = 0; c < kWidth; ++c) out[c] = static_cast<Acc>(to_double(in[c]));
}

// Copies rows [row, row + rows) of columns [column, column + columns) to slices [rows, kWidth], with zeros beyond the
// last column.
template <class In, int64_t kWidth, class Acc>
void pack_as(const Matrix& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns, Acc* out) {
  const int64_t down = matrix.row_stride, along = matrix.column_stride;
  const In* const in = static_cast<const In*>(matrix.data) + row * down + column * along;
  const int64_t whole = along == 1 ? columns / kWidth * kWidth : 0;
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t c = 0; c < whole; c += kWidth)
      convert_piece<kWidth>(in + n * down + c, out + c * rows + n * kWidth);
  for (int64_t c = whole; c < (columns + kWidth - 1) / kWidth * kWidth; ++c) {
    Acc* const to = out + (c - c % kWidth) * rows + c % kWidth;
    for (int64_t n = 0; n < rows; ++n)
      to[n * kWidth] = c < columns ? static_cast<Acc>(to_double(in[n * down + c * along])) : Acc{};
  }
}

template <int64_t kWidth, class Acc>
void pack(const Matrix& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns, Acc* out) {
  switch (matrix.dtype) {
    case DType::float32: return pack_as<float, kWidth>(matrix, row, rows, column, columns, out);
    case DType::float64: return pack_as<double, kWidth>(matrix, row, rows, column, columns, out);
    case DType::float16: return pack_as<Float16, kWidth>(matrix, row, rows, column, columns, out);
    case DType::bfloat16: return pack_as<BFloat16, kWidth>(matrix, row, rows, column, columns, out);
  }
}

// Pieces of rows that are packed next, asked for bit by bit while blocks are multiplied: they lie far apart.
struct NextPieces {
  const char* from;
  int64_t rows, stride, bytes, asked = 0;

  NextPieces(const Matrix& matrix, int64_t row, int64_t num_rows, int64_t column, int64_t columns) {
    const int64_t size = element_size(matrix.dtype);
    from = static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column * matrix.column_stride) * size;
    rows = matrix.column_stride == 1 ? num_rows : 0;
    stride = matrix.row_stride * size, bytes = columns * size;
  }

  // Asks until a share of all has been asked for.
  void ask(int64_t part, int64_t parts) {
    for (; asked * parts < rows * part; ++asked)
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + asked * stride + b, 0, 2);
  }
};

// ---- patches --------------------------------------------------------------------------------------------------------

// The gradients of all tasks in one patch after another; those of a task lie in a row, block by block.
template <class Acc>
struct PatchGradients {
  const LinearLayer& layer;
  int64_t num_tasks = layer.num_tasks();
  int64_t most_entries = layer.patch_outputs * layer.patch_inputs;
  int64_t row_entries = most_entries + kLine<Acc>;  // apart, as in gram_kernel.h
  Buffer packed_inputs = allocate(kPackedRows * layer.patch_inputs * sizeof(Acc));
  Buffer packed_cotangents = allocate(kPackedRows * layer.patch_outputs * sizeof(Acc));
  Buffer sums = allocate((num_tasks + 1) * row_entries * sizeof(Acc));  // with a row for their weighted sum
  Buffer lost = allocate(num_tasks * row_entries * sizeof(Acc));
  Problem problem = make_problem({walk()}, num_tasks, false, layer.weights);

  explicit PatchGradients(const LinearLayer& layer) : layer(layer) {}

  static Acc* entries(const Buffer& buffer) { return static_cast<Acc*>(buffer.get()); }

  Walk walk() const {
    Walk walk;
    walk.numel = most_entries;
    walk.dtype = std::is_same_v<Acc, double> ? DType::float64 : DType::float32;
    walk.sizes = {most_entries};
    walk.strides.assign(num_tasks + 1, 1);
    for (int64_t t = 0; t <= num_tasks; ++t) walk.data.push_back(entries(sums) + t * row_entries);
    return walk;
  }

  static int64_t num_strips(const Patch& patch) { return (patch.outputs + kStrip - 1) / kStrip; }
  static int64_t num_blocks(const Patch& patch) {
    return num_strips(patch) * ((patch.inputs + kPanel<Acc> - 1) / kPanel<Acc>);
  }

  // Adds the products of rows whose inputs are packed to a task's gradient.
  void add_rows(const Patch& patch, int64_t t, int64_t row, int64_t rows) {
    pack<kStrip>(layer.cotangents[t], row, rows, patch.output, patch.outputs, entries(packed_cotangents));
    const bool is_last = t + 1 == num_tasks;
    const int64_t next_row = is_last ? row + rows : row;
    NextPieces next(layer.cotangents[is_last ? 0 : t + 1], next_row, std::min(kPackedRows, layer.rows - next_row),
                    patch.output, patch.outputs);
    Acc* sum = entries(sums) + t * row_entries;
    Acc* owed = entries(lost) + t * row_entries;
    int64_t block = 0;
    for (int64_t i = 0; i < patch.inputs; i += kPanel<Acc>)
      for (int64_t o = 0; o < patch.outputs; o += kStrip, sum += kBlockEntries<Acc>, owed += kBlockEntries<Acc>) {
        next.ask(++block, num_blocks(patch));
        add_block(entries(packed_cotangents) + o * rows, entries(packed_inputs) + i * rows, rows, row == 0, sum, owed);
      }
  }

  // Forms the gradients of a patch, adds their products to `slot` and writes their weighted sum.
  void add_to(Slot<>& slot, const Patch& patch) {
    for (int64_t rows, row = 0; row < layer.rows; row += rows) {
      rows = std::min(kPackedRows, layer.rows - row);
      pack<kPanel<Acc>>(layer.inputs, row, rows, patch.input, patch.inputs, entries(packed_inputs));
      for (int64_t t = 0; t < num_tasks; ++t) add_rows(patch, t, row, rows);
    }
    slot.add(0, num_blocks(patch) * kBlockEntries<Acc>);
    if (layer.weights == nullptr) return;
    switch (layer.combined.dtype) {
      case DType::float32: return write_combined<float>(patch);
      case DType::float64: return write_combined<double>(patch);
      case DType::float16: return write_combined<Float16>(patch);
      case DType::bfloat16: return write_combined<BFloat16>(patch);
    }
  }

  template <class Out>
  void write_combined(const Patch& patch) const {
    const Matrix& to = layer.combined;
    Out* const out = static_cast<Out*>(const_cast<void*>(to.data)) + patch.output * to.row_stride + patch.input;
    for (int64_t o = 0; o < patch.outputs; ++o)
      for (int64_t i = 0; i < patch.inputs; i += kPanel<Acc>) {
        const int64_t block = i / kPanel<Acc> * num_strips(patch) + o / kStrip, row = block * kStrip + o % kStrip;
        const Acc* const from = entries(sums) + num_tasks * row_entries + row * kPanel<Acc>;
        for (int64_t c = 0; c < std::min(kPanel<Acc>, patch.inputs - i); ++c)
          round_to(out + o * to.row_stride + i + c, static_cast<Sum<Out>>(from[c]));
      }
  }
};

template <class Acc>
void linear_gram_slots_as(const LinearLayer& layer, int64_t num_slots, int64_t first, int64_t last, double* sums) {
  PatchGradients<Acc> gradients(layer);
  const int64_t num_pairs = layer.num_tasks() * (layer.num_tasks() + 1) / 2, patches = layer.num_patches();
  for (int64_t s = first; s < last; ++s) {
    Slot<> slot(gradients.problem);
    for (int64_t p = s * patches / num_slots; p < (s + 1) * patches / num_slots; ++p)
      gradients.add_to(slot, layer.patch(p));
    slot.finish(sums + s * num_pairs);
  }
}

// For each of the slots [first, last), an even share of the patches, sums of the products of all pairs into `sums`
// [num_slots, num_tasks * (num_tasks + 1) / 2].
void linear_gram_slots(const LinearLayer& layer, int64_t num_slots, int64_t first, int64_t last, double* sums) {
  layer.is_wide ? linear_gram_slots_as<double>(layer, num_slots, first, last, sums)
                : linear_gram_slots_as<float>(layer, num_slots, first, last, sums);
}
