#define SPARSECC_NAMESPACE neon_i8mm
#define SPARSECC_LANES 4
#define SPARSECC_NEON 1
#define SPARSECC_DOTPROD 1
#define SPARSECC_I8MM 1
#include "planes.inl.h"
