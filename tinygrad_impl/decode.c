// The whole model for R tokens at once, whose keys and values go into the cache, in float32 or float64.
//
// cpu_decode.py defines T, NAME, the model's sizes, DEEP, EPS and the activation, and calls NAME on every thread with
// the same `given`. It goes phase by phase (phases.h). What a unit computes does not depend on who does: the bits are
// the same for any number of threads. They are the same for any R as well, since every sum has one order: DEEP
// products after each other, and then these sums, as in gemm.c.
//
// Library functions come as pointers: tinygrad's loader cannot link what is more than 2 GB away.

enum { D = C / H, TILE = ACROSS * LANES };  // columns of a tile
enum { FEW = 14 };                         // rows: as long as they are fewer, reading the weights takes longest
enum { STEP = 8 };                         // rows of the weight that are read at once, for few rows
enum { WIDTH = 768, TOKENS = 64, NEIGHBOURS = 256 };  // columns in a unit: of a product, the head, the activation

typedef struct {
  const T *ln_1_weight, *ln_1_bias, *attn_c_attn_weight, *attn_c_attn_bias, *attn_c_proj_weight, *attn_c_proj_bias;
  const T *ln_2_weight, *ln_2_bias, *mlp_c_fc_weight, *mlp_c_fc_bias, *mlp_c_proj_weight, *mlp_c_proj_bias;
  T *keys, *values;  // (N, H, P, D)
} layer;

typedef struct {
  const layer *layers;
  const T *wte, *wpe, *ln_f_weight, *ln_f_bias, *head;
  const int *tokens, *positions;  // (R,), those of a text side by side
  const int *texts, *starts;      // (G,) rows of the cache, (G + 1,) where their tokens begin
  T *x, *h, *y, *inner;           // (R, C), normalised (R, C), of attention (R, C), of the MLP (R, INNER)
  T *sums;                        // (blocks of DEEP products, R, columns)
  T *scores;                      // (G, H, P)
  T *logits;                      // (R, V), or null
  phase *phases;                  // zeros
  double (*erfc)(double);
  int (*yield)(void);
  long R, G;
} given;

static void embed(const given *m, long r);
FULL static void product(const T *in, const T *weight, T *sums, long R, long K, long N, long unit);
FULL static void attention(const given *m, const layer *l, long unit);
static void add(const given *m, long r, const T *bias, long K, const T *gain, const T *shift);
static void activate(const given *m, const T *bias, long unit);
static void head(const given *m, long unit);

#define EACH(units, work)                                                \
  {                                                                      \
    const long all = units;                                              \
    for (long unit; (unit = take(p)) < all; finish(p)) work;             \
    wait_for(p++, all, m->yield);                                        \
  }
#define PRODUCT(in, weight, K, N) EACH(parts(K, DEEP) * parts(N, WIDTH), product(in, weight, m->sums, m->R, K, N, unit))

// the first function in the file, which is where a program begins
void NAME(const given *m) {
  phase *p = m->phases;
  EACH(m->R, embed(m, unit))
  for (const layer *l = m->layers; l < m->layers + LAYERS; l++) {
    PRODUCT(m->h, l->attn_c_attn_weight, C, 3 * C)
    EACH(m->G * H, attention(m, l, unit))
    PRODUCT(m->y, l->attn_c_proj_weight, C, C)
    EACH(m->R, add(m, unit, l->attn_c_proj_bias, C, l->ln_2_weight, l->ln_2_bias))
    PRODUCT(m->h, l->mlp_c_fc_weight, C, INNER)
    EACH(m->R * parts(INNER, NEIGHBOURS), activate(m, l->mlp_c_fc_bias, unit))
    PRODUCT(m->inner, l->mlp_c_proj_weight, INNER, C)
    const int last = l == m->layers + LAYERS - 1;
    const T *gain = last ? m->ln_f_weight : l[1].ln_1_weight, *shift = last ? m->ln_f_bias : l[1].ln_1_bias;
    EACH(m->R, add(m, unit, l->mlp_c_proj_bias, INNER, gain, shift))
  }
  if (m->logits) EACH(parts(V, TOKENS), head(m, unit))
}

// Layer norm of x (C,).
static void normalise(const T *x, const T *gain, const T *shift, T *out) {
  double mean = 0, square = 0;
  for (long c = 0; c < C; c++) mean += x[c];
  mean /= C;
  for (long c = 0; c < C; c++) square += (x[c] - mean) * (x[c] - mean);
  const double scale = 1 / __builtin_sqrt(square / C + EPS);
  for (long c = 0; c < C; c++) out[c] = (T)((x[c] - mean) * scale) * gain[c] + shift[c];
}

static void embed(const given *m, long r) {
  T *x = m->x + r * C;
  for (long c = 0; c < C; c++) x[c] = m->wte[(long)m->tokens[r] * C + c] + m->wpe[(long)m->positions[r] * C + c];
  normalise(x, m->layers->ln_1_weight, m->layers->ln_1_bias, m->h + r * C);
}

// Adds `deep` products to the sums, or begins them: those of rows in + k of the weight, from column left to right.
INLINE void add_products(
    const T *in, const T *weight, T *out, long R, long K, long N, long left, long right, int begin, const long deep) {
  long n = left;
  for (; n + LANES <= right; n += LANES) {
    vector rows[STEP];
#pragma unroll
    for (long i = 0; i < deep; i++) rows[i] = *(const vector *)(weight + i * N + n);
    for (long r = 0; r < R; r++) {
      vector *place = (vector *)(out + r * N + n), sum = begin ? (vector)0 : *place;
#pragma unroll
      for (long i = 0; i < deep; i++) sum += in[r * K + i] * rows[i];
      *place = sum;
    }
  }
  for (; n < right; n++)
    for (long r = 0; r < R; r++) {
      T sum = begin ? 0 : out[r * N + n];
      for (long i = 0; i < deep; i++) sum += in[r * K + i] * weight[i * N + n];
      out[r * N + n] = sum;
    }
}

// The sums of `deep` products of `high` rows, in registers, for columns that are side by side in the panel. Meanwhile
// some lines of the next panel are fetched, which lie far apart.
INLINE void tile(
    const T *in, T panel[DEEP][TILE], const T *next, long lines, T *out, long K, long N, long deep, long width,
    const long high) {
  vector sums[HIGH][ACROSS] = {};
  for (long k = 0; k < deep; k++) {
    for (long i = k * lines; i < (k + 1) * lines; i++) __builtin_prefetch(next + i / ACROSS * N + i % ACROSS * LANES);
#pragma unroll
    for (long i = 0; i < high; i++)
#pragma unroll
      for (long j = 0; j < ACROSS; j++) sums[i][j] += in[i * K + k] * ((vector *)panel[k])[j];
  }
  T all[HIGH][TILE];
#pragma unroll
  for (long i = 0; i < high; i++)
#pragma unroll
    for (long j = 0; j < ACROSS; j++) ((vector *)all[i])[j] = sums[i][j];
  for (long i = 0; i < high; i++)
    for (long j = 0; j < width; j++) out[i * N + j] = all[i][j];
}

// A unit of in (R, K) @ weight (K, N): the sums of DEEP products, of WIDTH columns.
FULL static void product(const T *in, const T *weight, T *sums, long R, long K, long N, long unit) {
  const long across = parts(N, WIDTH), block = unit / across, top = block * DEEP, bottom = least(top + DEEP, K);
  const long left = unit % across * WIDTH, right = least(left + WIDTH, N);
  T *out = sums + block * R * N;
  if (R < FEW) {
    long k = top;
    for (; k + STEP <= bottom; k += STEP)
      add_products(in + k, weight + k * N, out, R, K, N, left, right, k == top, STEP);
    for (; k < bottom; k++) add_products(in + k, weight + k * N, out, R, K, N, left, right, k == top, 1);
    return;
  }
  T panel[DEEP][TILE] __attribute__((aligned(BYTES)));
  const long tiles = parts(R, HIGH);
  for (long n = left; n < right; n += TILE) {
    const long width = least(TILE, right - n);
    for (long k = top; k < bottom; k++)
      for (long j = 0; j < TILE; j++) panel[k - top][j] = j < width ? weight[k * N + n + j] : 0;
    for (long t = 0; t < tiles; t++) {
      const long r = t * R / tiles, high = (t + 1) * R / tiles - r, lines = parts(ACROSS, tiles);
      const T *a = in + r * K + top, *next = weight + (top + t * DEEP * lines / ACROSS) * N + n + TILE;
      T *o = out + r * N + n;
      if (high == 6) tile(a, panel, next, lines, o, K, N, bottom - top, width, 6);
      else if (high == 5) tile(a, panel, next, lines, o, K, N, bottom - top, width, 5);
      else tile(a, panel, next, lines, o, K, N, bottom - top, width, 4);  // FEW or more have no lower tiles
    }
  }
}

// Row r of such a product with its bias: out (size,) are its elements from column n on.
FULL static void linear(const given *m, const T *bias, long r, long n, long size, long K, long N, T *out) {
  for (long block = 0; block < parts(K, DEEP); block++) {
    const T *sums = m->sums + (block * m->R + r) * N + n;
    for (long i = 0; i < size; i++) out[i] = block ? out[i] + sums[i] : sums[i];
  }
  for (long i = 0; i < size; i++) out[i] += bias[n + i];
}

FULL static T dot(const T *a, const T *b, long size) {
  vector lanes = 0;
  long i = 0;
  for (; i + LANES <= size; i += LANES) lanes += *(const vector *)(a + i) * *(const vector *)(b + i);
  T sum = 0;
  for (; i < size; i++) sum += a[i] * b[i];
  for (long j = 0; j < LANES; j++) sum += lanes[j];
  return sum;
}

// A head of a text: keeps its keys and values, and then softmax(q @ keys.T / sqrt(D)) @ values of each token.
static void attention(const given *m, const layer *l, long unit) {
  const long g = unit / H, h = unit % H, first = m->starts[g], last = m->starts[g + 1];
  T *keys = l->keys + (m->texts[g] * H + h) * P * D, *values = l->values + (m->texts[g] * H + h) * P * D;
  T *scores = m->scores + unit * P;
  for (long r = first; r < last; r++) {
    linear(m, l->attn_c_attn_bias, r, h * D, D, C, 3 * C, m->y + r * C + h * D);  // q, until it is read
    linear(m, l->attn_c_attn_bias, r, C + h * D, D, C, 3 * C, keys + m->positions[r] * D);
    linear(m, l->attn_c_attn_bias, r, 2 * C + h * D, D, C, 3 * C, values + m->positions[r] * D);
  }
  for (long r = first; r < last; r++) {
    T *y = m->y + r * C + h * D, largest = 0;
    const long seen = m->positions[r] + 1;
    for (long s = 0; s < seen; s++) {
      scores[s] = dot(y, keys + s * D, D) * (T)(1 / __builtin_sqrt(D));
      largest = s && largest > scores[s] ? largest : scores[s];
    }
    double total = 0;
    for (long s = 0; s < seen; s++) scores[s] = exponential(scores[s] - largest);
    for (long s = 0; s < seen; s++) total += scores[s];
    for (long d = 0; d < D; d++) y[d] = 0;
    for (long start = 0; start < seen; start += DEEP) {
      T sums[D];
      for (long d = 0; d < D; d++) sums[d] = 0;
      for (long s = start; s < least(start + DEEP, seen); s++)
        for (long d = 0; d < D; d++) sums[d] += scores[s] * values[s * D + d];
      for (long d = 0; d < D; d++) y[d] += sums[d];
    }
    for (long d = 0; d < D; d++) y[d] /= total;
  }
}

// x + the linear layer's, and its layer norm.
static void add(const given *m, long r, const T *bias, long K, const T *gain, const T *shift) {
  T *x = m->x + r * C, new[C];
  linear(m, bias, r, 0, C, K, C, new);
  for (long c = 0; c < C; c++) x[c] += new[c];
  normalise(x, gain, shift, m->h + r * C);
}

// The activations of model.py. NaN stays NaN.
#define gelu_new(x) (x / (1 + exponential(-1.5957691216057308 * x * (1 + 0.044715 * x * x))))
#define gelu(x) (0.5 * x * m->erfc(-0.7071067811865476 * x))
#define relu(x) (x < 0 ? 0 : x)

FULL static void activate(const given *m, const T *bias, long unit) {
  const long across = parts(INNER, NEIGHBOURS), r = unit / across, left = unit % across * NEIGHBOURS;
  const long size = least(NEIGHBOURS, INNER - left);
  T *out = m->inner + r * INNER + left;
  linear(m, bias, r, left, size, C, INNER, out);
  for (long i = 0; i < size; i++) {
    const double x = out[i];
    out[i] = ACTIVATION(x);
  }
}

static void head(const given *m, long unit) {
  for (long v = unit * TOKENS; v < least((unit + 1) * TOKENS, V); v++)
    for (long r = 0; r < m->R; r++) m->logits[r * V + v] = dot(m->h + r * C, m->head + v * C, C);
}
