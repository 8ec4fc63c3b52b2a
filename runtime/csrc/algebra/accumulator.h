// Where the products of one row of a matrix product meet, and come out in the order of their columns.
#ifndef SPARSECC_ALGEBRA_ACCUMULATOR_H_
#define SPARSECC_ALGEBRA_ACCUMULATOR_H_

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "common.h"

namespace sparsecc::algebra {

// One number per column, and two levels of bits that say which are in use: 64 columns in a word, 64 words above it.
template <class V, class I>
class DenseAccumulator {
 public:
  explicit DenseAccumulator(int64_t columns)
      : sums_(columns), words_(ceil_div(columns, 64)), blocks_(ceil_div(columns, 4096)) {}

  void begin_row(int64_t) {}

  // The coordinates rise, so that those of one word come one after the other, as do the words of a block.
  void add(V factor, const I* crd, const V* values, int64_t begin, int64_t end) {
    if (begin == end) return;
    products_ += end - begin;
    int64_t word = crd[begin] >> 6, block = word >> 6;
    first_ = std::min(first_, block);
    uint64_t bits = 0, words = 0;
    for (int64_t i = begin; i < end; ++i) {
      const I column = crd[i];
      sums_[column] += factor * values[i];
      if (column >> 6 != word) {
        words_[word] |= bits;
        words |= uint64_t{1} << (word & 63);
        bits = 0;
        word = column >> 6;
        if (word >> 6 != block) {
          blocks_[block] |= words;
          words = 0;
          block = word >> 6;
        }
      }
      bits |= uint64_t{1} << (column & 63);
    }
    words_[word] |= bits;
    blocks_[block] |= words | uint64_t{1} << (word & 63);
    last_ = std::max(last_, block);
  }

  // The most columns that can be in use.
  int64_t most() const { return std::min(products_, sums_.size()); }

  // Calls found(column, sum) for each column in use, and is empty after it.
  template <class Found>
  void take(const Found& found) {
    for (int64_t block = first_; block <= last_; ++block) {
      uint64_t words = blocks_[block];
      blocks_[block] = 0;
      for (; words != 0; words &= words - 1) {
        const int64_t word = 64 * block + std::countr_zero(words);
        uint64_t bits = words_[word];
        words_[word] = 0;
        for (; bits != 0; bits &= bits - 1) {
          const int64_t column = 64 * word + std::countr_zero(bits);
          found(static_cast<I>(column), sums_[column]);
          sums_[column] = V{0};
        }
      }
    }
    first_ = kNone;
    last_ = -1;
    products_ = 0;
  }

 private:
  static constexpr int64_t kNone = INT64_MAX;

  Buffer<V> sums_;
  Buffer<uint64_t> words_, blocks_;
  int64_t first_ = kNone, last_ = -1;  // blocks in use
  int64_t products_ = 0;
};

// Only columns that a mask has in the row; sums are multiplied by its values.
template <class V, class I>
class MaskedAccumulator {
 public:
  struct Mask {
    const I* pos;
    const I* crd;
    const V* values;
  };

  MaskedAccumulator(int64_t columns, Mask mask) : mask_(mask), place_(columns) {}

  void begin_row(int64_t row) {
    begin_ = mask_.pos[row];
    const int64_t size = mask_.pos[row + 1] - begin_;
    sums_.assign(at(size + 1), V{0});
    used_.assign(at(size + 1), 0);
    for (int64_t i = 0; i < size; ++i) place_[mask_.crd[begin_ + i]] = static_cast<I>(i + 1);
  }

  void add(V factor, const I* crd, const V* values, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const size_t place = at(place_[crd[i]]);
      sums_[place] += factor * values[i];
      used_[place] = 1;
    }
  }

  int64_t most() const { return static_cast<int64_t>(sums_.size()) - 1; }

  template <class Found>
  void take(const Found& found) {
    for (int64_t i = 0; i < most(); ++i) {
      const I column = mask_.crd[begin_ + i];
      place_[column] = 0;
      if (used_[at(i + 1)] != 0) found(column, mask_.values[begin_ + i] * sums_[at(i + 1)]);
    }
  }

 private:
  const Mask mask_;
  Buffer<I> place_;  // of each column in the row of the mask, from 1; 0: not there
  std::vector<V> sums_;  // by place; at 0 what the mask leaves out
  std::vector<uint8_t> used_;
  int64_t begin_ = 0;
};

}  // namespace sparsecc::algebra
#endif
