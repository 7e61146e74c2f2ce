// The whole model for R tokens at once, whose keys and values go into the cache, in float32 or float64.
//
// cpu_decode.py defines T, NAME, the model's sizes and its activation, and calls NAME on every thread with the same
// `given`. The work of a phase is in units, which whoever is free takes. What a unit computes does not depend on who
// that is: all bits are the same for any number of threads. Every weight is read once, and in the order of memory.
//
// There are no calls of libraries but through pointers, since tinygrad's loader cannot reach what is far away.

#if defined(__AVX512F__)
enum { BYTES = 64 };
#define WIDE __attribute__((min_vector_width(512)))  // or clang, tuning for some processors, would halve such vectors
#elif defined(__AVX__)
enum { BYTES = 32 };
#define WIDE
#else
enum { BYTES = 16 };
#define WIDE
#endif
enum { LANES = BYTES / sizeof(T), D = C / H };
enum { DEEP = 128, STEP = 8, WIDTH = 768 };  // products of a sum, of which so many rows of a matrix at a time; columns
enum { TOKENS = 64, NEIGHBOURS = 256 };      // of the head, of the activation: in a unit
enum { SPINS = 2000 };                       // before a thread that waits lets others run
typedef T vector __attribute__((ext_vector_type(LANES), aligned(sizeof(T))));

typedef struct {
  const T *ln_1_weight, *ln_1_bias, *attn_c_attn_weight, *attn_c_attn_bias, *attn_c_proj_weight, *attn_c_proj_bias;
  const T *ln_2_weight, *ln_2_bias, *mlp_c_fc_weight, *mlp_c_fc_bias, *mlp_c_proj_weight, *mlp_c_proj_bias;
  T *keys, *values;  // (N, H, P, D)
} layer;

typedef struct {
  _Alignas(64) long taken;  // units that someone has begun
  _Alignas(64) long done;
} phase;

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
  double (*exp)(double), (*erfc)(double);
  int (*yield)(void);
  long R, G;
} given;

static long least(long x, long y) { return x < y ? x : y; }
static long parts(long size, long part) { return (size + part - 1) / part; }
static void embed(const given *m, long r);
WIDE static void product(const T *in, const T *weight, T *sums, long R, long K, long N, long unit);
static void attention(const given *m, const layer *l, long unit);
static void add(const given *m, long r, const T *bias, long K, const T *gain, const T *shift);
static void activate(const given *m, const T *bias, long unit);
static void head(const given *m, long unit);
static void wait_for(const given *m, phase *p, long units);

#define EACH(units, work)                                                                      \
  {                                                                                            \
    const long all = units;                                                                    \
    for (long unit; (unit = __atomic_fetch_add(&p->taken, 1, __ATOMIC_RELAXED)) < all;) {      \
      work;                                                                                    \
      __atomic_fetch_add(&p->done, 1, __ATOMIC_RELEASE);                                       \
    }                                                                                          \
    wait_for(m, p++, all);                                                                     \
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

static void wait_for(const given *m, phase *p, long units) {
  for (long spins = 0; __atomic_load_n(&p->done, __ATOMIC_ACQUIRE) < units; spins++) {
    if (spins >= SPINS) m->yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
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
static inline __attribute__((always_inline)) void add_products(
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

// A unit of in (R, K) @ weight (K, N): the sums of DEEP products, of WIDTH columns.
static void product(const T *in, const T *weight, T *sums, long R, long K, long N, long unit) {
  const long across = parts(N, WIDTH), block = unit / across, top = block * DEEP, bottom = least(top + DEEP, K);
  const long left = unit % across * WIDTH, right = least(left + WIDTH, N);
  T *out = sums + block * R * N;
  long k = top;
  for (; k + STEP <= bottom; k += STEP)
    add_products(in + k, weight + k * N, out, R, K, N, left, right, k == top, STEP);
  for (; k < bottom; k++) add_products(in + k, weight + k * N, out, R, K, N, left, right, k == top, 1);
}

// Element (r, n) of such a product, with its bias.
static T linear(const given *m, const T *bias, long r, long n, long K, long N) {
  T sum = 0;
  for (long block = 0; block < parts(K, DEEP); block++) sum += m->sums[(block * m->R + r) * N + n];
  return sum + bias[n];
}

WIDE static T dot(const T *a, const T *b, long size) {
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
  for (long r = first; r < last; r++)
    for (long d = 0; d < D; d++) {
      const long n = h * D + d, slot = m->positions[r] * D + d;
      m->y[r * C + n] = linear(m, l->attn_c_attn_bias, r, n, C, 3 * C);  // q, until it is read
      keys[slot] = linear(m, l->attn_c_attn_bias, r, C + n, C, 3 * C);
      values[slot] = linear(m, l->attn_c_attn_bias, r, 2 * C + n, C, 3 * C);
    }
  for (long r = first; r < last; r++) {
    T *y = m->y + r * C + h * D, largest = 0;
    const long seen = m->positions[r] + 1;
    for (long s = 0; s < seen; s++) {
      scores[s] = dot(y, keys + s * D, D) * (T)(1 / __builtin_sqrt(D));
      largest = s && largest > scores[s] ? largest : scores[s];
    }
    double total = 0;
    for (long s = 0; s < seen; s++) total += scores[s] = m->exp(scores[s] - largest);
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
  T *x = m->x + r * C;
  for (long c = 0; c < C; c++) x[c] += linear(m, bias, r, c, K, C);
  normalise(x, gain, shift, m->h + r * C);
}

// The activations of model.py. NaN stays NaN.
static double gelu_new(const given *m, double x) { return x / (1 + m->exp(-1.5957691216057308 * x * (1 + 0.044715 * x * x))); }
static double gelu(const given *m, double x) { return 0.5 * x * m->erfc(-0.7071067811865476 * x); }
static double relu(const given *m, double x) { return x < 0 ? 0 : x; }

static void activate(const given *m, const T *bias, long unit) {
  const long across = parts(INNER, NEIGHBOURS), r = unit / across, left = unit % across * NEIGHBOURS;
  for (long n = left; n < least(left + NEIGHBOURS, INNER); n++)
    m->inner[r * INNER + n] = ACTIVATION(m, linear(m, bias, r, n, C, INNER));
}

static void head(const given *m, long unit) {
  for (long v = unit * TOKENS; v < least((unit + 1) * TOKENS, V); v++)
    for (long r = 0; r < m->R; r++) m->logits[r * V + v] = dot(m->h + r * C, m->head + v * C, C);
}
