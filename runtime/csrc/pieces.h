// Groups of outputs whose sums are cut in pieces (Shares): where the pieces are, and where their sums meet.
#ifndef SPARSECC_PIECES_H_
#define SPARSECC_PIECES_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "common.h"
#include "shares.h"

namespace sparsecc {

// The pieces as groups of a weight of their own, of which each has the place of one in a row of partial sums.
struct Pieces {
  struct Whole {
    int64_t group, first, count;  // the pieces [first, first + count) of a group
  };

  Pieces() = default;
  explicit Pieces(const std::vector<Shares::Piece>& pieces) {
    for (const auto& [group, first, last] : pieces) {
      if (wholes.empty() || wholes.back().group != group)
        wholes.push_back({group, static_cast<int64_t>(begin.size()), 0});
      ++wholes.back().count;
      whole_of.push_back(static_cast<int64_t>(wholes.size()) - 1);
      begin.push_back(first);
      end.push_back(last);
    }
  }
  int64_t count() const { return static_cast<int64_t>(begin.size()); }

  std::vector<int64_t> begin, end;  // blocks of each piece
  std::vector<Whole> wholes;
  std::vector<int64_t> whole_of;  // of each piece
};

// The partial sums of one call: [rows][pieces][width]. Rows come in chunks; whoever finishes the last piece of
// a group for a chunk of rows puts the sums together.
template <class T>
class PartialSums {
 public:
  PartialSums(const Pieces& pieces, int64_t rows, int64_t chunks, int64_t width)
      : pieces_(pieces),
        stride_(pieces.count() * width),
        width_(width),
        sums_(rows * stride_),
        done_(stride_ == 0 ? nullptr
                           : std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(chunks) *
                                                                      pieces.wholes.size())) {}
  int64_t stride() const { return stride_; }
  T* row(int64_t row) { return sums_.data() + row * stride_; }
  T* of(int64_t row, const Pieces::Whole& whole) { return this->row(row) + whole.first * width_; }

  // Of the pieces [begin, end), done for a chunk: calls join(whole) for each group that is complete with them.
  template <class Join>
  void done(int64_t chunk, int64_t begin, int64_t end, const Join& join) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const auto whole = static_cast<size_t>(pieces_.whole_of[static_cast<size_t>(piece)]);
      auto& count = done_[static_cast<size_t>(chunk) * pieces_.wholes.size() + whole];
      if (count.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces_.wholes[whole].count)
        join(pieces_.wholes[whole]);
    }
  }

 private:
  const Pieces& pieces_;
  int64_t stride_, width_;
  Scratch<4, T> sums_;
  std::unique_ptr<std::atomic<int64_t>[]> done_;
};

}  // namespace sparsecc
#endif
