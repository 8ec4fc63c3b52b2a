#include "operator.h"

#include <cstring>
#include <string>

namespace sparsecc {
namespace {

// The row of the table with this name. Rows exist for every kernel that is asked for.
template <class Job>
Kernel<Job> find(Isa isa, const std::string& wanted) {
#define SPARSECC_KERNEL(isa_of_row, kernel, JobOfRow, rows, wide)      \
  if constexpr (std::is_same_v<Job, JobOfRow>)                         \
    if (isa == kIsa_##isa_of_row && wanted == #kernel)                 \
      return {#kernel "-" #isa_of_row, isa_of_row::kernel##_tile, isa_of_row::kernel};
#include "kernels.inc"
#undef SPARSECC_KERNEL
  throw Failure{"no kernel " + wanted + " for " + isa_name(isa)};
}

const char* suffix(sparsecc_value_type type) {
  return type == SPARSECC_FLOAT16 ? "_f16" : type == SPARSECC_BFLOAT16 ? "_bf16" : "";
}

}  // namespace

sparsecc_value_type values_read(Isa isa, sparsecc_value_type type) {
  return isa == Isa::kGeneric ? SPARSECC_FLOAT32 : type;
}

Kernel<BlockJob> block_kernel(Isa isa, int wide, sparsecc_value_type type) {
  return find<BlockJob>(isa, std::string(wide == 2 ? "block32" : "block16") + suffix(type));
}

Kernel<ElementJob> element_kernel(Isa isa, int tall) {
  return find<ElementJob>(isa, tall == 4 ? "element4" : "element");
}

Kernel<SliceJob> slice_kernel(Isa isa, SliceView::Form form, sparsecc_value_type type) {
  const std::string name = form == SliceView::kUniform  ? "slice_uniform"
                     : form == SliceView::kPacked ? "slice_packed"
                                                  : "slice_masked";
  return find<SliceJob>(isa, name + suffix(type));
}

const Helpers& helpers(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::kHelpers;
  if (isa == Isa::kAvx2) return avx2::kHelpers;
#elif defined(__aarch64__)
  if (isa == Isa::kNeon) return neon::kHelpers;
#endif
  (void)isa;
  return generic::kHelpers;
}

const char* kernel_table() {
  static const std::string table = [] {
    std::string text;
#define SPARSECC_KERNEL(isa, kernel, Job, rows, wide) \
  if (isa_usable(kIsa_##isa)) text += #kernel "-" #isa " " #isa " " #rows "x" #wide "\n";
#include "kernels.inc"
#undef SPARSECC_KERNEL
    return text;
  }();
  return table.c_str();
}

Linear::Linear(const sparsecc_weight_desc& desc, const Weight& weight)
    : outputs(weight.outputs),
      inputs(weight.inputs),
      isa(choose_isa(desc.isa)),
      help(helpers(isa)),
      bias_(round_up(weight.outputs, 2 * kGroup)) {
  if (desc.bias != nullptr)
    std::memcpy(bias_.data(), desc.bias, static_cast<size_t>(weight.outputs) * sizeof(float));
  epilogue = {bias_.data(), desc.activation, desc.alpha, desc.beta};
}

bool has_block_kernel(const Layout& layout) {
  return layout.kind == Layout::kBlock && layout.rows % kGroup == 0;
}

int element_tall(const Layout& layout) {
  return layout.kind == Layout::kBlock && layout.rows % 4 == 0 ? 4 : 1;
}

// The panel of one block of inputs, in its widest form, takes all of a 48 KB first-level cache with AVX-512
// (whose server cores have that since 2019) and two thirds of it elsewhere. A row costs some cycles per block
// whatever it holds, so that few weights pay for longer blocks with panels from the second level, the sooner
// the more outputs share a load from them; measured on Zen 5.
int64_t element_block_inputs(Isa isa, const Rows& rows) {
  const int64_t wide = element_kernel(isa, rows.tall).tile.wide;
  if (isa != Isa::kAvx512) return 512 / wide;
  const double grid = static_cast<double>(ceil_div(rows.outputs, rows.tall) * rows.inputs);
  const double kept = std::max(1.0, static_cast<double>(rows.column.size()));
  const double longer = std::clamp((rows.tall == 1 ? 0.14 : 0.4) * grid / kept, 1.0, 4.0);
  return round_up(static_cast<int64_t>(static_cast<double>(768 / wide) * longer), kGroup);
}

}  // namespace sparsecc
