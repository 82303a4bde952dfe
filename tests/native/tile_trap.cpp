// Carries out the tile instructions of AMX on a processor that lacks them: each one traps, and the handler does what
// Intel's manual says, from the encoding. So the instructions themselves can be tested where they do not exist.
// Independent of csrc/tile.h. Linked into a program or preloaded, it is there from the start.
#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct TileState {
  uint8_t config[64];
  uint8_t data[8][16][64];

  int rows(int t) const { return config[48 + t]; }
  int bytes(int t) const { return config[16 + 2 * t] | config[17 + 2 * t] << 8; }
};
thread_local TileState tiles;
long trapped = 0;  // of all threads; for a look only

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "tile_trap: %s\n", what);
  std::abort();
}

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
float bf16_at(const uint8_t* p) {
  const uint32_t bits = uint32_t(p[0]) << 16 | uint32_t(p[1]) << 24;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

void multiply(int c, int a, int b, bool pairs, bool signed_a, bool signed_b) {
  const int words = tiles.bytes(a) / 4;
  require(tiles.rows(c) && tiles.rows(c) == tiles.rows(a) && tiles.bytes(c) == tiles.bytes(b), "shapes of a product");
  require(words == tiles.rows(b) && tiles.bytes(a) % 4 == 0 && a != b && a != c && b != c, "operands of a product");
  for (int m = 0; m < tiles.rows(c); ++m)
    for (int n = 0; n < tiles.bytes(c) / 4; ++n) {
      uint8_t* sum = tiles.data[c][m] + 4 * n;
      if (pairs) {
        float even = 0, odd = 0, total;
        for (int k = 0; k < words; ++k) {
          const uint8_t *x = tiles.data[a][m] + 4 * k, *y = tiles.data[b][k] + 4 * n;
          even = flushed(std::fma(bf16_at(x), bf16_at(y), even));
          odd = flushed(std::fma(bf16_at(x + 2), bf16_at(y + 2), odd));
        }
        std::memcpy(&total, sum, 4);
        total = flushed(flushed(total) + flushed(even + odd));
        std::memcpy(sum, &total, 4);
      } else {
        uint32_t total;
        std::memcpy(&total, sum, 4);
        for (int i = 0; i < 4 * words; ++i) {
          const uint8_t x = tiles.data[a][m][i], y = tiles.data[b][i / 4][4 * n + i % 4];
          total += uint32_t((signed_a ? int8_t(x) : x) * (signed_b ? int8_t(y) : y));
        }
        std::memcpy(sum, &total, 4);
      }
    }
}

constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

struct Address {
  uint8_t* base;
  int64_t stride;
  int bytes;  // of SIB and displacement
};

// The memory operand behind a ModRM byte at `p`. The index of an SIB is the stride of a tile, in bytes.
Address address_of(const uint8_t* p, const greg_t* registers, bool index_high, bool base_high) {
  const int mode = p[0] >> 6;
  int low = p[0] & 7, bytes = 0;
  int64_t base = 0, stride = 0;
  require(mode != 3, "memory operand");
  if (low == 4) {
    const int sib = p[1], index = (sib >> 3 & 7) | index_high << 3;
    bytes = 1, low = sib & 7;
    if (index != 4) stride = registers[kRegisters[index]] << (sib >> 6);
    require(low != 5 || mode != 0, "base register");
    base = registers[kRegisters[low | base_high << 3]];
  } else if (mode == 0 && low == 5) {  // relative to the next instruction, whose address is that of p + 5
    base = reinterpret_cast<int64_t>(p + 5);
  } else {
    base = registers[kRegisters[low | base_high << 3]];
  }
  int32_t displacement = 0;
  if (mode == 1) displacement = int8_t(p[1 + bytes]), bytes += 1;
  if (mode == 2 || (mode == 0 && (p[0] & 7) == 5)) std::memcpy(&displacement, p + 1 + bytes, 4), bytes += 4;
  return {reinterpret_cast<uint8_t*>(base + displacement), stride, bytes};
}

// Carries out the instruction at `p`; returns its length, 0 for one that is not of AMX.
int execute(const uint8_t* p, const greg_t* registers) {
  if (p[0] != 0xC4 || (p[1] & 0x1F) != 2 || (p[2] & 0x84)) return 0;  // VEX.128.0F38.W0
  const bool index_high = !(p[1] & 0x40), base_high = !(p[1] & 0x20);
  const int prefix = p[2] & 3, operand = ~p[2] >> 3 & 15, opcode = p[3], reg = p[4] >> 3 & 7, low = p[4] & 7;
  const bool memory = p[4] >> 6 != 3;
  if (opcode == 0x49 && prefix == 0 && !memory) {  // TILERELEASE
    std::memset(&tiles, 0, sizeof tiles);
    return 5;
  }
  if (opcode == 0x49 && prefix == 0) {  // LDTILECFG
    const Address at = address_of(p + 4, registers, index_high, base_high);
    std::memcpy(tiles.config, at.base, 64);
    require(tiles.config[0] == 1 && tiles.config[1] == 0, "palette");
    for (int t = 0; t < 16; ++t) {
      require(t < 8 || (!tiles.rows(t) && !tiles.bytes(t)), "number of tiles");
      require(tiles.rows(t) <= 16 && tiles.bytes(t) <= 64 && !tiles.rows(t) == !tiles.bytes(t), "shape of a tile");
    }
    std::memset(tiles.data, 0, sizeof tiles.data);
    return 5 + at.bytes;
  }
  if (opcode == 0x49 && prefix == 3 && !memory) {  // TILEZERO
    require(tiles.rows(reg), "tile to zero");
    std::memset(tiles.data[reg], 0, sizeof tiles.data[reg]);
    return 5;
  }
  if (opcode == 0x4B && (prefix == 3 || prefix == 2) && memory) {  // TILELOADD, TILESTORED
    const Address at = address_of(p + 4, registers, index_high, base_high);
    require(tiles.rows(reg), "tile to load or store");
    if (prefix == 3) std::memset(tiles.data[reg], 0, sizeof tiles.data[reg]);
    for (int m = 0; m < tiles.rows(reg); ++m) {
      uint8_t *row = tiles.data[reg][m], *there = at.base + m * at.stride;
      std::memcpy(prefix == 3 ? row : there, prefix == 3 ? there : row, size_t(tiles.bytes(reg)));
    }
    return 5 + at.bytes;
  }
  if ((opcode == 0x5E || (opcode == 0x5C && prefix == 2)) && !memory) {  // TDPB*D; TDPBF16PS
    const bool signed_a = prefix == 3 || prefix == 2, signed_b = prefix == 3 || prefix == 1;
    multiply(reg, low, operand, opcode == 0x5C, signed_a, signed_b);
    return 5;
  }
  return 0;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const int length = execute(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  require(length > 0, "an instruction that is not of AMX");
  registers[REG_RIP] += length;
  ++trapped;
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

extern "C" void install_tile_trap() { install(); }
extern "C" long trapped_tile_instructions() { return trapped; }
