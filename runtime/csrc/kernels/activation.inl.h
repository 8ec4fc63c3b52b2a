// Activations over whole vectors. Comparisons are written so that NaN passes through.
#pragma once

#if SPARSECC_AVX512
// One instruction, which returns its second operand where either is NaN.
SPARSECC_INLINE Vec at_least(Vec x, Vec low) { return (Vec)_mm512_max_ps((__m512)low, (__m512)x); }
SPARSECC_INLINE Vec at_most(Vec x, Vec high) { return (Vec)_mm512_min_ps((__m512)high, (__m512)x); }
#else
SPARSECC_INLINE Vec at_least(Vec x, Vec low) { return x < low ? low : x; }
SPARSECC_INLINE Vec at_most(Vec x, Vec high) { return x > high ? high : x; }
#endif

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
#if SPARSECC_AVX512
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const VecInt power = __builtin_convertvector(n, VecInt);
  const VecInt half = power >> 1;
  const Vec low = (Vec)((VecUint)(half + 127) << 23);
  const Vec high = (Vec)((VecUint)(power - half + 127) << 23);
  return p * low * high;
#endif
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

// Beyond -87 the reciprocal of the denominator would be no normal number.
SPARSECC_INLINE Vec sigmoid_vec(Vec x) {
  return quotient(splat(1.0f), 1.0f + exp_vec(at_most(-x, splat(87.0f))));
}

struct Ratio {
  Vec over, under;
};

// Where the ratio below rounds to exactly 1, which depends on the roundings on the way: without it 1 + tanh(x), times
// a large -x, would not vanish.
#ifdef __FP_FAST_FMAF
constexpr float kTanhEnd = 7.99881172180175781f;
#else
constexpr float kTanhEnd = 7.90531110763549805f;
#endif

// Odd rational approximation, error below 4 ulp (the form Eigen uses).
SPARSECC_INLINE Ratio tanh_ratio(Vec x) {
  const Vec z = at_most(at_least(x, splat(-kTanhEnd)), splat(kTanhEnd));
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

#if SPARSECC_AVX512
// Both Gelus are max(x, 0) - g(|x|), where g is small and smooth: sixteen pieces of width 0.4, whose coefficients
// one permute each picks from a register. A piece is a polynomial in the distance from its middle, in widths, fitted
// by least squares at Chebyshev points; the first is exactly 0 at 0, the last, where g is below 4e-8, is 0. Error
// below 3e-8 beside the rounding of the result.
constexpr int kPieces = 16, kPiecePowers = 6;
alignas(64) const float kGeluPieces[kPiecePowers][kPieces] = {
    {0.0f, 0.137831286f, 0.169484332f, 0.138083622f, 0.087678872f, 0.0455002636f, 0.0196740814f,
     0.00715436228f, 0.00219884072f, 0.000572791148f, 0.000126685263f, 2.3815348e-05f, 3.80802953e-06f,
     5.18164427e-07f, 6.00214349e-08f, 0.0f},
    {0.199999973f, 0.0789080858f, -0.00795913022f, -0.0471814387f, -0.0490696207f, -0.0340927243f,
     -0.0182197355f, -0.00784325227f, -0.00277677691f, -0.000817495165f, -0.000201459916f,
     -4.17338015e-05f, -7.28839586e-06f, -1.07524806e-06f, -1.34206147e-07f, 0.0f},
    {-0.0638300925f, -0.0542086139f, -0.0315189175f, -0.00870050862f, 0.00496871118f, 0.00863861665f,
     0.00673655886f, 0.00369828823f, 0.00157163909f, 0.000536499836f, 0.000149868589f, 3.46289562e-05f,
     6.66374945e-06f, 1.0728977e-06f, 1.45007192e-07f, 0.0f},
    {-6.86074645e-06f, 0.00603347272f, 0.00830581039f, 0.00636310037f, 0.00272613741f, 9.9569661e-08f,
     -0.00100900407f, -0.000907841953f, -0.000507815508f, -0.000210539292f, -6.85193663e-05f,
     -1.79787567e-05f, -3.86061947e-06f, -6.84781014e-07f, -1.00963661e-07f, 0.0f},
    {0.00173178129f, 0.00113336626f, -1.66420105e-05f, -0.000819450186f, -0.000865774928f,
     -0.000461389165f, -7.8102159e-05f, 8.73557219e-05f, 9.40313475e-05f, 5.31954975e-05f,
     2.13544517e-05f, 6.59162606e-06f, 1.62005415e-06f, 3.23055701e-07f, 5.28752402e-08f, 0.0f},
    {-5.71886085e-05f, -0.000202335534f, -0.000223038369f, -8.4277417e-05f, 5.34377905e-05f,
     9.1347516e-05f, 5.58433967e-05f, 1.30900989e-05f, -6.46150238e-06f, -8.11167683e-06f,
     -4.49046547e-06f, -1.70169346e-06f, -4.8765736e-07f, -1.10121746e-07f, -2.00269525e-08f, 0.0f},
};
alignas(64) const float kGeluTanhPieces[kPiecePowers][kPieces] = {
    {0.0f, 0.137838826f, 0.169568315f, 0.138297245f, 0.087863043f, 0.0454023033f, 0.0192768425f,
     0.00668889098f, 0.00186956429f, 0.000412580383f, 7.0246293e-05f, 9.00212581e-06f, 8.46392084e-07f,
     5.68856784e-08f, 2.66209832e-09f, 0.0f},
    {0.199999973f, 0.0789364725f, -0.00783348549f, -0.0470904559f, -0.0492402092f, -0.0344397053f,
     -0.0184239838f, -0.0077833836f, -0.0025972561f, -0.000675272371f, -0.000134049318f,
     -1.98503494e-05f, -2.13940439e-06f, -1.63624108e-07f, -8.65501892e-09f, 0.0f},
    {-0.0638300776f, -0.0541710667f, -0.0314803161f, -0.00878573861f, 0.00482432358f, 0.00863006059f,
     0.00686677778f, 0.00380680873f, 0.00158351264f, 0.000499115034f, 0.000117899835f, 2.04788648e-05f,
     2.5579161e-06f, 2.24316295e-07f, 1.34707943e-08f, 0.0f},
    {-7.01368253e-06f, 0.00605048798f, 0.00828230474f, 0.0063173119f, 0.00274189399f, 6.12393924e-05f,
     -0.000988170388f, -0.000936573313f, -0.000535796105f, -0.000215620938f, -6.26129986e-05f,
     -1.30494209e-05f, -1.92160383e-06f, -1.95982068e-07f, -1.35396947e-08f, 0.0f},
    {0.00174086948f, 0.0011302717f, -2.94207221e-05f, -0.000813629653f, -0.00084687263f,
     -0.000461543037f, -9.34144409e-05f, 8.10288984e-05f, 9.88796455e-05f, 5.80129526e-05f,
     2.2184704e-05f, 5.81452423e-06f, 1.04903495e-06f, 1.28984325e-07f, 1.06362359e-08f, 0.0f},
    {-5.84780682e-05f, -0.000205881661f, -0.000222130679f, -7.91933999e-05f, 5.24342395e-05f,
     8.6330605e-05f, 5.55364713e-05f, 1.6020429e-05f, -5.37781852e-06f, -8.86738417e-06f,
     -5.11319649e-06f, -1.76876972e-06f, -3.96978777e-07f, -5.86471813e-08f, -5.67517544e-09f, 0.0f},
};

SPARSECC_INLINE Vec gelu_vec(Vec x, const Vec (&of_power)[kPiecePowers]) {
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, the piece, in the low bits
  const Vec size = at_most((Vec)((VecUint)x & 0x7fffffffu), splat(6.0f));
  const Vec rounded = size * 2.5f + shift;
  const Vec away = size * 2.5f - (rounded - shift);
  const auto coefficient = [&](int power) __attribute__((always_inline)) {
    return (Vec)_mm512_permutexvar_ps((__m512i)rounded, (__m512)of_power[power]);
  };
  Vec g = coefficient(kPiecePowers - 1);
  SPARSECC_UNROLL
  for (int power = kPiecePowers - 2; power >= 0; --power) g = g * away + coefficient(power);
  return at_least(x, splat(0.0f)) - g;
}
#else
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
  const Vec near = z * p / q;
  return z >= 4.0f ? splat(1.0f) : (z <= -4.0f ? splat(-1.0f) : near);
}
#endif

template <class Function>
SPARSECC_INLINE void for_each_vec(float* data, int64_t groups, Function function) {
  for (int64_t i = 0; i < groups * kParts; ++i) {
    VecLoose* at = (VecLoose*)(data + i * kLanes);
    *at = function((Vec)*at);
  }
}

#if SPARSECC_AVX512
SPARSECC_INLINE void gelu(float* data, int64_t groups, const float (&pieces)[kPiecePowers][kPieces]) {
  Vec of_power[kPiecePowers];
  SPARSECC_UNROLL
  for (int power = 0; power < kPiecePowers; ++power) of_power[power] = *(const Vec*)pieces[power];
  for_each_vec(data, groups, [&](Vec x) { return gelu_vec(x, of_power); });
}
#endif

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
#if SPARSECC_AVX512
    case SPARSECC_ACT_GELU:
      return gelu(data, groups, kGeluPieces);
    case SPARSECC_ACT_GELU_TANH:
      return gelu(data, groups, kGeluTanhPieces);
#else
    case SPARSECC_ACT_GELU:
      return for_each_vec(data, groups, [](Vec x) { return x * 0.5f * (1.0f + erf_vec(x * 0.70710678f)); });
    case SPARSECC_ACT_GELU_TANH:
      return for_each_vec(data, groups, [](Vec x) {
        return x * 0.5f * (1.0f + tanh_vec(x * 0.79788456f * (1.0f + x * x * 0.044715f)));
      });
#endif
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
