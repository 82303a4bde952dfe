#include "pack/pack.h"

#include <cmath>
#include <cstring>

#include "half.h"

namespace ipex_quant {
namespace {

// INT8 codes and zero points are shifted by 128 to be unsigned.
uint8_t byte_offset(int32_t dtype) { return dtype == kInt8 ? 128 : 0; }

// Calls f(slot, position) for every slot that is no padding, with its position in group order.
template <class F>
void for_each_slot(const WoqGeometry& g, F f) {
  for (int64_t group = 0, slot = 0; group < g.groups; slot += g.padded(group), ++group)
    for (int64_t k = 0; k < g.length(group); ++k) f(slot + k, group * g.group + k);
}

// Reads row `row` of the plain codes as unsigned bytes, in group order, with zeros in the padding.
void read_row(const PackArgs& args, int64_t row, uint8_t* slots, uint8_t* plain) {
  const WoqGeometry& g = *args.geometry;
  const uint8_t* in = args.plain.codes + row * g.code_columns();
  if (g.two_a_byte()) {
    for (int64_t k = 0; k < g.k; k += 2) plain[k] = in[k / 2] & 15, plain[k + 1] = in[k / 2] >> 4;
  } else {
    for (int64_t k = 0; k < g.k; ++k) plain[k] = uint8_t(in[k] + byte_offset(g.dtype));
  }
  std::memset(slots, 0, g.padded_k);
  if (args.perm) {
    for_each_slot(g, [&](int64_t slot, int64_t position) { slots[slot] = plain[args.perm[position]]; });
  } else if (g.groups == 1 || g.padded_full == g.group) {
    std::memcpy(slots, plain, g.k);
  } else {
    for_each_slot(g, [&](int64_t slot, int64_t position) { slots[slot] = plain[position]; });
  }
}

void write_row(const PackArgs& args, int64_t row, const uint8_t* slots, uint8_t* plain) {
  const WoqGeometry& g = *args.geometry;
  for_each_slot(
      g, [&](int64_t slot, int64_t position) { plain[args.perm ? args.perm[position] : position] = slots[slot]; });
  uint8_t* out = args.plain.codes + row * g.code_columns();
  if (g.two_a_byte()) {
    plain[g.k] = 0;  // the spare nibble of an odd row
    for (int64_t k = 0; k < g.k; k += 2) out[k / 2] = uint8_t(plain[k] | plain[k + 1] << 4);
  } else {
    for (int64_t k = 0; k < g.k; ++k) out[k] = uint8_t(plain[k] - byte_offset(g.dtype));
  }
}

// The inverse of get_codes, into zeros.
template <int32_t Dtype>
void put_codes(uint8_t* set, int64_t column, const uint8_t* slots) {
  for (int64_t piece = 0; 4 * piece < line_k(Dtype); ++piece) {
    uint32_t codes;
    std::memcpy(&codes, slots + 4 * piece, 4);
    for_each_plane<Dtype>(piece, column, [&](int64_t offset, int shift, uint32_t mask, int up) {
      uint32_t word;
      std::memcpy(&word, set + offset, 4);
      word |= (codes >> up & mask) << shift;
      std::memcpy(set + offset, &word, 4);
    });
  }
}

// Column `column` of a run of kTileN floats that are stored as f32 or f16.
void put_float(bool half, uint8_t* run, int64_t column, float value) {
  const uint16_t bits = uint16_t(float_to_half(value));
  std::memcpy(run + (half ? 2 : 4) * column, half ? static_cast<const void*>(&bits) : &value, half ? 2 : 4);
}
float get_float(bool half, const uint8_t* run, int64_t column) {
  float value;
  uint16_t bits;
  std::memcpy(&bits, run + 2 * column, 2);
  if (half) return half_to_float(bits);
  std::memcpy(&value, run + 4 * column, 4);
  return value;
}

uint8_t power_byte(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint8_t(bits >> 23);
}
float power_of_byte(uint8_t byte) {
  const uint32_t bits = uint32_t(byte) << 23;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float fp8_of_byte(uint8_t byte) {  // e4m3
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float magnitude = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
  return byte & 128 ? -magnitude : magnitude;
}
uint8_t fp8_byte(float value) {  // the nearest
  const float magnitude = std::fabs(value);
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  const uint32_t byte = !(magnitude < 448.0f) ? 0x7E
                        : magnitude < 0x1p-6f ? uint32_t(std::rint(magnitude * 512.0f))
                                              : (bits + 0x80000 - (120u << 23)) >> 20;
  return uint8_t(byte | (std::signbit(value) ? 128 : 0));
}

// The byte whose factor times `super` is nearest to `value`.
uint8_t factor_byte(int32_t type, float value, float super) {
  if (super == 0.0f) return 0;
  const float factor = value / super;
  if (type == kFp8Scale) return fp8_byte(factor);
  return uint8_t(int8_t(std::fmin(std::fmax(std::rint(factor), -128.0f), 127.0f)));
}
float factor_of_byte(int32_t type, uint8_t byte) { return type == kFp8Scale ? fp8_of_byte(byte) : float(int8_t(byte)); }

// Column `column` of a run of kTileN scales or minimums.
void put_scale(int32_t type, uint8_t* run, int64_t column, float value, float super) {
  if (type <= kHalfScale) return put_float(type == kHalfScale, run, column, value);
  run[column] = type == kPowerScale ? power_byte(value) : factor_byte(type, value, super);
}
float get_scale(int32_t type, const uint8_t* run, int64_t column, float super) {
  if (type <= kHalfScale) return get_float(type == kHalfScale, run, column);
  return type == kPowerScale ? power_of_byte(run[column]) : factor_of_byte(type, run[column]) * super;
}

int64_t rows_of(const WoqGeometry& g, int64_t tile) {
  return g.n - tile * kTileN < kTileN ? g.n - tile * kTileN : kTileN;
}

// Scales, and zero points or minimums, of one row in the group at which the walk is.
void put_head(const PackArgs& args, const GroupWalk& at, int64_t row, int64_t column) {
  const WoqGeometry& g = *args.geometry;
  const PlainWeight& plain = args.plain;
  uint8_t* head = const_cast<uint8_t*>(at.head());
  const int64_t i = row * g.groups + at.group;
  float super = 0.0f, super_minimum = 0.0f;
  if (plain.super_scales) {
    uint8_t* supers = const_cast<uint8_t*>(at.super_head());
    const int64_t own = row * g.supers() + at.group / g.super_groups;
    put_float(g.half_supers, supers, column, super = plain.super_scales[own]);
    if (plain.super_minimums)
      put_float(g.half_supers, supers + kTileN * g.super_scale_bytes(), column,
                super_minimum = plain.super_minimums[own]);
  }
  put_scale(g.scale_type, head, column, plain.scales[i], super);
  uint8_t* offsets = head + kTileN * g.scale_bytes();
  if (plain.zero_points) offsets[column] = uint8_t(plain.zero_points[i] + byte_offset(g.dtype));
  if (plain.minimums) put_scale(g.scale_type, offsets, column, plain.minimums[i], super_minimum);
}

// A word of codes of 4 or 8 bits in their order as it stands in a code line.
template <int32_t Dtype>
uint32_t line_word(uint32_t plain) {
  if constexpr (code_bits(Dtype) == 8) return plain ^ 0x01010101u * byte_offset(Dtype);
  const auto spread = [](uint32_t four) {  // one to a byte
    four = (four | four << 8) & 0x00FF00FFu;
    return (four | four << 4) & 0x0F0F0F0Fu;
  };
  return spread(plain & 0xFFFFu) | spread(plain >> 16) << 4;
}

// The codes of one row in the group at which the walk is, if the words of the row are those of its lines.
template <int32_t Dtype>
void put_words(const PackArgs& args, const GroupWalk& at, int64_t row, int64_t column) {
  const WoqGeometry& g = *args.geometry;
  constexpr int64_t kBits = code_bits(Dtype);
  const uint8_t* in = args.plain.codes + row * g.code_columns() + at.start * kBits / 8;
  uint8_t* out = const_cast<uint8_t*>(at.codes()) + 4 * column;
  for (int64_t words = g.padded(at.group) * kBits / 32; words > 0; --words, in += 4, out += 4 * kTileN) {
    uint32_t word;
    std::memcpy(&word, in, 4);
    word = line_word<Dtype>(word);
    std::memcpy(out, &word, 4);
  }
}

template <int32_t Dtype>
void pack_typed_tile(const PackArgs& args, int64_t tile, uint8_t* scratch) {
  const WoqGeometry& g = *args.geometry;
  uint8_t* to = args.tiles + tile * g.tile_bytes;
  const int64_t rows = rows_of(g, tile), first = tile * kTileN;
  const bool by_words = code_bits(Dtype) % 4 == 0 && !args.perm && g.padded_k == g.k;
  std::memset(to, 0, size_t(g.tile_bytes));
  for (GroupWalk at(g, to); at.more(); at.advance()) {
    for (int64_t column = 0; column < rows; ++column) {
      put_head(args, at, first + column, column);
      if (by_words) put_words<Dtype>(args, at, first + column, column);
    }
  }
  for (int64_t column = 0; column < rows && !by_words; ++column) {
    read_row(args, first + column, scratch, scratch + g.padded_k);
    for (GroupWalk at(g, to); at.more(); at.advance()) {
      uint8_t* codes = const_cast<uint8_t*>(at.codes());
      for (int64_t k = 0; k < g.padded(at.group); k += line_k(Dtype), codes += line_set_bytes(Dtype))
        put_codes<Dtype>(codes, column, scratch + at.start + k);
    }
  }
}

template <int32_t Dtype>
void unpack_typed_tile(const PackArgs& args, int64_t tile, uint8_t* scratch) {
  const WoqGeometry& g = *args.geometry;
  const PlainWeight& plain = args.plain;
  for (int64_t column = 0; column < rows_of(g, tile); ++column) {
    const int64_t row = tile * kTileN + column;
    for (GroupWalk at(g, args.tiles + tile * g.tile_bytes); at.more(); at.advance()) {
      const uint8_t *head = at.head(), *codes = at.codes(), *supers = at.super_head();
      const int64_t i = row * g.groups + at.group;
      float super = 0.0f, super_minimum = 0.0f;
      if (plain.super_scales) {
        const int64_t own = row * g.supers() + at.group / g.super_groups;
        plain.super_scales[own] = super = get_float(g.half_supers, supers, column);
        if (plain.super_minimums)
          plain.super_minimums[own] = super_minimum =
              get_float(g.half_supers, supers + kTileN * g.super_scale_bytes(), column);
      }
      plain.scales[i] = get_scale(g.scale_type, head, column, super);
      const uint8_t* offsets = head + kTileN * g.scale_bytes();
      if (plain.zero_points) plain.zero_points[i] = int16_t(offsets[column] - byte_offset(g.dtype));
      if (plain.minimums) plain.minimums[i] = get_scale(g.scale_type, offsets, column, super_minimum);
      for (int64_t k = 0; k < g.padded(at.group); k += line_k(Dtype), codes += line_set_bytes(Dtype))
        get_codes<Dtype>(codes, column, scratch + at.start + k);
    }
    write_row(args, row, scratch, scratch + g.padded_k);
  }
}

}  // namespace

bool fits_half(const float* numbers, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (half_to_float(float_to_half(numbers[i])) != numbers[i]) return false;
  return true;
}

bool fits_power(const float* numbers, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (power_of_byte(power_byte(numbers[i])) != numbers[i] || std::signbit(numbers[i]) || std::isinf(numbers[i]))
      return false;
  return true;
}

bool fits_super(int32_t type, const float* numbers, const float* supers, int64_t count, int64_t super_groups) {
  for (int64_t i = 0; i < count; ++i) {
    const float super = supers[i / super_groups];
    if (factor_of_byte(type, factor_byte(type, numbers[i], super)) * super != numbers[i]) return false;
  }
  return true;
}

void pack_tile(const PackArgs& args, int64_t tile, uint8_t* scratch) {
  for_dtype(args.geometry->dtype, [&](auto dtype) { pack_typed_tile<dtype.value>(args, tile, scratch); });
}

void unpack_tile(const PackArgs& args, int64_t tile, uint8_t* scratch) {
  for_dtype(args.geometry->dtype, [&](auto dtype) { unpack_typed_tile<dtype.value>(args, tile, scratch); });
}

}  // namespace ipex_quant
