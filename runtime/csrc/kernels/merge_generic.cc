#define SPARSECC_NAMESPACE generic
#define SPARSECC_LANES 4
#define SPARSECC_AVX2 0
#define SPARSECC_AVX512 0
#include "merge.inl.h"
