// Blocks of 16 or 32 outputs by one input: outputs in the lanes, a tile of rows of x in registers.
#pragma once

// Few rows would leave the FMA units waiting for their own results: several blocks go to separate sums.
template <int Rows, int Wide>
constexpr int kChains = Rows * Wide * kParts >= 8   ? 1
                        : Rows * Wide * kParts >= 4 ? 2
                                                    : 4;

// With two registers a vector, values that are widened need registers of their own: those for x, shared by the
// vectors of a block, would be too many. Each vector then reads x again.
template <class Value>
constexpr bool kReadsAgain = kParts == 2 && sizeof(Value) < sizeof(float);

template <class Value, int Rows, int Wide>
SPARSECC_INLINE void block_sums(const BlockView& w, int64_t group, const float* panel, int64_t stride,
                                F16 (&sum)[Rows][Wide]) {
  constexpr int chains = kChains<Rows, Wide>;
  F16 part[chains][Rows][Wide];
  SPARSECC_UNROLL
  for (int c = 0; c < chains; ++c) SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) SPARSECC_UNROLL
  for (int v = 0; v < Wide; ++v) part[c][r][v] = broadcast(0.0f);
  int64_t i = w.start[group];
  const int64_t end = w.end[group];
  const Value* values = (const Value*)w.values + i * kGroup * Wide;
  const auto one = [&](int c) __attribute__((always_inline)) {
    const float* x = panel + (int64_t)w.index[i + c] * stride;
    __asm__("" : "+r"(x));  // one address per block, not one per row
    Singles<Rows> of_rows = singles<Rows>(x);
    SPARSECC_UNROLL
    for (int v = 0; v < Wide; ++v) {
      if constexpr (kReadsAgain<Value>) {
        __asm__("" : "+r"(x));
        of_rows = singles<Rows>(x);
      }
      const F16 weight = load(values + (c * Wide + v) * kGroup);
      SPARSECC_UNROLL
      for (int r = 0; r < Rows; ++r) part[c][r][v] = multiply_add(part[c][r][v], of_rows, r, weight);
    }
  };
  for (; i + chains <= end; i += chains, values += chains * Wide * kGroup) SPARSECC_UNROLL
  for (int c = 0; c < chains; ++c) one(c);
  for (; i < end; ++i, values += Wide * kGroup) one(0);
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) SPARSECC_UNROLL
  for (int v = 0; v < Wide; ++v) {
    sum[r][v] = part[0][r][v];
    SPARSECC_UNROLL
    for (int c = 1; c < chains; ++c) sum[r][v] = add(sum[r][v], part[c][r][v]);
  }
}

// Rows in the order of the target: straight to a row-major matrix, through a transpose to planes.
template <int Rows, int Wide>
SPARSECC_INLINE void block_store(const BlockJob& job, int64_t group, int64_t first_row,
                                 F16 (&sum)[Rows][Wide]) {
  const Target& to = job.target;
  SPARSECC_UNROLL
  for (int v = 0; v < Wide; ++v) {
    const int64_t output = (group * Wide + v) * kGroup;
    const int64_t left = job.weight->outputs - output;
    if (left <= 0) return;
    const int64_t n = left < kGroup ? left : kGroup;
    const F16 bias = load(job.epilogue->bias + output);
    float* y = to.y + first_row * to.row_stride + output * to.output_stride;
    if (job.epilogue->activation == SPARSECC_ACT_NONE && to.output_stride == 1) {
      SPARSECC_UNROLL
      for (int r = 0; r < Rows; ++r) store_first(y + r * to.row_stride, add(sum[r][v], bias), n);
      continue;
    }
    float tile[Rows * kGroup] __attribute__((aligned(64)));
    SPARSECC_UNROLL
    for (int r = 0; r < Rows; ++r) store(tile + r * kGroup, add(sum[r][v], bias));
    activate(tile, Rows, *job.epilogue);
    if (to.output_stride == 1) {
      SPARSECC_UNROLL
      for (int r = 0; r < Rows; ++r) store_first(y + r * to.row_stride, load(tile + r * kGroup), n);
    } else {
      transpose_tile(tile, kGroup, Rows, n, y, to.output_stride);
    }
  }
}

template <class Value, int Rows, int Wide>
static void block_tile(const BlockJob& job, int64_t first_row) {
  for (int64_t group = job.group_begin; group < job.group_end; ++group) {
    F16 sum[Rows][Wide];
    block_sums<Value, Rows, Wide>(*job.weight, group, job.panel + first_row, job.stride, sum);
    block_store<Rows, Wide>(job, group, first_row, sum);
  }
}

// Calls the tile of exactly `rows` rows, 1 <= rows <= Rows.
template <class Value, int Rows, int Wide>
static void block_tile_of(const BlockJob& job, int64_t first_row, int rows) {
  if (rows == Rows) return block_tile<Value, Rows, Wide>(job, first_row);
  if constexpr (Rows > 1) block_tile_of<Value, Rows - 1, Wide>(job, first_row, rows);
}

template <class Value, int Most, int Wide>
static void block_panel(const BlockJob& job) {
  const int tiles = (job.rows + Most - 1) / Most;
  int first = 0;
  for (int t = 0; t < tiles; ++t) {  // tiles of nearly equal height
    const int rows = (job.rows - first + tiles - t - 1) / (tiles - t);
    block_tile_of<Value, Most, Wide>(job, first, rows);
    first += rows;
  }
}
