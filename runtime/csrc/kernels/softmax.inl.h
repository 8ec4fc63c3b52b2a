// Softmax of numbers that stand side by side.
#pragma once

// y[i] = exp(x[i] - largest) / their sum; y may be x. Uses what attention.inl.h defines.
static void softmax(const float* x, int64_t count, float* y) {
  F16 most = broadcast(-__builtin_inff()), sums = broadcast(0.0f);
  const int64_t whole = count / kGroup * kGroup, rest = count - whole;
  for (int64_t i = 0; i < whole; i += kGroup) {
    const F16 v = load(x + i);
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) most.part[p] = at_least(v.part[p], most.part[p]);
  }
  float largest = most_of_lanes(most);
  for (int64_t i = whole; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
  const auto weights = [=](F16 v) __attribute__((always_inline)) {
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) v.part[p] = exp_vec(v.part[p] - splat(largest));
    return v;
  };
  for (int64_t i = 0; i < whole; i += kGroup) {
    const F16 v = weights(load(x + i));
    store(y + i, v);
    sums = add(sums, v);
  }
  if (rest > 0) {
    const F16 v = first_lanes(weights(load_first(x + whole, rest)), rest);
    store_first(y + whole, v, rest);
    sums = add(sums, v);
  }
  const Vec share = splat(1.0f / sum_of_lanes(sums));
  for (int64_t i = 0; i < count; i += kGroup) {
    const int64_t n = count - i < kGroup ? count - i : kGroup;
    F16 v = load_first(y + i, n);
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) v.part[p] *= share;
    store_first(y + i, v, n);
  }
}
