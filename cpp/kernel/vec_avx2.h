// SPDX-License-Identifier: Apache-2.0
//
// AVX2 with FMA: registers of 32 bytes, 16 of them. See vec.h for what each function means.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastattn {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kColumns = 3;        // vectors of queries in a full block
constexpr int64_t kKeyTile = 128;  // keys per tile

// Rows of the micro-kernel: 4 x 3 accumulators, 3 vectors of queries and 1 broadcast in 16
// registers.
constexpr int micro_rows(int columns) { return columns == 3 ? 4 : columns == 2 ? 6 : 8; }

namespace isa {
inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
inline __m256 max(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
inline __m256d max(__m256d a, __m256d b) { return _mm256_max_pd(a, b); }
inline __m256 min(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
inline __m256d min(__m256d a, __m256d b) { return _mm256_min_pd(a, b); }

// What is masked is neither read nor written, whether or not there is memory.
inline __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_wide_lanes(int64_t count) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline __m256 load_some(const float* from, int64_t count) {
    return _mm256_maskload_ps(from, first_lanes(count));
}
inline __m256d load_some(const double* from, int64_t count) {
    return _mm256_maskload_pd(from, first_wide_lanes(count));
}
inline void store_some(__m256 x, float* to, int64_t count) {
    _mm256_maskstore_ps(to, first_lanes(count), x);
}
inline void store_some(__m256d x, double* to, int64_t count) {
    _mm256_maskstore_pd(to, first_wide_lanes(count), x);
}

inline bool all_finite(__m256 x) {
    const __m256 rest = _mm256_sub_ps(x, x);
    return _mm256_movemask_ps(_mm256_cmp_ps(rest, rest, _CMP_UNORD_Q)) == 0;
}
inline bool all_finite(__m256d x) {
    const __m256d rest = _mm256_sub_pd(x, x);
    return _mm256_movemask_pd(_mm256_cmp_pd(rest, rest, _CMP_UNORD_Q)) == 0;
}

inline void hold(__m256&) {}

// 2^-150 (float) and 2^-1075 (double) round to 0 already.
inline __m256 split(__m256 x, __m256& n) {
    x = max(_mm256_set1_ps(-150), x);
    n = _mm256_round_ps(x, 8);
    return _mm256_sub_ps(x, n);
}
inline __m256d split(__m256d x, __m256d& n) {
    x = max(_mm256_set1_pd(-1075), x);
    n = _mm256_round_pd(x, 8);
    return _mm256_sub_pd(x, n);
}

// The exponent field is built 24 (float) or 53 (double) too high, so that it is never subnormal,
// and a last product brings it down with the one rounding that a subnormal result needs.
inline __m256 times_power_of_two(__m256 p, __m256 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127 + 24));
    const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    return _mm256_mul_ps(_mm256_mul_ps(p, power), _mm256_set1_ps(0x1p-24f));
}
inline __m256d times_power_of_two(__m256d p, __m256d n) {
    // Adding 1.5 * 2^52 leaves the integer n in the low bits.
    const __m256i bits = _mm256_castpd_si256(_mm256_add_pd(n, _mm256_set1_pd(0x1.8p52)));
    const __m256i exponent = _mm256_add_epi64(bits, _mm256_set1_epi64x(1023 + 53));
    const __m256d power = _mm256_castsi256_pd(_mm256_slli_epi64(exponent, 52));
    return _mm256_mul_pd(_mm256_mul_pd(p, power), _mm256_set1_pd(0x1p-53));
}

typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
inline bool any(Wide mask) { return _mm256_movemask_epi8((__m256i)mask) != 0; }
inline Wide multiply_halves(Wide a, Wide b) {
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
inline __m256 from_bfloat16(HalfBits x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16));
}
typedef int8_t Int8s __attribute__((vector_size(kVectorBytes / 4)));
inline __m256 from_int8(Int8s x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)x)));
}
// i * scale + least of the low and the high halves of bytes, integers of 0 to 15, and
// (i - 8) * scale: a scale times an integer is exact, so that one rounding is left.
inline void from_halves(Int8s x, __m256 scale, __m256 least, __m256& low, __m256& high) {
    const __m256i both = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)x));
    const __m256i halves = _mm256_and_si256(both, _mm256_set1_epi32(15));
    low = _mm256_fmadd_ps(_mm256_cvtepi32_ps(halves), scale, least);
    high = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4)), scale, least);
}
inline void from_halves(Int8s x, __m256 scale, __m256& low, __m256& high) {
    from_halves(x, scale, scale * -8.0f, low, high);
}
inline __m256 from_float16(HalfBits x) { return _mm256_cvtph_ps((__m128i)x); }
inline HalfBits to_float16(__m256 x) { return (HalfBits)_mm256_cvtps_ph(x, 8); }

inline __m256 zip_low(__m256 a, __m256 b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
inline __m256 zip_high(__m256 a, __m256 b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}
inline __m256d zip_low(__m256d a, __m256d b) {
    return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x20);
}
inline __m256d zip_high(__m256d a, __m256d b) {
    return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x31);
}
}  // namespace isa

}  // namespace
}  // namespace fastattn
