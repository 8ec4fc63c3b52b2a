#define SPARSECC_NAMESPACE neon
#define SPARSECC_LANES 4
#define SPARSECC_NEON 1
#include "merge.inl.h"
