// SPDX-License-Identifier: Apache-2.0
//
// AVX-512: registers of 64 bytes, 32 of them. See vec.h for what each function means.
// Compiled a second time for CPUs that multiply pairs of bfloat16.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastattn {
namespace {

constexpr int kVectorBytes = 64;
constexpr int kColumns = 3;        // vectors of queries in a full block
constexpr int64_t kKeyTile = 128;  // keys per tile

// Rows of the micro-kernel: 8 x 3 accumulators, 3 vectors of queries and 1 broadcast in 32
// registers.
constexpr int micro_rows(int columns) { return columns == 3 ? 8 : columns == 2 ? 12 : 16; }

namespace isa {
inline __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
inline __m512 max(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
inline __m512d max(__m512d a, __m512d b) { return _mm512_max_pd(a, b); }
inline __m512 min(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
inline __m512d min(__m512d a, __m512d b) { return _mm512_min_pd(a, b); }

// What is masked is neither read nor written, whether or not there is memory.
inline __mmask16 first_lanes(int64_t count) { return __mmask16((1u << count) - 1); }
inline __m512 load_some(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
inline __m512d load_some(const double* from, int64_t count) {
    return _mm512_maskz_loadu_pd(__mmask8(first_lanes(count)), from);
}
inline void store_some(__m512 x, float* to, int64_t count) {
    _mm512_mask_storeu_ps(to, first_lanes(count), x);
}
inline void store_some(__m512d x, double* to, int64_t count) {
    _mm512_mask_storeu_pd(to, __mmask8(first_lanes(count)), x);
}

inline bool all_finite(__m512 x) { return _mm512_fpclass_ps_mask(x, 0x99) == 0; }
inline bool all_finite(__m512d x) { return _mm512_fpclass_pd_mask(x, 0x99) == 0; }

// Keeps the compiler from reading x from memory again for each use.
inline void hold(__m512& x) { asm("" : "+v"(x)); }

// scalef takes any n, and reduce gives 0 at -inf.
inline __m512 split(__m512 x, __m512& n) {
    n = _mm512_roundscale_ps(x, 8);
    return _mm512_reduce_ps(x, 8);
}
inline __m512d split(__m512d x, __m512d& n) {
    n = _mm512_roundscale_pd(x, 8);
    return _mm512_reduce_pd(x, 8);
}
inline __m512 times_power_of_two(__m512 p, __m512 n) { return _mm512_scalef_ps(p, n); }
inline __m512d times_power_of_two(__m512d p, __m512d n) { return _mm512_scalef_pd(p, n); }

typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
inline bool any(Wide mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }
inline Wide multiply_halves(Wide a, Wide b) {
    return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
inline __m512 from_bfloat16(HalfBits x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16));
}
typedef int8_t Int8s __attribute__((vector_size(kVectorBytes / 4)));
inline __m512 from_int8(Int8s x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x)); }
// The halves of bytes, low and high ones, are integers of 0 to 15: looked up among 16 numbers.
inline void look_up(Int8s x, __m512 numbers, __m512& low, __m512& high) {
    const __m512i both = _mm512_cvtepu8_epi32((__m128i)x);
    low = _mm512_permutexvar_ps(both, numbers);
    high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), numbers);
}
// i * scale + least of such integers, and (i - 8) * scale.
inline void from_halves(Int8s x, __m512 scale, __m512 least, __m512& low, __m512& high) {
    const __m512 i = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    look_up(x, _mm512_fmadd_ps(i, scale, least), low, high);
}
inline void from_halves(Int8s x, __m512 scale, __m512& low, __m512& high) {
    const __m512 i = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    look_up(x, i * scale, low, high);
}
inline __m512 from_float16(HalfBits x) { return _mm512_cvtph_ps((__m256i)x); }
inline HalfBits to_float16(__m512 x) { return (HalfBits)_mm512_cvtps_ph(x, 8); }

#if defined(__AVX512BF16__)
typedef uint32_t Pairs __attribute__((vector_size(kVectorBytes)));
inline __m512 add_dot(Pairs a, Pairs b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
inline Pairs adjacent_pairs(__m512 low, __m512 high) {
    return (Pairs)_mm512_cvtne2ps_pbh(high, low);
}
inline Pairs to_pairs(__m512 first, __m512 second) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i high = _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16);
    return (Pairs)_mm512_permutexvar_epi16(_mm512_or_si512(low, high),
                                           (__m512i)adjacent_pairs(first, second));
}
inline void pair_rows(Pairs first, Pairs second, Pairs& a, Pairs& b) {
    a = (Pairs)_mm512_unpacklo_epi16((__m512i)first, (__m512i)second);
    b = (Pairs)_mm512_unpackhi_epi16((__m512i)first, (__m512i)second);
}
// Unpacking takes 4 pairs of each 16 bytes in turn.
inline void in_order(__m512& a, __m512& b) {
    const __m512 low = _mm512_shuffle_f32x4(a, b, 0x44), high = _mm512_shuffle_f32x4(a, b, 0xee);
    a = _mm512_shuffle_f32x4(low, low, 0xd8);
    b = _mm512_shuffle_f32x4(high, high, 0xd8);
}
#endif

inline __m512 zip_low(__m512 a, __m512 b) {
    return _mm512_permutex2var_ps(
        a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
}
inline __m512 zip_high(__m512 a, __m512 b) {
    return _mm512_permutex2var_ps(
        a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
}
inline __m512d zip_low(__m512d a, __m512d b) {
    return _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b);
}
inline __m512d zip_high(__m512d a, __m512d b) {
    return _mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b);
}
}  // namespace isa

}  // namespace
}  // namespace fastattn
