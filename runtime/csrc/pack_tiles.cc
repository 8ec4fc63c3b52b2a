// Blocks of bytes as tiles, and whether to make tiles of a weight at all, bfloat16 included.
//
// NOT MEASURED: no machine with AMX was at hand. Everything that is decided by estimated time is decided here, from the
// throughputs Intel publishes for Sapphire Rapids.
#include <algorithm>
#include <vector>

#include "float_tiles.h"
#include "int8.h"
#include "schedule.h"

namespace sparsecc {
namespace {

constexpr double kProductCycles = 16;  // TDPBSUD, TDPBF16PS; the two loads take 8 each, at the same time
// More for a tile whose quads of x are brought together: 16 loads, 16 stores at one a cycle.
constexpr double kGatherCycles = 16;
// A block of neighbours by 16 rows: 16 VPDPBUSD, two a cycle.
constexpr double kBlockCycles = 8;
// For a tile of bfloat16: three times 16 lines, each an insertion and a permute, which share one port.
constexpr double kFloatGatherCycles = 72;
constexpr double kFloatBlockCycles = 0.5;  // a block of 16 outputs by one row: one FMA of two a cycle
// Weights are read once for every chunk of rows, from memory or from a second-level cache.
constexpr double kBytesPerCycle = 16;

// The quads of one group as they go into tiles: sixteen neighbours as they stand, empty ones among them, or any
// sixteen that are brought together.
struct TileQuads {
  std::vector<int64_t> direct;    // windows of sixteen neighbours
  std::vector<uint32_t> gathered;  // quads
  int64_t tiles() const { return static_cast<int64_t>(direct.size()) + gathered_tiles(); }
  int64_t gathered_tiles() const { return ceil_div(static_cast<int64_t>(gathered.size()), kTileQuads); }
};

// `quads` in ascending order. A window costs a product as it stands, and as many products and gathers as it has
// sixteenths if its quads go elsewhere; in the last tile that is not full, a whole one.
TileQuads deal_quads(const uint32_t* quads, const uint32_t* end) {
  constexpr auto kWorthStanding = static_cast<size_t>(kTileQuads * kProductCycles / (kProductCycles + kGatherCycles));
  TileQuads dealt;
  const uint32_t* fullest = end;  // window of those that are gathered, and how many quads it has
  size_t most = 0;
  for (const uint32_t* first = quads; first != end;) {
    const uint32_t window = *first / kTileQuads;
    const uint32_t* const last = std::find_if(first, end, [&](uint32_t quad) { return quad / kTileQuads != window; });
    const auto count = static_cast<size_t>(last - first);
    if (count >= kWorthStanding) {
      dealt.direct.push_back(window);
    } else {
      dealt.gathered.insert(dealt.gathered.end(), first, last);
      if (count > most) {
        most = count;
        fullest = first;
      }
    }
    first = last;
  }
  const size_t over = dealt.gathered.size() % kTileQuads;
  if (over != 0 && most >= over) {
    const uint32_t window = *fullest / kTileQuads;
    std::erase_if(dealt.gathered, [&](uint32_t quad) { return quad / kTileQuads == window; });
    dealt.direct.push_back(window);
  }
  return dealt;
}

}  // namespace

double estimated_cycles(const ByteKernel& kernel, const QuadPack& form) {
  const double products = kernel.order == QuadOrder::kTiles
                              ? static_cast<double>(form.products()) * kProductCycles
                              : static_cast<double>(form.blocks()) * kernel.cost * kBlockCycles;
  return products + static_cast<double>(form.bytes()) / kBytesPerCycle;
}

int64_t least_rows_of_tiles(int64_t tiles, int64_t blocks, int wide) {
  if (blocks == 0) return INT64_MAX;
  const double all = static_cast<double>(tiles) * (kFloatGatherCycles + kSplits * kProductCycles * wide);
  return static_cast<int64_t>(all / (static_cast<double>(blocks * wide) * kFloatBlockCycles)) + 1;
}

// From blocks in QuadOrder::kOutputs.
Buffer<int64_t> QuadPack::pack_tiles() {
  std::vector<uint32_t> index;
  std::vector<int8_t> values;
  Buffer<int64_t> tile_start(groups + 1);
  Buffer<int64_t> products(groups + 1);
  std::vector<size_t> place;  // of each quad of this group, in `index`
  for (int64_t group = 0; group < groups; ++group) {
    const uint32_t* const first = index_.data() + start[group];
    const uint32_t* const last = index_.data() + start[group + 1];
    const TileQuads dealt = deal_quads(first, last);
    const size_t begin = index.size();
    if (first != last) place.resize(std::max(place.size(), (last[-1] / size_t{kTileQuads} + 1) * kTileQuads));
    for (const int64_t window : dealt.direct)
      for (uint32_t i = 0; i < kTileQuads; ++i) index.push_back(static_cast<uint32_t>(window * kTileQuads) + i);
    index.insert(index.end(), dealt.gathered.begin(), dealt.gathered.end());
    for (size_t slot = begin; slot < index.size(); ++slot) place[index[slot]] = slot;
    // Repeating the first quad of a tile shows that it does not hold sixteen neighbours.
    while (index.size() % kTileQuads != 0) index.push_back(index[index.size() / kTileQuads * kTileQuads]);
    values.resize(index.size() * kQuadValues);
    for (const uint32_t* quad = first; quad != last; ++quad) {
      const size_t slot = place[*quad];
      const int8_t* const block = values_.data() + (start[group] + (quad - first)) * kQuadValues;
      int8_t* const tile = values.data() + slot / kTileQuads * kTileQuads * kQuadValues + slot % kTileQuads * kQuad;
      for (int64_t output = 0; output < kGroup; ++output)
        std::copy_n(block + output * kQuad, kQuad, tile + output * kTileQuads * kQuad);
    }
    tile_start[group + 1] = static_cast<int64_t>(index.size()) / kTileQuads;
    products[group + 1] = products[group] + dealt.tiles() +
                           dealt.gathered_tiles() * static_cast<int64_t>(kGatherCycles / kProductCycles);
  }
  start = std::move(tile_start);
  index_ = aligned(index);
  values_ = aligned(values);
  return products;
}

}  // namespace sparsecc
