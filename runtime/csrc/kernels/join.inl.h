// Sums that were cut in pieces, put together: always in the order of the pieces, whoever computed them.
#pragma once

static void join(const JoinJob* job) {
  const float* sums = job->sums;
  float* y = job->y;
  const F16 bias = lane_bias(*job->epilogue, job->order, job->output, job->outputs);
  for (int64_t row = 0; row < job->rows; ++row, sums += job->row_stride, y += job->y_stride) {
    F16 sum = load(sums);
    for (int64_t i = 1; i < job->pieces; ++i) sum = add(sum, load(sums + i * job->width));
    float lanes[kGroup] __attribute__((aligned(64)));
    store(lanes, add(sum, bias));
    activate(lanes, 1, *job->epilogue);
    store_lanes(y, lanes, job->order, job->output, job->outputs);
  }
}
