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
      if (count > 0)
        transpose_tile(x + r * row_stride + k, row_stride, count, n, panel + k * stride + r, stride);
    }
  }
}

// Lanes whose pixels follow each other without a gap, from lane `first` on.
SPARSECC_INLINE int64_t contiguous(const PixelJob& job, int64_t first, int64_t end) {
  int64_t n = 1;
  while (first + n < end && job.pixels[first + n] == job.pixels[first] + n) ++n;
  return n;
}

#if SPARSECC_AVX512
// Sixteen pixels as a few windows of 32 floats, each picked by one two-register permute; none where they follow
// each other from from[0] on.
struct Windows {
  static constexpr int kMost = 4;
  int count = 0;
  int64_t from[kMost];
  __m512i pick[kMost];
  __mmask16 lanes[kMost];
};

SPARSECC_INLINE bool find_windows(const int32_t* pixels, int64_t n, Windows& windows) {
  for (int64_t lane = 0; lane < n;) {
    if (windows.count == Windows::kMost) return false;
    const int32_t base = pixels[lane];
    alignas(64) int32_t pick[kGroup] = {};
    uint32_t mask = 0;
    for (; lane < n && pixels[lane] < base + 2 * kGroup; ++lane) {
      pick[lane] = pixels[lane] - base;
      mask |= 1u << lane;
    }
    windows.from[windows.count] = base;
    windows.pick[windows.count] = _mm512_load_si512(pick);
    windows.lanes[windows.count++] = (__mmask16)mask;
  }
  return true;
}

SPARSECC_INLINE __m512 pick_windows(const Windows& windows, const float* from) {
  __m512 all = _mm512_setzero_ps();
  for (int i = 0; i < windows.count; ++i) {
    const float* at = from + windows.from[i];
    const __m512 picked =
        _mm512_permutex2var_ps(_mm512_loadu_ps(at), windows.pick[i], _mm512_loadu_ps(at + kGroup));
    all = _mm512_mask_mov_ps(all, windows.lanes[i], picked);
  }
  return all;
}

// Pixels that follow each other.
static void pack_contiguous(const PixelJob& job) {
  const int64_t whole = job.count / kGroup * kGroup;
  float* to = job.panel;
  for (int64_t k = 0; k < job.input_count; ++k, to += job.stride) {
    const float* from = job.base + job.inputs[k] + job.pixels[0];
    for (int64_t i = 0; i < whole; i += kGroup) store(to + i, load(from + i));
    if (whole < job.count) store(to + whole, load_first(from + whole, job.count - whole));
  }
}

static bool pack_by_windows(const PixelJob& job) {
  Windows windows[kMaxWide];
  int wide = 0;
  if (!job.slack) return false;
  for (int64_t first = 0; first < job.count; first += kGroup, ++wide) {
    const int64_t n = job.count - first < kGroup ? job.count - first : kGroup;
    Windows& w = windows[wide];
    if (contiguous(job, first, first + n) == n) {
      w.from[0] = job.pixels[first];
    } else if (!find_windows(job.pixels + first, n, w)) {
      return false;
    }
  }
  float* to = job.panel;
  for (int64_t k = 0; k < job.input_count; ++k, to += job.stride) {
    const float* from = job.base + job.inputs[k];
    for (int v = 0; v < wide; ++v) {
      const Windows& w = windows[v];
      _mm512_store_ps(to + v * kGroup, w.count == 0 ? _mm512_loadu_ps(from + w.from[0]) : pick_windows(w, from));
    }
  }
  return true;
}

// A whole row of the panel at a time: what is written lies side by side, and what is read does nearly so, which
// matters where the panel is larger than a first-level cache.
static bool pack_by_rows(const PixelJob& job) {
  if (contiguous(job, 0, job.count) < job.count) return pack_by_windows(job);
  pack_contiguous(job);
  return true;
}
#endif

// Pixels from wherever they lie, by runs.
static void pack_scattered(const PixelJob& job, int64_t first, int64_t end) {
  while (first < end) {
    const int64_t n = contiguous(job, first, end);
    const float* from = job.base + job.pixels[first];
    for (int64_t k = 0; k < job.input_count; ++k) {
      float* to = job.panel + k * job.stride + first;
      for (int64_t i = 0; i < n; ++i) to[i] = from[job.inputs[k] + i];
    }
    first += n;
  }
}

static void pack_pixels(const PixelJob* job) {
#if SPARSECC_AVX512
  if (pack_by_rows(*job)) return;
#endif
  for (int64_t first = 0; first < job->count; first += kGroup) {
    const int64_t n = job->count - first < kGroup ? job->count - first : kGroup;
    const float* from = job->base + job->pixels[first];
    float* to = job->panel + first;
    if (contiguous(*job, first, first + n) == n) {
      for (int64_t k = 0; k < job->input_count; ++k)
        store(to + k * job->stride, load_first(from + job->inputs[k], n));
    } else {
      pack_scattered(*job, first, first + n);
    }
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
