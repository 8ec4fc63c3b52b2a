#define SPARSECC_NAMESPACE generic
#define SPARSECC_LANES 4
#define SPARSECC_AVX2 0
#define SPARSECC_AVX512 0
#define SPARSECC_VNNI 0
#define SPARSECC_VBMI 0
#include "int8.inl.h"
