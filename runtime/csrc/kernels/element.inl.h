// Single weights, or Tall of them that share an input: 16 * Wide rows of x (or pixels) in the lanes, loaded
// once per Tall broadcast weights.
#pragma once

template <int Tall, int Wide>
constexpr int kElementChains = Tall * Wide * kParts >= 8  ? 1
                               : Tall * Wide * kParts > 2 ? 2
                                                          : 4;

template <int Tall, int Wide>
SPARSECC_INLINE void element_direct(const ElementJob& job, int64_t output, F16 (&sum)[Tall][Wide]) {
  const Vec low = splat(job.low), high = splat(job.high);
  float* y = job.target.y + output * job.target.output_stride;
  SPARSECC_UNROLL
  for (int t = 0; t < Tall; ++t, y += job.target.output_stride) {
    if (Tall > 1 && output + t >= job.outputs) return;
    SPARSECC_UNROLL
    for (int v = 0; v < Wide; ++v) {
      for (int p = 0; p < kParts; ++p) sum[t][v].part[p] = at_most(at_least(sum[t][v].part[p], low), high);
      const int64_t left = job.count - v * kGroup;
      store_first(y + v * kGroup, sum[t][v], left < kGroup ? left : kGroup);
    }
  }
}

// Rows come in the order of their lengths, so that nobody but this asks in time for what planes hold for them.
template <int Tall, int Wide>
SPARSECC_INLINE void element_prefetch(const ElementJob& job, int64_t output) {
  for (int t = 0; t < Tall; ++t) {
    const int64_t at = (output + t) * job.target.output_stride;
    SPARSECC_UNROLL
    for (int v = 0; v < Wide; ++v) {
      if (job.bias != nullptr && job.added != nullptr) __builtin_prefetch(job.added + at + v * kGroup, 0);
      if (job.direct) __builtin_prefetch(job.target.y + at + v * kGroup, 1);
    }
  }
}

// Where the sums of one output start.
template <int Wide>
SPARSECC_INLINE void element_start(const ElementJob& job, int64_t output, F16 (&sum)[Wide]) {
  SPARSECC_UNROLL
  for (int v = 0; v < Wide; ++v) sum[v] = broadcast(job.bias[output]);
  if (job.added == nullptr || output >= job.outputs) return;
  const float* added = job.added + output * job.target.output_stride;
  SPARSECC_UNROLL
  for (int v = 0; v < Wide; ++v) {
    const int64_t left = job.count - v * kGroup;
    sum[v] = add(sum[v], load_first(added + v * kGroup, left < kGroup ? left : kGroup));
  }
}

template <int Tall, int Wide>
static void element_wide(const ElementJob& job) {
  constexpr int64_t stride = Wide * kGroup;
  constexpr int chains = kElementChains<Tall, Wide>;
  const ElementView& w = job.weight;
  const bool planes = job.direct || job.added != nullptr;
  const uint16_t* row = w.row;
  const uint16_t* index = w.index;
  const float* value = w.value;
  for (int64_t run = 0; run < w.run_count; ++run) {
    const uint32_t count = w.runs[run].count;
    for (uint32_t r = 0; r < w.runs[run].rows; ++r) {
      const int64_t output = *row++ * Tall;
      if (planes) element_prefetch<Tall, Wide>(job, row[kElementAhead - 1] * Tall);
      float* sums = job.sums + output * stride;
      F16 sum[chains][Tall][Wide];
      SPARSECC_UNROLL
      for (int t = 0; t < Tall; ++t) {
        if (job.bias != nullptr) {
          element_start<Wide>(job, output + t, sum[0][t]);
        } else {
          SPARSECC_UNROLL
          for (int v = 0; v < Wide; ++v) sum[0][t][v] = load(sums + t * stride + v * kGroup);
        }
        SPARSECC_UNROLL
        for (int c = 1; c < chains; ++c) SPARSECC_UNROLL
        for (int v = 0; v < Wide; ++v) sum[c][t][v] = broadcast(0.0f);
      }
      const auto one = [&](uint32_t i, int c) __attribute__((always_inline)) {
        const float* x = job.panel + index[i] * stride;
        __asm__("" : "+r"(x));
        if constexpr (Tall == 1) {
          const F16 weight = broadcast(value[i]);
          SPARSECC_UNROLL
          for (int v = 0; v < Wide; ++v)
            sum[c][0][v] = multiply_add(sum[c][0][v], weight, load(x + v * kGroup));
        } else {
          F16 from[Wide];
          SPARSECC_UNROLL
          for (int v = 0; v < Wide; ++v) from[v] = load(x + v * kGroup);
          const Singles<Tall> weights = singles<Tall>(value + i * Tall);
          SPARSECC_UNROLL
          for (int t = 0; t < Tall; ++t) SPARSECC_UNROLL
          for (int v = 0; v < Wide; ++v) sum[c][t][v] = multiply_add(sum[c][t][v], weights, t, from[v]);
        }
      };
      uint32_t i = 0;
      for (; i + chains <= count; i += chains) SPARSECC_UNROLL
      for (int c = 0; c < chains; ++c) one(i + c, c);
      if constexpr (chains == 4)
        if ((count & 2) != 0) {
          one(i++, 0);
          one(i++, 1);
        }
      if (chains > 1 && (count & 1) != 0) one(i, 2 % chains);
      SPARSECC_UNROLL
      for (int t = 0; t < Tall; ++t) SPARSECC_UNROLL
      for (int v = 0; v < Wide; ++v) SPARSECC_UNROLL
      for (int c = 1; c < chains; ++c) sum[0][t][v] = add(sum[0][t][v], sum[c][t][v]);
      if (job.direct) {
        element_direct<Tall, Wide>(job, output, sum[0]);
      } else {
        SPARSECC_UNROLL
        for (int t = 0; t < Tall; ++t) SPARSECC_UNROLL
        for (int v = 0; v < Wide; ++v) store(sums + t * stride + v * kGroup, sum[0][t][v]);
      }
      index += count;
      value += count * Tall;
    }
  }
}

template <int Tall, int Wide>
static void element_of(const ElementJob& job) {
  if (job.wide == Wide) return element_wide<Tall, Wide>(job);
  if constexpr (Wide > 1) element_of<Tall, Wide - 1>(job);
}
