#include "isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "common.h"
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace sparsecc {
namespace {

#if defined(SPARSECC_EMULATED_AMX)
constexpr bool kEmulatedAmx = true;
#else
constexpr bool kEmulatedAmx = false;
#endif

struct Cpu {
  bool avx2 = false, avx512 = false, avxvnni = false, avx512vnni = false, vbmi = false;
  bool amx_int8 = false, amx_bf16 = false;
  bool neon = false, dotprod = false, i8mm = false;
};

#if defined(__x86_64__)
uint64_t enabled_state() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Tiles as the kernels use them: palette 1 with 8 registers of 16 lines of 64 bytes.
bool has_palette() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(0x1d, 1, &a, &b, &c, &d) != 0 && (b & 0xffff) == 64 && b >> 16 >= 8 && (c & 0xffff) >= 16;
}

// Linux saves tile registers only for processes that ask for it, once and before the first use.
bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Cpu detect() {
  Cpu cpu;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return cpu;
  const bool fma = (c >> 12 & 1) != 0, xsave = (c >> 27 & 1) != 0, f16c = (c >> 29 & 1) != 0;
  if (!xsave) return cpu;
  const uint64_t state = enabled_state();
  const bool ymm = (state & 0x6) == 0x6;    // SSE and AVX registers are saved by the system
  const bool zmm = (state & 0xe6) == 0xe6;  // and mask registers and the upper zmm
  const bool tmm = (state & 0x60000) == 0x60000;  // and tile registers and their configuration
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return cpu;
  const auto has = [b](int bit) { return (b >> bit & 1) != 0; };
  cpu.avx2 = ymm && fma && f16c && has(5) && has(8);  // AVX2, BMI2
  // F, DQ, BW, VL: every server and desktop core with AVX-512 since 2017
  cpu.avx512 = cpu.avx2 && zmm && has(16) && has(17) && has(30) && has(31);
  cpu.avx512vnni = cpu.avx512 && (c >> 11 & 1) != 0;
  cpu.vbmi = cpu.avx512vnni && (c >> 1 & 1) != 0;
  const bool amx_bf16 = (d >> 22 & 1) != 0, amx_tile = (d >> 24 & 1) != 0, amx_int8 = (d >> 25 & 1) != 0;
  // VBMI: every core with AMX.
  cpu.amx_int8 = cpu.vbmi && tmm && amx_tile && amx_int8 && has_palette() && tiles_permitted();
  cpu.amx_bf16 = cpu.amx_int8 && amx_bf16;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) cpu.avxvnni = cpu.avx2 && (a >> 4 & 1) != 0;
  return cpu;
}
#elif defined(__aarch64__) && defined(__linux__)
Cpu detect() {
  // The kernel's names for these bits are younger than some C libraries.
  constexpr unsigned long kAsimd = 1ul << 1, kAsimdDotprod = 1ul << 20, kI8mm = 1ul << 13;
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  Cpu cpu;
  cpu.neon = (first & kAsimd) != 0;
  cpu.dotprod = cpu.neon && (first & kAsimdDotprod) != 0;
  cpu.i8mm = cpu.dotprod && (second & kI8mm) != 0;
  return cpu;
}
#else
Cpu detect() { return {}; }
#endif

const Cpu& cpu() {
  static const Cpu detected = detect();
  return detected;
}

constexpr Isa kBestFirst[] = {Isa::kAvx512, Isa::kAvx2, Isa::kNeon, Isa::kGeneric};
constexpr ByteIsa kBytesBestFirst[] = {
    ByteIsa::kAvx512Amx, ByteIsa::kAvx512Vnni,  ByteIsa::kAvxVnni, ByteIsa::kAvx512,            ByteIsa::kAvx2,
    ByteIsa::kNeonI8mm,  ByteIsa::kNeonDotprod, ByteIsa::kNeon,    ByteIsa::kAvx512AmxEmulated, ByteIsa::kGeneric};

Isa extended_by(ByteIsa isa) {
  switch (isa) {
    case ByteIsa::kAvx512Amx:
    case ByteIsa::kAvx512AmxEmulated:
    case ByteIsa::kAvx512Vnni:
    case ByteIsa::kAvx512:
      return Isa::kAvx512;
    case ByteIsa::kAvxVnni:
    case ByteIsa::kAvx2:
      return Isa::kAvx2;
    case ByteIsa::kNeonI8mm:
    case ByteIsa::kNeonDotprod:
    case ByteIsa::kNeon:
      return Isa::kNeon;
    case ByteIsa::kGeneric:
      break;
  }
  return Isa::kGeneric;
}

bool names(const char* wanted, Isa isa) {
  for (const ByteIsa variant : kBytesBestFirst)
    if (extended_by(variant) == isa && isa_usable(variant) && std::strcmp(wanted, isa_name(variant)) == 0)
      return true;
  return false;
}

bool names(const char* wanted, ByteIsa isa) { return std::strcmp(wanted, isa_name(isa)) == 0; }

template <class Any, size_t N>
Any choose(const Any (&best_first)[N], const char* wanted, const char* (*usable)()) {
  const char* source = "isa";
  if (wanted == nullptr) {
    wanted = std::getenv("SPARSECC_ISA");
    source = "SPARSECC_ISA";
  }
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const Any isa : best_first)
    if (isa_usable(isa) && (any || names(wanted, isa))) return isa;
  throw Failure{std::string(source) + " is " + quoted(wanted) + ", usable here: " + usable()};
}

template <class Any, size_t N>
std::string usable_names(const Any (&best_first)[N]) {
  std::string text;
  for (const Any isa : best_first)
    if (isa_usable(isa)) text.append(text.empty() ? "" : " ").append(isa_name(isa));
  return text;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kNeon:
      return "neon";
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
    case Isa::kNeon:
      return cpu().neon;
    case Isa::kGeneric:
      break;
  }
  return true;
}

const char* isa_name(ByteIsa isa) {
  switch (isa) {
    case ByteIsa::kAvx512Amx:
      return "avx512amx";
    case ByteIsa::kAvx512AmxEmulated:
      return "avx512amx_emulated";
    case ByteIsa::kAvx512Vnni:
      return "avx512vnni";
    case ByteIsa::kAvxVnni:
      return "avxvnni";
    case ByteIsa::kNeonI8mm:
      return "neon_i8mm";
    case ByteIsa::kNeonDotprod:
      return "neon_dotprod";
    default:
      return isa_name(extended_by(isa));
  }
}

bool isa_usable(ByteIsa isa) {
  switch (isa) {
    case ByteIsa::kAvx512Amx:
      return cpu().amx_int8;
    case ByteIsa::kAvx512AmxEmulated:
      return kEmulatedAmx && cpu().vbmi;
    case ByteIsa::kAvx512Vnni:
      return cpu().avx512vnni;
    case ByteIsa::kAvxVnni:
      return cpu().avxvnni;
    case ByteIsa::kNeonI8mm:
      return cpu().i8mm;
    case ByteIsa::kNeonDotprod:
      return cpu().dotprod;
    default:
      return isa_usable(extended_by(isa));
  }
}

ByteIsa without_tiles(ByteIsa isa) {
  return isa == ByteIsa::kAvx512Amx || isa == ByteIsa::kAvx512AmxEmulated ? ByteIsa::kAvx512Vnni : isa;
}

bool bf16_tiles_usable(ByteIsa isa) {
  return isa_usable(isa) && (isa == ByteIsa::kAvx512Amx ? cpu().amx_bf16 : isa == ByteIsa::kAvx512AmxEmulated);
}

bool vbmi_usable() { return cpu().vbmi; }

Isa choose_isa(const char* wanted) { return choose(kBestFirst, wanted, isa_list); }

ByteIsa choose_byte_isa(const char* wanted) { return choose(kBytesBestFirst, wanted, byte_isa_list); }

const char* isa_list() {
  static const std::string list = usable_names(kBestFirst);
  return list.c_str();
}

const char* byte_isa_list() {
  static const std::string list = usable_names(kBytesBestFirst);
  return list.c_str();
}

}  // namespace sparsecc
