#include "algebra/spgemm.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "algebra/accumulator.h"
#include "algebra/merge.h"
#include "algebra/splitter.h"
#include "algebra/tensor.h"
#include "schedule.h"

namespace sparsecc::algebra {
namespace {

constexpr int64_t kGrain = 1 << 14;
constexpr int64_t kReserved = 1 << 20;

// How many products come before each entry of A, and each entry itself counts as one more.
template <class V, class I>
class Work {
 public:
  Work(const Rows<V, I>& a, const Rows<V, I>& b, const sparsecc_executor* executor) : before_(at(entries(a) + 1)) {
    const int64_t n = entries(a), tasks = std::clamp(n / kGrain, int64_t{1}, thread_count(executor));
    std::vector<int64_t> sums(at(tasks));
    const auto length = [&](int64_t i) { return int64_t{b.pos[a.crd[i] + 1]} - b.pos[a.crd[i]] + 1; };
    run_tasks(executor, tasks, [&](int64_t task) {
      int64_t sum = 0;
      for (int64_t i = task * n / tasks; i < (task + 1) * n / tasks; ++i) sum += length(i);
      sums[at(task)] = sum;
    });
    run_tasks(executor, tasks, [&](int64_t task) {
      int64_t sum = 0;
      for (int64_t other = 0; other < task; ++other) sum += sums[at(other)];
      for (int64_t i = task * n / tasks; i < (task + 1) * n / tasks; ++i) {
        before_[at(i)] = sum;
        sum += length(i);
      }
      if (task + 1 == tasks) before_[at(n)] = sum;
    });
  }

  int64_t total() const { return before_.back(); }
  int64_t before(int64_t entry) const { return before_[at(entry)]; }
  // The last entry with less work before it than `target`, for targets above 0.
  int64_t entry_at(int64_t target) const {
    return std::lower_bound(before_.begin(), before_.end() - 1, target) - before_.begin() - 1;
  }

 private:
  static int64_t entries(const Rows<V, I>& a) { return a.pos[a.rows]; }
  std::vector<int64_t> before_;
};

// Between two products: entries of A that have begun, products of the last of them that are done, and rows begun.
struct Cut {
  int64_t entry = 0, products = 0, rows = 0;
};

// An array at the end of which there is room for more.
template <class T>
class Grown {
 public:
  T* room(int64_t more) {
    if (size_ + more > memory_.size()) {
      Buffer<T> larger;
      larger.grow(std::max(2 * memory_.size(), size_ + more));
      std::copy_n(memory_.data(), size_, larger.data());
      memory_ = std::move(larger);
    }
    return memory_.data() + size_;
  }
  void set_size(int64_t size) { size_ = size; }
  int64_t size() const { return size_; }
  const T* data() const { return memory_.data(); }
  const T& operator[](int64_t i) const { return memory_[i]; }

 private:
  Buffer<T> memory_;
  int64_t size_ = 0;
};

// What one part has computed: rows one after the other. If the part begins inside a row, that comes first.
template <class V, class I>
struct Piece {
  Grown<I> crd;
  Grown<V> values;
  std::vector<int64_t> ends;  // of the rows, in the two
  bool carried = false;       // the first belongs to an earlier part's last row

  int64_t begin(size_t row) const { return row == 0 ? 0 : ends[row - 1]; }
};

template <class V, class I>
class Product : public sparsecc_product {
 public:
  Product(const sparsecc_tensor& a, const sparsecc_tensor& b, const sparsecc_executor* executor)
      : a_(rows_of<V, I>(a)), b_(rows_of<V, I>(b)), work_(a_, b_, executor) {
    const int64_t parts = parts_for(work_.total(), kGrain);
    for (int64_t i = 0; i <= parts; ++i) cuts_.push_back(cut(i, parts));
    pieces_.resize(at(parts));
  }

  // `make` returns an accumulator for the use of one thread.
  template <class Make>
  void compute(const Make& make, const sparsecc_executor* executor) {
    const auto parts = static_cast<int64_t>(pieces_.size());
    std::vector<decltype(make())> accumulators;
    const int64_t workers = std::min(parts, thread_count(executor));
    for (int64_t i = 0; i < workers; ++i) accumulators.push_back(make());
    std::atomic<int64_t> next{0};
    run_tasks(executor, workers, [&](int64_t worker) {
      for (int64_t part = next.fetch_add(1); part < parts; part = next.fetch_add(1))
        compute_part(part, *accumulators[at(worker)]);
    });
    join_carried();
  }

  int64_t rows() const override { return a_.rows; }
  int64_t entries() const override { return starts_.back(); }

  void fetch(void* pos, void* crd, void* values, const sparsecc_executor* executor) const override {
    I* positions = static_cast<I*>(pos);
    run_tasks(executor, static_cast<int64_t>(pieces_.size()), [&](int64_t part) {
      const Piece<V, I>& piece = pieces_[at(part)];
      const int64_t skipped = piece.carried ? piece.ends[0] : 0, shift = starts_[at(part)] - skipped;
      int64_t row = cuts_[at(part)].rows;
      for (size_t i = piece.carried ? 1 : 0; i < piece.ends.size(); ++i)
        positions[row++] = static_cast<I>(piece.begin(i) + shift);
      const int64_t size = piece.crd.size() - skipped;
      std::copy_n(piece.crd.data() + skipped, size, static_cast<I*>(crd) + starts_[at(part)]);
      std::copy_n(piece.values.data() + skipped, size, static_cast<V*>(values) + starts_[at(part)]);
    });
    positions[a_.rows] = static_cast<I>(entries());
  }

 private:
  Cut cut(int64_t part, int64_t parts) const {
    if (part == 0) return {};
    if (part == parts) return {nonzeros(), nonzeros() > 0 ? length(nonzeros() - 1) : 0, a_.rows};
    const int64_t total = work_.total(), target = part * (total / parts) + part * (total % parts) / parts;
    const int64_t entry = work_.entry_at(target);
    const int64_t row = std::upper_bound(a_.pos, a_.pos + a_.rows + 1, static_cast<I>(entry)) - a_.pos;
    return {entry + 1, target - work_.before(entry) - 1, row};
  }

  template <class Accumulator>
  void compute_part(int64_t part, Accumulator& accumulator) {
    const Cut &from = cuts_[at(part)], &to = cuts_[at(part + 1)];
    Piece<V, I>& piece = pieces_[at(part)];
    // Room for as many results as there can be, up to a limit: memory that is never written costs nothing.
    const int64_t most = std::min(work_.total() / static_cast<int64_t>(pieces_.size()) + 1, kReserved);
    piece.crd.room(most);
    piece.values.room(most);
    const int64_t open_end = from.rows > 0 ? std::min<int64_t>(a_.pos[from.rows], to.entry) : 0;
    piece.carried = from.entry > 0 && (from.entry < open_end || unfinished(from));
    if (piece.carried) {
      accumulator.begin_row(from.rows - 1);
      if (from.entry == to.entry) {
        add(accumulator, from.entry - 1, from.products, to.products);
      } else {
        add(accumulator, from.entry - 1, from.products, length(from.entry - 1));
        add_entries(accumulator, from.entry, open_end, to);
      }
      take_row(accumulator, piece);
    }
    for (int64_t row = from.rows; row < to.rows; ++row) {
      const int64_t begin = a_.pos[row], end = std::min<int64_t>(a_.pos[row + 1], to.entry);
      accumulator.begin_row(row);
      add_entries(accumulator, begin, end, to);
      take_row(accumulator, piece);
    }
  }

  int64_t nonzeros() const { return a_.pos[a_.rows]; }
  bool unfinished(const Cut& cut) const { return cut.products < length(cut.entry - 1); }
  int64_t length(int64_t entry) const { return int64_t{b_.pos[a_.crd[entry] + 1]} - b_.pos[a_.crd[entry]]; }

  // Entries up to `end`, the last of which may be cut.
  template <class Accumulator>
  void add_entries(Accumulator& accumulator, int64_t begin, int64_t end, const Cut& to) const {
    for (int64_t entry = begin; entry < end; ++entry)
      add(accumulator, entry, 0, entry + 1 == to.entry ? to.products : length(entry));
  }

  template <class Accumulator>
  void add(Accumulator& accumulator, int64_t entry, int64_t begin, int64_t end) const {
    const int64_t first = b_.pos[a_.crd[entry]];
    accumulator.add(a_.values[entry], b_.crd, b_.values, first + begin, first + end);
  }

  template <class Accumulator>
  static void take_row(Accumulator& accumulator, Piece<V, I>& piece) {
    const int64_t most = accumulator.most();
    I* crd = piece.crd.room(most);
    V* values = piece.values.room(most);
    int64_t n = piece.crd.size();
    accumulator.take([&](I column, V sum) {
      *crd++ = column;
      *values++ = sum;
      ++n;
    });
    finish_row(piece, n);
  }

  static void finish_row(Piece<V, I>& piece, int64_t size) {
    piece.crd.set_size(size);
    piece.values.set_size(size);
    piece.ends.push_back(size);
  }

  // Rows that several parts have computed are added up, in the order of the parts, where they begin.
  void join_carried() {
    const size_t parts = pieces_.size();
    for (size_t owner = 0; owner < parts;) {
      size_t end = owner + 1;
      while (end < parts && pieces_[end].carried && pieces_[end].ends.size() == 1) ++end;
      const bool shared = end < parts && pieces_[end].carried;
      if (shared || end > owner + 1) add_up(owner, shared ? end : end - 1);
      owner = end;
    }
    starts_.assign(1, 0);
    for (const Piece<V, I>& piece : pieces_)
      starts_.push_back(starts_.back() + piece.crd.size() - (piece.carried ? piece.ends[0] : 0));
  }

  // The last row of `owner` and the first of those up to `last`.
  void add_up(size_t owner, size_t last) {
    std::vector<Window> windows;
    for (size_t part = owner; part <= last; ++part) {
      const Piece<V, I>& piece = pieces_[part];
      const size_t row = part == owner ? piece.ends.size() - 1 : 0;
      windows.push_back({piece.begin(row), piece.ends[row]});
    }
    std::vector<I> crd;
    std::vector<V> values;
    std::vector<int64_t> positions(windows.size());
    merge<Join::kUnion>(
        windows.data(), static_cast<int64_t>(windows.size()), positions.data(),
        [&](int64_t t, int64_t position) { return int64_t{pieces_[owner + at(t)].crd[position]}; },
        [&](int64_t coordinate, const int64_t* position) {
          V sum{0};
          for (size_t t = 0; t < windows.size(); ++t)
            if (position[t] >= 0) sum += pieces_[owner + t].values[position[t]];
          crd.push_back(static_cast<I>(coordinate));
          values.push_back(sum);
        });
    Piece<V, I>& piece = pieces_[owner];
    const int64_t begin = piece.begin(piece.ends.size() - 1), size = static_cast<int64_t>(crd.size());
    piece.ends.pop_back();
    piece.crd.set_size(begin);
    piece.values.set_size(begin);
    std::copy(crd.begin(), crd.end(), piece.crd.room(size));
    std::copy(values.begin(), values.end(), piece.values.room(size));
    finish_row(piece, begin + size);
  }

  const Rows<V, I> a_, b_;
  const Work<V, I> work_;
  std::vector<Cut> cuts_;
  std::vector<Piece<V, I>> pieces_;
  std::vector<int64_t> starts_;  // of what each part has in the result
};

template <class V, class I>
sparsecc_product* multiply_typed(const sparsecc_tensor& a, const sparsecc_tensor& b, const sparsecc_tensor* mask,
                                 const sparsecc_executor* executor) {
  auto product = std::make_unique<Product<V, I>>(a, b, executor);
  const int64_t columns = b.levels[1].size;
  if (mask == nullptr) {
    product->compute([&] { return std::make_unique<DenseAccumulator<V, I>>(columns); }, executor);
  } else {
    const Rows<V, I> rows = rows_of<V, I>(*mask);
    product->compute(
        [&] {
          return std::make_unique<MaskedAccumulator<V, I>>(
              columns, typename MaskedAccumulator<V, I>::Mask{rows.pos, rows.crd, rows.values});
        },
        executor);
  }
  require(product->entries() <= std::numeric_limits<I>::max(), "the product needs positions of 64 bits");
  return product.release();
}

void check_matrix(const sparsecc_tensor& matrix, const sparsecc_tensor& first, bool by_rows) {
  require(matrix.level_count == 2 && !is_dense(matrix.levels[1]) && (!by_rows || is_dense(matrix.levels[0])),
          "operands must be CSR matrices; only the first may be DCSR, without a mask");
  require(matrix.value_bytes == first.value_bytes && index_bytes(matrix) == index_bytes(first),
          "operands must have the same types");
}

}  // namespace

sparsecc_product* multiply(const sparsecc_tensor& a, const sparsecc_tensor& b, const sparsecc_tensor* mask,
                           const sparsecc_executor* executor) {
  check_matrix(a, a, mask != nullptr);
  check_matrix(b, a, true);
  require(a.levels[1].size == b.levels[0].size, "the inner sizes of the operands differ");
  if (mask != nullptr) {
    check_matrix(*mask, a, true);
    require(mask->levels[0].size == a.levels[0].size && mask->levels[1].size == b.levels[1].size,
            "the mask has another shape than the product");
  }
  sparsecc_product* product = nullptr;
  with_types(a, [&](auto value, auto index) {
    product = multiply_typed<decltype(value), decltype(index)>(a, b, mask, executor);
  });
  return product;
}

}  // namespace sparsecc::algebra
