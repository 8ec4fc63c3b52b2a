// What AMX adds to products of bytes.
#define SPARSECC_NAMESPACE avx512amx
#define SPARSECC_LANES 16
#define SPARSECC_AVX2 0
#define SPARSECC_AVX512 1
#define SPARSECC_VNNI 1
#define SPARSECC_VBMI 0
#define SPARSECC_AMX 1
#define SPARSECC_AMX_EMULATED 0
#include "int8.inl.h"
