#include "algebra/spgemm.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "algebra/accumulator.h"
#include "algebra/splitter.h"
#include "algebra/tensor.h"
#include "schedule.h"

namespace sparsecc::algebra {
namespace {

constexpr int64_t kGrain = 1 << 14;
constexpr int64_t kReserved = 1 << 20;
constexpr int64_t kAhead = 8;  // entries of A whose rows of B are fetched before they are needed

// How many products come before each entry of A, and each entry itself counts as one more; the first of a row also as
// many as the mask has in that row.
template <class V, class I>
class Work {
 public:
  Work(const Rows<V, I>& a, const Rows<V, I>& b, const sparsecc_tensor* mask, const sparsecc_executor* executor)
      : before_(at(entries(a) + 1)) {
    const int64_t n = entries(a), tasks = std::clamp(n / kGrain, int64_t{1}, thread_count(executor));
    if (mask != nullptr) note_headers(a, rows_of<V, I>(*mask).pos);
    std::vector<int64_t> sums(at(tasks));
    const auto length = [&](int64_t i) {
      return before_[at(i)] + int64_t{b.pos[a.crd[i] + 1]} - b.pos[a.crd[i]] + 1;
    };
    run_tasks(executor, tasks, [&](int64_t task) {
      int64_t sum = 0;
      for (int64_t i = task * n / tasks; i < (task + 1) * n / tasks; ++i) sum += length(i);
      sums[at(task)] = sum;
    });
    run_tasks(executor, tasks, [&](int64_t task) {
      int64_t sum = 0;
      for (int64_t other = 0; other < task; ++other) sum += sums[at(other)];
      for (int64_t i = task * n / tasks; i < (task + 1) * n / tasks; ++i) {
        const int64_t more = length(i);
        before_[at(i)] = sum;
        sum += more;
      }
      if (task + 1 == tasks) before_[at(n)] = sum;
    });
  }

  int64_t total() const { return before_.back(); }
  int64_t before(int64_t entry) const { return before_[at(entry)]; }
  int64_t of(int64_t entry) const { return before_[at(entry + 1)] - before_[at(entry)]; }
  // The last entry with less work before it than `target`, for targets above 0.
  int64_t entry_at(int64_t target) const {
    return std::lower_bound(before_.begin(), before_.end() - 1, target) - before_.begin() - 1;
  }

 private:
  static int64_t entries(const Rows<V, I>& a) { return a.pos[a.rows]; }
  void note_headers(const Rows<V, I>& a, const I* mask_pos) {
    for (int64_t row = 0; row < a.rows; ++row)
      if (a.pos[row] < a.pos[row + 1]) before_[at(a.pos[row])] = int64_t{mask_pos[row + 1]} - mask_pos[row];
  }
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
  // Behind what belongs to an earlier part's last row.
  int64_t own_begin() const { return carried ? ends[0] : 0; }
};

template <class V, class I>
class Product : public sparsecc_product {
 public:
  Product(const sparsecc_tensor& a, const sparsecc_tensor& b, const sparsecc_tensor* mask,
          const sparsecc_executor* executor)
      : a_(rows_of<V, I>(a)), b_(rows_of<V, I>(b)), work_(a_, b_, mask, executor) {
    const int64_t parts = parts_for(work_.total(), kGrain);
    for (int64_t i = 0; i <= parts; ++i) cuts_.push_back(cut(i, parts));
    pieces_.resize(at(parts));
  }

  // `make` returns an accumulator for the use of one thread.
  template <class Make>
  void compute(const Make& make, const sparsecc_executor* executor) {
    std::vector<decltype(make())> accumulators;
    run_parts(pieces_.size(), make, accumulators, executor,
              [&](int64_t part, auto& accumulator) { compute_part(part, accumulator); });
    find_shared();
    const auto join = [&](int64_t task, auto& accumulator) { add_up(ranges_[at(task)], accumulator); };
    if constexpr (std::is_same_v<decltype(make()), std::unique_ptr<DenseAccumulator<V, I>>>) {
      run_parts(ranges_.size(), make, accumulators, executor, join);
    } else {
      std::vector<std::unique_ptr<DenseAccumulator<V, I>>> unmasked;
      const auto make_unmasked = [&] { return std::make_unique<DenseAccumulator<V, I>>(b_.columns); };
      run_parts(ranges_.size(), make_unmasked, unmasked, executor, join);
    }
    place_runs();
  }

  int64_t rows() const override { return a_.rows; }
  int64_t entries() const override { return entries_; }

  void fetch(void* pos, void* crd, void* values, const sparsecc_executor* executor) const override {
    I* positions = static_cast<I*>(pos);
    run_tasks(executor, static_cast<int64_t>(runs_.size()), [&](int64_t i) {
      const Run& run = runs_[at(i)];
      std::copy_n(run.crd, run.size, static_cast<I*>(crd) + run.start);
      std::copy_n(run.values, run.size, static_cast<V*>(values) + run.start);
      if (run.part < 0) return;
      const Piece<V, I>& piece = pieces_[at(run.part)];
      const int64_t shift = run.start - piece.own_begin();
      int64_t row = cuts_[at(run.part)].rows;
      for (size_t n = piece.carried ? 1 : 0; n < piece.ends.size(); ++n)
        positions[row++] = static_cast<I>(piece.begin(n) + shift);
    });
    positions[a_.rows] = static_cast<I>(entries());
  }

 private:
  // A range of the columns of a row that parts [first, last] have computed.
  struct Range {
    size_t first, last;
    std::vector<int64_t> begin, end;  // in each of those pieces
    Piece<V, I> sum;
  };
  // Results that follow each other in memory; of a part, or -1: of a range.
  struct Run {
    const I* crd;
    const V* values;
    int64_t size, start, part;
  };

  // Calls body(task, accumulator) for all tasks; there are as many accumulators as threads that have some to do.
  template <class Make, class Accumulators, class Body>
  static void run_parts(size_t count, const Make& make, Accumulators& accumulators, const sparsecc_executor* executor,
                        const Body& body) {
    const auto tasks = static_cast<int64_t>(count);
    const int64_t workers = std::min(tasks, thread_count(executor));
    while (static_cast<int64_t>(accumulators.size()) < workers) accumulators.push_back(make());
    std::atomic<int64_t> next{0};
    run_tasks(executor, workers, [&](int64_t worker) {
      for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1))
        body(task, *accumulators[at(worker)]);
    });
  }

  Cut cut(int64_t part, int64_t parts) const {
    if (part == 0) return {};
    if (part == parts) return {nonzeros(), nonzeros() > 0 ? length(nonzeros() - 1) : 0, a_.rows};
    const int64_t total = work_.total(), target = part * (total / parts) + part * (total % parts) / parts;
    const int64_t entry = work_.entry_at(target);
    const int64_t header = work_.of(entry) - length(entry) - 1, products = target - work_.before(entry) - 1 - header;
    if (products < 0 && entry == 0) return {};
    // Who is to load a row of the mask has something to do in it.
    if (products < 0) return {entry, length(entry - 1), rows_begun(entry - 1)};
    return {entry + 1, products, rows_begun(entry)};
  }

  int64_t rows_begun(int64_t entry) const {
    return std::upper_bound(a_.pos, a_.pos + a_.rows + 1, static_cast<I>(entry)) - a_.pos;
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
    for (int64_t entry = begin; entry < end; ++entry) {
      // Rows of B come from anywhere, and a processor does not guess where the one before ends.
      __builtin_prefetch(b_.pos + a_.crd[std::min(entry + 2 * kAhead, nonzeros() - 1)]);
      const I* next = b_.pos + a_.crd[std::min(entry + kAhead, nonzeros() - 1)];
      __builtin_prefetch(b_.crd + next[0]);
      __builtin_prefetch(b_.values + next[0]);
      __builtin_prefetch(b_.crd + next[1]);
      __builtin_prefetch(b_.values + next[1]);
      add(accumulator, entry, 0, entry + 1 == to.entry ? to.products : length(entry));
    }
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

  // Rows that several parts have computed, cut by their columns into ranges of equal work.
  void find_shared() {
    const size_t parts = pieces_.size();
    for (size_t owner = 0; owner < parts;) {
      size_t end = owner + 1;
      while (end < parts && pieces_[end].carried && pieces_[end].ends.size() == 1) ++end;
      const bool shared = end < parts && pieces_[end].carried;
      if (shared || end > owner + 1) cut_shared(owner, shared ? end : end - 1);
      owner = end;
    }
  }

  void cut_shared(size_t first, size_t last) {
    const size_t n = last - first + 1;
    std::vector<sparsecc_level> levels(n);
    std::vector<sparsecc_walk> walks(n);
    std::vector<int64_t> begins(n);
    std::vector<I> pos(2 * n);
    const int64_t cost = 1;
    int64_t work = 0;
    for (size_t i = 0; i < n; ++i) {
      const Piece<V, I>& piece = pieces_[first + i];
      const size_t row = i == 0 ? piece.ends.size() - 1 : 0;
      begins[i] = piece.begin(row);
      const int64_t size = piece.ends[row] - begins[i];
      pos[2 * i + 1] = static_cast<I>(size);
      levels[i] = {b_.columns, &pos[2 * i], piece.crd.data() + begins[i], 2, size, sizeof(I), sizeof(I)};
      walks[i] = {&levels[i], &cost, 1};
      work += size;
    }
    const int64_t parts = parts_for(work, kGrain);
    std::vector<int64_t> targets, cursors(n * at(parts)), paths(at(parts));
    Cursors out{{}, parts, paths.data(), 1};
    for (int64_t i = 0; i < parts; ++i) targets.push_back((i + 1) * (work / parts) + (i + 1) * (work % parts) / parts);
    for (size_t i = 0; i < n; ++i) out.of_walk.push_back(cursors.data() + i * at(parts));
    find_splits(walks.data(), static_cast<int32_t>(n), targets.data(), parts, out, nullptr);
    for (int64_t part = 0; part < parts; ++part) {
      Range range{first, last, {}, {}, {}};
      for (size_t i = 0; i < n; ++i) {
        range.begin.push_back(begins[i] + (part == 0 ? 0 : out.of_walk[i][part - 1]));
        range.end.push_back(begins[i] + (part + 1 == parts ? levels[i].crd_count : out.of_walk[i][part]));
      }
      ranges_.push_back(std::move(range));
    }
  }

  // In the order of the parts.
  void add_up(Range& range, DenseAccumulator<V, I>& accumulator) {
    for (size_t i = 0; i < range.begin.size(); ++i) {
      const Piece<V, I>& piece = pieces_[range.first + i];
      accumulator.add(V{1}, piece.crd.data(), piece.values.data(), range.begin[i], range.end[i]);
    }
    take_row(accumulator, range.sum);
  }

  // Each part's own rows without a last one that is shared, then the ranges of that.
  void place_runs() {
    auto range = ranges_.begin();
    for (size_t part = 0; part < pieces_.size(); ++part) {
      const Piece<V, I>& piece = pieces_[part];
      const bool shared = range != ranges_.end() && range->first == part;
      const int64_t begin = piece.own_begin(), end = shared ? piece.begin(piece.ends.size() - 1) : piece.crd.size();
      add_run(piece, begin, end, static_cast<int64_t>(part));
      for (; range != ranges_.end() && range->first == part; ++range)
        add_run(range->sum, 0, range->sum.crd.size(), -1);
    }
  }

  void add_run(const Piece<V, I>& piece, int64_t begin, int64_t end, int64_t part) {
    runs_.push_back({piece.crd.data() + begin, piece.values.data() + begin, end - begin, entries_, part});
    entries_ += end - begin;
  }

  const Rows<V, I> a_, b_;
  const Work<V, I> work_;
  std::vector<Cut> cuts_;
  std::vector<Piece<V, I>> pieces_;
  std::vector<Range> ranges_;
  std::vector<Run> runs_;
  int64_t entries_ = 0;
};

template <class V, class I>
sparsecc_product* multiply_typed(const sparsecc_tensor& a, const sparsecc_tensor& b, const sparsecc_tensor* mask,
                                 const sparsecc_executor* executor) {
  auto product = std::make_unique<Product<V, I>>(a, b, mask, executor);
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
