// Operators of sparse tensor algebra: operands come as the arrays of their storage, at run time or as constants.
// sparsecc/emit/ops_algebra.py declares the same set.
#include <algorithm>
#include <optional>

#include "kernel.h"
#include "node_reader.h"
#include "packed_reader.h"
#include "session_threads.h"
#include "sparsecc/algebra.h"
#include "sparsecc/sparse_attention.h"

namespace sparsecc::ort {
namespace {

const float* floats(const TensorView& view) { return static_cast<const float*>(view.data); }

void check_format(const NodeReader& node) {
  const std::string format = node.text("format");
  if (format != "csr") throw KernelError("attribute 'format' is '" + short_text(node, "format") + "', expected 'csr'");
}

int32_t index_bytes(const TensorView& view, const char* name) {
  if (view.dims.size() != 1 || (view.type != ElementType::kInt32 && view.type != ElementType::kInt64))
    throw KernelError(std::string(name) + " must be a list of int32 or int64, has shape " + to_text(view.dims));
  return view.type == ElementType::kInt32 ? 4 : 8;
}

// The rows as a compressed level. Lengths are checked here, numbers by the library.
sparsecc_level read_level(const TensorView& positions, const TensorView& coordinates, int64_t rows,
                          int64_t columns) {
  sparsecc_level level{};
  level.size = columns;
  level.pos_bytes = index_bytes(positions, "positions");
  level.crd_bytes = index_bytes(coordinates, "coordinates");
  if (level.pos_bytes != level.crd_bytes) throw KernelError("positions and coordinates must be of one type");
  if (positions.count != rows + 1 || rows < 0) {
    throw KernelError("there are " + std::to_string(positions.count) + " positions for " + std::to_string(rows) +
                      " rows: there must be one more");
  }
  level.pos = positions.data;
  level.crd = coordinates.data;
  level.pos_count = positions.count;
  level.crd_count = coordinates.count;
  return level;
}

// ---- products ---------------------------------------------------------------------------------------

constexpr size_t kMostCuts = size_t{1} << 14;

enum class Product { kVector, kMatrix, kSampled };

// Leading dimensions that broadcast: strides, in whole operands, of each of the batch's own.
struct Batch {
  std::vector<int64_t> dims;

  int64_t count() const {
    int64_t all = 1;
    for (const int64_t dim : dims) all *= dim;
    return all;
  }

  void join(const std::vector<int64_t>& other) {
    if (other.size() > dims.size()) dims.insert(dims.begin(), other.size() - dims.size(), 1);
    const size_t shift = dims.size() - other.size();
    for (size_t i = 0; i < other.size(); ++i) {
      int64_t& dim = dims[shift + i];
      if (dim != other[i] && dim != 1 && other[i] != 1)
        throw KernelError("leading dimensions " + to_text(dims) + " and " + to_text(other) + " do not broadcast");
      if (dim == 1) dim = other[i];
    }
  }

  // Which of the operands with these leading dimensions belongs to number `item` of the batch.
  int64_t operand(const std::vector<int64_t>& own, int64_t item) const {
    int64_t index = 0, stride = 1;
    for (size_t i = 0; i < own.size(); ++i) {
      const int64_t dim = dims[dims.size() - 1 - i], mine = own[own.size() - 1 - i];
      index += mine == 1 ? 0 : item % dim * stride;
      item /= dim;
      stride *= mine;
    }
    return index;
  }
};

// A dense operand: leading dimensions, then `own` of its own.
struct Operand {
  Operand(TensorView from, size_t own, const char* name) : view(std::move(from)) {
    if (view.dims.size() < own)
      throw KernelError(std::string(name) + " has shape " + to_text(view.dims) + ": too few dimensions");
    leading.assign(view.dims.begin(), view.dims.end() - static_cast<std::ptrdiff_t>(own));
    for (size_t i = leading.size(); i < view.dims.size(); ++i) size *= view.dims[i];
  }
  int64_t dim(size_t from_last) const { return view.dims[view.dims.size() - from_last]; }
  const float* at(const Batch& batch, int64_t item) const {
    return floats(view) + batch.operand(leading, item) * size;
  }
  TensorView view;
  std::vector<int64_t> leading;
  int64_t size = 1;
};

// Components, as they come.
struct Components {
  TensorView positions, coordinates;
  int64_t rows = 0, columns = 0;

  sparsecc_level level() const { return read_level(positions, coordinates, rows, columns); }
  // What is constant on the node, with its shape; nothing if any part is computed.
  static std::optional<Components> constant(const NodeReader& node, size_t positions, size_t coordinates,
                                            size_t shape) {
    std::optional<TensorView> parts[] = {node.if_constant(positions), node.if_constant(coordinates),
                                         node.if_constant(shape)};
    if (!parts[0] || !parts[1] || !parts[2]) return std::nullopt;
    Components known{*std::move(parts[0]), *std::move(parts[1])};
    known.set_shape(*parts[2]);
    return known;
  }

  void set_shape(const TensorView& shape) {
    if (shape.type != ElementType::kInt64 || shape.dims.size() != 1 || shape.count != 2)
      throw KernelError("shape must be two int64, has shape " + to_text(shape.dims));
    rows = static_cast<const int64_t*>(shape.data)[0];
    columns = static_cast<const int64_t*>(shape.data)[1];
    if (rows < 0 || columns < 0)
      throw KernelError("shape is " + to_text({rows, columns}) + ", expected numbers from 0 on");
  }
};

sparsecc_tensor tensor_of(const sparsecc_level (&levels)[2], const float* values) {
  sparsecc_tensor tensor{};
  tensor.struct_size = sizeof(tensor);
  tensor.levels = levels;
  tensor.level_count = 2;
  tensor.value_bytes = 4;
  tensor.values = values;
  tensor.value_count = levels[1].crd_count;
  return tensor;
}

class EinsumKernel final : public Kernel {
 public:
  EinsumKernel(const NodeReader& node, const Functions& functions, std::string node_label, Product product,
               int32_t threads)
      : Kernel(functions, std::move(node_label)), product_(product), gauge_(threads) {
    check_format(node);
    read_equation(node);
    const std::optional<Components> known = Components::constant(node, 0, 1, 3);
    if (!known) return;  // cuts could not be checked but at every run, which takes longer than to cut
    cuts_ = node.integers_if_any("cuts");
    check_components(*known);
    checked_before_ = true;
  }

  void run(OrtKernelContext* context) const override {
    Components sparse{read_input(api, context, 0), read_input(api, context, 1)};
    sparse.set_shape(read_input(api, context, 3));
    if (!checked_before_) check_components(sparse);
    const Operand values(read_input(api, context, 2), 1, "values");
    check_rank(values, 0, "values");
    if (values.size != sparse.coordinates.count) {
      throw KernelError("there are " + std::to_string(values.size) + " values for " +
                        std::to_string(sparse.coordinates.count) + " coordinates");
    }
    if (product_ == Product::kSampled) {
      run_sampled(context, sparse, values);
    } else {
      run_product(context, sparse, values);
    }
  }

 private:
  // How many leading indices each operand has: those of its term without its own. The terms are einsum subscripts.
  void read_equation(const NodeReader& node) {
    const std::string text = node.text("equation");
    static constexpr size_t kOwn[3][3] = {{2, 1, 0}, {2, 2, 0}, {2, 2, 2}};
    const size_t operands = product_ == Product::kSampled ? 3 : 2;
    const size_t arrow = text.find("->");
    size_t begin = 0;
    for (size_t i = 0; i < operands && arrow != std::string::npos; ++i) {
      const size_t end = i + 1 == operands ? arrow : std::min(text.find(',', begin), arrow);
      const size_t own = kOwn[static_cast<int>(product_)][i];
      if (end < begin + own || end == std::string::npos) break;
      leading_.push_back(end - begin - own);
      begin = end + 1;
    }
    if (leading_.size() != operands)
      throw KernelError("attribute 'equation' is '" + short_text(node, "equation") + "', which is not of this operator");
  }

  void check_rank(const Operand& operand, size_t number, const char* name) const {
    if (operand.leading.size() != leading_[number]) {
      throw KernelError(std::string(name) + " has shape " + to_text(operand.view.dims) + ", the equation gives it " +
                        std::to_string(leading_[number]) + " leading dimensions");
    }
  }

  // With the cuts of the attribute.
  sparsecc_tensor cut_tensor(const sparsecc_level (&levels)[2], const float* values) const {
    sparsecc_tensor tensor = tensor_of(levels, values);
    if (!cuts_.empty()) {
      tensor.cuts = cuts_.data();
      tensor.cut_parts = static_cast<int32_t>(cuts_.size() / 2 - 1);
    }
    return tensor;
  }

  void check_components(const Components& sparse) const {
    if (cuts_.size() % 2 != 0 || cuts_.size() > kMostCuts)
      throw KernelError("attribute 'cuts' has " + std::to_string(cuts_.size()) + " numbers, expected two per cut");
    sparsecc_level levels[2] = {{}, sparse.level()};
    levels[0].size = sparse.rows;
    static const float any = 0;  // the values are not looked at
    const sparsecc_tensor tensor = cut_tensor(levels, &any);
    checked([&](char* error, size_t size) { return sparsecc_tensor_check(&tensor, error, size); });
  }

  static void check_size(const Operand& operand, const char* name, size_t from_last, int64_t wanted) {
    if (operand.dim(from_last) != wanted) {
      throw KernelError(std::string(name) + " has shape " + to_text(operand.view.dims) + ", expected " +
                        std::to_string(wanted) + " rows");
    }
  }

  void run_product(OrtKernelContext* context, const Components& sparse, const Operand& values) const {
    const bool vector = product_ == Product::kVector;
    const Operand x(read_input(api, context, 4), vector ? 1 : 2, "x");
    check_rank(x, 1, "x");
    check_size(x, "x", vector ? 1 : 2, sparse.columns);
    Batch batch;
    batch.join(values.leading);
    batch.join(x.leading);
    const int64_t width = vector ? 1 : x.dim(1);
    std::vector<int64_t> dims = batch.dims;
    dims.push_back(sparse.rows);
    if (!vector) dims.push_back(width);
    auto* y = static_cast<float*>(make_output(api, context, 0, dims));
    if (sparse.rows * width == 0) return;
    sparsecc_level levels[2] = {{}, sparse.level()};
    levels[0].size = sparse.rows;
    SessionThreads threads(api, context, gauge_);
    for (int64_t item = 0; item < batch.count(); ++item, y += sparse.rows * width) {
      const sparsecc_tensor tensor = cut_tensor(levels, values.at(batch, item));
      checked([&](char* error, size_t size) {
        return width == 1 ? sparsecc_spmv(&tensor, x.at(batch, item), y, nullptr, &threads.executor, error, size)
                          : sparsecc_spmm(&tensor, x.at(batch, item), width, y, nullptr, &threads.executor, error,
                                          size);
      });
    }
    threads.check();
  }

  void run_sampled(OrtKernelContext* context, const Components& sparse, const Operand& values) const {
    const Operand u(read_input(api, context, 4), 2, "u"), v(read_input(api, context, 5), 2, "v");
    check_rank(u, 1, "u");
    check_rank(v, 2, "v");
    check_size(u, "u", 2, sparse.rows);
    check_size(v, "v", 2, sparse.columns);
    if (u.dim(1) != v.dim(1)) {
      throw KernelError("u and v have shapes " + to_text(u.view.dims) + " and " + to_text(v.view.dims) +
                        ": the last dimensions differ");
    }
    Batch batch;
    for (const Operand* operand : {&values, &u, &v}) batch.join(operand->leading);
    std::vector<int64_t> dims = batch.dims;
    dims.push_back(sparse.coordinates.count);
    auto* y = static_cast<float*>(make_output(api, context, 0, dims));
    if (sparse.coordinates.count == 0) return;
    sparsecc_level levels[2] = {{}, sparse.level()};
    levels[0].size = sparse.rows;
    SessionThreads threads(api, context, gauge_);
    for (int64_t item = 0; item < batch.count(); ++item, y += sparse.coordinates.count) {
      const sparsecc_tensor tensor = cut_tensor(levels, values.at(batch, item));
      checked([&](char* error, size_t size) {
        return sparsecc_sddmm(&tensor, u.at(batch, item), v.at(batch, item), u.dim(1), y, nullptr, &threads.executor,
                              error, size);
      });
    }
    threads.check();
  }

  const Product product_;
  std::vector<size_t> leading_;  // dimensions of values and of the dense operands
  bool checked_before_ = false;  // components are constants
  std::vector<int64_t> cuts_;    // as sparsecc_tensor has them; empty: the kernels cut
  mutable ThreadGauge gauge_;
};

// ---- softmax ----------------------------------------------------------------------------------------

class SoftmaxKernel final : public Kernel {
 public:
  SoftmaxKernel(const NodeReader& node, const Functions& functions, std::string node_label, int32_t threads)
      : Kernel(functions, std::move(node_label)), gauge_(threads) {
    check_format(node);
  }

  void run(OrtKernelContext* context) const override {
    const TensorView positions = read_input(api, context, 0);
    const Operand values(read_input(api, context, 1), 1, "values");
    sparsecc_level level{};
    level.pos = positions.data;
    level.pos_bytes = index_bytes(positions, "positions");
    level.pos_count = positions.count;
    level.crd_count = values.size;
    int64_t batch = 1;
    for (const int64_t dim : values.leading) batch *= dim;
    auto* y = static_cast<float*>(make_output(api, context, 0, values.view.dims));
    SessionThreads threads(api, context, gauge_);
    checked([&](char* error, size_t size) {
      return sparsecc_sparse_softmax_run(&level, floats(values.view), batch, nullptr, y, &threads.executor, error,
                                         size);
    });
    threads.check();
  }

 private:
  mutable ThreadGauge gauge_;
};

// ---- attention --------------------------------------------------------------------------------------

using PatternPtr = std::shared_ptr<sparsecc_attention_pattern>;

class SparseAttentionKernel final : public Kernel {
 public:
  SparseAttentionKernel(const NodeReader& node, const Functions& functions, std::string node_label,
                        int32_t threads)
      : Kernel(functions, std::move(node_label)),
        scale_(node.number("scale")),
        gauge_(threads) {
    check_format(node);
    const std::optional<Components> known = Components::constant(node, 3, 4, 5);
    if (!known) return;
    known_ = make_pattern(*known);
    known_rows_ = known->rows;
    known_columns_ = known->columns;
  }

  void run(OrtKernelContext* context) const override {
    const TensorView q = read_input(api, context, 0), k = read_input(api, context, 1),
                     v = read_input(api, context, 2);
    const bool four = q.dims.size() == 4 && k.dims.size() == 4;
    if (!four || v.dims != k.dims || k.dims[0] != q.dims[0] || k.dims[1] != q.dims[1] || k.dims[3] != q.dims[3]) {
      throw KernelError("q, k and v have shapes " + to_text(q.dims) + ", " + to_text(k.dims) + " and " +
                        to_text(v.dims) + ", expected [B,heads,S,D] and twice [B,heads,T,D]");
    }
    sparsecc_attention_desc desc{};
    desc.struct_size = sizeof(desc);
    desc.batch = q.dims[0];
    desc.heads = desc.kv_heads = q.dims[1];
    desc.queries = q.dims[2];
    desc.keys = k.dims[2];
    desc.head_size = q.dims[3];
    desc.scale = scale_;
    desc.q = floats(q);
    desc.k = floats(k);
    desc.v = floats(v);
    set_strides(desc.q_strides, desc, desc.queries);
    set_strides(desc.y_strides, desc, desc.queries);
    set_strides(desc.k_strides, desc, desc.keys);
    set_strides(desc.v_strides, desc, desc.keys);
    const PatternPtr pattern = known_ != nullptr ? known_ : pattern_of(context, desc);
    if (known_ != nullptr) check_sizes(known_rows_, known_columns_, desc);
    desc.y = static_cast<float*>(make_output(api, context, 0, q.dims));
    SessionThreads threads(api, context, gauge_);
    checked([&](char* error, size_t size) {
      return sparsecc_sparse_attention_run(pattern.get(), &desc, &threads.executor, error, size);
    });
    threads.check();
  }

 private:
  static void set_strides(int64_t (&strides)[3], const sparsecc_attention_desc& desc, int64_t rows) {
    strides[0] = desc.heads * rows * desc.head_size;
    strides[1] = desc.head_size;
    strides[2] = rows * desc.head_size;
  }

  static void check_sizes(int64_t rows, int64_t columns, const sparsecc_attention_desc& desc) {
    if (rows != desc.queries || columns != desc.keys) {
      throw KernelError("shape is " + to_text({rows, columns}) + ", there are " + std::to_string(desc.queries) +
                        " queries and " + std::to_string(desc.keys) + " keys");
    }
  }

  PatternPtr pattern_of(const OrtKernelContext* context, const sparsecc_attention_desc& desc) const {
    Components sparse{read_input(api, context, 3), read_input(api, context, 4)};
    sparse.set_shape(read_input(api, context, 5));
    check_sizes(sparse.rows, sparse.columns, desc);
    return make_pattern(sparse);
  }

  static PatternPtr make_pattern(const Components& sparse) {
    const sparsecc_level level = sparse.level();
    sparsecc_attention_pattern* pattern = nullptr;
    checked([&](char* error, size_t size) {
      return sparsecc_attention_pattern_create(&level, nullptr, &pattern, error, size);
    });
    return PatternPtr(pattern, sparsecc_attention_pattern_destroy);
  }

  const float scale_;
  PatternPtr known_;  // of constant components
  int64_t known_rows_ = 0, known_columns_ = 0;
  mutable ThreadGauge gauge_;
};

}  // namespace

std::vector<OperatorSpec> algebra_operators() {
  using Types = std::vector<ElementType>;
  constexpr ElementType kFloat = ElementType::kFloat, kInt64 = ElementType::kInt64,
                        kIntegers = ElementType::kIntegers;
  std::vector<OperatorSpec> specs;
  const struct {
    const char* name;
    Product product;
    Types dense;
  } products[] = {{"SparseEinsumVector", Product::kVector, {kFloat}},
                  {"SparseEinsum", Product::kMatrix, {kFloat}},
                  {"SparseEinsumSampled", Product::kSampled, {kFloat, kFloat}}};
  for (const auto& row : products) {
    Types inputs{kIntegers, kIntegers, kFloat, kInt64};
    inputs.insert(inputs.end(), row.dense.begin(), row.dense.end());
    specs.push_back({row.name, inputs, {kFloat},
                     [product = row.product](const NodeReader& node, const Functions& api, const std::string& label,
                                             int32_t threads) {
                       return std::make_unique<EinsumKernel>(node, api, label, product, threads);
                     }});
  }
  specs.push_back({"SparseSoftmax", {kIntegers, kFloat}, {kFloat},
                   [](const NodeReader& node, const Functions& api, const std::string& label, int32_t threads) {
                     return std::make_unique<SoftmaxKernel>(node, api, label, threads);
                   }});
  specs.push_back({"SparseAttention", {kFloat, kFloat, kFloat, kIntegers, kIntegers, kInt64}, {kFloat},
                   [](const NodeReader& node, const Functions& api, const std::string& label, int32_t threads) {
                     return std::make_unique<SparseAttentionKernel>(node, api, label, threads);
                   }});
  return specs;
}

}  // namespace sparsecc::ort
