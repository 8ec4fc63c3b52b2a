#define SPARSECC_NAMESPACE avx2
#define SPARSECC_LANES 8
#define SPARSECC_AVX2 1
#define SPARSECC_AVX512 0
#include "merge.inl.h"
