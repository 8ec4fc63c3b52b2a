// Operators around the sparse products of a transformer: attention, normalisation with the sum before it, gated
// units. sparsecc/emit/ops_transformer.py declares the same set.
#include <algorithm>
#include <array>

#include "kernel.h"
#include "node_reader.h"
#include "session_threads.h"
#include "sparsecc/c_api.h"

namespace sparsecc::ort {
namespace {

constexpr int64_t kMostHeads = 1 << 20;

const float* floats(const TensorView& view) { return static_cast<const float*>(view.data); }

// ---- attention --------------------------------------------------------------------------------------

struct AttentionForm {
  bool packed;   // one input [..., q k v] side by side; else three
  bool grouped;  // heads of q share those of k and v: attribute kv_heads
  bool rotary;   // cosines and sines by which q and k are turned; grouped too
  bool mask;     // a last input, added to the scores
};

class AttentionKernel final : public Kernel {
 public:
  AttentionKernel(const NodeReader& node, const Functions& functions, std::string node_label,
                  AttentionForm form, int32_t threads)
      : Kernel(functions, std::move(node_label)),
        form_(form),
        heads_(node.integer("heads")),
        kv_heads_(form.grouped ? node.integer("kv_heads") : heads_),
        scale_(node.number("scale")),
        gauge_(threads) {
    if (heads_ < 1 || heads_ > kMostHeads)
      throw KernelError("attribute 'heads' is " + std::to_string(heads_) + ", expected 1..1048576");
    if (kv_heads_ < 1 || heads_ % kv_heads_ != 0)
      throw KernelError("attribute 'kv_heads' is " + std::to_string(kv_heads_) + ", which does not divide " +
                        std::to_string(heads_) + " heads");
  }

  void run(OrtKernelContext* context) const override {
    sparsecc_attention_desc desc{};
    desc.struct_size = sizeof(desc);
    desc.heads = heads_;
    desc.kv_heads = kv_heads_;
    desc.scale = scale_;
    std::vector<int64_t> y_dims = form_.packed ? read_packed(context, &desc) : read_three(context, &desc);
    size_t next = form_.packed ? 1 : 3;
    if (form_.rotary) {
      read_rotary(context, next, &desc);
      next += 2;
    }
    if (form_.mask) read_mask(context, next, &desc);
    desc.y = static_cast<float*>(make_output(api, context, 0, y_dims));
    set_strides(desc.y_strides, desc.queries, y_dims[2], desc.head_size);
    SessionThreads threads(api, context, gauge_);
    checked([&](char* error, size_t size) {
      return sparsecc_attention_run(&desc, &threads.executor, error, size);
    });
    threads.check();
  }

 private:
  static void set_strides(int64_t (&strides)[3], int64_t rows, int64_t width, int64_t head_size) {
    strides[0] = rows * width;
    strides[1] = width;
    strides[2] = head_size;
  }

  // Rows of `heads` heads.
  TensorView read_rows(const OrtKernelContext* context, size_t index, const char* name, int64_t heads) const {
    TensorView x = read_input(api, context, index);
    if (x.dims.size() != 3 || x.dims[2] % heads != 0) {
      throw KernelError(std::string(name) + " has shape " + to_text(x.dims) +
                        ", expected three dimensions, the last a multiple of " + std::to_string(heads));
    }
    return x;
  }

  std::vector<int64_t> read_packed(const OrtKernelContext* context, sparsecc_attention_desc* desc) const {
    const int64_t all = heads_ + 2 * kv_heads_;
    const TensorView x = read_rows(context, 0, "qkv", all);
    desc->batch = x.dims[0];
    desc->queries = desc->keys = x.dims[1];
    desc->head_size = x.dims[2] / all;
    desc->q = floats(x);
    desc->k = desc->q + heads_ * desc->head_size;
    desc->v = desc->k + kv_heads_ * desc->head_size;
    for (int64_t(*strides)[3] : {&desc->q_strides, &desc->k_strides, &desc->v_strides})
      set_strides(*strides, x.dims[1], x.dims[2], desc->head_size);
    return {x.dims[0], x.dims[1], heads_ * desc->head_size};
  }

  std::vector<int64_t> read_three(const OrtKernelContext* context, sparsecc_attention_desc* desc) const {
    const TensorView q = read_rows(context, 0, "q", heads_), k = read_rows(context, 1, "k", kv_heads_),
                     v = read_rows(context, 2, "v", kv_heads_);
    if (k.dims != v.dims || k.dims[0] != q.dims[0] || k.dims[2] / kv_heads_ != q.dims[2] / heads_) {
      throw KernelError("q, k and v have shapes " + to_text(q.dims) + ", " + to_text(k.dims) + " and " +
                        to_text(v.dims) + ", which do not fit together");
    }
    desc->batch = q.dims[0];
    desc->queries = q.dims[1];
    desc->keys = k.dims[1];
    desc->head_size = q.dims[2] / heads_;
    desc->q = floats(q);
    desc->k = floats(k);
    desc->v = floats(v);
    set_strides(desc->q_strides, desc->queries, q.dims[2], desc->head_size);
    set_strides(desc->k_strides, desc->keys, k.dims[2], desc->head_size);
    set_strides(desc->v_strides, desc->keys, k.dims[2], desc->head_size);
    return q.dims;
  }

  // [queries, head size], before it ones and at most the batch: [1 or batch, 1, queries, head size].
  void read_rotary(const OrtKernelContext* context, size_t first, sparsecc_attention_desc* desc) const {
    const TensorView cosines = read_input(api, context, first), sines = read_input(api, context, first + 1);
    if (desc->keys != desc->queries || desc->head_size % 2 != 0) {
      throw KernelError("rotary positions need an even head size and as many queries as keys, here " +
                        to_text({desc->head_size, desc->queries, desc->keys}));
    }
    const std::vector<int64_t>& dims = cosines.dims;
    const size_t rank = dims.size();
    const bool fits = sines.dims == dims && rank >= 2 && rank <= 4 && dims[rank - 1] == desc->head_size &&
                      dims[rank - 2] == desc->queries && (rank < 3 || dims[rank - 3] == 1) &&
                      (rank < 4 || dims[0] == 1 || dims[0] == desc->batch);
    if (!fits) {
      throw KernelError("cosines and sines have shapes " + to_text(dims) + " and " + to_text(sines.dims) +
                        ", expected both to be [1 or " + std::to_string(desc->batch) + ",1," +
                        std::to_string(desc->queries) + "," + std::to_string(desc->head_size) + "]");
    }
    desc->cosines = floats(cosines);
    desc->sines = floats(sines);
    desc->rotary_strides[0] = rank == 4 && dims[0] > 1 ? desc->queries * desc->head_size : 0;
    desc->rotary_strides[1] = desc->head_size;
  }

  // Broadcast to [batch, heads, queries, keys], dimensions counted from the last.
  void read_mask(const OrtKernelContext* context, size_t index, sparsecc_attention_desc* desc) const {
    const TensorView mask = read_input(api, context, index);
    const std::array<int64_t, 4> wanted{desc->batch, desc->heads, desc->queries, desc->keys};
    int64_t stride = 1;
    bool fits = mask.dims.size() <= wanted.size();
    for (size_t i = 0; fits && i < mask.dims.size(); ++i) {
      const int64_t dim = mask.dims[mask.dims.size() - 1 - i];
      const size_t axis = wanted.size() - 1 - i;
      fits = dim == 1 || dim == wanted[axis];
      desc->mask_strides[axis] = dim == 1 ? 0 : stride;
      stride *= dim;
    }
    if (!fits) {
      throw KernelError("mask has shape " + to_text(mask.dims) + ", which does not broadcast to " +
                        to_text({wanted.begin(), wanted.end()}));
    }
    desc->mask = floats(mask);
  }

  const AttentionForm form_;
  const int64_t heads_, kv_heads_;
  const float scale_;
  mutable ThreadGauge gauge_;
};

// ---- normalisation ----------------------------------------------------------------------------------

struct NormForm {
  bool residual;  // a second input is added first
  bool centred;   // layer norm, with a shift; else root-mean-square norm, without
  bool sum;       // the sum is a second output
};

class NormKernel final : public Kernel {
 public:
  NormKernel(const NodeReader& node, const Functions& functions, std::string node_label, NormForm form,
             int32_t threads)
      : Kernel(functions, std::move(node_label)),
        form_(form),
        epsilon_(node.number("epsilon")),
        gauge_(threads) {}

  void run(OrtKernelContext* context) const override {
    const TensorView x = read_input(api, context, 0);
    if (x.dims.empty()) throw KernelError("x has no dimension");
    const int64_t size = x.dims.back();
    sparsecc_norm_desc desc{};
    desc.struct_size = sizeof(desc);
    desc.size = size;
    desc.rows = size == 0 ? 0 : x.count / size;
    desc.centred = form_.centred ? 1 : 0;
    desc.epsilon = epsilon_;
    desc.x = floats(x);
    size_t next = 1;
    if (form_.residual) {
      const TensorView residual = read_input(api, context, next++);
      check_residual(x, residual);
      desc.residual = floats(residual);
      desc.residual_rows = size == 0 ? 1 : std::max<int64_t>(1, residual.count / size);
    }
    desc.gain = per_column(context, next++, "gain", size);
    if (form_.centred) desc.shift = per_column(context, next, "shift", size);
    desc.y = static_cast<float*>(make_output(api, context, 0, x.dims));
    if (form_.sum) desc.sum = static_cast<float*>(make_output(api, context, 1, x.dims));
    SessionThreads threads(api, context, gauge_);
    checked([&](char* error, size_t length) {
      return sparsecc_norm_run(&desc, &threads.executor, error, length);
    });
    threads.check();
  }

 private:
  // The same shape but for leading dimensions, which may be missing or 1.
  static void check_residual(const TensorView& x, const TensorView& residual) {
    const size_t rank = residual.dims.size();
    bool fits = rank >= 1 && rank <= x.dims.size();
    bool leading = true;
    for (size_t i = 0; fits && i < rank; ++i) {
      const int64_t dim = residual.dims[i], wanted = x.dims[x.dims.size() - rank + i];
      leading = leading && dim == 1 && i + 1 < rank;
      fits = dim == wanted || leading;
    }
    if (!fits) {
      throw KernelError("residual has shape " + to_text(residual.dims) + ", x has " + to_text(x.dims) +
                        ": only leading dimensions may be missing or 1");
    }
  }

  const float* per_column(const OrtKernelContext* context, size_t index, const char* name,
                          int64_t size) const {
    const TensorView view = read_input(api, context, index);
    if (view.dims.size() != 1 || view.count != size) {
      throw KernelError(std::string(name) + " has shape " + to_text(view.dims) + ", x has rows of " +
                        std::to_string(size));
    }
    return floats(view);
  }

  const NormForm form_;
  const float epsilon_;
  mutable ThreadGauge gauge_;
};

// ---- gated units ------------------------------------------------------------------------------------

class GateKernel final : public Kernel {
 public:
  GateKernel(const Functions& functions, std::string node_label, sparsecc_activation activation,
             int32_t threads)
      : Kernel(functions, std::move(node_label)), activation_(activation), gauge_(threads) {}

  void run(OrtKernelContext* context) const override {
    const TensorView x = read_input(api, context, 0);
    if (x.dims.empty() || x.dims.back() % 2 != 0) {
      throw KernelError("x has shape " + to_text(x.dims) + ", expected an even last dimension");
    }
    std::vector<int64_t> dims = x.dims;
    dims.back() /= 2;
    auto* y = static_cast<float*>(make_output(api, context, 0, dims));
    const int64_t size = dims.back(), rows = size == 0 ? 0 : x.count / (2 * size);
    SessionThreads threads(api, context, gauge_);
    checked([&](char* error, size_t length) {
      return sparsecc_gate_run(floats(x), rows, size, activation_, nullptr, y, &threads.executor, error,
                               length);
    });
    threads.check();
  }

 private:
  const sparsecc_activation activation_;
  mutable ThreadGauge gauge_;
};

}  // namespace

std::vector<OperatorSpec> transformer_operators() {
  using Types = std::vector<ElementType>;
  constexpr ElementType kFloat = ElementType::kFloat;
  std::vector<OperatorSpec> specs;
  for (const char* kind : {"", "Grouped", "Rotary"}) {
    const bool grouped = *kind != 0, rotary = *kind == 'R';
    for (const AttentionForm form : {AttentionForm{false, grouped, rotary, false}, {false, grouped, rotary, true},
                                     {true, grouped, rotary, false}, {true, grouped, rotary, true}}) {
      const size_t inputs = (form.packed ? 1 : 3) + (rotary ? 2 : 0) + (form.mask ? 1 : 0);
      specs.push_back({std::string(form.packed ? "Packed" : "") + kind + "Attention" + (form.mask ? "Mask" : ""),
                       Types(inputs, kFloat),
                       {kFloat},
                       [form](const NodeReader& node, const Functions& api, const std::string& label,
                              int32_t threads) {
                         return std::make_unique<AttentionKernel>(node, api, label, form, threads);
                       }});
    }
  }
  for (const bool centred : {true, false}) {
    for (const NormForm form : {NormForm{false, centred, false}, {true, centred, false}, {true, centred, true}}) {
      const size_t inputs = 2 + (form.residual ? 1 : 0) + (centred ? 1 : 0);
      specs.push_back({std::string(form.residual ? "Add" : "") + (centred ? "LayerNorm" : "RmsNorm") +
                           (form.sum ? "Sum" : ""),
                       Types(inputs, kFloat), Types(form.sum ? 2 : 1, kFloat),
                       [form](const NodeReader& node, const Functions& api, const std::string& label,
                              int32_t threads) {
                         return std::make_unique<NormKernel>(node, api, label, form, threads);
                       }});
    }
  }
  const struct {
    const char* name;
    sparsecc_activation activation;
  } gates[] = {{"GatedSilu", SPARSECC_ACT_SILU},
               {"GatedGelu", SPARSECC_ACT_GELU},
               {"GatedGeluTanh", SPARSECC_ACT_GELU_TANH}};
  for (const auto& gate : gates) {
    specs.push_back({gate.name,
                     {kFloat},
                     {kFloat},
                     [activation = gate.activation](const NodeReader&, const Functions& api,
                                                    const std::string& label, int32_t threads) {
                       return std::make_unique<GateKernel>(api, label, activation, threads);
                     }});
  }
  return specs;
}

}  // namespace sparsecc::ort
