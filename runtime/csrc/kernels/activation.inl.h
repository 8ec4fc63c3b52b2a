// Activations over whole vectors. Comparisons are written so that NaN passes through.
#pragma once

SPARSECC_INLINE Vec at_least(Vec x, Vec low) { return x < low ? low : x; }
SPARSECC_INLINE Vec at_most(Vec x, Vec high) { return x > high ? high : x; }

// Cephes expf: x = n ln 2 + r, polynomial in r; the scale 2^n is applied in two halves so that
// results near the ends of the range come out as denormal, zero or infinite.
SPARSECC_INLINE Vec exp_vec(Vec x) {
  x = at_most(at_least(x, splat(-104.0f)), splat(89.0f));
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * 1.44269504f + shift) - shift;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecInt power = __builtin_convertvector(n, VecInt);
  const VecInt half = power >> 1;
  const Vec low = (Vec)((VecUint)(half + 127) << 23);
  const Vec high = (Vec)((VecUint)(power - half + 127) << 23);
  return p * low * high;
}

SPARSECC_INLINE Vec sigmoid_vec(Vec x) { return 1.0f / (1.0f + exp_vec(-x)); }

struct Ratio {
  Vec over, under;
};

// Odd rational approximation, error below 4 ulp (the form Eigen uses).
SPARSECC_INLINE Ratio tanh_ratio(Vec x) {
  const Vec z = at_most(at_least(x, splat(-7.90531110763549805f)), splat(7.90531110763549805f));
  const Vec s = z * z;
  Vec p = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * s + -8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  Vec q = s * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return {z * p, q};
}

SPARSECC_INLINE Vec tanh_vec(Vec x) {
  const Ratio ratio = tanh_ratio(x);
  return ratio.over / ratio.under;
}

// a / b to about 1 ulp, for b whose reciprocal is a normal number: where division is slow, by its estimate.
SPARSECC_INLINE Vec quotient(Vec a, Vec b) {
#if SPARSECC_AVX512
  Vec r = (Vec)_mm512_rcp14_ps((__m512)b);
  r = r * (2.0f - b * r);
  const Vec q = a * r;
  return q + (a - q * b) * r;
#else
  return a / b;
#endif
}

// Odd rational approximation (the form Eigen uses), error below 4e-7; exactly 1 in magnitude from 4 on.
SPARSECC_INLINE Vec erf_vec(Vec x) {
  const Vec z = at_most(at_least(x, splat(-4.0f)), splat(4.0f));
  const Vec s = z * z;
  Vec p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  Vec q = s * -1.45660718464996e-05f + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  const Vec near = quotient(z * p, q);
  return z >= 4.0f ? splat(1.0f) : (z <= -4.0f ? splat(-1.0f) : near);
}

template <class Function>
SPARSECC_INLINE void for_each_vec(float* data, int64_t groups, Function function) {
  for (int64_t i = 0; i < groups * kParts; ++i) {
    VecLoose* at = (VecLoose*)(data + i * kLanes);
    *at = function((Vec)*at);
  }
}

// In place over groups * 16 floats.
__attribute__((noinline)) static void activate(float* data, int64_t groups, const Epilogue& epilogue) {
  const Vec zero = splat(0.0f), a = splat(epilogue.alpha), b = splat(epilogue.beta);
  switch (epilogue.activation) {
    case SPARSECC_ACT_RELU:
      return for_each_vec(data, groups, [=](Vec x) { return at_least(x, zero); });
    case SPARSECC_ACT_LEAKY_RELU:
      return for_each_vec(data, groups, [=](Vec x) { return x < zero ? x * a : x; });
    case SPARSECC_ACT_CLIP:
      return for_each_vec(data, groups, [=](Vec x) { return at_most(at_least(x, a), b); });
    case SPARSECC_ACT_SIGMOID:
      return for_each_vec(data, groups, [](Vec x) { return sigmoid_vec(x); });
    case SPARSECC_ACT_TANH:
      return for_each_vec(data, groups, [](Vec x) { return tanh_vec(x); });
    case SPARSECC_ACT_GELU:
      return for_each_vec(data, groups, [](Vec x) { return x * 0.5f * (1.0f + erf_vec(x * 0.70710678f)); });
    case SPARSECC_ACT_GELU_TANH:
      return for_each_vec(data, groups, [](Vec x) {
        return x * 0.5f * (1.0f + tanh_vec(x * 0.79788456f * (1.0f + x * x * 0.044715f)));
      });
    case SPARSECC_ACT_SILU:
      return for_each_vec(data, groups, [](Vec x) { return x * sigmoid_vec(x); });
    case SPARSECC_ACT_HARD_SWISH:
      return for_each_vec(data, groups, [=](Vec x) {
        return x * at_most(at_least(x * (1.0f / 6.0f) + 0.5f, zero), splat(1.0f));
      });
    default:
      return;
  }
}
