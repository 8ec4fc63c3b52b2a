// One head of attention: y = softmax(scale * q k^T + mask) v, for blocks of queries whose scores stay in the
// first-level cache.
#pragma once

// Lanes from n on become zero.
SPARSECC_INLINE F16 first_lanes(F16 v, int64_t n) {
  float kept[kGroup] __attribute__((aligned(64)));
  store(kept, v);
  return load_first(kept, n);
}

// All lanes of v joined by `join`, a function of two vectors that may take them in any order.
template <class Join>
SPARSECC_INLINE float join_lanes(F16 v, Join join) {
  SPARSECC_UNROLL
  for (int p = 1; p < kParts; ++p) v.part[0] = join(v.part[0], v.part[p]);
  Vec all = v.part[0];
#if SPARSECC_AVX512
  all = join(all, (Vec)_mm512_shuffle_f32x4((__m512)all, (__m512)all, 0x4e));
  all = join(all, (Vec)_mm512_shuffle_f32x4((__m512)all, (__m512)all, 0xb1));
  all = join(all, (Vec)_mm512_permute_ps((__m512)all, 0x4e));
  all = join(all, (Vec)_mm512_permute_ps((__m512)all, 0xb1));
  return all[0];
#else
  float lanes[kLanes];
  *(VecLoose*)lanes = all;
  float one = lanes[0];
  for (int i = 1; i < kLanes; ++i) one = join(splat(one), splat(lanes[i]))[0];
  return one;
#endif
}

SPARSECC_INLINE float sum_of_lanes(F16 v) {
  return join_lanes(v, [](Vec a, Vec b) { return a + b; });
}

// NaN may be lost.
SPARSECC_INLINE float most_of_lanes(F16 v) {
  return join_lanes(v, [](Vec a, Vec b) { return at_least(a, b); });
}

// A product of a few rows by a few vectors: row r of the left side is left[r * row_stride + i * step].
template <int Rows, int Wide>
SPARSECC_INLINE void product_tile(const float* left, int64_t row_stride, int64_t step, const float* right,
                                  int64_t right_stride, int64_t count, F16 (&sum)[Rows][Wide]) {
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) SPARSECC_UNROLL
  for (int w = 0; w < Wide; ++w) sum[r][w] = broadcast(0.0f);
  for (int64_t i = 0; i < count; ++i, left += step, right += right_stride) {
    F16 vectors[Wide];
    SPARSECC_UNROLL
    for (int w = 0; w < Wide; ++w) vectors[w] = load(right + w * kGroup);
    SPARSECC_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const F16 value = broadcast(left[r * row_stride]);
      SPARSECC_UNROLL
      for (int w = 0; w < Wide; ++w) sum[r][w] = multiply_add(sum[r][w], value, vectors[w]);
    }
  }
}

// q k^T of exactly `Rows` queries, which are `turned`: [size][tile rows].
template <int Rows, int Wide>
static void score_tile(const AttentionJob& job, const float* turned, int64_t key, float* scores) {
  F16 sum[Rows][Wide];
  product_tile<Rows, Wide>(turned, 1, attention_tile.rows, job.keys_t + key, job.keys_wide, job.size, sum);
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) SPARSECC_UNROLL
  for (int w = 0; w < Wide; ++w) store(scores + r * job.score_stride + key + w * kGroup, sum[r][w]);
}

// Rows of weights, not yet divided by their sums, times the values.
template <int Rows, int Wide>
static void value_tile(const AttentionJob& job, const float* weights, const float* shares, int64_t column,
                       float* y) {
  F16 sum[Rows][Wide];
  product_tile<Rows, Wide>(weights, job.score_stride, 1, job.values + column, job.size_wide, job.keys, sum);
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const Vec share = splat(shares[r]);
    SPARSECC_UNROLL
    for (int w = 0; w < Wide; ++w) {
      const int64_t left = job.size - column - w * kGroup;
      SPARSECC_UNROLL
      for (int p = 0; p < kParts; ++p) sum[r][w].part[p] *= share;
      store_first(y + r * job.y_stride + column + w * kGroup, sum[r][w], left < kGroup ? left : kGroup);
    }
  }
}

// Calls function<Rows, Wide> of exactly these numbers, 1 <= rows <= Rows, 1 <= wide <= Wide.
template <int Rows, int Wide, template <int, int> class Function, class... Arguments>
static void call_tile(int rows, int wide, Arguments... arguments) {
  if constexpr (Rows > 1)
    if (rows < Rows) return call_tile<Rows - 1, Wide, Function>(rows, wide, arguments...);
  if constexpr (Wide > 1)
    if (wide < Wide) return call_tile<Rows, Wide - 1, Function>(rows, wide, arguments...);
  Function<Rows, Wide>::run(arguments...);
}

template <int Rows, int Wide>
struct Scores {
  static void run(const AttentionJob* job, const float* turned, int64_t key, float* scores) {
    score_tile<Rows, Wide>(*job, turned, key, scores);
  }
};

template <int Rows, int Wide>
struct Values {
  static void run(const AttentionJob* job, const float* weights, const float* shares, int64_t column,
                  float* y) {
    value_tile<Rows, Wide>(*job, weights, shares, column, y);
  }
};

// Vectors [0, vectors) in runs of nearly equal length, at most the tile's width.
template <class Function>
SPARSECC_INLINE void for_each_run(int64_t vectors, Function function) {
  constexpr int most = attention_tile.wide;
  const int64_t runs = (vectors + most - 1) / most;
  int64_t first = 0;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t wide = (vectors - first + runs - run - 1) / (runs - run);
    function(first * kGroup, (int)wide);
    first += wide;
  }
}

constexpr int kSoftmaxRows = kParts == 1 ? 4 : 2;

// `Rows` rows of scores to exp(score - largest), and one over their sums. A few rows together: one alone would mostly
// wait for its own sums.
template <int Rows>
static void softmax_rows(const AttentionJob& job, float* scores, int64_t row, float* shares) {
  // In locals, since scores are stored between uses.
  const int64_t stride = job.score_stride, keys = job.keys, whole = keys / kGroup * kGroup, rest = keys - whole;
  const int64_t mask_stride = job.mask_row_stride, key_stride = job.mask_key_stride;
  const float* mask = job.mask == nullptr ? nullptr : job.mask + row * mask_stride;
  const Vec scale = splat(job.scale);
  const auto masked = [=](int r, int64_t key, int64_t n) __attribute__((always_inline)) {
    F16 score = load(scores + r * stride + key);
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) score.part[p] *= scale;
    if (mask == nullptr) return score;
    const float* from = mask + r * mask_stride + key * key_stride;
    return add(score, key_stride == 0 ? broadcast(*from) : load_first(from, n));
  };
  F16 most[Rows], sum[Rows];
  float largest[Rows];
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    most[r] = broadcast(-__builtin_inff());
    sum[r] = broadcast(0.0f);
  }
  for (int64_t key = 0; key < whole; key += kGroup) SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const F16 score = masked(r, key, kGroup);
    store(scores + r * stride + key, score);
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) most[r].part[p] = at_least(score.part[p], most[r].part[p]);
  }
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    largest[r] = most_of_lanes(most[r]);
    if (rest == 0) continue;
    float* last = scores + r * stride + whole;
    store(last, masked(r, whole, rest));
    for (int64_t i = 0; i < rest; ++i) largest[r] = last[i] > largest[r] ? last[i] : largest[r];
  }
  const auto weight = [=](const float* from, float most_of_row) __attribute__((always_inline)) {
    F16 v = load(from);
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) v.part[p] = exp_vec(v.part[p] - splat(most_of_row));
    return v;
  };
  for (int64_t key = 0; key < whole; key += kGroup) SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const F16 v = weight(scores + r * stride + key, largest[r]);
    store(scores + r * stride + key, v);
    sum[r] = add(sum[r], v);
  }
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    if (rest > 0) {
      float* last = scores + r * stride + whole;
      const F16 v = first_lanes(weight(last, largest[r]), rest);
      store(last, v);
      sum[r] = add(sum[r], v);
    }
    shares[r] = 1.0f / sum_of_lanes(sum[r]);
  }
}

static void attention(const AttentionJob* all) {
  const AttentionJob& job = *all;
  constexpr int tile = attention_tile.rows;
  const int64_t rows = job.queries;
  float shares[kMostBlockRows];
  for (int64_t row = 0; row < rows; row += tile)
    for (int64_t i = 0; i < job.size; i += kGroup)
      transpose_tile(job.q + row * job.q_stride + i, job.q_stride,
                     rows - row < tile ? rows - row : tile, job.size - i < kGroup ? job.size - i : kGroup,
                     job.turned + row * job.size + i * tile, tile);
  for_each_run((job.keys + kGroup - 1) / kGroup, [&](int64_t key, int wide) {
    for (int64_t row = 0; row < rows; row += tile)
      call_tile<tile, attention_tile.wide, Scores>((int)(rows - row < tile ? rows - row : tile), wide, &job,
                                                   (const float*)job.turned + row * job.size, key,
                                                   job.scores + row * job.score_stride);
  });
  int64_t next = 0;
  for (; next + kSoftmaxRows <= rows; next += kSoftmaxRows)
    softmax_rows<kSoftmaxRows>(job, job.scores + next * job.score_stride, next, shares + next);
  for (; next < rows; ++next) softmax_rows<1>(job, job.scores + next * job.score_stride, next, shares + next);
  for_each_run(job.size_wide / kGroup, [&](int64_t column, int wide) {
    for (int64_t row = 0; row < rows; row += tile) {
      const int count = (int)(rows - row < tile ? rows - row : tile);
      call_tile<tile, attention_tile.wide, Values>(
          count, wide, &job, (const float*)job.scores + row * job.score_stride, (const float*)shares + row,
          column, job.y + row * job.y_stride);
    }
  });
}

static void pack_attention(const AttentionPackJob* job) {
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  for (int64_t key = 0; key < job->keys; key += kGroup)
    for (int64_t i = 0; i < job->size; i += kGroup)
      transpose_tile(job->k + key * job->k_stride + i, job->k_stride, least(kGroup, job->keys - key),
                     least(kGroup, job->size - i), job->keys_t + i * job->keys_wide + key, job->keys_wide);
  if (job->keys < job->keys_wide)
    for (int64_t i = 0; i < job->size; ++i)
      for (int64_t key = job->keys; key < job->keys_wide; ++key)
        job->keys_t[i * job->keys_wide + key] = 0.0f;
  for (int64_t key = 0; key < job->keys; ++key)
    for (int64_t i = 0; i < job->size; i += kGroup)
      store(job->values + key * job->size_wide + i,
            load_first(job->v + key * job->v_stride + i, least(kGroup, job->size - i)));
}
