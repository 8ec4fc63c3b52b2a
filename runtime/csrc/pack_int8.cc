#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "int8.h"

namespace sparsecc {
namespace {

// Where weight (output, input) of a block lies among its 64 bytes.
int64_t place(QuadOrder order, int64_t output, int64_t input) {
  switch (order) {
    case QuadOrder::kOutputs:
    case QuadOrder::kBlockPairs:  // of single blocks, as those with picks are
      return output * kQuad + input;
    case QuadOrder::kPairs:
    case QuadOrder::kSmallPairs:
      return input / 2 * (2 * kGroup) + output * 2 + input % 2;
    case QuadOrder::kTiles:  // made of blocks in another order
    case QuadOrder::kLanes:
    case QuadOrder::kInputs:
      break;
  }
  return input * kGroup + output % 4 * 4 + output / 4;
}

// The same among the bytes of all blocks of neighbours.
int64_t place(QuadOrder order, int64_t block, int64_t output, int64_t input) {
  if (order == QuadOrder::kBlockPairs)
    return block / 2 * (2 * kQuadValues) + output * (2 * kQuad) + block % 2 * kQuad + input;
  return block * kQuadValues + place(order, output, input);
}

// Whether a block can hold this weight; what is left of one that is too small goes to one more block.
bool fits(QuadOrder order, int8_t value) { return order != QuadOrder::kSmallPairs || value != -128; }

// Calls take(output, input, value) for every non-zero weight of a group of 16 outputs.
template <class Take>
void visit_group(const Weight& weight, const int8_t* values, int64_t group, Take take) {
  const int64_t height = weight.layout.rows, width = weight.layout.cols;
  const int64_t first = group * kGroup, last = std::min(weight.outputs, first + kGroup);
  for (int64_t row = first / height; row * height < last; ++row)
    for (int64_t unit = weight.row_start[at(row)]; unit < weight.row_start[at(row) + 1]; ++unit) {
      const int64_t input = int64_t{weight.column[at(unit)]} * width;
      const int64_t inputs = std::min(width, weight.inputs - input);
      for (int64_t output = std::max(first, row * height); output < std::min(last, (row + 1) * height);
           ++output)
        for (int64_t c = 0; c < inputs; ++c) {
          const int8_t value = values[(unit * height + output - row * height) * width + c];
          if (value != 0) take(output, input + c, value);
        }
    }
}

}  // namespace

Weight read_int8_weight(const sparsecc_int8_weight_desc& desc) {
  if (desc.struct_size < sizeof(desc))
    throw Failure{"int8 weight descriptor is " + std::to_string(desc.struct_size) + " bytes, expected " +
                  std::to_string(sizeof(desc)) + ": caller and library do not match"};
  sparsecc_weight_desc positions{};
  positions.struct_size = sizeof(positions);
  positions.layout_version = desc.layout_version;
  positions.layout = desc.layout;
  positions.outputs = desc.outputs;
  positions.inputs = desc.inputs;
  positions.values = desc.values;
  positions.value_count = desc.value_count;
  positions.indices = desc.indices;
  positions.index_bytes = desc.index_bytes;
  static_assert(sizeof positions.activation == sizeof desc.activation);
  __builtin_memcpy(&positions.activation, &desc.activation, sizeof desc.activation);  // may hold no member
  Weight weight = read_structure(positions);
  if (desc.scales == nullptr) throw Failure{"int8 weights have no scales"};
  for (int64_t n = 0; n < desc.outputs; ++n)
    if (!(desc.scales[n] > 0.0f) || !std::isfinite(desc.scales[n]))
      throw Failure{"scale of output " + std::to_string(n) + " is not a finite positive number"};
  return weight;
}

QuadPack::QuadPack(const Weight& weight, const sparsecc_int8_weight_desc& desc, QuadOrder order, int width)
    : outputs(weight.outputs),
      groups(ceil_div(weight.outputs, kGroup)),
      start(groups + 1),
      sums_(groups * kGroup),
      scales_(groups * kGroup) {
  std::copy_n(desc.scales, outputs, scales_.data());
  for (int64_t group = 0; group < groups; ++group)
    visit_group(weight, desc.values, group, [&](int64_t output, int64_t, int8_t value) {
      // Modulo 2^32, as all sums here.
      sums_[output] =
          static_cast<int32_t>(static_cast<uint32_t>(sums_[output]) + static_cast<uint32_t>(value));
    });
  if (order == QuadOrder::kTiles) {
    pack_neighbours(weight, desc.values, QuadOrder::kOutputs);
    const Buffer<int64_t> products = pack_tiles();
    products_ = products[groups];
    shares = Shares(products.data(), groups, kGroupOverhead);
    return;
  }
  if (order == QuadOrder::kLanes) {
    pack_lanes(weight, desc.values);
    return;
  }
  if (width == 0) {
    pack_neighbours(weight, desc.values, order);
  } else {
    pack_windows(weight, desc.values, order, width);
  }
  shares = Shares(start.data(), groups, kGroupOverhead, kGrain);
  pieces = Pieces(shares.pieces());
}

void QuadPack::pack_neighbours(const Weight& weight, const int8_t* values, QuadOrder order) {
  std::vector<uint32_t> index;
  std::vector<int64_t> block_of(at(ceil_div(weight.inputs, kQuad)));
  std::vector<uint8_t> blocks_at(block_of.size());  // in this group, of these four inputs
  for (int64_t group = 0; group < groups; ++group) {
    std::fill(blocks_at.begin(), blocks_at.end(), uint8_t{0});
    visit_group(weight, values, group, [&](int64_t, int64_t input, int8_t value) {
      uint8_t& count = blocks_at[at(input / kQuad)];
      count = std::max<uint8_t>(count, fits(order, value) ? 1 : 2);
    });
    for (size_t quad = 0; quad < blocks_at.size(); ++quad)
      index.insert(index.end(), blocks_at[quad], static_cast<uint32_t>(quad));
    if (order == QuadOrder::kBlockPairs && index.size() % 2 != 0) index.push_back(index.back());
    start[group + 1] = static_cast<int64_t>(index.size());
  }
  index_ = aligned(index);
  values_ = Buffer<int8_t>(blocks() * kQuadValues);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t block = start[group + 1] - 1; block >= start[group]; --block) block_of[index_[block]] = block;
    visit_group(weight, values, group, [&](int64_t output, int64_t input, int8_t value) {
      const int64_t block = block_of[at(input / kQuad)];
      int8_t& stored = values_[place(order, block, output % kGroup, input % kQuad)];
      stored = value;
      if (!fits(order, value)) {
        ++stored;
        values_[place(order, block + 1, output % kGroup, input % kQuad)] = -1;
      }
    });
  }
}

namespace {

// Who picks inputs: each output its own, four outputs the same ones, or each output four neighbours at once.
struct Pickers {
  explicit Pickers(const Layout& layout)
      : outputs(layout.rows % 4 == 0 ? 4 : 1),
        inputs(outputs == 1 && layout.cols % kQuad == 0 ? kQuad : 1),
        count(kGroup / outputs),
        picks(kQuad / inputs) {}
  const int outputs, inputs;  // that one pick stands for
  const int count;            // in a group
  const int picks;            // of each, for one block
  int places() const { return count * picks; }
};

// Where an output's input, one of four, lies among 64 bytes that were picked.
int64_t picked_place(QuadOrder order, int64_t output, int64_t input) {
  switch (order) {
    case QuadOrder::kPairs:  // even bytes are widened apart from odd ones
      return output * kQuad + input % 2 * 2 + input / 2;
    case QuadOrder::kSmallPairs:
      return place(order, output, input);
    default:
      return output * kQuad + input;
  }
}

struct Entry {
  int64_t input;
  int64_t output;  // in its group
  int8_t value;
};

// The entries of one picker, in the order of their inputs, and how many of them were placed.
struct Queue {
  std::vector<Entry> entries;
  size_t next = 0;
  bool empty() const { return next == entries.size(); }
  int64_t front(int inputs) const { return entries[next].input / inputs * inputs; }
};

}  // namespace

// Every block takes the first window that a picker still needs; the others go along as far as it reaches.
void QuadPack::pack_windows(const Weight& weight, const int8_t* values, QuadOrder order, int width) {
  const Pickers pickers(weight.layout);
  const int64_t half = width / 2;
  const bool own = pickers.places() == kQuadValues;
  std::vector<uint32_t> index;
  std::vector<int8_t> placed;
  std::vector<uint8_t> places;
  std::vector<Queue> queues(at(pickers.count));
  const auto take = [&](Queue& queue, int64_t picker, int64_t begin) {
    int8_t* const to = placed.data() + placed.size() - kQuadValues;
    uint8_t* const picked = places.data() + places.size() - pickers.places();
    for (int pick = 0; pick < pickers.picks && !queue.empty(); ++pick) {
      const int64_t input = queue.front(pickers.inputs);
      if (input + pickers.inputs > begin + width) return;
      // What is left of a weight that did not fit goes to another pick of the same input.
      for (; !queue.empty() && queue.front(pickers.inputs) == input; ++queue.next) {
        const Entry& entry = queue.entries[queue.next];
        int8_t& stored = to[place(order, entry.output, pick + entry.input - input)];
        if (stored != 0) break;
        stored = entry.value;
      }
      const int64_t to_place = own ? picked_place(order, picker, pick) : picker * pickers.picks + pick;
      picked[to_place] = static_cast<uint8_t>(input - begin);
    }
  };
  for (int64_t group = 0; group < groups; ++group) {
    for (Queue& queue : queues) queue = {};
    visit_group(weight, values, group, [&](int64_t output, int64_t input, int8_t value) {
      const bool fitting = fits(order, value);
      auto& entries = queues[at(output % kGroup / pickers.outputs)].entries;
      entries.push_back({input, output % kGroup, fitting ? value : static_cast<int8_t>(value + 1)});
      if (!fitting) entries.push_back({input, output % kGroup, -1});
    });
    for (Queue& queue : queues)
      std::stable_sort(queue.entries.begin(), queue.entries.end(),
                       [](const Entry& a, const Entry& b) { return a.input < b.input; });
    while (true) {
      int64_t first = weight.inputs;
      for (const Queue& queue : queues)
        if (!queue.empty()) first = std::min(first, queue.front(pickers.inputs));
      if (first == weight.inputs) break;
      index.push_back(static_cast<uint32_t>(first / half));
      placed.resize(placed.size() + kQuadValues);
      places.resize(places.size() + at(pickers.places()));
      for (int64_t picker = 0; picker < pickers.count; ++picker)
        take(queues[at(picker)], picker, first / half * half);
    }
    start[group + 1] = static_cast<int64_t>(index.size());
  }
  index_ = aligned(index);
  values_ = aligned(placed);
  places_ = aligned(places);
  picks_ = own ? Picks::kOwn : Picks::kShared;
  spread_ = Buffer<uint8_t>(kQuadValues);
  added_ = Buffer<uint8_t>(kQuadValues);
  for (int output = 0; output < kGroup; ++output)
    for (int i = 0; i < kQuad; ++i) {
      const int64_t to = picked_place(order, output, i);
      spread_[to] = static_cast<uint8_t>(output / pickers.outputs * pickers.picks +
                                         (pickers.inputs == 1 ? i : 0));
      added_[to] = static_cast<uint8_t>(pickers.inputs == 1 ? 0 : i);
    }
}

// Fours of inputs in their order, for every `tall` outputs by themselves.
void QuadPack::pack_lanes(const Weight& weight, const int8_t* values) {
  tall = weight.layout.rows % 8 == 0 ? 8 : 4;
  const int64_t parts = kGroup / tall;
  start = Buffer<int64_t>(groups * parts + 1);
  std::vector<uint32_t> index;
  std::vector<int8_t> placed;
  std::vector<Entry> entries;
  std::vector<int64_t> before(at(groups + 1));
  for (int64_t group = 0; group < groups; ++group) {
    entries.clear();
    visit_group(weight, values, group, [&](int64_t output, int64_t input, int8_t value) {
      entries.push_back({input, output % kGroup, value});
    });
    const auto part_of = [&](const Entry& entry) { return entry.output / tall; };
    std::sort(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) {
      return part_of(a) != part_of(b) ? part_of(a) < part_of(b) : a.input < b.input;
    });
    auto entry = entries.begin();
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t input = -1; entry != entries.end() && part_of(*entry) == part; ++entry) {
        if (entry->input != input) index.push_back(static_cast<uint32_t>(entry->input * kLaneRows));
        input = entry->input;
        const int64_t slot = static_cast<int64_t>(index.size()) - 1;
        placed.resize(at(slot / kQuad + 1) * at(tall) * kQuad);
        placed[at(slot / kQuad * tall * kQuad + entry->output % tall * kQuad + slot % kQuad)] = entry->value;
      }
      while (index.size() % kQuad != 0) index.push_back(0);  // with weights of zero
      start[group * parts + part + 1] = static_cast<int64_t>(index.size()) / kQuad;
    }
    before[at(group + 1)] = start[(group + 1) * parts];
  }
  index_ = aligned(index);
  values_ = aligned(placed);
  shares = Shares(before.data(), groups, kGroupOverhead);
}

QuadView QuadPack::view() const {
  return {start.data(), start.data() + 1, index_.data(), values_.data(),  sums_.data(),   scales_.data(),
          outputs,      tall,             picks_,        places_.data(), spread_.data(), added_.data()};
}

QuadView QuadPack::piece_view() const {
  QuadView of_pieces = view();
  of_pieces.start = pieces.begin.data();
  of_pieces.end = pieces.end.data();
  of_pieces.outputs = pieces.count() * kGroup;
  return of_pieces;
}

}  // namespace sparsecc
