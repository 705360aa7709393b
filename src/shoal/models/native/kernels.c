// A decoder's pass in one call, or in a call per layer where somebody looks on: for each layer norm, qkv, attention over the cache in place, out, norm, up, activation, down; then the
// head. What it computes is decoder.py's plain path with activations in float32; structures mirror those of library.py.

#include "team.h"
#include "vectors.h"
#include "products.h"
#include "packing.h"
#include "attention.h"

typedef struct {
    const float *weight, *bias;  // [d], bias or null
} Norm;

typedef struct {
    Norm attention_norm, mlp_norm;
    const float *q_norm, *k_norm;
    Product qkv, out, up, down;
    int64_t num_tokens_run;  // counted where the products run, to hold the planned counts against
} Layer;

typedef struct {
    const void *rows;        // [vocabulary, d], or null: they are the head's panels
    int64_t kind;            // Kind of rows
    const float *positions;  // [positions, d], or null
    int64_t offset;          // added to a position before it is looked up
} Embedding;

typedef struct {
    Heads heads;
    int64_t hidden, num_layers, rms, activation, gated, parallel_residual;
    float norm_eps;
    Embedding embedding;
    Layer *layers;
    Norm final_norm;
    Product head;
} Model;

typedef struct {
    int64_t num_tokens;
    const int64_t *token_ids, *positions;  // [tokens]
    float *x;                        // [tokens, hidden], residual stream
    const float *cos, *sin;          // [tokens, rotary_dim / 2]
    const Work *const *works;        // per layer, null where no token runs it
    void *const *keys, *const *values;  // per layer
    int64_t capacity;                // positions per slot
    int64_t num_logits;
    const int64_t *logit_tokens;     // which tokens' logits are wanted
    float *logits;                   // [num_logits, vocabulary]
    float *normed, *normed_mlp;      // [tokens, hidden], two of them for parallel residuals
    float *qkv, *attended, *up;      // [tokens, ...]
    float *scratch;                  // threads * attention_scratch
    const int64_t *groups;           // [tokens] whose states are added up together, -1 for none; or null
    int64_t num_groups;
    float *sums;                     // [layers + 1, num_groups, hidden]
    const int64_t *given;            // [tokens] which of `states` a token brings instead of its embedding, -1 for none; or null
    const float *states;             // [given, hidden]
    const int64_t *below, *among;    // as in Attention, or null
    int64_t first_layer, end_layer;  // part of the pass, x keeps the states from call to call; -1 begins with the embedding
} Pass;

typedef struct {
    const Runtime *runtime;
    const Model *model;
    const Pass *pass;
    Shared shared;
} Call;

INLINE void norm_row(const Model *m, const Norm *norm, const float *x, float *to) {
    const int64_t d = m->hidden, whole = d / 8 * 8;
    f8 sum = {0}, squares = {0};
    float mean = 0, rest = 0;
    if (!m->rms) {
        for (int64_t i = 0; i < whole; i += 8) sum += *(const f8 *)(x + i);
        for (int64_t i = whole; i < d; i++) rest += x[i];
        mean = (sum8(sum) + rest) / d;
        rest = 0;
    }
    for (int64_t i = 0; i < whole; i += 8) {
        const f8 centred = *(const f8 *)(x + i) - mean;
        squares += centred * centred;
    }
    for (int64_t i = whole; i < d; i++) rest += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / sqrtf((sum8(squares) + rest) / d + m->norm_eps);
    for (int64_t i = 0; i < d; i++) to[i] = (x[i] - mean) * scale * norm->weight[i] + (norm->bias ? norm->bias[i] : 0.0f);
}

// One thread's part of norming `num_rows` rows of x, those named by `rows`.
static void norm_rows(Team *team, const Model *m, const Norm *norm, const float *x, const int64_t *rows, int64_t num_rows, float *to) {
    for (int64_t row = team->thread; row < num_rows; row += team->shared->num_threads)
        norm_row(m, norm, x + (rows ? rows[row] : row) * m->hidden, to + row * m->hidden);
}

// One value of a packed weight.
INLINE float unpacked(const Product *p, int64_t row, int64_t k) {
    const int64_t column = row % PANEL, at = (row / PANEL * p->in + k) * PANEL;
    if (p->kind == FLOAT32) return ((const float *)p->weight)[at + column];
    if (p->kind == INT8) return ((const int8_t *)p->weight)[at + column] * p->scale[row];
    const uint32_t pair = ((const uint16_t *)p->weight)[at + 2 * (column % 8) + column / 8];
    const uint32_t bits = pair << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// One thread's part of the embeddings.
static void embed(Team *team, const Model *m, const Pass *p) {
    const Embedding *e = &m->embedding;
    const int64_t d = m->hidden;
    for (int64_t token = team->thread; token < p->num_tokens; token += team->shared->num_threads) {
        const int64_t id = p->token_ids[token];
        float *x = p->x + token * d;
        if (p->given && p->given[token] >= 0) {
            memcpy(x, p->states + p->given[token] * d, d * sizeof(float));
            continue;
        }
        const float *position = e->positions ? e->positions + (p->positions[token] + e->offset) * d : NULL;
        for (int64_t k = 0; k < d; k++) {
            if (!e->rows) x[k] = unpacked(&m->head, id, k);
            else if (e->kind == FLOAT32) x[k] = ((const float *)e->rows)[id * d + k];
            else {
                const uint32_t bits = (uint32_t)((const uint16_t *)e->rows)[id * d + k] << 16;
                memcpy(x + k, &bits, 4);
            }
            if (position) x[k] += position[k];
        }
    }
    meet(team);
}

// One thread's part, some columns, of adding the states before layer `level` to their groups' sums.
static void add_states(Team *team, const Model *m, const Pass *p, int64_t level) {
    if (!p->groups) return;
    const int64_t d = m->hidden, from = d * team->thread / team->shared->num_threads;
    const int64_t to = d * (team->thread + 1) / team->shared->num_threads;
    for (int64_t token = 0; token < p->num_tokens; token++) {
        if (p->groups[token] < 0) continue;
        float *sums = p->sums + (level * p->num_groups + p->groups[token]) * d;
        for (int64_t k = from; k < to; k++) sums[k] += p->x[token * d + k];
    }
}

static void run_layer(Team *team, const Model *m, Layer *layer, const Pass *p, const Work *work, void *keys, void *values) {
    const int64_t n = work->num_tokens, d = m->hidden;
    const Into residual = {.out = p->x, .stride = d, .rows = work->tokens, .add = 1};
    float *normed_mlp = m->parallel_residual ? p->normed_mlp : p->normed;

    if (team->thread == 0) layer->num_tokens_run += n;
    norm_rows(team, m, &layer->attention_norm, p->x, work->tokens, n, p->normed);
    if (m->parallel_residual) norm_rows(team, m, &layer->mlp_norm, p->x, work->tokens, n, normed_mlp);
    meet(team);
    multiply(team, &layer->qkv, p->normed, n, &(Into){.out = p->qkv, .stride = layer->qkv.out});
    const Attention attention = {
        .keys = keys, .values = values, .capacity = p->capacity, .q_norm = layer->q_norm, .k_norm = layer->k_norm,
        .cos = p->cos, .sin = p->sin, .qkv = p->qkv, .out = p->attended, .kind = FLOAT32, .below = p->below, .among = p->among,
    };
    attend_all(team, &m->heads, &attention, work, p->scratch);
    multiply(team, &layer->out, p->attended, n, &residual);
    if (!m->parallel_residual) {
        norm_rows(team, m, &layer->mlp_norm, p->x, work->tokens, n, normed_mlp);
        meet(team);
    }
    const Into up = {.out = p->up, .stride = layer->down.in, .activation = m->activation, .gated = m->gated};
    multiply(team, &layer->up, normed_mlp, n, &up);
    multiply(team, &layer->down, p->up, n, &residual);
}

static void run_pass(void *data) {
    Call *call = data;
    const Model *m = call->model;
    const Pass *p = call->pass;
    Team team = {.shared = &call->shared, .thread = call->runtime->thread(), .step = 0};
    // The runtime may lend fewer threads than asked for; every thread writes the same number.
    call->shared.num_threads = call->runtime->threads();
    if (p->first_layer < 0) embed(&team, m, p);
    for (int64_t l = p->first_layer < 0 ? 0 : p->first_layer; l < p->end_layer; l++) {
        add_states(&team, m, p, l);  // a layer changes x behind its first meeting only, so nobody waits here
        if (p->works[l]) run_layer(&team, m, &m->layers[l], p, p->works[l], p->keys[l], p->values[l]);
    }
    if (p->end_layer < m->num_layers) return;
    add_states(&team, m, p, m->num_layers);
    norm_rows(&team, m, &m->final_norm, p->x, p->logit_tokens, p->num_logits, p->normed);
    meet(&team);
    multiply(&team, &m->head, p->normed, p->num_logits, &(Into){.out = p->logits, .stride = m->head.out});
}

int64_t shoal_panel(void) { return PANEL; }

int64_t shoal_attention_scratch(const Model *model, int64_t capacity) { return attention_scratch(&model->heads, capacity); }

void shoal_pass(const Runtime *runtime, int64_t num_threads, const Model *model, const Pass *pass) {
    Call call = {.runtime = runtime, .model = model, .pass = pass};
    runtime->parallel(run_pass, &call, num_threads, 0);
}

typedef struct {
    const Runtime *runtime;
    const Heads *heads;
    const Attention *attention;
    const Work *work;
    float *scratch;
    Shared shared;
} AttentionCall;

static void run_attention(void *data) {
    AttentionCall *call = data;
    Team team = {.shared = &call->shared, .thread = call->runtime->thread(), .step = 0};
    call->shared.num_threads = call->runtime->threads();
    attend_all(&team, call->heads, call->attention, call->work, call->scratch);
}

void shoal_attend(const Runtime *runtime, int64_t num_threads, const Heads *heads, const Attention *attention, const Work *work,
                  float *scratch) {
    AttentionCall call = {.runtime = runtime, .heads = heads, .attention = attention, .work = work, .scratch = scratch};
    runtime->parallel(run_attention, &call, num_threads, 0);
}

typedef struct {
    const Runtime *runtime;
    const Packing *packing;
    Shared shared;
} PackingCall;

static void run_packing(void *data) {
    PackingCall *call = data;
    Team team = {.shared = &call->shared, .thread = call->runtime->thread(), .step = 0};
    call->shared.num_threads = call->runtime->threads();
    pack(&team, call->packing);
}

void shoal_pack(const Runtime *runtime, int64_t num_threads, const Product *to, const void *rows, int64_t kind, int64_t gated) {
    const Packing packing = {.to = to, .rows = rows, .kind = kind, .gated = gated};
    PackingCall call = {.runtime = runtime, .packing = &packing};
    runtime->parallel(run_packing, &call, num_threads, 0);
}
