#include "operator.h"

#include <cstring>

namespace sparsecc {

const KernelSet& kernel_set(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::kKernels;
  if (isa == Isa::kAvx2) return avx2::kKernels;
#endif
  (void)isa;
  return generic::kKernels;
}

Linear::Linear(const sparsecc_weight_desc& desc, const Weight& weight)
    : outputs(weight.outputs),
      inputs(weight.inputs),
      isa(choose_isa(desc.isa)),
      kernels(kernel_set(isa)),
      bias_(round_up(weight.outputs, 2 * kGroup)) {
  if (desc.bias != nullptr)
    std::memcpy(bias_.data(), desc.bias, static_cast<size_t>(weight.outputs) * sizeof(float));
  epilogue = {bias_.data(), desc.activation, desc.alpha, desc.beta};
}

bool has_block_kernel(const Layout& layout) {
  return layout.kind == Layout::kBlock && layout.rows % kGroup == 0;
}

// The panel of one block of inputs, in its widest form, takes two thirds of a 48 KB first-level cache.
int64_t element_block_inputs(const KernelSet& kernels) { return 512 / kernels.element_wide; }

int64_t element_width(int64_t lanes, int most) {
  const int64_t vectors = ceil_div(lanes, kGroup), chunks = ceil_div(vectors, most);
  return std::max<int64_t>(1, ceil_div(vectors, chunks == 0 ? 1 : chunks));
}

}  // namespace sparsecc
