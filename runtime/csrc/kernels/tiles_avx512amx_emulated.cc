#define SPARSECC_NAMESPACE avx512amx_emulated
#define SPARSECC_LANES 16
#define SPARSECC_AVX2 0
#define SPARSECC_AVX512 1
#define SPARSECC_AMX_EMULATED 1
#include "tile_kernels.inl.h"
