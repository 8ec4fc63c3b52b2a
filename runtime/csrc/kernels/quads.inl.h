// Blocks of 16 outputs by 4 inputs of bytes: outputs in the lanes, a tile of rows of x in registers.
#pragma once

// Few rows would wait for their own results: several blocks go to separate sums.
template <int Rows>
constexpr int kQuadChains = Rows >= 8   ? 1
                            : Rows >= 4 ? 2
                                        : 4;

// Few rows are bound by the stream of weights. Measured on x86 only.
template <int Rows>
SPARSECC_INLINE void fetch_ahead(const void* from) {
  constexpr int kAhead = 2048;
  if constexpr (Rows <= 4 && !SPARSECC_NEON) __builtin_prefetch((const char*)from + kAhead);
}

// Sums over the blocks of a group; block(i, part) adds the products of the blocks i..i + Step - 1.
template <int Rows, class Sums, int Step, class Block>
SPARSECC_INLINE void sum_blocks(const QuadView& w, int64_t group, I16 (&sum)[Rows], Block block) {
  constexpr int chains = kParts == 1 ? kQuadChains<Rows> : SPARSECC_NEON && Rows * Step == 1 ? 2 : 1;
  Sums part[chains] = {};
  int64_t i = w.start[group];
  const int64_t end = w.end[group];
  for (; i + chains * Step <= end; i += chains * Step) SPARSECC_UNROLL
  for (int c = 0; c < chains; ++c) block(i + c * Step, part[c]);
  for (; i < end; i += Step) block(i, part[0]);
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    sum[r] = row_of(part[0], r);
    SPARSECC_UNROLL
    for (int c = 1; c < chains; ++c) SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) sum[r].part[p] += row_of(part[c], r).part[p];
  }
}

SPARSECC_INLINE void quad_scale(const QuadJob& job, int64_t output, I16 sum, F16& z) {
  const uint32_t zero_point = (uint32_t)(job.x.zero_point - kStoredLess);
  const F16 bias = load(job.epilogue->bias + output), scale = load(job.weight->scales + output);
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) {
    const VecUint extra = *(const VecUint*)(job.weight->sums + output + p * kLanes) * zero_point;
    const Vec exact = __builtin_convertvector((VecInt)(sum.part[p] - extra), Vec);
    z.part[p] = exact * (scale.part[p] * job.x.scale) + bias.part[p];
  }
}

SPARSECC_INLINE void store_sums(uint32_t* to, I16 sum) {
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) *(VecUint*)(to + p * kLanes) = sum.part[p];
}

template <int Rows>
SPARSECC_INLINE void quad_store(const QuadJob& job, int64_t group, int64_t first_row,
                                const I16 (&sum)[Rows]) {
  if (job.sums != nullptr) {
    for (int r = 0; r < Rows; ++r) store_sums(job.sums + (first_row + r) * job.row_stride + group * kGroup, sum[r]);
    return;
  }
  const int64_t output = group * kGroup, left = job.weight->outputs - output;
  const int64_t n = left < kGroup ? left : kGroup;
  float* y = job.y + first_row * job.row_stride + output;
  F16 z[Rows];
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) quad_scale(job, output, sum[r], z[r]);
  if (job.epilogue->activation == SPARSECC_ACT_NONE) {
    SPARSECC_UNROLL
    for (int r = 0; r < Rows; ++r) store_first(y + r * job.row_stride, z[r], n);
    return;
  }
  float tile[Rows * kGroup] __attribute__((aligned(64)));
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) store(tile + r * kGroup, z[r]);
  activate(tile, Rows, *job.epilogue);
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) store_first(y + r * job.row_stride, load(tile + r * kGroup), n);
}

struct Neighbours {
  static constexpr int kRowStep = kTileStep;
  template <int Rows>
  SPARSECC_INLINE void sum(const QuadJob& job, int64_t group, int64_t first_row, I16 (&sum)[Rows]) {
    const QuadView& w = *job.weight;
    const XQuad* panel = (const XQuad*)job.panel + first_row;
    const auto block = [&](int64_t i, QuadSums<Rows>& part) __attribute__((always_inline)) {
      const XQuad* x[kBlockStep];
      SPARSECC_UNROLL
      for (int b = 0; b < kBlockStep; ++b) {
        x[b] = panel + (int64_t)w.index[i + b] * job.rows;
        __asm__("" : "+r"(x[b]));  // one address per block, not one per row
      }
      fetch_ahead<Rows>(w.values + i * kQuadValues);
      add_blocks<Rows>(part, x, w.values + i * kQuadValues);
    };
    sum_blocks<Rows, QuadSums<Rows>, kBlockStep>(w, group, sum, block);
  }
};

template <class Form, int Rows>
static void quad_tile(const QuadJob& job, int64_t first_row) {
  for (int64_t group = job.group_begin; group < job.group_end; ++group) {
    I16 sum[Rows];
    Form::template sum<Rows>(job, group, first_row, sum);
    quad_store<Rows>(job, group, first_row, sum);
  }
}

// Calls the tile of exactly `rows` rows, 1 <= rows <= Rows.
template <class Form, int Rows>
static void quad_tile_of(const QuadJob& job, int64_t first_row, int rows) {
  if (rows == Rows) return quad_tile<Form, Rows>(job, first_row);
  if constexpr (Rows > 1) quad_tile_of<Form, Rows - 1>(job, first_row, rows);
}

template <class Form, int Most>
static void quad_tiles(const QuadJob& job) {
  const int tiles = (job.rows + Most - 1) / Most;
  int first = 0;
  for (int t = 0; t < tiles; ++t) {  // tiles of nearly equal height
    const int left = job.rows - first, even = (left + tiles - t - 1) / (tiles - t);
    const int whole = (even + Form::kRowStep - 1) / Form::kRowStep * Form::kRowStep;
    const int rows = whole < left ? whole : left;
    quad_tile_of<Form, Most>(job, first, rows);
    first += rows;
  }
}
