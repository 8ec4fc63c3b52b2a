#define SPARSECC_NAMESPACE avx512
#define SPARSECC_LANES 16
#define SPARSECC_AVX2 0
#define SPARSECC_AVX512 1
#include "merge.inl.h"
