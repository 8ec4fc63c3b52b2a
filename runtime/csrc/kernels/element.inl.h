// Single weights: 16 * Wide rows of x (or pixels) in the lanes, one broadcast weight per step.
#pragma once

template <int Wide>
constexpr int kElementChains = Wide * kParts >= 8  ? 1
                               : Wide * kParts > 2 ? 2
                                                   : 4;

template <int Wide>
static void element_wide(const ElementJob& job) {
  constexpr int64_t stride = Wide * kGroup;
  const ElementView& w = job.weight;
  const uint16_t* row = w.row;
  const uint16_t* index = w.index;
  const float* value = w.value;
  const Vec low = splat(job.low), high = splat(job.high);
  for (int64_t run = 0; run < w.run_count; ++run) {
    const uint32_t count = w.runs[run].count;
    for (uint32_t r = 0; r < w.runs[run].rows; ++r) {
      const int64_t output = *row++;
      float* sums = job.sums + output * stride;
      F16 sum[kElementChains<Wide>][Wide];
      SPARSECC_UNROLL
      for (int v = 0; v < Wide; ++v)
        sum[0][v] = job.bias != nullptr ? broadcast(job.bias[output]) : load(sums + v * kGroup);
      SPARSECC_UNROLL
      for (int c = 1; c < kElementChains<Wide>; ++c)
        for (int v = 0; v < Wide; ++v) sum[c][v] = broadcast(0.0f);
      const auto one = [&](uint32_t i, int c) __attribute__((always_inline)) {
        const float* x = job.panel + index[i] * stride;
        __asm__("" : "+r"(x));
        const F16 weight = broadcast(value[i]);
        SPARSECC_UNROLL
        for (int v = 0; v < Wide; ++v) sum[c][v] = multiply_add(sum[c][v], weight, load(x + v * kGroup));
      };
      uint32_t i = 0;
      for (; i + kElementChains<Wide> <= count; i += kElementChains<Wide>) SPARSECC_UNROLL
      for (int c = 0; c < kElementChains<Wide>; ++c) one(i + c, c);
      if constexpr (kElementChains<Wide> == 4)
        if ((count & 2) != 0) {
          one(i++, 0);
          one(i++, 1);
        }
      if (kElementChains<Wide> > 1 && (count & 1) != 0) one(i, 2 % kElementChains<Wide>);
      SPARSECC_UNROLL
      for (int v = 0; v < Wide; ++v) {
        SPARSECC_UNROLL
        for (int c = 1; c < kElementChains<Wide>; ++c) sum[0][v] = add(sum[0][v], sum[c][v]);
      }
      if (job.direct) {
        float* y = job.target.y + output * job.target.output_stride;
        SPARSECC_UNROLL
        for (int v = 0; v < Wide; ++v) {
          for (int p = 0; p < kParts; ++p)
            sum[0][v].part[p] = at_most(at_least(sum[0][v].part[p], low), high);
          const int64_t left = job.count - v * kGroup;
          store_first(y + v * kGroup, sum[0][v], left < kGroup ? left : kGroup);
        }
      } else {
        SPARSECC_UNROLL
        for (int v = 0; v < Wide; ++v) store(sums + v * kGroup, sum[0][v]);
      }
      index += count;
      value += count;
    }
  }
}

template <int Wide>
static void element_of(const ElementJob& job) {
  if (job.wide == Wide) return element_wide<Wide>(job);
  if constexpr (Wide > 1) element_of<Wide - 1>(job);
}
