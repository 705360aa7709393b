// x @ weight.T for few rows, with weights in panels: PANEL output columns behind each other for every k. Each output is one sum over
// k in order, whatever rows stand beside it, so a row's result does not depend on its company, to the last bit.
//
//     float32, int8   panel[k][PANEL]
//     bfloat16        panel[k][8] pairs: column j in the low half of a word, column j + 8 in the high half
//
// The weights of a row are read once; how many panels run side by side is chosen so that at least eight sums are in flight.

typedef struct {
    const void *weight;  // panels
    const float *scale;  // per output column, int8 only
    const float *bias;   // per output column, or null
    int64_t in, out;     // columns of the input; of the output, of which the last panel may hold fewer than PANEL
    int64_t kind;        // Kind
} Product;

// What becomes of a product's outputs.
typedef struct {
    float *out;             // rows
    int64_t stride;         // values from one row to the next
    const int64_t *rows;    // which row of `out` each row goes to; null: the same
    int64_t add;            // add to `out` instead of replacing it
    int64_t activation;     // Activation
    int64_t gated;          // the two halves of a panel are gate and up: 8 outputs, activation(gate) * up
} Into;

INLINE void weights_at(const char *panel, int64_t k, Kind kind, f8 w[2]) {
    if (kind == FLOAT32) {
        w[0] = *(const f8 *)(panel + 4 * PANEL * k);
        w[1] = *(const f8 *)(panel + 4 * PANEL * k + 32);
    } else if (kind == BFLOAT16) {
        const u8 pairs = *(const u8 *)(panel + 2 * PANEL * k);
        w[0] = (f8)(pairs << 16);
        w[1] = (f8)(pairs & 0xffff0000u);
    } else {
        w[0] = widen8(panel + PANEL * k);
        w[1] = widen8(panel + PANEL * k + 8);
    }
}

enum { AHEAD = 1024 };  // bytes that are asked for before they are needed; the processor's own guess stops at every page

// The two halves of one row's sums over a panel, to where they belong.
INLINE void put(const Product *p, const Into *into, int64_t row, int64_t panel, f8 low, f8 high) {
    const int64_t first = panel * PANEL;
    if (p->scale) {
        low *= *(const f8 *)(p->scale + first);
        high *= *(const f8 *)(p->scale + first + 8);
    }
    if (p->bias) {
        low += *(const f8 *)(p->bias + first);
        high += *(const f8 *)(p->bias + first + 8);
    }
    float *to = into->out + (into->rows ? into->rows[row] : row) * into->stride + first;
    int64_t room = p->out - first;  // outputs left in the row; the last panel is filled up with zeros
    if (into->gated) {
        low = activate8(low, into->activation) * high;
        to -= first / 2;
        room /= 2;
    } else if (into->activation) {
        low = activate8(low, into->activation);
        high = activate8(high, into->activation);
    }
    const int num_halves = into->gated ? 1 : 2;
    if (room >= 8 * num_halves) {
        *(f8 *)to = into->add ? *(f8 *)to + low : low;
        if (num_halves == 2) *(f8 *)(to + 8) = into->add ? *(f8 *)(to + 8) + high : high;
        return;
    }
    const f8 values[2] = {low, high};
    for (int64_t j = 0; j < room; j++) to[j] = (into->add ? to[j] : 0.0f) + values[j / 8][j % 8];
}

// `num_rows` rows of x by `num_panels` panels, both known to the compiler.
INLINE void tile(const int num_rows, const int num_panels, const Kind kind, const Product *p, const Into *into, const float *x,
                 int64_t row, int64_t panel) {
    const int64_t depth = p->in, size = kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1, bytes = size * PANEL * depth;
    const char *weights = (const char *)p->weight + panel * bytes;
    const float *rows = x + row * depth;
    f8 sums[MAX_ROWS][4][2] = {0};
    for (int64_t k = 0; k < depth; k++) {
#pragma GCC unroll 4
        for (int q = 0; q < num_panels; q++) {
            f8 w[2];
            weights_at(weights + q * bytes, k, kind, w);
            __builtin_prefetch(weights + q * bytes + PANEL * size * k + AHEAD);
#pragma GCC unroll 6
            for (int r = 0; r < num_rows; r++) {
                const float value = rows[r * depth + k];
                sums[r][q][0] += value * w[0];
                sums[r][q][1] += value * w[1];
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < num_rows; r++) {
#pragma GCC unroll 4
        for (int q = 0; q < num_panels; q++) {
            put(p, into, row + r, panel + q, sums[r][q][0], sums[r][q][1]);
        }
    }
}

// Panels `panel` to `last` for rows `row` to `end`: as many rows at a time as registers hold, spread evenly (8 rows: 4 + 4).
INLINE void block(const Kind kind, const Product *p, const Into *into, const float *x, int64_t row, int64_t end, int64_t panel,
                  int64_t last) {
    const int64_t num_blocks = (end - row + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t done = 0; done < num_blocks; done++) {
        const int64_t rows = (end - row) / (num_blocks - done);
        int64_t at = panel;
        switch (rows) {
#define ROWS(N, PANELS)                                                                            \
    case N:                                                                                        \
        for (; at + PANELS <= last; at += PANELS) tile(N, PANELS, kind, p, into, x, row, at);      \
        for (; at < last; at++) tile(N, 1, kind, p, into, x, row, at);                             \
        break;
            ROWS(1, 4) ROWS(2, 2) ROWS(3, 1) ROWS(4, 1) ROWS(5, 1) ROWS(6, 1)
#undef ROWS
        }
        row += rows;
    }
}

static void block_float32(const Product *p, const Into *into, const float *x, int64_t row, int64_t end, int64_t panel, int64_t last) {
    block(FLOAT32, p, into, x, row, end, panel, last);
}
static void block_bfloat16(const Product *p, const Into *into, const float *x, int64_t row, int64_t end, int64_t panel, int64_t last) {
    block(BFLOAT16, p, into, x, row, end, panel, last);
}
static void block_int8(const Product *p, const Into *into, const float *x, int64_t row, int64_t end, int64_t panel, int64_t last) {
    block(INT8, p, into, x, row, end, panel, last);
}

enum { ROWS_AT_ONCE = 96, PANELS_AT_ONCE = 4 };  // a thread's share: rows that stay in its cache, panels that are one stretch of memory

// One thread's part of into = x @ weight.T for x [num_rows, in].
static void multiply(Team *team, const Product *p, const float *x, int64_t num_rows, const Into *into) {
    const int64_t num_panels = (p->out + PANEL - 1) / PANEL;
    const int64_t columns = (num_panels + PANELS_AT_ONCE - 1) / PANELS_AT_ONCE;
    const int64_t num_tasks = columns * ((num_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE);
    for (int64_t task = take(team); task < num_tasks; task = take(team)) {
        const int64_t row = task / columns * ROWS_AT_ONCE, panel = task % columns * PANELS_AT_ONCE;
        const int64_t end = row + ROWS_AT_ONCE < num_rows ? row + ROWS_AT_ONCE : num_rows;
        const int64_t last = panel + PANELS_AT_ONCE < num_panels ? panel + PANELS_AT_ONCE : num_panels;
        if (p->kind == FLOAT32) block_float32(p, into, x, row, end, panel, last);
        else if (p->kind == BFLOAT16) block_bfloat16(p, into, x, row, end, panel, last);
        else block_int8(p, into, x, row, end, panel, last);
    }
    meet(team);
}
