// Gated units: one half of every row is activated and multiplied with the other half.
#pragma once

static void gate_row(const float* gates, const float* ups, int64_t size, const Epilogue& epilogue, float* y) {
  constexpr int64_t kAtOnce = 16;  // vectors
  float part[kAtOnce * kGroup] __attribute__((aligned(64)));
  for (int64_t first = 0; first < size; first += kAtOnce * kGroup) {
    const int64_t count = size - first < kAtOnce * kGroup ? size - first : kAtOnce * kGroup;
    const auto each = [&](auto function) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; i += kGroup) function(i, count - i < kGroup ? count - i : (int64_t)kGroup);
    };
    each([&](int64_t i, int64_t n) { store(part + i, load_first(gates + first + i, n)); });
    activate(part, (count + kGroup - 1) / kGroup, epilogue);
    each([&](int64_t i, int64_t n) {
      F16 v = load(part + i);
      const F16 up = load_first(ups + first + i, n);
      SPARSECC_UNROLL
      for (int p = 0; p < kParts; ++p) v.part[p] *= up.part[p];
      store_first(y + first + i, v, n);
    });
  }
}

static void gate(const GateJob* job) {
  for (int64_t r = 0; r < job->rows; ++r) {
    const float* x = job->x + r * 2 * job->size;
    gate_row(x, x + job->size, job->size, job->epilogue, job->y + r * job->size);
  }
}
