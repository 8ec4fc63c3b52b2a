#include "algebra/tensor.h"

#include <cstddef>

namespace sparsecc::algebra {
namespace {

constexpr int32_t kMostLevels = 64;
constexpr int32_t kMostCutParts = 4096;
constexpr int64_t kMostNodes = int64_t{1} << 48;

std::string named(int32_t level, const char* what) { return "level " + show(level) + ": " + what; }

void check_level(const sparsecc_level& level, int32_t number, int64_t parents) {
  const auto need = [number](bool good, const char* what) {
    if (!good) throw Failure{named(number, what)};
  };
  need(level.size >= 0, "the size is negative");
  if (is_dense(level)) {
    need(level.size == 0 || parents <= kMostNodes / level.size, "too many coordinates");
    return;
  }
  need(level.pos_count == parents + 1, "there must be one position more than nodes above");
  need(level.crd_count >= 0 && (level.crd_count == 0 || level.crd != nullptr), "coordinates are missing");
  need(level.pos_bytes == 4 || level.pos_bytes == 8, "positions must have 4 or 8 bytes");
  need(level.crd_bytes == 4 || level.crd_bytes == 8, "coordinates must have 4 or 8 bytes");
  need(pos_at(level, parents) == level.crd_count, "the last position is not the number of coordinates");
}

void check_fibres(const sparsecc_level& level, int32_t number) {
  if (pos_at(level, 0) != 0) throw Failure{named(number, "positions do not begin at 0")};
  for (int64_t parent = 0; parent + 1 < level.pos_count; ++parent) {
    const int64_t begin = pos_at(level, parent), end = pos_at(level, parent + 1);
    if (begin > end || end > level.crd_count) throw Failure{named(number, "positions do not rise")};
    int64_t before = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t coordinate = crd_at(level, i);
      if (coordinate <= before || coordinate >= level.size)
        throw Failure{named(number, "coordinate ") + show(coordinate) + " is out of range, unsorted or there twice"};
      before = coordinate;
    }
  }
}

// A cut lies behind a row's header and inside that row, or before everything.
void check_cuts(const sparsecc_tensor& tensor) {
  require(tensor.level_count > 0 && !is_dense(tensor.levels[tensor.level_count - 1]),
          "cuts need a compressed last level");
  const sparsecc_level& last = tensor.levels[tensor.level_count - 1];
  const int64_t *rows = tensor.cuts, *leaves = rows + tensor.cut_parts + 1, all = last.pos_count - 1;
  require(rows[0] == 0 && leaves[0] == 0, "cuts do not begin at 0");
  require(rows[tensor.cut_parts] == all && leaves[tensor.cut_parts] == last.crd_count, "cuts do not end at the end");
  for (int32_t i = 1; i <= tensor.cut_parts; ++i) {
    require(rows[i] >= rows[i - 1] && rows[i] <= all && leaves[i] >= leaves[i - 1], "cuts do not rise to the end");
    const int64_t low = rows[i] == 0 ? 0 : pos_at(last, rows[i] - 1), high = rows[i] == 0 ? 0 : pos_at(last, rows[i]);
    require(leaves[i] >= low && leaves[i] <= high, "a cut is not in the row before it");
  }
}

}  // namespace

bool has_cuts(const sparsecc_tensor& tensor) { return tensor.struct_size >= sizeof(tensor) && tensor.cuts != nullptr; }

void check_levels(const sparsecc_level* levels, int32_t level_count) {
  require(level_count >= 0 && level_count <= kMostLevels, "a tensor has 0 to 64 levels");
  require(level_count == 0 || levels != nullptr, "levels must not be null");
  int64_t nodes = 1;
  for (int32_t i = 0; i < level_count; ++i) {
    check_level(levels[i], i, nodes);
    nodes = count(levels[i], nodes);
  }
}

void check_shape(const sparsecc_tensor* tensor) {
  require(tensor != nullptr, "tensor must not be null");
  require(tensor->struct_size >= offsetof(sparsecc_tensor, cuts), "the tensor is too short: caller and library do not match");
  require(tensor->value_bytes == 4 || tensor->value_bytes == 8, "values must be float32 or float64");
  check_levels(tensor->levels, tensor->level_count);
  int64_t nodes = 1;
  for (int32_t i = 0; i < tensor->level_count; ++i) nodes = count(tensor->levels[i], nodes);
  require(tensor->value_count == nodes, "there must be one value for each stored coordinate");
  require(nodes == 0 || tensor->values != nullptr, "values must not be null");
  require(!has_cuts(*tensor) || (tensor->cut_parts >= 1 && tensor->cut_parts <= kMostCutParts),
          "there must be 1 to 4096 parts");
}

void check_numbers(const sparsecc_tensor& tensor) {
  for (int32_t i = 0; i < tensor.level_count; ++i)
    if (!is_dense(tensor.levels[i])) check_fibres(tensor.levels[i], i);
  if (has_cuts(tensor)) check_cuts(tensor);
}

int32_t index_bytes(const sparsecc_tensor& tensor) {
  int32_t bytes = 0;
  for (int32_t i = 0; i < tensor.level_count; ++i) {
    const sparsecc_level& level = tensor.levels[i];
    if (is_dense(level)) continue;
    if (bytes == 0) bytes = level.pos_bytes;
    require(level.pos_bytes == bytes && level.crd_bytes == bytes, "integers of a tensor must have one width");
  }
  return bytes == 0 ? 8 : bytes;
}

}  // namespace sparsecc::algebra
