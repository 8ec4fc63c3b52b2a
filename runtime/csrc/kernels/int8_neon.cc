#define SPARSECC_NAMESPACE neon
#define SPARSECC_LANES 4
#define SPARSECC_NEON 1
#define SPARSECC_DOTPROD 0
#define SPARSECC_I8MM 0
#include "int8.inl.h"
