#include "pack.h"

#include <algorithm>
#include <cstring>

namespace sparsecc {
namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }

}  // namespace

BlockPack::BlockPack(const Weight& weight) : outputs_(weight.outputs) {
  const int64_t height = weight.layout.rows, width = weight.layout.cols;
  wide_ = height % (2 * kGroup) == 0 ? 2 : 1;
  const int64_t tall = kGroup * wide_, parts = height / tall;
  groups = ceil_div(weight.outputs, tall);
  start = Buffer<int64_t>(groups + 1);
  // The last column of blocks may stick out of W.
  const auto columns_of = [&](int64_t unit) {
    return std::min(width, weight.inputs - int64_t{weight.column[at(unit)]} * width);
  };
  for (int64_t group = 0; group < groups; ++group) {
    int64_t columns = 0;
    const size_t row = at(group / parts);
    for (int64_t unit = weight.row_start[row]; unit < weight.row_start[row + 1]; ++unit)
      columns += columns_of(unit);
    start[group + 1] = start[group] + columns;
  }
  index_ = Buffer<uint32_t>(start[groups]);
  values_ = Buffer<float>(start[groups] * tall);
  for (int64_t group = 0; group < groups; ++group) {
    int64_t to = start[group];
    const size_t row = at(group / parts);
    for (int64_t unit = weight.row_start[row]; unit < weight.row_start[row + 1]; ++unit)
      for (int64_t c = 0; c < columns_of(unit); ++c, ++to) {
        index_[to] = static_cast<uint32_t>(weight.column[at(unit)] * width + c);
        const float* from = weight.values + (unit * height + group % parts * tall) * width + c;
        for (int64_t r = 0; r < std::min(tall, outputs_ - group * tall); ++r)
          values_[to * tall + r] = from[r * width];
      }
  }
}

BlockView BlockPack::view() const {
  return {start.data(), index_.data(), values_.data(), wide_, outputs_};
}

ElementPack::ElementPack(const Rows& rows, int64_t first_output, int64_t output_count, int64_t block)
    : block_inputs(block),
      chunks(ceil_div(output_count, kChunk)),
      blocks(ceil_div(rows.inputs, block)),
      outputs_(output_count) {
  const int64_t first_weight = rows.start[at(first_output)];
  const int64_t weights = rows.start[at(first_output + output_count)] - first_weight;
  index_ = Buffer<uint16_t>(weights);
  value_ = Buffer<float>(weights);
  std::vector<uint16_t> row;
  std::vector<int64_t> next(rows.start.begin() + first_output, rows.start.begin() + first_output + output_count);
  std::vector<int64_t> end(at(kChunk));
  std::vector<uint16_t> order;
  int64_t placed = 0;
  chunk_start.push_back(0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t base = chunk * kChunk, count = chunk_outputs(chunk);
    for (int64_t b = 0; b < blocks; ++b) {
      order.clear();
      const auto size = [&](uint16_t r) { return end[r] - next[at(base + r)]; };
      for (int64_t r = 0; r < count; ++r) {
        const auto from = rows.column.begin() + next[at(base + r)];
        const auto stop = rows.column.begin() + rows.start[at(first_output + base + r + 1)];
        end[at(r)] = std::lower_bound(from, stop, (b + 1) * block) - rows.column.begin();
        if (size(static_cast<uint16_t>(r)) > 0) order.push_back(static_cast<uint16_t>(r));
      }
      std::stable_sort(order.begin(), order.end(), [&](uint16_t x, uint16_t y) { return size(x) < size(y); });
      cells_.push_back({static_cast<int64_t>(runs_.size()), 0, static_cast<int64_t>(row.size()), placed});
      for (const uint16_t r : order) {
        const auto length = static_cast<uint32_t>(size(r));
        if (cells_.back().run_count == 0 || runs_.back().count != length) {
          runs_.push_back({0, length});
          ++cells_.back().run_count;
        }
        ++runs_.back().rows;
        row.push_back(r);
        for (int64_t& i = next[at(base + r)]; i < end[r]; ++i, ++placed) {
          index_[placed] = static_cast<uint16_t>(rows.column[at(i)] - b * block);
          value_[placed] = rows.value[at(i)];
        }
      }
    }
    chunk_start.push_back(placed);
  }
  row_ = Buffer<uint16_t>(static_cast<int64_t>(row.size()));
  if (!row.empty()) std::memcpy(row_.data(), row.data(), row.size() * sizeof(uint16_t));
}

ElementView ElementPack::cell(int64_t chunk, int64_t block) const {
  const Cell& cell = cells_[at(chunk * blocks + block)];
  return {runs_.data() + cell.run, cell.run_count, row_.data() + cell.row, index_.data() + cell.weight,
          value_.data() + cell.weight};
}

SlicePack::SlicePack(const Rows& rows, bool expand)
    : groups(ceil_div(rows.outputs, kGroup)),
      outputs_(rows.outputs),
      inputs_(rows.inputs),
      slices_(ceil_div(rows.inputs, kGroup)),
      expand_(expand) {
  slot_start = Buffer<int64_t>(groups + 1);
  value_start_ = Buffer<int64_t>(groups + 1);
  slots_ = Buffer<uint8_t>(groups * slices_);
  std::vector<uint8_t> count(at(slices_));
  for (int64_t group = 0; group < groups; ++group) {
    uint8_t* most = slots_.data() + group * slices_;
    const int64_t first = group * kGroup, last = std::min(outputs_, first + kGroup);
    for (int64_t output = first; output < last; ++output) {
      std::fill(count.begin(), count.end(), uint8_t{0});
      for (int64_t i = rows.start[at(output)]; i < rows.start[at(output + 1)]; ++i)
        ++count[rows.column[at(i)] / kGroup];
      for (int64_t s = 0; s < slices_; ++s) most[s] = std::max(most[s], count[at(s)]);
    }
    int64_t total = 0;
    for (int64_t s = 0; s < slices_; ++s) total += most[s];
    slot_start[group + 1] = slot_start[group] + total;
    value_start_[group + 1] = value_start_[group] +
                              (expand ? rows.start[at(last)] - rows.start[at(first)] : total * kGroup);
  }
  positions_ = Buffer<uint64_t>(slot_start[groups]);
  masks_ = Buffer<uint16_t>(slot_start[groups]);
  values_ = Buffer<float>(value_start_[groups]);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * kGroup, lanes = std::min(outputs_, first + kGroup) - first;
    int64_t next[kGroup];
    for (int64_t lane = 0; lane < lanes; ++lane) next[lane] = rows.start[at(first + lane)];
    int64_t slot = slot_start[group], value = value_start_[group];
    for (int64_t s = 0; s < slices_; ++s)
      for (int used = 0; used < slots_[group * slices_ + s]; ++used, ++slot) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          int64_t& i = next[lane];
          const bool has = i < rows.start[at(first + lane + 1)] && rows.column[at(i)] / kGroup == at(s);
          if (has) {
            const uint64_t position = rows.column[at(i)] % kGroup;
            positions_[slot] |= position << (lane % 2 * 32 + lane / 2 * 4);
            masks_[slot] = static_cast<uint16_t>(masks_[slot] | 1u << lane);
            values_[expand ? value++ : value + lane] = rows.value[at(i++)];
          }
        }
        if (!expand) value += kGroup;
      }
  }
}

SliceView SlicePack::view() const {
  return {slot_start.data(), value_start_.data(), slots_.data(), positions_.data(), masks_.data(),
          values_.data(),    slices_,             inputs_,       outputs_,          expand_};
}

}  // namespace sparsecc
