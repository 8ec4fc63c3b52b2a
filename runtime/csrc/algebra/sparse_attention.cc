// Attention over the keys that a pattern names, by the kernels of dense attention: blocks of queries, each over the
// groups of 16 keys that any of its queries sees.
#include "sparsecc/sparse_attention.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

#include "algebra/tensor.h"
#include "schedule.h"
#include "transformer.h"

using sparsecc::algebra::crd_at;
using sparsecc::algebra::pos_at;

namespace sparsecc {
namespace {

// How much larger a block may be than the two that it joins: larger ones read keys and values less often.
constexpr double kJoinedMost = 1.25;
// What a block costs beside its scores, in scores.
constexpr int64_t kBlockOverhead = 256;

// Neighbouring keys, of one query.
struct Run {
  int32_t first, end;
};

struct Block {
  int64_t row, rows;
  std::vector<int32_t> groups;  // of 16 keys, rising

  int64_t scores() const { return rows * static_cast<int64_t>(groups.size()) * kGroup; }
  bool contiguous() const { return groups.back() - groups.front() + 1 == static_cast<int64_t>(groups.size()); }
};

std::vector<int32_t> joined(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  std::vector<int32_t> all;
  all.reserve(a.size() + b.size());
  std::set_union(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(all));
  return all;
}

}  // namespace
}  // namespace sparsecc

using namespace sparsecc;  // NOLINT: the C types lie outside the namespace

struct sparsecc_attention_pattern {
  Isa isa;
  int64_t queries, keys;
  std::vector<int64_t> row_runs;  // [queries + 1]: where the runs of each begin
  std::vector<Run> runs;
  std::vector<Block> blocks;    // without those of queries that see nothing
  std::vector<int64_t> before;  // [blocks + 1]: work of the blocks before each
  bool gaps = false;            // some query sees nothing
};

namespace sparsecc {
namespace {

using Pattern = sparsecc_attention_pattern;

void find_runs(const sparsecc_level& keys, Pattern* pattern) {
  pattern->row_runs.push_back(0);
  for (int64_t row = 0; row < pattern->queries; ++row) {
    const int64_t begin = pos_at(keys, row), end = pos_at(keys, row + 1);
    for (int64_t i = begin; i < end; ++i) {
      const auto key = static_cast<int32_t>(crd_at(keys, i));
      if (i > begin && pattern->runs.back().end == key) {
        ++pattern->runs.back().end;
      } else {
        pattern->runs.push_back({key, key + 1});
      }
    }
    pattern->gaps |= begin == end;
    pattern->row_runs.push_back(static_cast<int64_t>(pattern->runs.size()));
  }
}

std::vector<int32_t> groups_of(const Pattern& pattern, int64_t row, int64_t rows) {
  std::vector<int32_t> groups;
  for (int64_t i = pattern.row_runs[at(row)]; i < pattern.row_runs[at(row + rows)]; ++i) {
    const Run& run = pattern.runs[at(i)];
    for (int32_t group = run.first / kGroup; group <= (run.end - 1) / kGroup; ++group) groups.push_back(group);
  }
  std::sort(groups.begin(), groups.end());
  groups.erase(std::unique(groups.begin(), groups.end()), groups.end());
  return groups;
}

// Blocks of whole tiles of queries, as many as fit into the cache and see nearly the same keys.
void find_blocks(int64_t tile, Pattern* pattern) {
  const int64_t most_rows = kMostBlockRows / tile * tile;
  for (int64_t row = 0; row < pattern->queries; row += tile) {
    const int64_t rows = std::min(tile, pattern->queries - row);
    Block block{row, rows, groups_of(*pattern, row, rows)};
    if (block.groups.empty()) continue;
    if (!pattern->blocks.empty()) {
      Block& last = pattern->blocks.back();
      const bool next = last.row + last.rows == row && last.rows + rows <= most_rows;
      Block both{last.row, last.rows + rows, next ? joined(last.groups, block.groups) : std::vector<int32_t>()};
      const bool fits = next && both.scores() * static_cast<int64_t>(sizeof(float)) <= kScoreBytes;
      if (fits && static_cast<double>(both.scores()) <=
                      kJoinedMost * static_cast<double>(last.scores() + block.scores())) {
        last = std::move(both);
        continue;
      }
    }
    pattern->blocks.push_back(std::move(block));
  }
  pattern->before.push_back(0);
  for (const Block& block : pattern->blocks)
    pattern->before.push_back(pattern->before.back() + block.scores() + kBlockOverhead);
}

// What one thread works with.
struct Room {
  Room(int64_t most_rows, int64_t most_wide, int64_t size, int64_t size_wide, bool copies)
      : stride(most_wide),
        scores(most_rows * (2 * most_wide + size)),
        keys_t(copies ? size * most_wide : 0),
        values(copies ? most_wide * size_wide : 0) {
    mask = scores.data() + most_rows * most_wide;
    turned = mask + most_rows * most_wide;
  }
  int64_t stride;
  Scratch<1> scores;
  Scratch<2> keys_t;
  Scratch<3> values;
  float *mask, *turned;
};

// 0 where a query sees a key of the block, hidden elsewhere. Returns false if all see all.
bool fill_mask(const Pattern& pattern, const Block& block, int64_t stride, float* mask) {
  const auto wide = static_cast<int64_t>(block.groups.size()) * kGroup;
  int64_t seen = 0;
  for (int64_t row = 0; row < block.rows; ++row) {
    float* own = mask + row * stride;
    std::fill_n(own, wide, kHidden);
    size_t slot = 0;
    for (int64_t i = pattern.row_runs[at(block.row + row)]; i < pattern.row_runs[at(block.row + row + 1)]; ++i) {
      const Run& run = pattern.runs[at(i)];
      for (int32_t key = run.first; key < run.end;) {
        while (block.groups[slot] < key / kGroup) ++slot;
        const int32_t end = std::min<int32_t>(run.end, (key / kGroup + 1) * kGroup);
        std::fill_n(own + static_cast<int64_t>(slot) * kGroup + key % kGroup, end - key, 0.0f);
        seen += end - key;
        key = end;
      }
    }
  }
  return seen < block.rows * wide;
}

// Keys and values of one head from group `first` on, packed.
struct Packed {
  const float *keys_t, *values;
  int64_t stride, first;
};

void gather_keys(const Block& block, const Packed& packed, int64_t size, int64_t stride, float* to) {
  for (int64_t i = 0; i < size; ++i) {
    const float* from = packed.keys_t + i * packed.stride;
    for (size_t slot = 0; slot < block.groups.size(); ++slot)
      std::memcpy(to + i * stride + static_cast<int64_t>(slot) * kGroup,
                  from + (block.groups[slot] - packed.first) * kGroup, kGroup * sizeof(float));
  }
}

void gather_values(const Block& block, const Packed& packed, int64_t keys, int64_t size_wide, float* to) {
  for (size_t slot = 0; slot < block.groups.size(); ++slot) {
    const int64_t key = int64_t{block.groups[slot]} * kGroup, count = std::min<int64_t>(kGroup, keys - key);
    std::memcpy(to + static_cast<int64_t>(slot) * kGroup * size_wide,
                packed.values + (key - packed.first * kGroup) * size_wide,
                static_cast<size_t>(count * size_wide) * sizeof(float));
  }
}

void block_task(const sparsecc_attention_desc& a, const Pattern& pattern, const TransformerHelpers& help,
                const Block& block, const Packed& packed, int64_t batch, int64_t head, Room* room) {
  const int64_t size_wide = round_up(a.head_size, kGroup);
  AttentionJob job{};
  job.size = a.head_size;
  job.size_wide = size_wide;
  job.scale = a.scale;
  job.queries = block.rows;
  const auto groups = static_cast<int64_t>(block.groups.size());
  job.keys = std::min(groups * kGroup, (groups - 1) * kGroup + a.keys - int64_t{block.groups.back()} * kGroup);
  if (block.contiguous()) {
    const int64_t key = (block.groups.front() - packed.first) * kGroup;
    job.keys_t = packed.keys_t + key;
    job.keys_wide = packed.stride;
    job.values = packed.values + key * size_wide;
  } else {
    gather_keys(block, packed, a.head_size, room->stride, room->keys_t.data());
    gather_values(block, packed, a.keys, size_wide, room->values.data());
    job.keys_t = room->keys_t.data();
    job.keys_wide = room->stride;
    job.values = room->values.data();
  }
  if (fill_mask(pattern, block, room->stride, room->mask)) {
    job.mask = room->mask;
    job.mask_row_stride = room->stride;
    job.mask_key_stride = 1;
  }
  job.q = a.q + offset(a.q_strides, batch, block.row, head);
  job.q_stride = a.q_strides[1];
  job.y = a.y + offset(a.y_strides, batch, block.row, head);
  job.y_stride = a.y_strides[1];
  job.scores = room->scores.data();
  job.score_stride = room->stride;
  job.turned = room->turned;
  help.attention(&job);
}

// Blocks [first, end) of the heads of q that share a head of keys.
void heads_task(const sparsecc_attention_desc& a, const Pattern& pattern, const TransformerHelpers& help,
                int64_t batch, int64_t kv_head, int64_t first, int64_t end) {
  int64_t low = INT32_MAX, high = 0, rows = 1, wide = 1;
  bool copies = false;
  for (int64_t i = first; i < end; ++i) {
    const Block& block = pattern.blocks[at(i)];
    low = std::min<int64_t>(low, block.groups.front());
    high = std::max<int64_t>(high, block.groups.back() + 1);
    rows = std::max(rows, round_up(block.rows, help.attention_tile.rows));
    wide = std::max(wide, static_cast<int64_t>(block.groups.size()));
    copies |= !block.contiguous();
  }
  if (first == end) return;
  // An odd number of lines: rows at a distance of a power of two would meet in one set of the cache.
  const int64_t stride = ((high - low) | 1) * kGroup, size_wide = round_up(a.head_size, kGroup);
  const int64_t keys = std::min(a.keys, high * kGroup) - low * kGroup;
  Scratch<0> packed(stride * a.head_size + keys * size_wide);
  const AttentionPackJob pack{a.k + offset(a.k_strides, batch, low * kGroup, kv_head),
                              a.v + offset(a.v_strides, batch, low * kGroup, kv_head),
                              a.k_strides[1],
                              a.v_strides[1],
                              keys,
                              stride,
                              a.head_size,
                              size_wide,
                              packed.data(),
                              packed.data() + stride * a.head_size};
  help.pack_attention(&pack);
  Room room(rows, (wide | 1) * kGroup, a.head_size, size_wide, copies);
  const int64_t shared = a.heads / a.kv_heads;
  for (int64_t i = first; i < end; ++i)
    for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; ++head)
      block_task(a, pattern, help, pattern.blocks[at(i)], {pack.keys_t, pack.values, stride, low}, batch, head,
                 &room);
}

void clear_unseeing(const sparsecc_attention_desc& a, const Pattern& pattern) {
  if (!pattern.gaps) return;
  for (int64_t row = 0; row < a.queries; ++row) {
    if (pattern.row_runs[at(row)] != pattern.row_runs[at(row + 1)]) continue;
    for (int64_t i = 0; i < a.batch * a.heads; ++i)
      std::fill_n(a.y + offset(a.y_strides, i / a.heads, row, i % a.heads), a.head_size, 0.0f);
  }
}

void check(const sparsecc_attention_desc& a, const Pattern& pattern) {
  check_attention(a);
  require(a.queries == pattern.queries && a.keys == pattern.keys,
          "queries and keys are not as many as in the pattern");
  require(a.mask == nullptr && a.cosines == nullptr && a.isa == nullptr,
          "sparse attention takes no mask, no cosines and no instruction set");
}

void run_attention(const sparsecc_attention_desc& a, const Pattern& pattern, const sparsecc_executor* executor) {
  if (a.batch == 0 || a.heads == 0 || a.queries == 0 || a.head_size == 0) return;
  const TransformerHelpers& help = transformer_helpers(pattern.isa);
  const auto blocks = static_cast<int64_t>(pattern.blocks.size());
  const int64_t kv_heads = a.batch * a.kv_heads, work = pattern.before.back();
  const int64_t parts =
      std::clamp<int64_t>(ceil_div(wanted_tasks(executor), kv_heads), 1, std::max<int64_t>(blocks, 1));
  const auto cut = [&](int64_t part) {
    if (part == parts) return blocks;
    const auto first = pattern.before.begin();
    return static_cast<int64_t>(std::lower_bound(first, first + blocks, part * work / parts) - first);
  };
  run_tasks(executor, kv_heads * parts, [&](int64_t task) {
    const int64_t head = task / parts, part = task % parts;
    heads_task(a, pattern, help, head / a.kv_heads, head % a.kv_heads, cut(part), cut(part + 1));
  });
  clear_unseeing(a, pattern);
}

void check_positions(const sparsecc_level& level) {
  require(level.pos_bytes == 4 || level.pos_bytes == 8, "positions must have 4 or 8 bytes");
  int64_t before = 0;
  for (int64_t i = 0; i < level.pos_count; ++i) {
    const int64_t position = pos_at(level, i);
    require(position >= before && (i > 0 || position == 0), "positions do not rise from 0");
    before = position;
  }
  require(before == level.crd_count, "the last position is not the number of values");
}

}  // namespace
}  // namespace sparsecc

int sparsecc_attention_pattern_create(const sparsecc_level* keys, const char* isa,
                                      sparsecc_attention_pattern** out, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(keys != nullptr && out != nullptr, "keys and out must not be null");
    require(keys->pos != nullptr && keys->pos_count >= 1, "positions are missing");
    require(keys->size <= INT32_MAX, "there are too many keys");
    sparsecc_level levels[2] = {{}, *keys};
    levels[0].size = keys->pos_count - 1;
    algebra::check_levels(levels, 2);
    sparsecc_tensor entries{};
    entries.levels = levels;
    entries.level_count = 2;
    algebra::check_numbers(entries);
    auto pattern = std::make_unique<sparsecc_attention_pattern>();
    pattern->isa = choose_isa(isa);
    pattern->queries = levels[0].size;
    pattern->keys = keys->size;
    find_runs(*keys, pattern.get());
    find_blocks(transformer_helpers(pattern->isa).attention_tile.rows, pattern.get());
    *out = pattern.release();
  });
}

void sparsecc_attention_pattern_destroy(sparsecc_attention_pattern* pattern) { delete pattern; }

int sparsecc_sparse_attention_run(const sparsecc_attention_pattern* pattern,
                                  const sparsecc_attention_desc* attention, const sparsecc_executor* executor,
                                  char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(pattern != nullptr && attention != nullptr, "pattern and attention must not be null");
    check(*attention, *pattern);
    run_attention(*attention, *pattern, executor);
  });
}

int sparsecc_sparse_softmax_run(const sparsecc_level* entries, const float* values, int64_t batch,
                                const char* isa, float* y, const sparsecc_executor* executor, char* error,
                                size_t error_size) {
  return guard(error, error_size, [&] {
    require(entries != nullptr && entries->pos != nullptr && entries->pos_count >= 1, "positions are missing");
    require(batch >= 0, "batch is negative");
    const int64_t count = entries->crd_count, rows = entries->pos_count - 1;
    check_positions(*entries);
    if (batch == 0 || count == 0) return;
    require(values != nullptr && y != nullptr, "values and y must not be null");
    const TransformerHelpers& help = transformer_helpers(choose_isa(isa));
    const int64_t parts = std::clamp<int64_t>(ceil_div(wanted_tasks(executor), batch), 1, rows);
    // The first row that begins at or behind an even share of the entries.
    const auto cut = [&](int64_t part) {
      int64_t low = 0, high = rows;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (pos_at(*entries, middle) * parts < part * count) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      return part == parts ? rows : low;
    };
    run_tasks(executor, batch * parts, [&](int64_t task) {
      const int64_t offset = task / parts * count, part = task % parts, end = cut(part + 1);
      for (int64_t row = cut(part); row < end; ++row) {
        const int64_t first = pos_at(*entries, row), length = pos_at(*entries, row + 1) - first;
        if (length > 0) help.softmax(values + offset + first, length, y + offset + first);
      }
    });
  });
}
