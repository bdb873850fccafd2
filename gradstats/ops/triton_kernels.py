"""The Triton kernels of :mod:`gradstats.ops.triton_gram`, which lays out what they read.

For Gramians, ``register_kernel`` (few tasks) and ``tile_kernel`` (many) add up the products of one slot of entries in
each program, and ``reduce_kernel`` adds up the slots in order. Nothing is added atomically, and nothing that decides
the order of a sum depends on the device or on what the autotuner picks: results are bitwise reproducible.

Products of float32 and narrower types are formed in float32, and few of them are added up before they go to float64.
A slot with an entry whose square float32 cannot hold is done again in float64, as is float64 itself and whatever has
a metric.

``combine_kernel`` makes the weighted sums, and ``linear_kernel`` both, of the gradients of a linear layer's weight that
it forms tile by tile (:mod:`gradstats.ops.triton_linear`).
"""

import triton
import triton.language as tl

# A row of the table is a segment: the gradients of one parameter. It holds their NUM_ROWS addresses (0: no gradient),
# then these columns. The row behind the last segment has START alone.
BESIDE = tl.constexpr(0)  # address of what lies beside the gradients: their metric, or what they are combined to
NUMEL = tl.constexpr(1)  # entries of each gradient
START = tl.constexpr(2)  # chunks of all segments before this one
COLUMNS = tl.constexpr(3)

# Magnitudes beyond which squares leave float32 or lose bits there; see _fits.
_SMALLEST = tl.constexpr(2.0**-50)
_LARGEST = tl.constexpr(2.0**60)

# What the tile kernel is tuned over: how it is laid out on the device, which does not change the order of any sum. The
# interpreter has no device to tune for.
_INTERPRETED = triton.knobs.runtime.interpret
_CONFIGS = [triton.Config({}, num_warps=warps, num_stages=stages) for warps in (1, 2, 4, 8) for stages in (3, 5)]


def _worth_trying(configs, _, **arguments):
    """The configurations for a tile: 16 or 8 of its rows a warp."""
    return [config for config in configs if arguments["TILE"] // config.num_warps in (8, 16)]


# ---- the entries of a program ----------------------------------------------------------------------------------------


@triton.jit
def _segment_of(columns, chunk, num_segments, WIDTH: tl.constexpr):
    """The segment that a chunk is in, by bisection."""
    low = 0
    high = num_segments
    while high - low > 1:
        middle = (low + high) // 2
        starts_before = tl.load(columns + middle * WIDTH + START) <= chunk
        low = tl.where(starts_before, middle, low)
        high = tl.where(starts_before, high, middle)
    return low


@triton.jit
def _slot(columns, num_segments, WIDTH: tl.constexpr):
    """The chunks of this program, as a range, and the range of segments that they are in."""
    chunks = tl.load(columns + num_segments * WIDTH + START)
    begin = chunks * tl.program_id(0) // tl.num_programs(0)
    end = chunks * (tl.program_id(0) + 1) // tl.num_programs(0)
    first = _segment_of(columns, begin, num_segments, WIDTH)
    return begin, end, first, _segment_of(columns, end - 1, num_segments, WIDTH) + 1


@triton.jit
def _part(segment, begin, end, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Which chunks of a segment, counted from its own first, are in ``begin:end``.

    Returns the first, the end of the whole ones, the end of all (one more at most), and the segment's entries.
    """
    start = tl.load(segment + START)
    stop = tl.load(segment + WIDTH + START)
    numel = tl.load(segment + NUMEL)
    last = tl.minimum(end, stop) - start
    return tl.maximum(begin - start, 0), tl.minimum(last, numel // CHUNK), last, numel


@triton.jit
def _places(address, offsets, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to entries. ``offsets`` has two dimensions, the last of which is a run: if aligned, of 16 bytes."""
    at = address.to(tl.pointer_type(DTYPE)) + offsets
    if ALIGNED:
        at = tl.max_contiguous(tl.multiple_of(at, [16, 16]), [1, at.shape[1]])
    return at


@triton.jit
def _read(address, offsets, numel, TAIL: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Entries of gradients by their addresses; zeros where there is none and, in a tail, from ``numel`` on."""
    mask = address != 0
    if TAIL:
        mask = mask & (offsets < numel)
    return tl.load(_places(address, offsets, DTYPE, ALIGNED), mask=mask, other=0.0)


@triton.jit
def _widen(x):
    """The entries in float64."""
    wide = x.to(tl.float64)
    if x.dtype.primitive_bitwidth == 16:
        # Triton cannot multiply matrices in float64 that it sees to come from 16 bits: a sum of one term hides that.
        wide = tl.sum(wide[:, :, None], axis=2)
    return wide


@triton.jit
def _root(segment, offsets, numel, TAIL: tl.constexpr, METRIC_DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Root of the metric, in float64: with it on each side, a product is weighted alike for both of its tasks."""
    if METRIC_DTYPE is None:
        root = 1.0
    else:
        metric = _read(tl.load(segment + BESIDE), offsets, numel, TAIL, METRIC_DTYPE, ALIGNED)
        root = tl.sqrt(_widen(metric))
    return root


@triton.jit
def _fits(largest):
    """Whether float32 holds the products of rows whose ``largest`` [rows, ...] magnitudes these are.

    Sums of what underflows are nothing beside the square of the row's largest, unless that is tiny. NaN passes: it
    shows in the products.
    """
    of_row = tl.max(largest, axis=1)
    bad = (of_row > _LARGEST) | ((of_row > 0.0) & (of_row < _SMALLEST))
    return tl.max(bad.to(tl.int32), axis=0) == 0


# ---- few tasks: all pairs in registers -------------------------------------------------------------------------------


@triton.jit
def _register_add(
    state,
    segment,
    offsets,
    numel,
    TAIL: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    METRIC_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add a chunk to the ``state``: the sums of all pairs i <= j, then, unless ``WIDE``, the largest of each row."""
    root = _root(segment, offsets, numel, TAIL, METRIC_DTYPE, ALIGNED)
    rows = ()
    for t in tl.static_range(NUM_ROWS):
        x = _read(tl.load(segment - NUM_ROWS + t), offsets, numel, TAIL, DTYPE, ALIGNED)
        rows += (x.to(tl.float64) * root if WIDE else x.to(tl.float32),)
    new = ()
    for i in tl.static_range(NUM_ROWS):
        for j in tl.static_range(i, NUM_ROWS):
            products = tl.sum(rows[i] * rows[j], axis=1)
            new += (state[i * (2 * NUM_ROWS - i - 1) // 2 + j] + products.to(tl.float64),)
    if not WIDE:
        for t in tl.static_range(NUM_ROWS):
            largest = state[NUM_ROWS * (NUM_ROWS + 1) // 2 + t]
            new += (tl.maximum(largest, tl.max(tl.abs(rows[t]), axis=1)),)
    return new


@triton.jit
def _register_slot(
    table,
    partial,
    num_segments,
    NUM_ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    METRIC_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Store the products over this program's slot; returns whether float32 held them."""
    WIDTH: tl.constexpr = NUM_ROWS + COLUMNS
    PAIRS: tl.constexpr = NUM_ROWS * (NUM_ROWS + 1) // 2
    columns = table + NUM_ROWS
    state = ()
    for _ in tl.static_range(PAIRS):
        state += (tl.zeros([LANES], tl.float64),)
    if not WIDE:
        for _ in tl.static_range(NUM_ROWS):
            state += (tl.zeros([LANES], tl.float32),)

    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    begin, end, first, last = _slot(columns, num_segments, WIDTH)
    for k in range(first, last):
        segment = columns + k * WIDTH
        start, whole, stop, numel = _part(segment, begin, end, LANES * VECTOR, WIDTH)
        for chunk in range(start, whole):
            at = lanes + chunk * (LANES * VECTOR)
            state = _register_add(state, segment, at, numel, False, NUM_ROWS, DTYPE, METRIC_DTYPE, ALIGNED, WIDE)
        if whole < stop:
            at = lanes + whole * (LANES * VECTOR)
            state = _register_add(state, segment, at, numel, True, NUM_ROWS, DTYPE, METRIC_DTYPE, ALIGNED, WIDE)

    to = partial + tl.program_id(0) * (NUM_ROWS * NUM_ROWS)
    fits = True
    for i in tl.static_range(NUM_ROWS):
        for j in tl.static_range(i, NUM_ROWS):
            total = tl.sum(state[i * (2 * NUM_ROWS - i - 1) // 2 + j], axis=0)
            tl.store(to + i * NUM_ROWS + j, total)
            tl.store(to + j * NUM_ROWS + i, total)
        if not WIDE:
            fits = fits & _fits(state[PAIRS + i][None, :])
    return fits


@triton.autotune([triton.Config({}, num_warps=4)], key=[])
@triton.jit(do_not_specialize=["num_segments"])
def register_kernel(
    table,
    partial,
    fits,
    num_segments,
    NUM_ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    METRIC_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Store the products of all pairs of rows over slot ``program_id(0)`` in ``partial`` [slots, rows, rows].

    Each of the ``LANES`` threads reads and adds up ``VECTOR`` entries of a row at a time and keeps sums of its own.
    Whether float32 held the products is stored in ``fits`` [slots]. With ``WIDE``, they are formed in float64, and only
    for slots that did not fit, unless ``fits`` is None.
    """
    pid = tl.program_id(0)
    if not WIDE:
        held = _register_slot(table, partial, num_segments, NUM_ROWS, DTYPE, METRIC_DTYPE, ALIGNED, WIDE, LANES, VECTOR)
        tl.store(fits + pid, held.to(tl.int32))
    else:
        todo = True
        if fits is not None:
            todo = tl.load(fits + pid) == 0
        if todo:
            _register_slot(table, partial, num_segments, NUM_ROWS, DTYPE, METRIC_DTYPE, ALIGNED, WIDE, LANES, VECTOR)


# ---- many tasks: tiles of pairs on tensor cores ----------------------------------------------------------------------


@triton.jit
def _high(x):
    """Round to the 11 bits of TF32; the difference to ``x`` is exact."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def _multiply(x, y, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Products ``S`` of the rows of ``x`` and ``y``, in float64, of which ``(S_ij + S_ji) / 2`` is right.

    bfloat16 and float16 fit in TF32, so that their products are exact. A float32 is split into two TF32 halves, and
    ``S = H Hᵀ + 2 H Lᵀ + L Lᵀ`` needs one product less than the sum that it stands for.
    """
    if WIDE:
        products = tl.dot(x, tl.trans(y), out_dtype=tl.float64)
    elif DTYPE.primitive_bitwidth == 32:
        x_high = _high(x)
        y_high = _high(y)
        x_low = x - x_high
        minus_y_low = tl.trans(y_high - y)
        # A dot that is added would start with what it is added to, and cut off more; so this one is subtracted.
        rest = tl.dot(x_low, minus_y_low, input_precision="tf32")
        rest = tl.dot(x_high, 2.0 * minus_y_low, rest, input_precision="tf32")
        high = tl.dot(x_high, tl.trans(y_high), input_precision="tf32")
        products = (high - rest).to(tl.float64)
    else:
        products = tl.dot(x, tl.trans(y), input_precision="tf32").to(tl.float64)
    return products


@triton.jit
def _tile_add(
    state,
    segment,
    x_addresses,
    y_addresses,
    offsets,
    numel,
    TAIL: tl.constexpr,
    DTYPE: tl.constexpr,
    METRIC_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    SAME: tl.constexpr,
):
    """Add a chunk to the ``state``: the sums of the tile, and the largest of its entries, unless ``WIDE``."""
    root = _root(segment, offsets, numel, TAIL, METRIC_DTYPE, ALIGNED)
    x = _read(x_addresses, offsets, numel, TAIL, DTYPE, ALIGNED)
    x = _widen(x) * root if WIDE else x.to(tl.float32)
    if SAME:
        y = x
    else:
        y = _read(y_addresses, offsets, numel, TAIL, DTYPE, ALIGNED)
        y = _widen(y) * root if WIDE else y.to(tl.float32)
    new = (state[0] + _multiply(x, y, DTYPE, WIDE),)
    if not WIDE:
        new += (tl.maximum(state[1], tl.abs(x)),)
        if not SAME:
            new += (tl.maximum(state[2], tl.abs(y)),)
    return new


@triton.jit
def _tile_slot(
    table,
    partial,
    num_segments,
    num_rows,
    x_tile,
    y_tile,
    DTYPE: tl.constexpr,
    METRIC_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    SAME: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Store the products over this program's slot; returns whether they fit."""
    width = num_rows + COLUMNS
    columns = table + num_rows
    state = (tl.zeros([TILE, TILE], tl.float64),)
    if not WIDE:
        state += (tl.zeros([TILE, CHUNK], tl.float32),)
        if not SAME:
            state += (tl.zeros([TILE, CHUNK], tl.float32),)

    x_rows = x_tile * TILE + tl.arange(0, TILE)[:, None]
    y_rows = y_tile * TILE + tl.arange(0, TILE)[:, None]
    entries = tl.arange(0, CHUNK)[None, :]
    begin, end, first, last = _slot(columns, num_segments, width)
    for k in range(first, last):
        segment = columns + k * width
        x = tl.load(segment - num_rows + x_rows)
        y = tl.load(segment - num_rows + y_rows)
        start, whole, stop, numel = _part(segment, begin, end, CHUNK, width)
        for chunk in range(start, whole):
            at = entries + chunk * CHUNK
            state = _tile_add(state, segment, x, y, at, numel, False, DTYPE, METRIC_DTYPE, ALIGNED, WIDE, SAME)
        if whole < stop:
            at = entries + whole * CHUNK
            state = _tile_add(state, segment, x, y, at, numel, True, DTYPE, METRIC_DTYPE, ALIGNED, WIDE, SAME)

    to = partial + tl.program_id(0).to(tl.int64) * num_rows * num_rows
    tl.store(to + x_rows * num_rows + tl.trans(y_rows), state[0])
    fits = True
    if not WIDE:
        fits = _fits(state[1])
        if not SAME:
            fits = fits & _fits(state[2])
    return fits


@triton.autotune(
    _CONFIGS[: 1 if _INTERPRETED else None],
    key=["DTYPE", "METRIC_DTYPE", "ALIGNED", "WIDE", "SAME", "TILE"],
    prune_configs_by={"early_config_prune": _worth_trying},
)
@triton.jit(do_not_specialize=["num_segments"])
def tile_kernel(
    table,
    partial,
    fits,
    num_segments,
    num_rows,
    DTYPE: tl.constexpr,
    METRIC_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    SAME: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Store a tile of products over slot ``program_id(0)`` in ``partial`` [slots, rows, rows]; see ``_multiply``.

    With ``SAME``, ``program_id(1)`` is a tile on the diagonal; else it counts the others row by row. ``WIDE`` and
    ``fits`` [slots, tiles] are as for ``register_kernel``.
    """
    pid = tl.program_id(1)
    if SAME:
        x_tile = pid
        y_tile = pid
    else:
        others = num_rows // TILE - 1
        x_tile = pid // others
        y_tile = pid % others
        y_tile += (y_tile >= x_tile).to(tl.int32)
    flag = tl.program_id(0) * tl.num_programs(1) + pid
    if not WIDE:
        held = _tile_slot(
            table,
            partial,
            num_segments,
            num_rows,
            x_tile,
            y_tile,
            DTYPE,
            METRIC_DTYPE,
            ALIGNED,
            WIDE,
            SAME,
            TILE,
            CHUNK,
        )
        tl.store(fits + flag, held.to(tl.int32))
    else:
        todo = True
        if fits is not None:
            todo = tl.load(fits + flag) == 0
        if todo:
            _tile_slot(
                table,
                partial,
                num_segments,
                num_rows,
                x_tile,
                y_tile,
                DTYPE,
                METRIC_DTYPE,
                ALIGNED,
                WIDE,
                SAME,
                TILE,
                CHUNK,
            )


# ---- the sum of all slots --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_slots", "num_tasks", "num_rows"])
def reduce_kernel(partial, gram, num_slots, num_tasks, num_rows, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Store ``Σ_slot (partial[slot, i, j] + partial[slot, j, i]) / 2`` in ``gram`` [tasks, tasks]."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_tasks * num_tasks
    i = pair // num_tasks
    j = pair % num_tasks
    sums = tl.zeros([SLOTS, BLOCK], tl.float64)
    for first in range(0, num_slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)[:, None]
        mask = (slot < num_slots) & inside[None, :]
        of_slot = partial + slot.to(tl.int64) * num_rows * num_rows
        one = tl.load(of_slot + (i * num_rows + j)[None, :], mask=mask, other=0.0)
        other = tl.load(of_slot + (j * num_rows + i)[None, :], mask=mask, other=0.0)
        sums += one + other  # in one step, so that (i, j) and (j, i) round alike
    tl.store(gram + pair, 0.5 * tl.sum(sums, axis=0), mask=inside)


# ---- weighted sums ---------------------------------------------------------------------------------------------------

#: Tasks whose gradients are on their way together.
AT_ONCE = tl.constexpr(4)


@triton.jit
def _combine(
    weights,
    segment,
    offsets,
    numel,
    num_rows,
    TAIL: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write a chunk of the weighted sums, which are formed in the order of the tasks and rounded once."""
    SUM: tl.constexpr = tl.float64 if DTYPE.primitive_bitwidth == 64 else tl.float32
    total = tl.zeros(offsets.shape, SUM)
    for first in range(0, num_rows, AT_ONCE):
        rows = ()
        for t in tl.static_range(AT_ONCE):
            rows += (_read(tl.load(segment - num_rows + first + t), offsets, numel, TAIL, DTYPE, ALIGNED),)
        for t in tl.static_range(AT_ONCE):
            total += tl.load(weights + first + t).to(SUM) * rows[t].to(SUM)
    at = _places(tl.load(segment + BESIDE), offsets, DTYPE, ALIGNED)
    tl.store(at, total.to(DTYPE), mask=offsets < numel if TAIL else None)


@triton.jit(do_not_specialize=["num_segments"])
def combine_kernel(
    table,
    weights,
    num_segments,
    num_rows,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write the weighted sums over the chunks of slot ``program_id(0)``, with ``weights`` [num_rows]."""
    width = num_rows + COLUMNS
    columns = table + num_rows
    lanes = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    begin, end, first, last = _slot(columns, num_segments, width)
    for k in range(first, last):
        segment = columns + k * width
        start, whole, stop, numel = _part(segment, begin, end, LANES * VECTOR, width)
        for chunk in range(start, stop):
            at = lanes + chunk * (LANES * VECTOR)
            if chunk < whole:
                _combine(weights, segment, at, numel, num_rows, False, DTYPE, ALIGNED)
            else:
                _combine(weights, segment, at, numel, num_rows, True, DTYPE, ALIGNED)


# ---- the weight of a linear layer ------------------------------------------------------------------------------------


@triton.jit
def _add_rows(x, y, owed, DTYPE: tl.constexpr, AS_FLOAT32: tl.constexpr):
    """``x y + owed``, where ``owed`` is small beside the products.

    A float32 is split into two TF32 halves, of which the product of the smaller ones is left out. bfloat16 and float16
    are multiplied as they are, but in the interpreter, which cannot.
    """
    if DTYPE.primitive_bitwidth == 32:
        x_high = _high(x)
        y_high = _high(y)
        products = tl.dot(_high(x - x_high), y_high, owed, input_precision="tf32")
        products = tl.dot(x_high, _high(y - y_high), products, input_precision="tf32")
        products = tl.dot(x_high, y_high, products, input_precision="tf32")
    elif AS_FLOAT32:
        products = tl.dot(x.to(tl.float32), y.to(tl.float32), owed, input_precision="tf32")
    else:
        products = tl.dot(x, y, owed)
    return products


@triton.jit
def _linear_tile(
    table,
    inputs,
    num_rows,
    fan_in,
    fan_out,
    input_stride,
    cotangent_stride,
    first_output,
    first_input,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    AS_FLOAT32: tl.constexpr,
    TASKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of all tasks' gradients, float32 [TASKS * OUTPUTS, INPUTS].

    Tensor cores cut bits off when they add, so they add up ``ROWS`` rows only, and what is lost where those sums are
    added is owed to the next: the error does not grow with the number of rows.
    """
    side = tl.arange(0, TASKS * OUTPUTS)[:, None]
    address = tl.load(table + side // OUTPUTS)
    output = first_output + side % OUTPUTS
    feature = first_input + tl.arange(0, INPUTS)[None, :]
    cotangents = address.to(tl.pointer_type(DTYPE)) + output
    has_output = (address != 0) & (output < fan_out)
    total = tl.zeros([TASKS * OUTPUTS, INPUTS], tl.float32)
    owed = tl.zeros([TASKS * OUTPUTS, INPUTS], tl.float32)
    for first_row in range(0, num_rows, ROWS):
        rows = first_row + tl.arange(0, ROWS)
        x_at = cotangents + rows[None, :].to(tl.int64) * cotangent_stride
        y_at = inputs + rows[:, None].to(tl.int64) * input_stride + feature
        if ALIGNED:
            x_at = tl.max_contiguous(tl.multiple_of(x_at, [16, 1]), [OUTPUTS, 1])
            y_at = tl.max_contiguous(tl.multiple_of(y_at, [1, 16]), [1, INPUTS])
        x = tl.load(x_at, mask=has_output & (rows < num_rows)[None, :], other=0.0)
        y = tl.load(y_at, mask=(feature < fan_in) & (rows < num_rows)[:, None], other=0.0)
        due = _add_rows(x, y, owed, DTYPE, AS_FLOAT32)
        before = total
        total = before + due
        owed = due - (total - before)
    return total


@triton.jit
def _by_task(tile, TASKS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """The tasks' own tiles, each [OUTPUTS, INPUTS], of a tile [TASKS * OUTPUTS, INPUTS]: halves of halves."""
    LEVELS: tl.constexpr = TASKS.bit_length() - 1
    parts = (tl.permute(tl.reshape(tile, [TASKS, OUTPUTS, INPUTS]), [1, 2, 0]),)
    for level in tl.static_range(LEVELS):
        halves = ()
        for k in tl.static_range(2**level):
            both = tl.reshape(parts[k], [OUTPUTS, INPUTS, 2, TASKS // 2 ** (level + 1)])
            halves += tl.split(tl.permute(both, [0, 1, 3, 2]))
        parts = halves
    tiles = ()
    for t in tl.static_range(TASKS):
        tiles += (tl.reshape(parts[t], [OUTPUTS, INPUTS]),)
    return tiles


@triton.autotune(
    [triton.Config({}, num_warps=8, num_stages=stages) for stages in (3, 2)][: 1 if _INTERPRETED else 2],
    key=["DTYPE", "ALIGNED", "TASKS", "COMBINE"],
)
@triton.jit
def linear_kernel(
    table,
    inputs,
    weights,
    combined,
    partial,
    num_rows,
    fan_in,
    fan_out,
    input_stride,
    cotangent_stride,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    AS_FLOAT32: tl.constexpr,
    TASKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COMBINE: tl.constexpr,
):
    """Store the products of all pairs of tasks over the tiles of slot ``program_id(0)`` in ``partial`` [slots, T, T].

    A tile is ``OUTPUTS`` by ``INPUTS`` entries of the weight. ``table`` [TASKS] has the addresses of the cotangents,
    0 for zeros. With ``COMBINE``, the weighted gradient is written to ``combined`` [fan_out, fan_in].
    """
    across = tl.cdiv(fan_in, INPUTS)
    tiles = tl.cdiv(fan_out, OUTPUTS) * across
    begin = tl.program_id(0).to(tl.int64) * tiles // tl.num_programs(0)
    end = (tl.program_id(0).to(tl.int64) + 1) * tiles // tl.num_programs(0)
    pair = tl.arange(0, TASKS * TASKS)
    sums = tl.zeros([TASKS * TASKS], tl.float64)
    for tile in range(begin.to(tl.int32), end.to(tl.int32)):
        first_output = tile // across * OUTPUTS
        first_input = tile % across * INPUTS
        together = _linear_tile(
            table,
            inputs,
            num_rows,
            fan_in,
            fan_out,
            input_stride,
            cotangent_stride,
            first_output,
            first_input,
            DTYPE,
            ALIGNED,
            AS_FLOAT32,
            TASKS,
            OUTPUTS,
            INPUTS,
            ROWS,
        )
        grads = _by_task(together, TASKS, OUTPUTS, INPUTS)
        if COMBINE:
            total = tl.zeros([OUTPUTS, INPUTS], tl.float32)
            for t in tl.static_range(TASKS):
                total += tl.load(weights + t).to(tl.float32) * grads[t]
            output = first_output + tl.arange(0, OUTPUTS)[:, None]
            feature = first_input + tl.arange(0, INPUTS)[None, :]
            at = combined + output.to(tl.int64) * fan_in + feature
            tl.store(at, total.to(DTYPE), mask=(output < fan_out) & (feature < fan_in))
        for i in tl.static_range(TASKS):
            for j in tl.static_range(i, TASKS):
                products = grads[i].to(tl.float64) * grads[j].to(tl.float64)
                of_pair = tl.sum(tl.reshape(products, [OUTPUTS * INPUTS], can_reorder=True), axis=0)
                sums += tl.where((pair == i * TASKS + j) | (pair == j * TASKS + i), of_pair, 0.0)
    tl.store(partial + tl.program_id(0) * (TASKS * TASKS) + pair, sums)
