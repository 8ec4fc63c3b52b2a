#include "isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "common.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sparsecc {
namespace {

struct Cpu {
  bool avx2 = false, avx512 = false;
};

#if defined(__x86_64__)
uint64_t enabled_state() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

Cpu detect() {
  Cpu cpu;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return cpu;
  const bool fma = (c >> 12 & 1) != 0, xsave = (c >> 27 & 1) != 0;
  if (!xsave) return cpu;
  const uint64_t state = enabled_state();
  const bool ymm = (state & 0x6) == 0x6;    // SSE and AVX registers are saved by the system
  const bool zmm = (state & 0xe6) == 0xe6;  // and mask registers and the upper zmm
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return cpu;
  const auto has = [b](int bit) { return (b >> bit & 1) != 0; };
  cpu.avx2 = ymm && fma && has(5) && has(8);  // AVX2, BMI2
  // F, DQ, BW, VL: every server and desktop core with AVX-512 since 2017
  cpu.avx512 = cpu.avx2 && zmm && has(16) && has(17) && has(30) && has(31);
  return cpu;
}
#else
Cpu detect() { return {}; }
#endif

const Cpu& cpu() {
  static const Cpu detected = detect();
  return detected;
}

constexpr Isa kBestFirst[] = {Isa::kAvx512, Isa::kAvx2, Isa::kGeneric};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kGeneric:
      break;
  }
  return "generic";
}

bool isa_usable(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return cpu().avx512;
    case Isa::kAvx2:
      return cpu().avx2;
    case Isa::kGeneric:
      break;
  }
  return true;
}

Isa choose_isa(const char* wanted) {
  const char* source = "isa";
  if (wanted == nullptr) {
    wanted = std::getenv("SPARSECC_ISA");
    source = "SPARSECC_ISA";
  }
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const Isa isa : kBestFirst)
    if (isa_usable(isa) && (any || std::strcmp(wanted, isa_name(isa)) == 0)) return isa;
  throw Failure{std::string(source) + " is " + quoted(wanted) + ", usable here: " + isa_list()};
}

const char* isa_list() {
  static const std::string list = [] {
    std::string text;
    for (const Isa isa : kBestFirst)
      if (isa_usable(isa)) text.append(text.empty() ? "" : " ").append(isa_name(isa));
    return text;
  }();
  return list.c_str();
}

}  // namespace sparsecc
