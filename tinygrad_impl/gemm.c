// c (M, N) = a (M, K) @ b (K, N), in float32 or float64: sums of DEEP products, which are then added up.
//
// cpu.py defines T, NAME, the sizes, how many rows (where M > N) or columns are a PART, and the strides: element (m, n)
// of c is c[m * CM + n], (m, k) of a is a[m * AM + k * AK], and (k, n) of b is b[k * BK + n * BN]. Columns of c from N to
// CM become -inf.

enum { WIDE = ACROSS * LANES, DEEP = 128 };  // a panel of b has so many columns and rows
enum { ROWS = 258, COLUMNS = 768 };  // of c at once: few enough for what is used again to stay in the second cache
// Element (m, k) of a tile of a is tile[m * PM + k * PK]. Tiles begin an odd number of cache lines apart, or what is
// copied to all of them at once would be in few places of the first cache.
enum { PM = AM == 1 ? 1 : DEEP, PK = AM == 1 ? HIGH : 1, TILE = HIGH * DEEP + LINE };

FULL static void copy_rows(const T *restrict a, T *restrict part, long rows, long depth);
FULL static void copy_panel(const T *restrict b, T panel[DEEP][WIDE], long depth, long width);
FULL static void tile(
    T *restrict c, const T *restrict a, T panel[DEEP][WIDE], long depth, long high, long width, int first);
static void fetch(const T *b, long nth, long of, long depth);

FULL void NAME(T *restrict c, const T *restrict a, const T *restrict b, const int core_id) {
  T part[ROWS / HIGH * TILE] __attribute__((aligned(64))), panel[DEEP][WIDE] __attribute__((aligned(64)));
  const long first = core_id * PART, last = least(first + PART, M > N ? M : N);
  const long top = M > N ? first : 0, bottom = M > N ? last : M, left = M > N ? 0 : first, right = M > N ? N : last;
  for (long m = top; right == N && m < bottom; m++)
    for (long n = N; n < CM; n++) c[m * CM + n] = -__builtin_inf();
  for (long m = top; m < bottom; m += ROWS)
    for (long n = left; n < right; n += COLUMNS) {
      const long rows = least(ROWS, bottom - m), end = least(n + COLUMNS, right), tiles = parts(rows, HIGH);
      for (long k = 0; k < K; k += DEEP) {
        const long depth = least(DEEP, K - k);
        copy_rows(a + m * AM + k * AK, part, rows, depth);
        for (long j = n; j < end; j += WIDE) {
          const T *from = b + k * BK + j * BN, *next = from + WIDE * BN;
          if (j + WIDE >= end) next = k + DEEP < K ? b + (k + DEEP) * BK + n * BN : b + end * BN;
          const long width = least(WIDE, end - j);
          copy_panel(from, panel, depth, width);
          for (long t = 0; t < tiles; t++) {
            const long row = t * HIGH;
            fetch(next, t, tiles, depth);
            tile(c + (m + row) * CM + j, part + t * TILE, panel, depth, least(HIGH, rows - row), width, k == 0);
          }
        }
      }
    }
}

// Copies rows of a to tiles, in the last of which those past the last row are the last again.
FULL static void copy_rows(const T *restrict a, T *restrict part, long rows, long depth) {
  const long whole = rows / HIGH, rest = rows % HIGH;
  if (AM == 1) {
    for (long k = 0; k < depth; k++)
      for (long t = 0; t < whole; t++)
#pragma unroll
        for (long i = 0; i < HIGH; i++) part[t * TILE + k * HIGH + i] = a[k * AK + t * HIGH + i];
  } else
    for (long m = 0; m < whole * HIGH; m++)
      for (long k = 0; k < depth; k++) part[m / HIGH * TILE + m % HIGH * DEEP + k] = a[m * AM + k];
  if (rest)
    for (long k = 0; k < depth; k++)
      for (long i = 0; i < HIGH; i++)
        part[whole * TILE + i * PM + k * PK] = a[(whole * HIGH + least(i, rest - 1)) * AM + k * AK];
}

// Copies `width` columns of b, those past them being 0.
FULL static void copy_panel(const T *restrict b, T panel[DEEP][WIDE], long depth, long width) {
  long whole = 0;
  if (width == WIDE && BN == 1) {
    for (long k = 0; k < depth; k++)
#pragma unroll
      for (long j = 0; j < ACROSS; j++) ((vector *)panel[k])[j] = ((vector *)(b + k * BK))[j];
    return;
  }
  if (width == WIDE && BK == 1)  // transposed, in squares: row i and row i + LANES / 2 are merged, again and again
    for (; whole + LANES <= depth; whole += LANES)
      for (long j = 0; j < ACROSS; j++) {
        vector square[LANES], merged[LANES];
#pragma unroll
        for (long i = 0; i < LANES; i++) square[i] = *(vector *)(b + (j * LANES + i) * BN + whole);
#pragma unroll
        for (long step = 1; step < LANES; step *= 2) {
#pragma unroll
          for (long i = 0; i < LANES / 2; i++) {
            merged[2 * i].even = square[i].lo, merged[2 * i].odd = square[i + LANES / 2].lo;
            merged[2 * i + 1].even = square[i].hi, merged[2 * i + 1].odd = square[i + LANES / 2].hi;
          }
#pragma unroll
          for (long i = 0; i < LANES; i++) square[i] = merged[i];
        }
#pragma unroll
        for (long i = 0; i < LANES; i++) ((vector *)panel[whole + i])[j] = square[i];
      }
  for (long k = whole; k < depth; k++)
    for (long j = 0; j < WIDE; j++) panel[k][j] = j < width ? b[k * BK + j * BN] : 0;
}

// Fetches the nth of so many parts of what the next panel is copied from: lines that lie side by side, of rows of b as
// it is given.
static void fetch(const T *b, long nth, long of, long depth) {
  const long beside = (BN == 1 ? WIDE : DEEP) / LINE, stride = BN == 1 ? BK : BN;
  const long lines = beside * (BN == 1 ? depth : WIDE);
  for (long i = lines * nth / of; i < lines * (nth + 1) / of; i++)
    __builtin_prefetch(b + i / beside * stride + i % beside * LINE, 0, 2);
}

// Adds to c, or begins it with, the products of a tile of a and a panel of b, of which `high` rows and `width` columns
// are in c. c is fetched meanwhile.
FULL static void tile(
    T *restrict c, const T *restrict a, T panel[DEEP][WIDE], long depth, long high, long width, int first) {
  vector sums[HIGH][ACROSS] = {};
  for (long i = 0; i < HIGH; i++)
    for (long j = 0; j < WIDE; j += LINE) __builtin_prefetch(c + i * CM + j, 1);
  for (long k = 0; k < depth; k++)
#pragma unroll
    for (int i = 0; i < HIGH; i++)
#pragma unroll
      for (int j = 0; j < ACROSS; j++) sums[i][j] += a[i * PM + k * PK] * ((vector *)panel[k])[j];
  if (high == HIGH && width == WIDE) {
#pragma unroll
    for (int i = 0; i < HIGH; i++)
#pragma unroll
      for (int j = 0; j < ACROSS; j++) {
        vector *place = (vector *)(c + i * CM) + j;
        *place = first ? sums[i][j] : *place + sums[i][j];
      }
    return;
  }
  T all[HIGH][WIDE];
#pragma unroll
  for (int i = 0; i < HIGH; i++)
#pragma unroll
    for (int j = 0; j < ACROSS; j++) ((vector *)all[i])[j] = sums[i][j];
  for (long i = 0; i < high; i++)
    for (long j = 0; j < width; j++) c[i * CM + j] = first ? all[i][j] : c[i * CM + j] + all[i][j];
}
