// Cells of recurrent operators, sixteen hidden units at a time.
#pragma once

// sigmoid(x) = 1 / (1 + exp(-x)): only what is below the line.
SPARSECC_INLINE Vec sigmoid_under(Vec x) { return 1.0f + exp_vec(-x); }

SPARSECC_INLINE F16 load_unit(const float* gates, int64_t gate, int64_t hidden, int64_t unit) {
  return load(gates + gate * hidden + unit);
}

SPARSECC_INLINE int64_t units_left(int64_t hidden, int64_t unit) {
  return hidden - unit < kGroup ? hidden - unit : kGroup;
}

// A division takes as long as ten multiplications: products of gates share one.
static void lstm_units(const LstmCellJob& job) {
  const int64_t hidden = job.hidden;
  for (int64_t unit = 0; unit < hidden; unit += kGroup) {
    const int64_t n = units_left(hidden, unit);
    const auto gate = [&](int64_t g) __attribute__((always_inline)) {
      return add(load_unit(job.x_part, g, hidden, unit), load_unit(job.h_part, g, hidden, unit));
    };
    const F16 in = gate(0), out = gate(1), forget = gate(2), cell = gate(3);
    F16 c = load_first(job.c + unit, n), h;
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) {
      const Ratio fresh = tanh_ratio(cell.part[p]);
      c.part[p] = c.part[p] / sigmoid_under(forget.part[p]) +
                  fresh.over / (fresh.under * sigmoid_under(in.part[p]));
      const Ratio shown = tanh_ratio(c.part[p]);
      h.part[p] = shown.over / (shown.under * sigmoid_under(out.part[p]));
    }
    store_first(job.c + unit, c, n);
    store_first(job.h + unit, h, n);
    store_first(job.y + unit, h, n);
  }
}

static void gru_reset_units(const GruResetJob& job) {
  const int64_t hidden = job.hidden;
  for (int64_t unit = 0; unit < hidden; unit += kGroup) {
    const int64_t n = units_left(hidden, unit);
    const F16 reset =
        add(load_unit(job.x_part, 1, hidden, unit), load_unit(job.h_part, 1, hidden, unit));
    F16 h = load_first(job.h + unit, n);
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) h.part[p] = h.part[p] / sigmoid_under(reset.part[p]);
    store_first(job.reset_h + unit, h, n);
  }
}

static void gru_units(const GruCellJob& job) {
  const int64_t hidden = job.hidden;
  for (int64_t unit = 0; unit < hidden; unit += kGroup) {
    const int64_t n = units_left(hidden, unit);
    const auto gate = [&](int64_t g) __attribute__((always_inline)) {
      return add(load_unit(job.x_part, g, hidden, unit), load_unit(job.h_part, g, hidden, unit));
    };
    const F16 update = gate(0), x_part = load_unit(job.x_part, 2, hidden, unit);
    F16 from_h, h = load_first(job.h + unit, n);
    if (job.candidate != nullptr) {
      from_h = load(job.candidate + unit);
    } else {
      const F16 reset = gate(1);
      from_h = load_unit(job.h_part, 2, hidden, unit);
      SPARSECC_UNROLL
      for (int p = 0; p < kParts; ++p) from_h.part[p] = from_h.part[p] / sigmoid_under(reset.part[p]);
    }
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) {
      const Vec fresh = tanh_vec(x_part.part[p] + from_h.part[p]);
      h.part[p] = fresh + (h.part[p] - fresh) / sigmoid_under(update.part[p]);
    }
    store_first(job.h + unit, h, n);
    store_first(job.y + unit, h, n);
  }
}
