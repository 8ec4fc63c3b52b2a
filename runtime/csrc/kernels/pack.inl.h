// Brings x into panels and sums out of them.
#pragma once

static void pack_rows(const float* x, int64_t row_stride, int64_t rows, int64_t inputs, float* panel,
                      int64_t stride) {
  for (int64_t r = 0; r < stride; r += kGroup) {
    const int64_t width = stride - r < kGroup ? stride - r : kGroup;
    const int64_t count = rows - r < width ? rows - r : width;
    for (int64_t k = 0; k < inputs; k += kGroup) {
      const int64_t n = inputs - k < kGroup ? inputs - k : kGroup;
      if (count < width)
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = count > 0 ? count : 0; j < width; ++j) panel[(k + i) * stride + r + j] = 0.0f;
      if (count > 0) transpose_tile(x + r * row_stride + k, row_stride, count, n, panel + k * stride + r, stride);
    }
  }
}

// Sixteen pixels of one input, from wherever they lie.
SPARSECC_INLINE void pack_gathered(const PixelJob& job, int64_t first, int64_t width) {
  const int32_t* pixels = job.pixels + first;
  for (int64_t k = 0; k < job.input_count; ++k) {
    const float* from = job.base + job.inputs[k];
    float* to = job.panel + k * job.stride + first;
    for (int64_t i = 0; i < width; ++i) to[i] = from[pixels[i]];
  }
}

static void pack_pixels(const PixelJob* job) {
  for (int64_t first = 0; first < job->stride; first += kGroup) {
    const int64_t width = job->stride - first < kGroup ? job->stride - first : kGroup;
    bool together = width == kGroup;
    for (int64_t i = 1; i < width; ++i) together &= job->pixels[first + i] == job->pixels[first] + i;
    if (!together) {
      pack_gathered(*job, first, width);
      continue;
    }
    const float* from = job->base + job->pixels[first];
    float* to = job->panel + first;
    for (int64_t k = 0; k < job->input_count; ++k) store(to + k * job->stride, load(from + job->inputs[k]));
  }
}

static void finish(float* sums, int64_t stride, int64_t outputs, int64_t rows, Target target,
                   const Epilogue* epilogue) {
  activate(sums, outputs * stride / kGroup, *epilogue);
  for (int64_t r = 0; r < rows; r += kGroup) {
    const int64_t count = rows - r < kGroup ? rows - r : kGroup;
    float* y = target.y + r * target.row_stride;
    if (target.output_stride == 1) {
      for (int64_t n = 0; n < outputs; n += kGroup) {
        const int64_t width = outputs - n < kGroup ? outputs - n : kGroup;
        transpose_tile(sums + n * stride + r, stride, width, count, y + n, target.row_stride);
      }
    } else {
      for (int64_t n = 0; n < outputs; ++n)
        store_first(y + n * target.output_stride, load(sums + n * stride + r), count);
    }
  }
}
