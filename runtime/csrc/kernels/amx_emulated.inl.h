// Tile registers as arrays of each thread; what the processor answers with a fault ends the program.
#pragma once

struct EmulatedTiles {
  TileConfig config;  // palette 0: none
  uint8_t line[kTileRegisters][kTileLines][kTileLineBytes];
};
static thread_local EmulatedTiles emulated_tiles;

static void fault_unless(bool allowed) {
  if (!allowed) __builtin_trap();
}

static void tile_config(const TileConfig& config) {
  fault_unless(config.palette == 1 && config.start_row == 0);
  for (const uint8_t byte : config.reserved) fault_unless(byte == 0);
  for (int i = 0; i < 16; ++i) {
    const int bytes = config.line_bytes[i], lines = config.lines[i];
    fault_unless(bytes <= kTileLineBytes && lines <= kTileLines && (bytes == 0) == (lines == 0));
    fault_unless(i < kTileRegisters || bytes == 0);
  }
  emulated_tiles = {};  // all registers are zeroed
  emulated_tiles.config = config;
}

static void tile_release() { emulated_tiles = {}; }

static int lines_of(int tile) {
  fault_unless(emulated_tiles.config.palette == 1 && emulated_tiles.config.lines[tile] != 0);
  return emulated_tiles.config.lines[tile];
}

static int bytes_of(int tile) {
  fault_unless(lines_of(tile) != 0);
  return emulated_tiles.config.line_bytes[tile];
}

template <int To>
static void tile_zero() {
  fault_unless(lines_of(To) != 0);
  __builtin_memset(emulated_tiles.line[To], 0, kTileBytes);
}

template <int To>
static void tile_load(const void* from, int64_t stride) {
  tile_zero<To>();
  for (int i = 0; i < lines_of(To); ++i)
    __builtin_memcpy(emulated_tiles.line[To][i], (const uint8_t*)from + i * stride, (size_t)bytes_of(To));
}

template <int From>
static void tile_store(void* to, int64_t stride) {
  for (int i = 0; i < lines_of(From); ++i)
    __builtin_memcpy((uint8_t*)to + i * stride, emulated_tiles.line[From][i], (size_t)bytes_of(From));
}

// Calls product(sum, left, right) for each 32-bit sum in turn and the pairs of 32-bit words that are multiplied for it,
// `left` and `right` pointing to the first of them; a line further on is the next word of `right`.
template <int Sum, int Left, int Right, class Product>
static void emulated_product(Product product) {
  fault_unless(Sum != Left && Sum != Right && Left != Right);
  fault_unless(lines_of(Sum) == lines_of(Left) && bytes_of(Sum) == bytes_of(Right));
  fault_unless(bytes_of(Left) == 4 * lines_of(Right) && bytes_of(Left) % 4 == 0 && bytes_of(Right) % 4 == 0);
  const int words = lines_of(Right);
  for (int i = 0; i < lines_of(Sum); ++i)
    for (int j = 0; j < bytes_of(Sum); j += 4)
      product(&emulated_tiles.line[Sum][i][j], emulated_tiles.line[Left][i], &emulated_tiles.line[Right][0][j],
              words);
  // Lines of the sum beyond the configured ones, and their ends, are zeroed; they never held anything else.
}

template <int Sum, int Left, int Right>
static void tile_dot_bytes() {
  emulated_product<Sum, Left, Right>([](uint8_t* sum, const uint8_t* left, const uint8_t* right, int words) {
    uint32_t total;
    __builtin_memcpy(&total, sum, sizeof total);
    for (int k = 0; k < words; ++k)
      for (int b = 0; b < 4; ++b)
        total += (uint32_t)((int)(int8_t)left[4 * k + b] * (int)right[k * kTileLineBytes + b]);
    __builtin_memcpy(sum, &total, sizeof total);
  });
}

// Zero for what is below the normal numbers, with its sign.
static float flushed(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

static float from_bfloat16(const uint8_t* bytes) {
  uint16_t upper;
  __builtin_memcpy(&upper, bytes, sizeof upper);
  const uint32_t bits = (uint32_t)upper << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return flushed(value);
}

template <int Sum, int Left, int Right>
static void tile_dot_floats() {
  emulated_product<Sum, Left, Right>([](uint8_t* sum, const uint8_t* left, const uint8_t* right, int words) {
    float total, apart[2] = {};
    __builtin_memcpy(&total, sum, sizeof total);
    for (int k = 0; k < words; ++k)
      for (int b = 0; b < 2; ++b)
        apart[b] = flushed(__builtin_fmaf(from_bfloat16(left + 4 * k + 2 * b),
                                          from_bfloat16(right + k * kTileLineBytes + 2 * b), apart[b]));
    total = flushed(flushed(total) + flushed(apart[0] + apart[1]));
    __builtin_memcpy(sum, &total, sizeof total);
  });
}
