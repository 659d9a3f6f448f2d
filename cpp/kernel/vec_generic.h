// SPDX-License-Identifier: Apache-2.0
//
// Any CPU: registers of 16 bytes, written with the compiler's vector extensions alone (SSE2 on
// x86-64, NEON on aarch64). The definition of every operation; start here to add an instruction
// set.
#pragma once

#include <cstdint>

namespace fastattn {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kColumns = 3;        // vectors of queries in a full block
constexpr int64_t kKeyTile = 128;  // keys per tile

// Rows of the micro-kernel: 4 x 3 accumulators and the operands in 16 registers.
constexpr int micro_rows(int columns) { return columns == 3 ? 3 : columns == 2 ? 4 : 8; }

namespace isa {
typedef float Float __attribute__((vector_size(kVectorBytes)));
typedef double Double __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64 __attribute__((vector_size(kVectorBytes)));

// Rounded twice: not every CPU has a fused one.
inline Float fma(Float a, Float b, Float c) { return a * b + c; }
inline Double fma(Double a, Double b, Double c) { return a * b + c; }

// Keeps the compiler from reading x from memory again for each use, where that would be slower.
inline void hold(Float&) {}

// The larger (smaller) one; the second where either is NaN.
inline Float max(Float a, Float b) { return a > b ? a : b; }
inline Double max(Double a, Double b) { return a > b ? a : b; }
inline Float min(Float a, Float b) { return a < b ? a : b; }
inline Double min(Double a, Double b) { return a < b ? a : b; }

// Returns f of x = n + f, n the nearest whole number. 2^x is all that comes of it, so that n may
// stop at -150 (float), -1075 (double), where it rounds to 0. NaN stays. The sums have no fraction
// bits left.
inline Float split(Float x, Float& n) {
    x = max(Float{} - 150, x);
    n = (x + 0x1.8p23f) - 0x1.8p23f;
    return x - n;
}
inline Double split(Double x, Double& n) {
    x = max(Double{} - 1075, x);
    n = (x + 0x1.8p52) - 0x1.8p52;
    return x - n;
}

// The exponent field is built 24 (float) or 53 (double) too high, so that it is never subnormal,
// and a last product brings it down with the one rounding that a subnormal result needs.
inline Float times_power_of_two(Float p, Float n) {
    const Int32 exponent = __builtin_convertvector(n, Int32) + (127 + 24);
    return p * (Float)(exponent << 23) * 0x1p-24f;
}
inline Double times_power_of_two(Double p, Double n) {
    // Adding 1.5 * 2^52 leaves the integer n in the low bits.
    const Int64 exponent = (Int64)(n + 0x1.8p52) + (1023 + 53);
    return p * (Double)(exponent << 52) * 0x1p-53;
}

typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
// Of a mask, whether any lane is set.
inline bool any(Wide mask) { return (mask[0] | mask[1]) != 0; }
inline bool all_finite(Float x) { return !any((Wide)(x - x != Float{})); }
inline bool all_finite(Double x) { return !any((Wide)(x - x != Double{})); }
// Per lane, the product of the low halves.
inline Wide multiply_halves(Wide a, Wide b) { return (a & 0xffffffff) * (b & 0xffffffff); }

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));

inline Float from_bfloat16(HalfBits half) {
    return (Float)(__builtin_convertvector(half, Bits) << 16);
}
typedef int8_t Int8s __attribute__((vector_size(kVectorBytes / 4)));
inline Float from_int8(Int8s x) { return __builtin_convertvector(x, Float); }

// The product moves the exponent's bias, subnormals included; Inf and NaN get all exponent bits.
inline Float from_float16(HalfBits half) {
    const Bits x = __builtin_convertvector(half, Bits);
    const Float magnitude = (Float)((x & 0x7fff) << 13) * 0x1p112f;
    const Bits special = (x & 0x7c00) == 0x7c00 ? Bits{} + 0x7f800000 : Bits{};
    return (Float)((Bits)magnitude | special | (x & 0x8000) << 16);
}
// i * scale + least of the low and the high halves of bytes, integers of 0 to 15, and
// (i - 8) * scale: a scale times an integer is exact, so that one rounding is left.
inline void from_halves(Int8s x, Float scale, Float least, Float& low, Float& high) {
    const Int32 both = __builtin_convertvector(x, Int32);
    low = fma(__builtin_convertvector(both & 15, Float), scale, least);
    high = fma(__builtin_convertvector(both >> 4 & 15, Float), scale, least);
}
inline void from_halves(Int8s x, Float scale, Float& low, Float& high) {
    from_halves(x, scale, scale * -8.0f, low, high);
}

// To the nearest, and to the even one of two.
inline HalfBits to_float16(Float number) {
    const Bits sign = (Bits)number & 0x80000000, x = (Bits)number ^ sign;
    // A sum with 1/2 leaves the subnormal number's bits at its end, rounded.
    const Bits small = (Bits)((Float)x + 0.5f) - 0x3f000000;
    const Bits normal = (x + 0xc8000fff + (x >> 13 & 1)) >> 13;
    const Bits special = x > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
    const Bits half = x < 0x38800000 ? small : x < 0x47800000 ? normal : special;
    return __builtin_convertvector(half | sign >> 16, HalfBits);
}

// The low (high) halves of a and b, one element of each in turn.
inline Float zip_low(Float a, Float b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Float zip_high(Float a, Float b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
inline Double zip_low(Double a, Double b) { return __builtin_shufflevector(a, b, 0, 2); }
inline Double zip_high(Double a, Double b) { return __builtin_shufflevector(a, b, 1, 3); }
}  // namespace isa

}  // namespace
}  // namespace fastattn
