// Causal attention of UNITS texts' heads, each of S tokens: softmax(q @ k.T / sqrt(D)) @ v, or its gradients.
//
// cpu_attention.py defines T, NAME, the sizes, BACKWARD, and MEMORY, the elements of working memory that a part has.
// A part computes every PARTS-th head, so the bits do not depend on how many parts there are. Of scores only those of
// keys that a tile of HIGH queries sees are computed, and none are kept for the backward pass, as in FlashAttention
// (Dao et al. 2022). Sums are of DEEP products, which are then added up.

enum { DEEP = 128, BLOCK = 96 };  // queries at once, a multiple of HIGH that is at most DEEP
enum { WIDTH = (S + HIGH + LINE - 1) / LINE * LINE + LINE };  // of rows that have an element for each key
enum { HEIGHT = (S + HIGH - 1) / HIGH * HIGH, ACROSS_D = (D + LINE - 1) / LINE * LINE };  // what is past S and D is 0

typedef struct {
  T keys[D][WIDTH], values[D][WIDTH];     // transposed
  T k[HEIGHT][ACROSS_D], v[HEIGHT][ACROSS_D];
  T p[BLOCK][WIDTH], ds[BLOCK][WIDTH];    // softmax's result, and the gradient of what is before it
  T q[BLOCK][ACROSS_D], dy[BLOCK][ACROSS_D], out[HIGH][ACROSS_D];
  T dk[HEIGHT][ACROSS_D], dv[HEIGHT][ACROSS_D];
} working;
_Static_assert(sizeof(working) <= MEMORY * sizeof(T), "cpu_attention.py gives less memory than this takes");

FULL static void forward(working *m, T *y, const T *q, const T *k, const T *v);
FULL static void backward(
    working *m, T *dq, T *dk, T *dv, const T *q, const T *k, const T *v, const T *dy);

#if BACKWARD
void NAME(T *dq, T *dk, T *dv, T *memory, const T *q, const T *k, const T *v, const T *dy, const int core_id) {
  for (long unit = core_id, at; at = unit * S * D, unit < UNITS; unit += PARTS)
    backward((working *)(memory + core_id * MEMORY), dq + at, dk + at, dv + at, q + at, k + at, v + at, dy + at);
}
#else
void NAME(T *y, T *memory, const T *q, const T *k, const T *v, const int core_id) {
  for (long unit = core_id, at; at = unit * S * D, unit < UNITS; unit += PARTS)
    forward((working *)(memory + core_id * MEMORY), y + at, q + at, k + at, v + at);
}
#endif

// out (HIGH, across vectors) = or += a (HIGH, deep) @ b (deep, across vectors); element (i, k) of a is a[i * ai + k * ak].
INLINE void tile(
    T *out, long stride, const T *a, long ai, long ak, const T *b, long bk, long deep, int add, const long across) {
  vector sums[HIGH][ACROSS] = {};
  for (long k = 0; k < deep; k++)
#pragma unroll
    for (long i = 0; i < HIGH; i++)
#pragma unroll
      for (long j = 0; j < across; j++) sums[i][j] += a[i * ai + k * ak] * ((const vector *)(b + k * bk))[j];
#pragma unroll
  for (long i = 0; i < HIGH; i++)
#pragma unroll
    for (long j = 0; j < across; j++) {
      vector *place = (vector *)(out + i * stride) + j;
      *place = add ? *place + sums[i][j] : sums[i][j];
    }
}

// The same for any width, which is rounded up to whole vectors, and depth.
FULL static void product(
    T *out, long stride, const T *a, long ai, long ak, const T *b, long bk, long depth, long width, int add) {
  for (long start = 0; start < depth; start += DEEP, a += DEEP * ak, b += DEEP * bk, add = 1) {
    const long deep = least(DEEP, depth - start);
    long n = 0;
    for (; n + ACROSS * LANES <= width; n += ACROSS * LANES)
      tile(out + n, stride, a, ai, ak, b + n, bk, deep, add, ACROSS);
    for (; n < width; n += LANES) tile(out + n, stride, a, ai, ak, b + n, bk, deep, add, 1);
  }
}

// Copies `rows` rows of in (S, D) from the first on, those past the last token being 0.
static void copy(const T *in, T out[][ACROSS_D], long first, long rows) {
  for (long r = 0; r < rows; r++)
    for (long d = 0; d < ACROSS_D; d++) out[r][d] = first + r < S && d < D ? in[(first + r) * D + d] : 0;
}

static void transpose(T in[HEIGHT][ACROSS_D], T out[D][WIDTH]) {
  for (long d = 0; d < D; d++)
    for (long s = 0; s < HEIGHT; s++) out[d][s] = in[s][d];
  for (long d = 0; d < D; d++)
    for (long s = HEIGHT; s < WIDTH; s++) out[d][s] = 0;
}

static void store(const T *in, T *out, long first, long rows) {
  for (long r = 0; r < least(rows, S - first); r++)
    for (long d = 0; d < D; d++) out[(first + r) * D + d] = in[r * ACROSS_D + d];
}

// softmax(q @ k.T / sqrt(D)) of HIGH queries from the first on: p (HIGH, WIDTH), of which `first + HIGH` columns, and
// those up to a whole vector, are written.
FULL static void probabilities(const working *m, T q[HIGH][ACROSS_D], T *p, long first) {
  const long seen = parts(first + HIGH, LANES) * LANES;
  product(p, WIDTH, *q, ACROSS_D, 1, *m->keys, WIDTH, D, first + HIGH, 0);
  for (long i = 0; i < HIGH; i++) {
    T *row = p + i * WIDTH;
    for (long s = first + i + 1; s < seen; s++) row[s] = -__builtin_inf();
    vector largest = *(vector *)row, sums = 0;
    for (long s = 0; s < seen; s += LANES) {
      const vector scores = *(vector *)(row + s);
      largest = largest > scores ? largest : scores;
    }
    T most = largest[0], total = 0;
    for (long j = 1; j < LANES; j++) most = most > largest[j] ? most : largest[j];
    for (long s = 0; s < seen; s++) row[s] = exponential((row[s] - most) * (1 / __builtin_sqrt(D)));
    for (long s = first + i + 1; s < seen; s++) row[s] = 0;
    for (long s = 0; s < seen; s += LANES) sums += *(vector *)(row + s);
    for (long j = 0; j < LANES; j++) total += sums[j];
    for (long s = 0; s < seen; s++) row[s] *= 1 / total;
  }
}

FULL static void forward(working *m, T *y, const T *q, const T *k, const T *v) {
  copy(k, m->k, 0, HEIGHT), copy(v, m->v, 0, HEIGHT), transpose(m->k, m->keys);
  for (long first = 0; first < S; first += HIGH) {
    copy(q, m->q, first, HIGH);
    probabilities(m, m->q, *m->p, first);
    product(*m->out, ACROSS_D, *m->p, WIDTH, 1, *m->v, ACROSS_D, least(first + HIGH, S), D, 0);
    store(*m->out, y, first, HIGH);
  }
}

FULL static void backward(
    working *m, T *dq, T *dk, T *dv, const T *q, const T *k, const T *v, const T *dy) {
  copy(k, m->k, 0, HEIGHT), copy(v, m->v, 0, HEIGHT), transpose(m->k, m->keys), transpose(m->v, m->values);
  for (long block = 0; block < S; block += BLOCK) {
    const long rows = least(BLOCK, HEIGHT - block);
    copy(q, m->q, block, rows), copy(dy, m->dy, block, rows);
    for (long r = 0; r < rows; r += HIGH) {
      const long first = block + r, seen = parts(first + HIGH, LANES) * LANES;
      T *p = m->p[r], *ds = m->ds[r];
      probabilities(m, m->q + r, p, first);
      product(ds, WIDTH, m->dy[r], ACROSS_D, 1, *m->values, WIDTH, D, first + HIGH, 0);  // the gradient of p
      for (long i = 0; i < HIGH; i++) {
        T *of_p = p + i * WIDTH, *of_s = ds + i * WIDTH, total = 0;
        vector sums = 0;
        for (long s = 0; s < seen; s += LANES) sums += *(vector *)(of_p + s) * *(vector *)(of_s + s);
        for (long j = 0; j < LANES; j++) total += sums[j];
        for (long s = 0; s < seen; s++) of_s[s] = of_p[s] * (of_s[s] - total) * (T)(1 / __builtin_sqrt(D));
      }
      product(*m->out, ACROSS_D, ds, WIDTH, 1, *m->k, ACROSS_D, least(first + HIGH, S), D, 0);
      store(*m->out, dq, first, HIGH);
    }
    for (long s = 0; s < block + rows; s += HIGH) {  // queries before a tile of keys do not see them
      const long r = s > block ? s - block : 0, add = s < block;
      product(m->dk[s], ACROSS_D, m->ds[r] + s, 1, WIDTH, m->q[r], ACROSS_D, rows - r, D, add);
      product(m->dv[s], ACROSS_D, m->p[r] + s, 1, WIDTH, m->dy[r], ACROSS_D, rows - r, D, add);
    }
  }
  store(*m->dk, dk, 0, HEIGHT), store(*m->dv, dv, 0, HEIGHT);
}
