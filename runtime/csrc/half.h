// Numbers of 16 bits, as files and packed weights hold them, to float32 and back.
#ifndef SPARSECC_HALF_H_
#define SPARSECC_HALF_H_

#include <bit>
#include <cstdint>

#include "sparsecc/c_api.h"

namespace sparsecc {

// Exact, and apart from multiplications of normal numbers in integers: a session may flush small ones to zero.
inline float widen(uint16_t bits, sparsecc_value_type type) {
  if (type == SPARSECC_BFLOAT16) return std::bit_cast<float>(uint32_t{bits} << 16);
  const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return std::bit_cast<float>(sign | ((rest << 13) + (112u << 23)));
  const float small = static_cast<float>(rest) * 0x1p-24f;
  return sign != 0 ? -small : small;
}

// The other way, of what `widen` gave.
inline uint16_t narrow(float value, sparsecc_value_type type) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (type == SPARSECC_BFLOAT16) return static_cast<uint16_t>(bits >> 16);
  const uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest >= 143u << 23) return static_cast<uint16_t>(sign | 0x7c00u | (rest >> 13 & 0x3ffu));
  if (rest >= 113u << 23) return static_cast<uint16_t>(sign | (rest - (112u << 23)) >> 13);
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::bit_cast<float>(rest) * 0x1p24f));
}

}  // namespace sparsecc
#endif
