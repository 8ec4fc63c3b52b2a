// The inner loops of convolution on quad planes: a tile of outputs by units of sixteen pixels in registers.
#pragma once

// A unit of x as the products want it, and the weights of one output by one quad.
#if SPARSECC_VNNI
constexpr TapForm kForm = TapForm::kBytes;
typedef I16 XUnit;
typedef int32_t __attribute__((may_alias)) Taps;
struct TapVec {
  VecInt all;
};

SPARSECC_INLINE XUnit widen(const I16& quads) { return quads; }
SPARSECC_INLINE TapVec spread(const Taps& taps) { return {taps - VecInt{}}; }

SPARSECC_INLINE void dot(I16& sum, const XUnit& x, const TapVec& w) {
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p)
#if SPARSECC_AVX512
    sum.part[p] = (VecInt)_mm512_dpbusd_epi32((__m512i)sum.part[p], (__m512i)x.part[p], (__m512i)w.all);
#else
    sum.part[p] = (VecInt)_mm256_dpbusd_avx_epi32((__m256i)sum.part[p], (__m256i)x.part[p], (__m256i)w.all);
#endif
}
#elif SPARSECC_NEON && SPARSECC_DOTPROD
typedef I16 XUnit;
typedef int32_t __attribute__((may_alias)) Taps;

#if SPARSECC_I8MM
constexpr TapForm kForm = TapForm::kBytes;

SPARSECC_INLINE XUnit widen(const I16& quads) { return quads; }

template <int Lane>
SPARSECC_INLINE VecInt dot_lane(VecInt sum, VecInt x, int8x16_t taps) {
  return (VecInt)vusdotq_laneq_s32((int32x4_t)sum, (uint8x16_t)x, taps, Lane);
}
#else
constexpr TapForm kForm = TapForm::kSignedBytes;

SPARSECC_INLINE XUnit widen(const I16& quads) {
  XUnit x;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) x.part[p] = (VecInt)((VecUint)quads.part[p] ^ 0x80808080u);
  return x;
}

template <int Lane>
SPARSECC_INLINE VecInt dot_lane(VecInt sum, VecInt x, int8x16_t taps) {
  return (VecInt)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)x, taps, Lane);
}
#endif
#else
// Channels 0 and 2 of a pixel as 16-bit integers side by side, and channels 1 and 3.
constexpr TapForm kForm = TapForm::kPairs;
struct XUnit {
  I16 even, odd;
};
struct __attribute__((may_alias)) Taps {
  int32_t even, odd;
};
struct TapVec {
  VecInt even, odd;
};

SPARSECC_INLINE XUnit widen(const I16& quads) {
  XUnit x;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) {
    x.even.part[p] = quads.part[p] & 0x00ff00ff;
    x.odd.part[p] = (VecInt)((VecUint)quads.part[p] >> 8) & 0x00ff00ff;
  }
  return x;
}

SPARSECC_INLINE TapVec spread(const Taps& taps) { return {taps.even - VecInt{}, taps.odd - VecInt{}}; }

// The sum of the products of both 16-bit halves. A byte times an int8 fits 16 bits: |255 * -128| < 2^15.
SPARSECC_INLINE VecInt pair_products(VecInt x, VecInt w) {
#if SPARSECC_AVX512
  return (VecInt)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif SPARSECC_AVX2
  return (VecInt)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#else
  typedef int16_t Halves __attribute__((vector_size(kLanes * 4)));
  const VecInt both = (VecInt)((Halves)x * (Halves)w);
  return ((VecInt)((VecUint)both << 16) >> 16) + (both >> 16);
#endif
}

#if SPARSECC_NEON
// Both products of pairs in 32 bits, then the sum of neighbours.
SPARSECC_INLINE VecInt four_products(VecInt even, VecInt odd, VecInt w_even, VecInt w_odd) {
  const int16x8_t x[2] = {(int16x8_t)even, (int16x8_t)odd}, w[2] = {(int16x8_t)w_even, (int16x8_t)w_odd};
  const int32x4_t low = vmlal_s16(vmull_s16(vget_low_s16(x[0]), vget_low_s16(w[0])), vget_low_s16(x[1]),
                                  vget_low_s16(w[1]));
  const int32x4_t high = vmlal_high_s16(vmull_high_s16(x[0], w[0]), x[1], w[1]);
  return (VecInt)vpaddq_s32(low, high);
}
#endif

// Sums may wrap, as they do in onnxruntime: unsigned.
SPARSECC_INLINE void dot(I16& sum, const XUnit& x, const TapVec& w) {
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) {
#if SPARSECC_NEON
    const VecInt products = four_products(x.even.part[p], x.odd.part[p], w.even, w.odd);
#else
    const VecInt products = pair_products(x.even.part[p], w.even) + pair_products(x.odd.part[p], w.odd);
#endif
    sum.part[p] = (VecInt)((VecUint)sum.part[p] + (VecUint)products);
  }
}
#endif
static_assert(sizeof(Taps) == tap_bytes(kForm));

template <int Rows, int Units>
struct PlaneSums {
  I16 at[Rows][Units];
};

// The products of one quad of inputs.
#if SPARSECC_NEON && SPARSECC_DOTPROD
// A register has the weights of four outputs.
template <int Rows, int Units, int Row = 0>
SPARSECC_INLINE void plane_products(PlaneSums<Rows, Units>& sum, const XUnit (&x)[Units], const Taps* taps) {
  int8x16_t four = vld1q_s8((const int8_t*)(taps + Row));
  __asm__("" : "+w"(four));  // by one load, not lane by lane
  SPARSECC_UNROLL
  for (int u = 0; u < Units; ++u) SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) {
    const VecInt bytes = x[u].part[p];
    sum.at[Row][u].part[p] = dot_lane<0>(sum.at[Row][u].part[p], bytes, four);
    sum.at[Row + 1][u].part[p] = dot_lane<1>(sum.at[Row + 1][u].part[p], bytes, four);
    sum.at[Row + 2][u].part[p] = dot_lane<2>(sum.at[Row + 2][u].part[p], bytes, four);
    sum.at[Row + 3][u].part[p] = dot_lane<3>(sum.at[Row + 3][u].part[p], bytes, four);
  }
  if constexpr (Row + 4 < Rows) plane_products<Rows, Units, Row + 4>(sum, x, taps);
}
#else
template <int Rows, int Units>
SPARSECC_INLINE void plane_products(PlaneSums<Rows, Units>& sum, const XUnit (&x)[Units], const Taps* taps) {
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const TapVec w = spread(taps[r]);
    SPARSECC_UNROLL
    for (int u = 0; u < Units; ++u) dot(sum.at[r][u], x[u], w);
  }
}
#endif

template <int Rows, int Units>
SPARSECC_INLINE void plane_sums(const PlaneJob& job, int64_t begin, int64_t end, const Taps* taps,
                                int64_t stride, const int32_t* start, const PlaneUnit* unit,
                                PlaneSums<Rows, Units>& sum) {
  const uint8_t* base[Units];
  SPARSECC_UNROLL
  for (int u = 0; u < Units; ++u) {
    base[u] = job.x + (int64_t)unit[u].from * kLanesOfQuad;
    SPARSECC_UNROLL
    for (int r = 0; r < Rows; ++r) SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) sum.at[r][u].part[p] = start[r] - VecInt{};
  }
  for (int64_t i = begin; i < end; ++i, taps += stride) {
    const int64_t offset = (int64_t)job.offset[i] * kLanesOfQuad;
    XUnit x[Units];
    SPARSECC_UNROLL
    for (int u = 0; u < Units; ++u) x[u] = widen(load_unit(base[u] + offset));
    plane_products<Rows, Units>(sum, x, taps);
  }
}

// One quad of outputs of one unit, to bytes.
SPARSECC_INLINE void plane_store(const PlaneJob& job, int64_t output, const I16* sums, int64_t sum_stride,
                                 const PlaneUnit& unit) {
  const PlaneEpilogue& e = *job.epilogue;
  const int64_t at = (output / kLanesOfQuad * job.y_plane + unit.to) * kLanesOfQuad;
  I16 residual = {};
  if (job.residual != nullptr) residual = load_kept(job.residual + at, unit.kept);
  I16 y;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) {
    VecInt c[kLanesOfQuad];
    SPARSECC_UNROLL
    for (int k = 0; k < kLanesOfQuad; ++k) {
      Vec z = __builtin_convertvector(sums[k * sum_stride].part[p], Vec) * splat(e.scale[output + k]) +
              splat(e.bias[output + k]);
      if (job.residual != nullptr)
        z += __builtin_convertvector(channel_of(residual.part[p], k), Vec) * splat(e.residual_scale);
      c[k] = rounded(z) + e.zero_point;
    }
    y.part[p] = pack_quads(c[0], c[1], c[2], c[3], {e.low, e.high});
  }
  store_kept(job.y + at, y, unit.kept);
}

// Tall: outputs of a group. Rows of them are in registers at a time.
template <int Tall, int Rows, int Units>
static void plane_tile(const PlaneJob& job, int64_t group, const PlaneUnit* unit) {
  static_assert(Tall % Rows == 0 && Rows % kLanesOfQuad == 0);
  const int64_t begin = job.start[group], end = job.start[group + 1];
  for (int first = 0; first < Tall; first += Rows) {
    const int64_t output = group * Tall + first;
    if (output >= job.quads * kLanesOfQuad) return;
    PlaneSums<Rows, Units> sum;
    plane_sums<Rows, Units>(job, begin, end, (const Taps*)job.values + begin * Tall + first, Tall,
                            job.epilogue->start + output, unit, sum);
    SPARSECC_UNROLL
    for (int r = 0; r < Rows; r += kLanesOfQuad) {
      if (output + r >= job.quads * kLanesOfQuad) return;
      SPARSECC_UNROLL
      for (int u = 0; u < Units; ++u) plane_store(job, output + r, &sum.at[r][u], Units, unit[u]);
    }
  }
}

template <int Tall, int Rows, int Units>
SPARSECC_INLINE void plane_tile_of(const PlaneJob& job, int64_t group, const PlaneUnit* unit, int64_t units) {
  if (units == Units) return plane_tile<Tall, Rows, Units>(job, group, unit);
  if constexpr (Units > 1) plane_tile_of<Tall, Rows, Units - 1>(job, group, unit, units);
}

template <int Tall, int Rows, int Most>
static void plane_tiles(const PlaneJob& job) {
  const int64_t tiles = (job.unit_count + Most - 1) / Most;
  for (int64_t group = job.group_begin; group < job.group_end; ++group) {
    int64_t first = 0;
    for (int64_t t = 0; t < tiles; ++t) {  // tiles of nearly equal width
      const int64_t units = (job.unit_count - first + tiles - t - 1) / (tiles - t);
      plane_tile_of<Tall, Rows, Most>(job, group, job.units + first, units);
      first += units;
    }
  }
}
