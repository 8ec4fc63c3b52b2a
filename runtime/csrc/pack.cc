#include "pack.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "half.h"
#include "schedule.h"

namespace sparsecc {

PackedValues::PackedValues(Buffer<float> values, sparsecc_value_type type) : type_(type) {
  if (type == SPARSECC_FLOAT32) {
    wide_ = std::move(values);
    return;
  }
  narrow_ = Buffer<uint16_t>(values.size());
  for (int64_t i = 0; i < values.size(); ++i) narrow_[i] = narrow(values[i], type);
}

BlockPack::BlockPack(const Weight& weight, sparsecc_value_type type) : outputs_(weight.outputs) {
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
  shares = Shares(start.data(), groups, kGroupOverhead, kGrain);
  pieces = Pieces(shares.pieces());
  index_ = Buffer<uint32_t>(start[groups]);
  Buffer<float> values(start[groups] * tall);
  for (int64_t group = 0; group < groups; ++group) {
    int64_t to = start[group];
    const size_t row = at(group / parts);
    for (int64_t unit = weight.row_start[row]; unit < weight.row_start[row + 1]; ++unit)
      for (int64_t c = 0; c < columns_of(unit); ++c, ++to) {
        index_[to] = static_cast<uint32_t>(weight.column[at(unit)] * width + c);
        const float* from = weight.values + (unit * height + group % parts * tall) * width + c;
        for (int64_t r = 0; r < std::min(tall, outputs_ - group * tall); ++r)
          values[to * tall + r] = from[r * width];
      }
  }
  values_ = PackedValues(std::move(values), type);
}

BlockView BlockPack::view() const {
  return {start.data(), start.data() + 1, index_.data(), values_.data(), wide_, outputs_};
}

BlockView BlockPack::piece_view() const {
  const int64_t outputs = pieces.count() * wide_ * kGroup;
  return {pieces.begin.data(), pieces.end.data(), index_.data(), values_.data(), wide_, outputs};
}

namespace {

constexpr int64_t kMeanChunk = 384;  // outputs, at most: more than that bring nothing
constexpr int64_t kMostChunk = 1024;

// Chunks of nearly equal work. Tall ones make the inner loop's trip counts more predictable, so there are only as
// many as the threads of this machine are kept busy by; sums do not depend on them.
std::vector<int64_t> chunk_borders(const int64_t* start, int64_t outputs, int tall) {
  const int64_t asked_for = threads_asked_for(), threads = asked_for > 0 ? asked_for : threads_of_machine();
  const int64_t wanted = std::min<int64_t>(64, 2 * threads);
  int64_t count = 1;
  while (count * kMeanChunk < outputs || (count < wanted && 2 * count * kGroup <= outputs)) count *= 2;
  const int64_t step = outputs >= 8 * kGroup * count ? kGroup : tall;  // whole vectors of results, if those are many
  const int64_t rows = ceil_div(outputs, tall);
  const auto cost = [&](int64_t row) { return static_cast<double>((start[row] - start[0] + row) * tall); };
  std::vector<int64_t> borders{0};
  int64_t row = 0;
  for (int64_t i = 1; i <= count; ++i) {
    const double goal = cost(rows) * static_cast<double>(i) / static_cast<double>(count);
    while (row < rows && (cost(row) + cost(row + 1)) / 2 < goal) ++row;
    const int64_t near = (row * tall + step / 2) / step * step;
    const int64_t border = i == count ? outputs : std::min(near, outputs);
    while (border - borders.back() > kMostChunk) borders.push_back(borders.back() + kMostChunk);
    if (border > borders.back()) borders.push_back(border);
  }
  return borders;
}

}  // namespace

ElementPack::ElementPack(const Rows& rows, int64_t first_output, int64_t output_count, int64_t block)
    : block_inputs(block),
      blocks(std::max<int64_t>(1, ceil_div(rows.inputs, block))),
      tall(rows.tall),
      borders_(chunk_borders(rows.start.data() + first_output / rows.tall, output_count, rows.tall)) {
  const int64_t first_row = first_output / tall, row_count = ceil_div(output_count, tall);
  const int64_t units = rows.start[at(first_row + row_count)] - rows.start[at(first_row)];
  index_ = Buffer<uint16_t>(units);
  value_ = Buffer<float>(units * tall);
  std::vector<uint16_t> row;
  const auto start = rows.start.begin() + first_row;
  std::vector<int64_t> next(start, start + row_count);
  std::vector<int64_t> end(at(ceil_div(kMostChunk, tall)));
  std::vector<uint16_t> order;
  std::vector<int64_t> work_before{0};
  int64_t placed = 0;
  for (int64_t chunk = 0; chunk + 1 < static_cast<int64_t>(borders_.size()); ++chunk) {
    const int64_t base = borders_[at(chunk)] / tall, count = ceil_div(outputs_of(chunk, chunk + 1), tall);
    for (int64_t b = 0; b < blocks; ++b) {
      order.clear();
      const auto size = [&](uint16_t r) { return end[r] - next[at(base + r)]; };
      for (int64_t r = 0; r < count; ++r) {
        const auto from = rows.column.begin() + next[at(base + r)];
        const auto stop = rows.column.begin() + rows.start[at(first_row + base + r + 1)];
        end[at(r)] = std::lower_bound(from, stop, (b + 1) * block) - rows.column.begin();
        // The first and last blocks visit every row: sums start and end there.
        if (size(static_cast<uint16_t>(r)) > 0 || b == 0 || b == blocks - 1)
          order.push_back(static_cast<uint16_t>(r));
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
          std::copy_n(rows.value.data() + i * tall, tall, value_.data() + placed * tall);
        }
      }
    }
    work_before.push_back(placed * tall + borders_[at(chunk + 1)]);
  }
  shares = Shares(work_before.data(), static_cast<int64_t>(work_before.size()) - 1, 0);
  row.insert(row.end(), kElementAhead, 0);
  row_ = aligned(row);
}

ElementView ElementPack::cell(int64_t chunk, int64_t block) const {
  const Cell& cell = cells_[at(chunk * blocks + block)];
  return {runs_.data() + cell.run, cell.run_count, row_.data() + cell.row, index_.data() + cell.unit,
          value_.data() + cell.unit * tall};
}

namespace {

// One slot before it is written in the form chosen.
struct Slot {
  uint8_t step = 0;
  uint16_t mask = 0;
  uint8_t position[kGroup] = {};
  float weight[kGroup] = {};
};

// Inputs that a slot takes from, and what its beginning is a multiple of.
struct Window {
  int64_t length, unit;
};

Window window_of(SliceView::Form form) {
  return form == SliceView::kPacked ? Window{2 * kGroup, kGroup} : Window{kGroup, 1};
}

// The slots of outputs[0..lanes), in order.
template <class Emit>
void each_slot(const Rows& rows, const int64_t* outputs, int64_t lanes, Window size, Emit emit) {
  int64_t next[kGroup], end[kGroup];
  for (int64_t lane = 0; lane < lanes; ++lane) {
    next[lane] = rows.start[at(outputs[lane])];
    end[lane] = rows.start[at(outputs[lane] + 1)];
  }
  for (int64_t window = 0;;) {
    int64_t nearest = INT64_MAX;
    for (int64_t lane = 0; lane < lanes; ++lane)
      if (next[lane] < end[lane]) nearest = std::min<int64_t>(nearest, rows.column[at(next[lane])]);
    if (nearest == INT64_MAX) return;
    const int64_t target = std::max(window, nearest / size.unit);
    Slot slot;
    slot.step = static_cast<uint8_t>(std::min<int64_t>(target - window, UINT8_MAX));
    window += slot.step;
    for (int64_t lane = 0; window == target && lane < lanes; ++lane) {  // else an empty slot on the way
      if (next[lane] == end[lane]) continue;
      const int64_t position = rows.column[at(next[lane])] - window * size.unit;
      if (position >= size.length) continue;
      slot.position[lane] = static_cast<uint8_t>(position);
      slot.mask = static_cast<uint16_t>(slot.mask | 1u << lane);
      slot.weight[lane] = rows.value[at(next[lane]++)];
    }
    emit(slot);
  }
}

// The slots of a group of 16 outputs, which are taken in `order` if there is one.
template <class Emit>
void each_group_slot(const Rows& rows, const int32_t* order, int64_t group, Window size, Emit emit) {
  const int64_t first = group * kGroup, lanes = std::min(rows.outputs, first + kGroup) - first;
  int64_t outputs[kGroup];
  for (int64_t lane = 0; lane < lanes; ++lane)
    outputs[lane] = order != nullptr ? order[first + lane] : first + lane;
  each_slot(rows, outputs, lanes, size, emit);
}

int64_t count_slots(const Rows& rows, const int32_t* order, Window size) {
  int64_t count = 0;
  for (int64_t group = 0; group < ceil_div(rows.outputs, kGroup); ++group)
    each_group_slot(rows, order, group, size, [&](const Slot&) { ++count; });
  return count;
}

// The outputs by their number of weights, where that is worth it: a group takes as long as the longest of its
// outputs, and in pruned models these differ a lot. Empty if it saves less than a seventh of the slots, since
// results then no longer lie side by side.
Buffer<int32_t> balanced_order(const Rows& rows, Window size) {
  Buffer<int32_t> order(rows.outputs);
  std::iota(order.data(), order.data() + rows.outputs, 0);
  const auto weights = [&](int32_t output) { return rows.start[at(output + 1)] - rows.start[at(output)]; };
  std::stable_sort(order.data(), order.data() + rows.outputs,
                   [&](int32_t a, int32_t b) { return weights(a) < weights(b); });
  if (count_slots(rows, order.data(), size) * 7 > count_slots(rows, nullptr, size) * 6) return {};
  return order;
}

// The same of slices that are all alike.
template <class Emit>
void each_full_slot(const Rows& rows, int64_t first, int64_t lanes, int64_t slots, Emit emit) {
  for (int64_t i = 0; i < slots; ++i) {
    Slot slot;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t weight = rows.start[at(first + lane)] + i;
      slot.position[lane] = static_cast<uint8_t>(rows.column[at(weight)] % kGroup);
      slot.weight[lane] = rows.value[at(weight)];
    }
    emit(slot);
  }
}

// How many slots every slice has if all are alike and full, else 0.
int64_t uniform_slots(const Rows& rows, int64_t slices) {
  if (slices == 0) return 0;
  std::vector<int64_t> count(at(slices));
  int64_t expected = -1;
  for (int64_t output = 0; output < rows.outputs; ++output) {
    std::fill(count.begin(), count.end(), 0);
    for (int64_t i = rows.start[at(output)]; i < rows.start[at(output + 1)]; ++i)
      ++count[rows.column[at(i)] / kGroup];
    if (expected < 0) expected = count[0];
    for (const int64_t c : count)
      if (c != expected) return 0;
  }
  return expected;
}

void pack_halves(const Slot& slot, std::vector<uint8_t>& to) {
  uint64_t packed = 0;
  for (int lane = 0; lane < kGroup; ++lane)
    packed |= uint64_t{slot.position[lane]} << (lane % 2 * 32 + lane / 2 * 4);
  uint8_t bytes[sizeof packed];
  std::memcpy(bytes, &packed, sizeof packed);
  to.insert(to.end(), bytes, bytes + sizeof packed);
}

// Positions and values of a slot without most of its zeros; returns how many values it has.
uint8_t pack_dense(const Slot& slot, std::vector<uint8_t>& positions, std::vector<float>& values) {
  constexpr int kMostSkipped = 7;
  int skipped = 0;
  for (int lane = 0; lane < kGroup; ++lane) {
    positions.push_back(static_cast<uint8_t>(slot.position[lane] | skipped << 5));
    if ((slot.mask >> lane & 1) == 0 && skipped < kMostSkipped) {
      ++skipped;
    } else {
      values.push_back(slot.weight[lane]);
    }
  }
  return static_cast<uint8_t>(kGroup - skipped);
}

// Slots with all their zeros are read in three quarters of the time, as long as they stay in a second-level
// cache; from memory it is bytes that count.
SliceView::Form form_of(const Rows& rows, bool uniform, bool can_pack, sparsecc_value_type type) {
  constexpr int64_t kCachedBytes = 1 << 20;
  const int64_t slot_bytes = kGroup / 2 + 4 + kGroup * (type == SPARSECC_FLOAT32 ? 4 : 2);
  if (uniform) return SliceView::kUniform;
  if (!can_pack || rows.outputs == 0) return SliceView::kMasked;
  return count_slots(rows, nullptr, window_of(SliceView::kMasked)) * slot_bytes <= kCachedBytes
             ? SliceView::kMasked
             : SliceView::kPacked;
}

}  // namespace

SlicePack::SlicePack(const Rows& rows, bool can_pack, sparsecc_value_type type)
    : groups(ceil_div(rows.outputs, kGroup)),
      slot_start(groups + 1),
      outputs_(rows.outputs),
      slices_(ceil_div(rows.inputs, kGroup)),
      slots_per_slice_(uniform_slots(rows, slices_)),
      form_(form_of(rows, slots_per_slice_ > 0, can_pack, type)),
      value_start_(groups + 1) {
  std::vector<SlotMove> moves;
  std::vector<uint16_t> masks;
  std::vector<uint8_t> positions;
  std::vector<float> values;
  const Window window = window_of(form_);
  if (form_ != SliceView::kUniform) order_ = balanced_order(rows, window);
  const auto add = [&](const Slot& slot) {
    uint8_t count = kGroup;
    if (form_ == SliceView::kPacked) {
      count = pack_dense(slot, positions, values);
    } else {
      pack_halves(slot, positions);
      values.insert(values.end(), slot.weight, slot.weight + kGroup);
    }
    masks.push_back(slot.mask);
    moves.push_back({slot.step, count});
  };
  for (int64_t group = 0; group < groups; ++group) {
    if (form_ == SliceView::kUniform) {
      const int64_t first = group * kGroup, lanes = std::min(outputs_, first + kGroup) - first;
      each_full_slot(rows, first, lanes, slices_ * slots_per_slice_, add);
    } else {
      each_group_slot(rows, order_.data(), group, window, add);
    }
    slot_start[group + 1] = static_cast<int64_t>(masks.size());
    value_start_[group + 1] = static_cast<int64_t>(values.size());
  }
  values.insert(values.end(), kGroup, 0.0f);
  shares = Shares(slot_start.data(), groups, 2 * kGroupOverhead,
                  form_ == SliceView::kUniform ? 0 : kGrain);
  pieces = Pieces(shares.pieces());
  positions_ = aligned(positions);
  masks_ = aligned(masks);
  moves_ = aligned(moves);
  values_ = PackedValues(aligned(values), type);
  find_pieces();
}

// Where the window is and which values come next when a piece begins.
void SlicePack::find_pieces() {
  const int64_t unit = window_of(form_).unit;
  int64_t slot = 0, value = 0, origin = 0;
  for (const Shares::Piece& piece : shares.pieces()) {
    if (piece.begin == slot_start[piece.unit]) {
      slot = piece.begin;
      value = value_start_[piece.unit];
      origin = 0;
    }
    for (; slot < piece.begin; ++slot) {
      value += moves_[slot].values;
      origin += moves_[slot].step * unit;
    }
    piece_value_start_.push_back(value);
    piece_origin_.push_back(origin);
  }
}

SliceView SlicePack::view() const {
  return {form_,
          slot_start.data(),
          slot_start.data() + 1,
          value_start_.data(),
          nullptr,
          positions_.data(),
          masks_.data(),
          moves_.data(),
          values_.data(),
          slots_per_slice_,
          slices_,
          outputs_,
          order_.data()};
}

SliceView SlicePack::piece_view() const {
  SliceView of_pieces = view();
  of_pieces.slot_start = pieces.begin.data();
  of_pieces.slot_end = pieces.end.data();
  of_pieces.value_start = piece_value_start_.data();
  of_pieces.origin = piece_origin_.data();
  of_pieces.outputs = pieces.count() * kGroup;
  of_pieces.order = nullptr;
  return of_pieces;
}

}  // namespace sparsecc
