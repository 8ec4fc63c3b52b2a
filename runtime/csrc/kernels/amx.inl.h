// The tile registers of AMX as functions of plain names: the only place that knows whether they are the processor's
// or, in a build for tests, arrays. Semantics, palette 1 and faults are those of the Intel 64 manual, volume 2.
// A thread that has called tile_config must call tile_release before it returns to its caller.
#pragma once

constexpr int kTileLines = 16, kTileLineBytes = 64, kTileBytes = kTileLines * kTileLineBytes;
constexpr int kTileRegisters = 8;

// Operand of LDTILECFG.
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t line_bytes[16];  // of each register; those beyond the eighth must be 0
  uint8_t lines[16];
};
static_assert(sizeof(TileConfig) == 64);

// Sixteen lines of so many bytes.
SPARSECC_INLINE void configure(TileConfig& config, int tile, int line_bytes) {
  config.lines[tile] = kTileLines;
  config.line_bytes[tile] = (uint16_t)line_bytes;
}

#if SPARSECC_AMX_EMULATED
#include "amx_emulated.inl.h"
#else
// Not the compiler's intrinsics: those of GCC take a register's number only as written out in the source, and do not say
// which memory they read.
SPARSECC_INLINE void tile_config(const TileConfig& config) {
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}
SPARSECC_INLINE void tile_release() { __asm__ volatile("tilerelease"); }

template <int To>
SPARSECC_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(To));
}
// Lines that are not configured, and what is beyond the end of a line, become zero.
template <int To>
SPARSECC_INLINE void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2), %%tmm%c0" : : "i"(To), "r"(from), "r"(stride) : "memory");
}
template <int From>
SPARSECC_INLINE void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2)" : : "i"(From), "r"(to), "r"(stride) : "memory");
}
// Sum[i][j] += the products of the fours of signed bytes of line i of Left with the fours of unsigned bytes in place j
// of the lines of Right, modulo 2^32.
template <int Sum, int Left, int Right>
SPARSECC_INLINE void tile_dot_bytes() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(Left), "i"(Right));
}
// The same of pairs of numbers of bfloat16, in float32: first numbers and second ones are summed apart along a line, then
// together, then with Sum; numbers below the normal ones count as zero.
template <int Sum, int Left, int Right>
SPARSECC_INLINE void tile_dot_floats() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(Left), "i"(Right));
}
#endif
