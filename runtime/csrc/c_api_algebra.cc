#include <vector>

#include "algebra/join.h"
#include "algebra/mttkrp.h"
#include "algebra/rows.h"
#include "algebra/spgemm.h"
#include "algebra/splitter.h"
#include "algebra/tensor.h"
#include "c_guard.h"
#include "isa.h"
#include "sparsecc/algebra.h"

using sparsecc::choose_isa;
using sparsecc::guard;
using sparsecc::require;
namespace algebra = sparsecc::algebra;

namespace {

constexpr int32_t kMostOperands = 1 << 16;
constexpr int64_t kMostColumns = int64_t{1} << 31;

void check_rows(const sparsecc_tensor* tensor) {
  algebra::check_shape(tensor);
  require(tensor->level_count > 0 && !algebra::is_dense(tensor->levels[tensor->level_count - 1]),
          "the last level of the tensor must be compressed");
}

void check_result(const sparsecc_result* result, const sparsecc_tensor& like) {
  require(result->struct_size >= sizeof(*result), "the result is too short: caller and library do not match");
  require(result->level_count == like.level_count && result->levels != nullptr && result->values != nullptr,
          "the result has another number of levels, or no room");
  for (int32_t i = 0; i < like.level_count; ++i)
    require(algebra::is_dense(like.levels[i]) || (result->levels[i].pos != nullptr && result->levels[i].crd != nullptr),
            "the result has no room for a level");
}

}  // namespace

int sparsecc_tensor_check(const sparsecc_tensor* tensor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    algebra::check_shape(tensor);
    algebra::check_numbers(*tensor);
  });
}

int sparsecc_split(const sparsecc_walk* walks, int32_t walk_count, const int64_t* targets, int64_t target_count,
                   int64_t* cursors, int64_t* paths, const sparsecc_executor* executor, char* error,
                   size_t error_size) {
  return guard(error, error_size, [&] {
    require(walk_count >= 0 && walk_count <= kMostOperands && target_count >= 0, "negative numbers or too many walks");
    require(walk_count == 0 || walks != nullptr, "walks must not be null");
    require(target_count == 0 || targets != nullptr, "targets must not be null");
    const int64_t work = algebra::check_walks(walks, walk_count);
    for (int64_t i = 0; i < target_count; ++i)
      require(targets[i] >= 0 && targets[i] <= work, "a target is not between 0 and all work");
    algebra::Cursors out{{}, target_count, paths, 0};
    for (int32_t i = 0; i < walk_count; ++i) {
      out.of_walk.push_back(cursors);
      cursors += walks[i].level_count * target_count;
      out.loops = std::max(out.loops, walks[i].level_count);
    }
    require(target_count == 0 || out.loops == 0 || paths != nullptr, "paths must not be null");
    algebra::find_splits(walks, walk_count, targets, target_count, out, executor);
  });
}

int sparsecc_spmv(const sparsecc_tensor* a, const void* x, void* y, const char* isa,
                  const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    check_rows(a);
    require(x != nullptr && y != nullptr, "x and y must not be null");
    algebra::spmv(*a, x, y, choose_isa(isa), executor);
  });
}

int sparsecc_spmm(const sparsecc_tensor* a, const void* x, int64_t columns, void* y, const char* isa,
                  const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    check_rows(a);
    require(columns >= 0 && columns <= kMostColumns, "columns are negative or too many");
    require(x != nullptr && y != nullptr, "x and y must not be null");
    algebra::spmm(*a, x, columns, y, choose_isa(isa), executor);
  });
}

int sparsecc_sddmm(const sparsecc_tensor* s, const void* u, const void* v, int64_t inner, void* out,
                   const char* isa, const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    check_rows(s);
    require(inner >= 0 && inner <= kMostColumns, "the inner size is negative or too large");
    require(u != nullptr && v != nullptr && out != nullptr, "u, v and out must not be null");
    algebra::sddmm(*s, u, v, inner, out, choose_isa(isa), executor);
  });
}

int sparsecc_mttkrp(const sparsecc_tensor* a, const void* const* factors, int64_t columns, void* y, const char* isa,
                    const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    check_rows(a);
    require(columns >= 0 && columns <= kMostColumns, "columns are negative or too many");
    require(factors != nullptr && y != nullptr, "factors and y must not be null");
    for (int32_t level = 1; level < a->level_count; ++level)
      require(factors[level - 1] != nullptr, "factors must not be null");
    algebra::mttkrp(*a, factors, columns, y, choose_isa(isa), executor);
  });
}

int sparsecc_join(const sparsecc_tensor* operands, int32_t operand_count, int32_t kind, sparsecc_result* result,
                  const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(operand_count > 0 && operand_count <= kMostOperands, "there must be an operand, and not too many");
    require(operands != nullptr && result != nullptr, "operands and result must not be null");
    require(kind == SPARSECC_UNION || kind == SPARSECC_INTERSECTION, "unknown kind of join");
    for (int32_t i = 0; i < operand_count; ++i) algebra::check_shape(operands + i);
    algebra::check_join(operands, operand_count);
    check_result(result, operands[0]);
    algebra::join(operands, operand_count,
                  kind == SPARSECC_UNION ? algebra::Join::kUnion : algebra::Join::kIntersection, result,
                  choose_isa(nullptr), executor);
  });
}

int sparsecc_product_create(const sparsecc_tensor* a, const sparsecc_tensor* b, const sparsecc_tensor* mask,
                            sparsecc_product** out, const sparsecc_executor* executor, char* error,
                            size_t error_size) {
  return guard(error, error_size, [&] {
    require(out != nullptr, "out must not be null");
    *out = nullptr;
    algebra::check_shape(a);
    algebra::check_shape(b);
    if (mask != nullptr) algebra::check_shape(mask);
    *out = algebra::multiply(*a, *b, mask, executor);
  });
}

int64_t sparsecc_product_entries(const sparsecc_product* product) { return product->entries(); }

int sparsecc_product_fetch(const sparsecc_product* product, void* pos, void* crd, void* values,
                           const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(product != nullptr && pos != nullptr, "product and pos must not be null");
    require(product->entries() == 0 || (crd != nullptr && values != nullptr), "crd and values must not be null");
    product->fetch(pos, crd, values, executor);
  });
}

void sparsecc_product_destroy(sparsecc_product* product) { delete product; }
