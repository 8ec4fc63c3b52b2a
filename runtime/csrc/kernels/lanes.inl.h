// Blocks of 16 or 32 outputs by one input, rows of x or pixels in the lanes: a vector of x is loaded
// once for several outputs whose weights are broadcast. Needs fewer loads than outputs in the lanes when
// two vectors of x fit in registers, and no transpose when the target is planes.
#pragma once

template <int Outputs, int Vectors>
SPARSECC_INLINE void lane_sums(const BlockView& w, int64_t group, int64_t first, const LaneJob& job,
                               float* tile) {
  constexpr int64_t stride = Vectors * kGroup;
  const int64_t tall = kGroup * w.wide;
  F16 sum[Outputs][Vectors];
  SPARSECC_UNROLL
  for (int o = 0; o < Outputs; ++o) SPARSECC_UNROLL
  for (int v = 0; v < Vectors; ++v) sum[o][v] = broadcast(0.0f);
  const float* weight = w.values + w.start[group] * tall + first;
  for (int64_t i = w.start[group]; i < w.start[group + 1]; ++i, weight += tall) {
    const float* from = job.panel + (int64_t)w.index[i] * stride;
    F16 x[Vectors];
    SPARSECC_UNROLL
    for (int v = 0; v < Vectors; ++v) x[v] = load(from + v * kGroup);
    SPARSECC_UNROLL
    for (int o = 0; o < Outputs; ++o) {
      const F16 one = broadcast(weight[o]);
      SPARSECC_UNROLL
      for (int v = 0; v < Vectors; ++v) sum[o][v] = multiply_add(sum[o][v], one, x[v]);
    }
  }
  const float* bias = job.epilogue->bias + group * tall + first;
  SPARSECC_UNROLL
  for (int o = 0; o < Outputs; ++o) {
    const F16 start = broadcast(bias[o]);
    SPARSECC_UNROLL
    for (int v = 0; v < Vectors; ++v) store(tile + o * stride + v * kGroup, add(sum[o][v], start));
  }
}

template <int Outputs, int Vectors>
static void lane_tiles(const LaneJob& job) {
  const BlockView& w = *job.weight;
  for (int64_t group = job.group_begin; group < job.group_end; ++group)
    for (int64_t half = 0; half < w.wide; ++half) {  // sixteen outputs
      const int64_t output = (group * w.wide + half) * kGroup, left = w.outputs - output;
      if (left <= 0) return;
      float tile[kGroup * Vectors * kGroup] __attribute__((aligned(64)));
      for (int64_t first = 0; first < kGroup; first += Outputs)
        lane_sums<Outputs, Vectors>(w, group, half * kGroup + first, job, tile + first * Vectors * kGroup);
      const Target to = {job.target.y + output * job.target.output_stride, job.target.row_stride,
                         job.target.output_stride};
      finish(tile, Vectors * kGroup, left < kGroup ? left : kGroup, job.count, to, job.epilogue);
    }
}

template <int Outputs, int Vectors>
static void lane_tiles_of(const LaneJob& job) {
  if (job.wide == Vectors) return lane_tiles<Outputs, Vectors>(job);
  if constexpr (Vectors > 1) lane_tiles_of<Outputs, Vectors - 1>(job);
}
