// Weights from a matrix [out, in] into panels (products.h): 16 rows at a time, 8 x 8 values at a time.

typedef struct {
    const Product *to;  // its panels and scales are written
    const void *rows;   // [out, in]
    int64_t kind;       // Kind of rows, FLOAT32 or BFLOAT16
    int64_t gated;      // the upper half of the rows is the gate, the lower the up product: 8 of each in a panel
} Packing;

// Which row is column `column` of panel `panel`; -1 where a panel is filled up with zeros.
INLINE int64_t row_of(const Packing *packing, int64_t panel, int64_t column) {
    const int64_t out = packing->to->out, half = out / 2;
    if (!packing->gated) return panel * PANEL + column < out ? panel * PANEL + column : -1;
    const int64_t row = panel * 8 + column % 8;
    return row < half ? row + column / 8 * half : -1;
}

// Up to 8 values of a row from k on, filled up with zeros.
INLINE f8 row8(const Packing *packing, int64_t row, int64_t k) {
    const int64_t in = packing->to->in, left = in - k, size = packing->kind == FLOAT32 ? 4 : 2;
    const f8 zero = {0};
    if (row < 0) return zero;
    const char *from = (const char *)packing->rows + (row * in + k) * size;
    if (left >= 8) return load8(from, 0, packing->kind);
    char few[32] = {0};
    memcpy(few, from, left * size);
    return load8(few, 0, packing->kind);
}

// int8 steps as long as that 127 of them reach the row's largest value; NaN where a value is not finite, so that logits show it.
INLINE float step_of(const Packing *packing, int64_t row) {
    f8 most = {0}, bad = {0};
    for (int64_t k = 0; k < packing->to->in; k += 8) {
        const f8 x = row8(packing, row, k), size = (f8)((u8)x & 0x7fffffffu);
        most = pick8(size > most, size, most);
        bad += x * 0.0f;
    }
    const float largest = max8(most);
    return (largest > 1.17549435e-38f ? largest : 1.17549435e-38f) / 127 + sum8(bad);
}

// [i][j] to [j][i].
INLINE void transpose8(f8 a[8]) {
    f8 b[8], c[8];
    for (int i = 0; i < 8; i += 2) {
        b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = i; j < i + 2; j++) {
            c[j] = __builtin_shufflevector(b[j], b[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            c[j + 2] = __builtin_shufflevector(b[j], b[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        a[i] = __builtin_shufflevector(c[i], c[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        a[i + 4] = __builtin_shufflevector(c[i], c[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

INLINE __m128i steps8(f8 x) {
    const __m256i rounded = _mm256_cvtps_epi32((__m256)x);  // ties to even
    return _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

static void pack_panel(const Packing *packing, int64_t panel) {
    const Product *p = packing->to;
    const int64_t size = p->kind == FLOAT32 ? 4 : p->kind == BFLOAT16 ? 2 : 1;
    char *to = (char *)p->weight + panel * PANEL * p->in * size;
    int64_t rows[PANEL];
    float steps[PANEL];
    for (int64_t j = 0; j < PANEL; j++) {
        rows[j] = row_of(packing, panel, j);
        if (p->kind == INT8) ((float *)p->scale)[panel * PANEL + j] = steps[j] = step_of(packing, rows[j]);
    }
    for (int64_t k = 0; k < p->in; k += 8) {
        f8 values[2][8];
        for (int64_t j = 0; j < PANEL; j++) {
            values[j / 8][j % 8] = row8(packing, rows[j], k);
            if (p->kind == INT8) values[j / 8][j % 8] /= steps[j];
        }
        transpose8(values[0]);
        transpose8(values[1]);
        for (int64_t i = 0; i < 8 && k + i < p->in; i++, to += PANEL * size) {
            const f8 low = values[0][i], high = values[1][i];
            if (p->kind == FLOAT32) {
                *(f8 *)to = low;
                *(f8 *)(to + 32) = high;
            } else if (p->kind == BFLOAT16) {
                *(u8 *)to = bfloat16_bits8(low) | bfloat16_bits8(high) << 16;
            } else {
                _mm_storeu_si128((__m128i *)to, _mm_packs_epi16(steps8(low), steps8(high)));
            }
        }
    }
}

static void pack(Team *team, const Packing *packing) {
    const int64_t num_panels = (packing->to->out + PANEL - 1) / PANEL;
    const int64_t half_panels = (packing->to->out / 2 + 7) / 8;
    for (int64_t panel = take(team); panel < (packing->gated ? half_panels : num_panels); panel = take(team)) pack_panel(packing, panel);
    meet(team);
}
