#include "algebra/rows.h"

#include <algorithm>
#include <vector>

#include "algebra/splitter.h"
#include "algebra/tensor.h"
#include "schedule.h"

namespace sparsecc::algebra {
namespace {

// Products that a part has at least: a few microseconds.
constexpr int64_t kGrain = 4096;

// What the rows of a tensor are cut into, and where their results go.
template <class V, class I>
class Parts {
 public:
  Parts(const sparsecc_tensor& tensor, int64_t width)
      : rows_(rows_of<V, I>(tensor)), cuts_(cut(tensor, width)) {
    if (tensor.level_count == 2 && !is_dense(tensor.levels[0])) places_ = static_cast<const I*>(tensor.levels[0].crd);
  }

  int64_t count() const { return cuts_.parts(); }
  const I* places() const { return places_; }
  int64_t place(int64_t row) const { return places_ == nullptr ? row : int64_t{places_[row]}; }

  RowPart<V, I> part(int64_t i) const {
    return {rows_.pos,  rows_.crd,           rows_.values,       cuts_.rows[at(i)], cuts_.rows[at(i + 1)],
            cuts_.leaves[at(i)], cuts_.leaves[at(i + 1)]};
  }

  // Whether the part begins inside the row before its first.
  bool has_carry(int64_t i) const {
    const RowPart<V, I> mine = part(i);
    return mine.begin < std::min<int64_t>(mine.pos[mine.row_begin], mine.end);
  }

 private:
  static RowCuts cut(const sparsecc_tensor& tensor, int64_t width) {
    const sparsecc_level& last = tensor.levels[tensor.level_count - 1];
    const int64_t work = last.pos_count - 1 + last.crd_count;
    const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(width, 1), 1);
    return has_cuts(tensor) ? given(tensor, std::max<int64_t>(work / grain, 1))
                            : cut_rows(last, 1, 1, parts_for(work, grain));
  }

  // Every so many cuts of the table, so that there are at most `most` parts.
  static RowCuts given(const sparsecc_tensor& tensor, int64_t most) {
    int64_t step = 1;
    while (tensor.cut_parts % step != 0 || tensor.cut_parts / step > most) ++step;
    RowCuts cuts;
    for (int64_t i = 0; i <= tensor.cut_parts; i += step) {
      cuts.rows.push_back(tensor.cuts[i]);
      cuts.leaves.push_back(tensor.cuts[tensor.cut_parts + 1 + i]);
    }
    return cuts;
  }

  Rows<V, I> rows_;
  RowCuts cuts_;
  const I* places_ = nullptr;
};

// Rows that a tensor does not store are zero.
template <class V>
void clear_missing(const sparsecc_tensor& tensor, int64_t columns, V* y) {
  if (tensor.level_count == 2 && !is_dense(tensor.levels[0]))
    std::fill_n(y, tensor.levels[0].size * columns, V{0});
}

}  // namespace

const AlgebraTable& table_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      return avx512::kAlgebra;
    case Isa::kAvx2:
      return avx2::kAlgebra;
#elif defined(__aarch64__)
    case Isa::kNeon:
      return neon::kAlgebra;
#endif
    default:
      return generic::kAlgebra;
  }
}

template <>
const AlgebraKernels<float, int32_t>& kernels_of(Isa isa) { return table_of(isa).float_int32; }
template <>
const AlgebraKernels<float, int64_t>& kernels_of(Isa isa) { return table_of(isa).float_int64; }
template <>
const AlgebraKernels<double, int32_t>& kernels_of(Isa isa) { return table_of(isa).double_int32; }
template <>
const AlgebraKernels<double, int64_t>& kernels_of(Isa isa) { return table_of(isa).double_int64; }

void spmv(const sparsecc_tensor& a, const void* x, void* y, Isa isa, const sparsecc_executor* executor) {
  with_types(a, [&](auto value, auto index) {
    using V = decltype(value);
    using I = decltype(index);
    V* out = static_cast<V*>(y);
    const Parts<V, I> parts(a, 1);
    std::vector<V> carries(at(parts.count()));
    clear_missing(a, 1, out);
    const auto kernel = kernels_of<V, I>(isa).spmv;
    run_tasks(executor, parts.count(), [&](int64_t i) {
      SpmvJob<V, I> job = {parts.part(i), static_cast<const V*>(x), out, parts.places(), V{0}};
      kernel(&job);
      carries[at(i)] = job.carry;
    });
    for (int64_t i = 0; i < parts.count(); ++i)
      if (parts.has_carry(i)) out[parts.place(parts.part(i).row_begin - 1)] += carries[at(i)];
  });
}

void spmm(const sparsecc_tensor& a, const void* x, int64_t columns, void* y, Isa isa,
          const sparsecc_executor* executor) {
  with_types(a, [&](auto value, auto index) {
    using V = decltype(value);
    using I = decltype(index);
    V* out = static_cast<V*>(y);
    const Parts<V, I> parts(a, columns);
    std::vector<V> carries(at(parts.count() * columns));
    clear_missing(a, columns, out);
    const auto kernel = kernels_of<V, I>(isa).spmm;
    run_tasks(executor, parts.count(), [&](int64_t i) {
      const SpmmJob<V, I> job = {parts.part(i),  static_cast<const V*>(x), columns, out,
                                 parts.places(), carries.data() + i * columns};
      kernel(&job);
    });
    for (int64_t i = 0; i < parts.count(); ++i) {
      if (!parts.has_carry(i)) continue;
      V* row = out + parts.place(parts.part(i).row_begin - 1) * columns;
      for (int64_t column = 0; column < columns; ++column) row[column] += carries[at(i * columns + column)];
    }
  });
}

void sddmm(const sparsecc_tensor& s, const void* u, const void* v, int64_t inner, void* out, Isa isa,
           const sparsecc_executor* executor) {
  with_types(s, [&](auto value, auto index) {
    using V = decltype(value);
    using I = decltype(index);
    const Parts<V, I> parts(s, inner);
    const auto kernel = kernels_of<V, I>(isa).sddmm;
    run_tasks(executor, parts.count(), [&](int64_t i) {
      const SddmmJob<V, I> job = {parts.part(i), static_cast<const V*>(u), static_cast<const V*>(v), inner,
                                  parts.places(), static_cast<V*>(out)};
      kernel(&job);
    });
  });
}

}  // namespace sparsecc::algebra
