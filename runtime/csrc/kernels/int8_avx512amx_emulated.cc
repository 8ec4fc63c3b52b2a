// The same kernels with emulated tile registers, to be tested on any machine with AVX-512; not in a wheel.
#define SPARSECC_NAMESPACE avx512amx_emulated
#define SPARSECC_LANES 16
#define SPARSECC_AVX2 0
#define SPARSECC_AVX512 1
#define SPARSECC_VNNI 1
#define SPARSECC_VBMI 0
#define SPARSECC_AMX 1
#define SPARSECC_AMX_EMULATED 1
#include "int8.inl.h"
