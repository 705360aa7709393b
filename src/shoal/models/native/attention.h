// Attention of one row and one key-value head over its slot of the cache, read in place. Keys are taken eight at a time and values in
// order, so that the result does not depend on how a prompt was cut into chunks or on the other rows.

typedef struct {
    int64_t num_heads, num_kv_heads, head_dim, rotary_dim;  // head_dim is a multiple of 8
    int64_t cache_kind;                                     // Kind of keys and values
    float norm_eps;                                         // of q_norm and k_norm
} Heads;

// Active tokens of one layer: spans of [first token, number of tokens, slot, position of the first], one per row.
typedef struct {
    int64_t num_tokens;
    const int64_t *tokens;  // which of the pass's tokens; null: the leading ones
    int64_t num_spans;
    const int64_t (*spans)[4];
} Work;

typedef struct {
    void *keys, *values;    // [slots, num_kv_heads, capacity, head_dim]
    int64_t capacity;
    const float *q_norm, *k_norm;  // [head_dim] or null
    const float *cos, *sin;        // [tokens of the pass, rotary_dim / 2] or null
    const void *qkv;               // [active tokens, (num_heads + 2 num_kv_heads) head_dim]
    void *out;                     // [active tokens, num_heads head_dim]
    int64_t kind;                  // Kind of qkv and out
    // [tokens of the pass] each, or null without trees: a token sees the keys below `below`, and from there on those whose bit is set
    // in `among`; null: all up to its own.
    const int64_t *below, *among;
} Attention;

enum { QUERIES = 4 };  // queries that share what is read of keys and values

// One head of one token in float32: normed, rotated.
INLINE void head(const Heads *h, const Attention *a, const Work *work, int64_t token, int64_t index, const float *norm, float *to) {
    const int64_t dim = h->head_dim, half = h->rotary_dim / 2;
    const int64_t at = (token * (h->num_heads + 2 * h->num_kv_heads) + index) * dim;
    for (int64_t d = 0; d < dim; d += 8) *(f8 *)(to + d) = load8(a->qkv, at + d, a->kind);
    if (norm) {
        f8 squares = {0};
        for (int64_t d = 0; d < dim; d += 8) squares += *(f8 *)(to + d) * *(f8 *)(to + d);
        const float scale = 1.0f / sqrtf(sum8(squares) / dim + h->norm_eps);
        for (int64_t d = 0; d < dim; d++) to[d] *= scale * norm[d];
    }
    if (half) {
        const int64_t row = (work->tokens ? work->tokens[token] : token) * half;
        for (int64_t d = 0; d < half; d++) {
            const float first = to[d], second = to[half + d], c = a->cos[row + d], s = a->sin[row + d];
            to[d] = first * c - second * s;
            to[half + d] = second * c + first * s;
        }
    }
}

// scores[q][s] = query q . key s for all keys below `num_keys`, and a few beyond, up to a multiple of eight.
INLINE void score(const int num_queries, const Kind kind, const float *queries, const void *keys, int64_t dim, int64_t num_keys,
                  float *scores, int64_t stride) {
    for (int64_t s = 0; s < num_keys; s += 8) {
#pragma GCC unroll 4
        for (int q = 0; q < num_queries; q++) {
            f8 sums[8] = {0};
            for (int64_t d = 0; d < dim; d += 8) {
                const f8 query = *(const f8 *)(queries + q * dim + d);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) sums[i] += query * load8(keys, (s + i) * dim + d, kind);
            }
            *(f8 *)(scores + q * stride + s) = sums8(sums);
        }
    }
}

// Softmax over the first `num_keys` of `width` scores, a multiple of eight; the others become 0. Returns 1 / sum of the exponentials,
// which are left undivided.
INLINE float softmax(float *scores, int64_t num_keys, int64_t width) {
    for (int64_t s = num_keys; s < width; s++) scores[s] = -INFINITY;
    f8 most = *(f8 *)scores, sum = {0};
    for (int64_t s = 8; s < width; s += 8) {
        const f8 next = *(f8 *)(scores + s);
        most = pick8(next > most, next, most);
    }
    const float top = max8(most);
    for (int64_t s = 0; s < width; s += 8) {
        const f8 weight = exp8(*(f8 *)(scores + s) - top);
        *(f8 *)(scores + s) = weight;
        sum += weight;
    }
    return 1.0f / sum8(sum);
}

// `num_vectors` * 8 columns of out[q] = sum over s of weights[q][s] * values[s].
INLINE void mix(const int num_queries, const int num_vectors, const Kind kind, const float *weights, int64_t stride,
                const void *values, int64_t dim, int64_t column, int64_t num_keys, f8 sums[QUERIES][8]) {
#pragma GCC unroll 4
    for (int q = 0; q < num_queries; q++)
#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; v++) sums[q][v] = (f8){0};
    for (int64_t s = 0; s < num_keys; s++) {
#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; v++) {
            const f8 value = load8(values, s * dim + column + 8 * v, kind);
#pragma GCC unroll 4
            for (int q = 0; q < num_queries; q++) sums[q][v] += weights[q * stride + s] * value;
        }
    }
}

// Scores of the keys that a tree's token sees, next to each other, so that they are summed as in a chain. Returns how many they are.
INLINE int64_t gather(float *scores, int64_t below, uint64_t among) {
    for (int64_t s = below; among; s++, among >>= 1)
        if (among & 1) scores[below++] = scores[s];
    return below;
}

// The reverse, below `width`; other keys weigh 0.
INLINE void scatter(float *weights, int64_t below, uint64_t among, int64_t width) {
    int64_t from = below + __builtin_popcountll(among);
    for (int64_t s = width - 1; s >= below; s--) weights[s] = s - below < 64 && among >> (s - below) & 1 ? weights[--from] : 0.0f;
}

// Queries that share one head's keys: the first `limits[q]` are seen by query q, and those in `among[q]`; `num_keys` is the most.
INLINE void look(const int num_queries, const Kind kind, const Heads *h, const Attention *a, const float *queries, const void *keys,
                 const void *values, const int64_t *limits, const uint64_t *among, int64_t num_keys, const int64_t *to, float *scores) {
    const int64_t dim = h->head_dim, width = (num_keys + 7) / 8 * 8;
    float scale[QUERIES];
    score(num_queries, kind, queries, keys, dim, num_keys, scores, width);
    for (int q = 0; q < num_queries; q++) {
        float *weights = scores + q * width;
        scale[q] = softmax(weights, among[q] ? gather(weights, limits[q], among[q]) : limits[q], width);
        if (among[q]) scatter(weights, limits[q], among[q], width);
    }
    for (int64_t column = 0; column < dim;) {
        f8 sums[QUERIES][8];
        enum { WIDE = 8 };
        const int wide = WIDE / num_queries;
        const int vectors = dim - column >= 8 * wide ? wide : 1;
        if (vectors == wide) mix(num_queries, wide, kind, scores, width, values, dim, column, num_keys, sums);
        else mix(num_queries, 1, kind, scores, width, values, dim, column, num_keys, sums);
        for (int q = 0; q < num_queries; q++)
            for (int v = 0; v < vectors; v++) store8(a->out, to[q] + column + 8 * v, a->kind, sums[q][v] * scale[q]);
        column += 8 * vectors;
    }
}

// One row (a span) and one key-value head: write its new keys and values, then attend. `scratch`: see `attention_scratch`.
INLINE void attend(const Kind kind, const Heads *h, const Attention *a, const Work *work, int64_t span, int64_t kv_head,
                   float *scratch) {
    const int64_t first = work->spans[span][0], count = work->spans[span][1], slot = work->spans[span][2];
    const int64_t start = work->spans[span][3], dim = h->head_dim, group = h->num_heads / h->num_kv_heads;
    const int64_t bytes = kind == FLOAT32 ? 4 : 2, at = (slot * h->num_kv_heads + kv_head) * a->capacity * dim * bytes;
    char *keys = (char *)a->keys + at, *values = (char *)a->values + at;
    float *queries = scratch, *scores = scratch + QUERIES * dim;
    for (int64_t t = 0; t < count; t++) {
        head(h, a, work, first + t, h->num_heads + kv_head, a->k_norm, queries);
        for (int64_t d = 0; d < dim; d += 8) store8(keys, (start + t) * dim + d, kind, *(f8 *)(queries + d));
        const int64_t v = ((first + t) * (h->num_heads + 2 * h->num_kv_heads) + h->num_heads + h->num_kv_heads + kv_head) * dim;
        for (int64_t d = 0; d < dim; d += 8) store8(values, (start + t) * dim + d, kind, load8(a->qkv, v + d, a->kind));
    }
    const float scale = 1.0f / sqrtf(dim);
    for (int64_t next = 0; next < count * group;) {
        const int64_t left = count * group - next;
        const int num_queries = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        int64_t limits[QUERIES], to[QUERIES], most = 0;
        uint64_t among[QUERIES];
        for (int q = 0; q < num_queries; q++, next++) {
            const int64_t token = next / group, index = kv_head * group + next % group;
            head(h, a, work, first + token, index, a->q_norm, queries + q * dim);
            for (int64_t d = 0; d < dim; d++) queries[q * dim + d] *= scale;
            const int64_t row = work->tokens ? work->tokens[first + token] : first + token;
            most = start + token + 1;
            limits[q] = a->below ? a->below[row] : most;
            among[q] = a->among ? a->among[row] : 0;
            to[q] = ((first + token) * h->num_heads + index) * dim;
        }
        if (num_queries == 4) look(4, kind, h, a, queries, keys, values, limits, among, most, to, scores);
        else if (num_queries == 2) look(2, kind, h, a, queries, keys, values, limits, among, most, to, scores);
        else look(1, kind, h, a, queries, keys, values, limits, among, most, to, scores);
    }
}

static void attend_float32(const Heads *h, const Attention *a, const Work *w, int64_t span, int64_t kv_head, float *scratch) {
    attend(FLOAT32, h, a, w, span, kv_head, scratch);
}
static void attend_bfloat16(const Heads *h, const Attention *a, const Work *w, int64_t span, int64_t kv_head, float *scratch) {
    attend(BFLOAT16, h, a, w, span, kv_head, scratch);
}

// float32 values that a thread needs.
static int64_t attention_scratch(const Heads *h, int64_t capacity) {
    return QUERIES * (h->head_dim + (capacity + 7) / 8 * 8);
}

// One thread's part of a layer's attention.
static void attend_all(Team *team, const Heads *h, const Attention *a, const Work *work, float *scratch) {
    scratch += team->thread * attention_scratch(h, a->capacity);
    const int64_t num_tasks = work->num_spans * h->num_kv_heads;
    for (int64_t task = take(team); task < num_tasks; task = take(team)) {
        const int64_t span = task / h->num_kv_heads, kv_head = task % h->num_kv_heads;
        if (h->cache_kind == FLOAT32) attend_float32(h, a, work, span, kv_head, scratch);
        else attend_bfloat16(h, a, work, span, kv_head, scratch);
    }
    meet(team);
}
