// Sums of quads that were cut in pieces, put together.
#pragma once

static void join_quads(const QuadJob* job, const uint32_t* sums, int64_t row_stride, int64_t pieces) {
  for (int r = 0; r < job->rows; ++r, sums += row_stride) {
    I16 sum[1] = {};
    for (int64_t i = 0; i < pieces; ++i) SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) sum[0].part[p] += *(const VecUint*)(sums + i * kGroup + p * kLanes);
    quad_store<1>(*job, job->group_begin, r, sum);
  }
}
