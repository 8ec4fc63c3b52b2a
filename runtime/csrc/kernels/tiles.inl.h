// Blocks of 16 outputs by 4 inputs, sixteen at a time in a tile register. Outputs are the lines of the weights, rows
// of x those of 32-bit words beside them, so that a quad of inputs of sixteen rows, one line of the other factor, is
// one piece of the panel: any sixteen quads can be brought together by copying sixteen pieces.
#pragma once

constexpr int kTilePanels = 2;   // that share a load of weights
constexpr int kTilesAtOnce = 8;  // whose x is copied first: a tile register does not see what was just stored

// Registers: sums and x of each panel, and the weights.
constexpr int kTileSum = 0, kTileWeights = 2, kTileX = 3;

// The quads of x for one tile of one panel.
struct TileX {
  const uint8_t* from;
  int64_t stride;
};

SPARSECC_INLINE TileX tile_x(const uint8_t* panel, int rows, const uint32_t* quads, uint8_t* copied) {
  const int64_t piece = (int64_t)rows * kQuad;
  if (quads[kTileQuads - 1] == quads[0] + kTileQuads - 1) return {panel + quads[0] * piece, piece};
  const __mmask16 there = (__mmask16)((1u << rows) - 1u);
  SPARSECC_UNROLL
  for (int i = 0; i < kTileQuads; ++i)
    _mm512_store_si512(copied + i * kTileLineBytes,
                       _mm512_maskz_loadu_epi32(there, panel + quads[i] * piece));
  return {copied, kTileLineBytes};
}

// Of one panel.
template <int Panel>
static void tile_finish(const QuadJob& job, int64_t group, int rows) {
  uint32_t sums[kGroup * kGroup] __attribute__((aligned(64)));
  tile_store<kTileSum + Panel>(sums, kTileLineBytes);
  store_turned(job, group, Panel * kTileRows, rows, sums, kGroup);
}

template <int Panels>
static void tile_group(const QuadJob& job, int64_t group) {
  uint8_t copied[kTilesAtOnce][Panels][kTileBytes] __attribute__((aligned(64)));
  const QuadView& w = *job.weight;
  const auto rows_of = [&](int p) { return p + 1 < Panels ? kTileRows : job.rows - p * kTileRows; };
  tile_zero<kTileSum>();
  if constexpr (Panels > 1) tile_zero<kTileSum + 1>();
  const int64_t end = w.end[group];
  for (int64_t first = w.start[group]; first < end; first += kTilesAtOnce) {
    const int count = (int)(end - first < kTilesAtOnce ? end - first : kTilesAtOnce);
    TileX x[kTilesAtOnce][Panels];
    for (int i = 0; i < count; ++i) SPARSECC_UNROLL
    for (int p = 0; p < Panels; ++p)
      x[i][p] = tile_x((const uint8_t*)job.panel + p * kTileRows * job.row_bytes, rows_of(p),
                       w.index + (first + i) * kTileQuads, copied[i][p]);
    for (int i = 0; i < count; ++i) {
      tile_load<kTileWeights>(w.values + (first + i) * kTileBytes, kTileLineBytes);
      tile_load<kTileX>(x[i][0].from, x[i][0].stride);
      tile_dot_bytes<kTileSum, kTileWeights, kTileX>();
      if constexpr (Panels > 1) {
        tile_load<kTileX + 1>(x[i][1].from, x[i][1].stride);
        tile_dot_bytes<kTileSum + 1, kTileWeights, kTileX + 1>();
      }
    }
  }
  tile_finish<0>(job, group, rows_of(0));
  if constexpr (Panels > 1) tile_finish<1>(job, group, rows_of(1));
}

template <int Panels>
static void tile_groups(const QuadJob& job) {
  TileConfig config = {};
  config.palette = 1;
  configure(config, kTileWeights, kTileLineBytes);
  for (int p = 0; p < Panels; ++p) {
    const int rows = p + 1 < Panels ? kTileRows : job.rows - p * kTileRows;
    configure(config, kTileSum + p, rows * kQuad);
    configure(config, kTileX + p, rows * kQuad);
  }
  tile_config(config);
  for (int64_t group = job.group_begin; group < job.group_end; ++group) tile_group<Panels>(job, group);
  tile_release();
}

static void tile_panels(const QuadJob& job) {
  static_assert(tiles_tile.rows == kTilePanels * kTileRows);
  if (job.rows > kTileRows) return tile_groups<kTilePanels>(job);
  tile_groups<1>(job);
}
