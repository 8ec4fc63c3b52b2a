// The compiler's intrinsics, where the including file is compiled for an instruction set that needs them.
#pragma once

#ifndef SPARSECC_NEON
#define SPARSECC_NEON 0
#endif

#if SPARSECC_AVX2 || SPARSECC_AVX512
#if defined(__clang__)
#include <immintrin.h>
#else
// GCC 12 reports its own intrinsics headers (PR 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#elif SPARSECC_NEON
#include <arm_neon.h>
#endif
