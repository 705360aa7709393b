// Vectors of 8 floats in the compiler's own notation. Included by kernels.c alone.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { MAX_ROWS = 6 };  // 16 registers: 6 x 2 sums, 2 weights
enum { PANEL = 16 };  // output columns that are multiplied together

typedef float f8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t u8 __attribute__((vector_size(32), aligned(4)));
typedef uint16_t h8 __attribute__((vector_size(16), aligned(2)));

#define INLINE static inline __attribute__((always_inline))

typedef enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 } Kind;

INLINE f8 load8(const void *p, int64_t at, Kind kind) {
    if (kind == FLOAT32) return *(const f8 *)((const float *)p + at);
    return (f8)(__builtin_convertvector(*(const h8 *)((const uint16_t *)p + at), u8) << 16);
}

// Eight int8. The compiler's own conversion goes through memory, value by value.
INLINE f8 widen8(const char *p) {
    return (f8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

// Rounds to nearest, ties to even, as every bfloat16 conversion does; NaN stays NaN. In the low halves of the words.
INLINE u8 bfloat16_bits8(f8 x) {
    const u8 bits = (u8)x;
    const u8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const u8 is_nan = (u8)(x != x);
    return (rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan);
}

INLINE void store8(void *p, int64_t at, Kind kind, f8 x) {
    if (kind == FLOAT32) *(f8 *)((float *)p + at) = x;
    else *(h8 *)((uint16_t *)p + at) = __builtin_convertvector(bfloat16_bits8(x), h8);
}

INLINE f8 pick8(i8 which, f8 yes, f8 no) {
    return (f8)(((i8)yes & which) | ((i8)no & ~which));
}

INLINE float sum8(f8 x) {
    return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

INLINE float max8(f8 x) {
    float most = x[0];
    for (int i = 1; i < 8; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// The sums of eight vectors as one: [sum(a[0]), ..., sum(a[7])].
INLINE f8 sums8(const f8 a[8]) {
    f8 b[4], c[2];
    for (int i = 0; i < 4; i++)
        b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(a[2 * i], a[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int i = 0; i < 2; i++)
        c[i] = __builtin_shufflevector(b[2 * i], b[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(b[2 * i], b[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// e^x to 2 units in the last place: x = n ln 2 + r, a polynomial of degree 6 in r, n into the exponent. Below -87 it is 0.
INLINE f8 exp8(f8 x) {
    const f8 least = -87.0f - (f8){0}, most = 88.0f - (f8){0};
    const i8 vanishes = x < least;
    x = pick8(x < least, least, x);
    x = pick8(x > most, most, x);
    const f8 shift = 12582912.0f - (f8){0};  // 1.5 * 2^23: adding and taking it off rounds to an integer
    const f8 n = (x * 1.44269504f + shift) - shift;
    const f8 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    f8 p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const i8 power = (__builtin_convertvector(n, i8) + 127) << 23;
    return (f8)((i8)(p * (f8)power) & ~vanishes);
}

INLINE f8 tanh8(f8 x) {
    return 1.0f - 2.0f / (exp8(2.0f * x) + 1.0f);
}

// The error function to 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
INLINE f8 erf8(f8 x) {
    const f8 zero = {0}, positive = pick8(x < zero, -x, x);
    const f8 t = 1.0f / (1.0f + 0.3275911f * positive);
    f8 p = 1.061405429f * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const f8 y = 1.0f - p * t * exp8(-positive * positive);
    return pick8(x < zero, -y, y);
}

typedef enum { NONE = 0, RELU = 1, GELU = 2, GELU_TANH = 3, SILU = 4 } Activation;

INLINE f8 activate8(f8 x, Activation activation) {
    const f8 zero = {0};
    switch (activation) {
        case RELU: return pick8(x < zero, zero, x);  // NaN stays NaN
        case GELU: return 0.5f * x * (1.0f + erf8(x * 0.70710678f));
        case GELU_TANH: return 0.5f * x * (1.0f + tanh8(0.79788456f * (x + 0.044715f * x * x * x)));
        case SILU: return x / (1.0f + exp8(-x));
        default: return x;
    }
}
