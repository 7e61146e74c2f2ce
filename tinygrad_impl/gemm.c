// c (M, N) = a (M, K) @ b (K, N), in float32 or float64: sums of DEEP products, which are then added up.
//
// cpu.py defines T, NAME, the sizes, how many rows (where M > N) or columns are a PART, and the strides of a and b:
// element (m, k) of a is a[m * AM + k * AK], and (k, n) of b is b[k * BK + n * BN].

// What is kept in registers are the sums of a tile of HIGH rows by ACROSS vectors, beside ACROSS vectors of b.
#if defined(__AVX512F__)
enum { BYTES = 64, ACROSS = 4 };
// or clang, tuning for some processors, would halve such vectors, and run out of registers
__attribute__((min_vector_width(512))) void NAME(T *restrict, const T *restrict, const T *restrict, const int);
#elif defined(__AVX__)
enum { BYTES = 32, ACROSS = 2 };
#else
enum { BYTES = 16, ACROSS = 4 };
#endif
enum { HIGH = 6, LANES = BYTES / sizeof(T), WIDE = ACROSS * LANES, DEEP = 128, ROWS = 256 };
typedef T vector __attribute__((ext_vector_type(LANES)));

static long least(long x, long y) { return x < y ? x : y; }

void NAME(T *restrict c, const T *restrict a, const T *restrict b, const int core_id) {
  T panel[DEEP][WIDE] __attribute__((aligned(BYTES)));
  T tile[HIGH][WIDE] __attribute__((aligned(BYTES)));
  const long first = core_id * PART, last = least(first + PART, M > N ? M : N);
  const long top = M > N ? first : 0, bottom = M > N ? last : M, left = M > N ? 0 : first, right = M > N ? N : last;
  for (long n = left; n < right; n += WIDE)
    for (long block = top; block < bottom; block += ROWS)  // few enough for a's to stay in the cache
      for (long start = 0; start < K; start += DEEP) {
        const long depth = least(DEEP, K - start), width = least(WIDE, right - n);
        for (long k = 0; k < depth; k++)
          for (long j = 0; j < WIDE; j++) panel[k][j] = j < width ? b[(start + k) * BK + (n + j) * BN] : 0;
        for (long m = block; m < least(block + ROWS, bottom); m += HIGH) {
          const T *row[HIGH];  // what is past the last is the last again, and not stored
          for (int i = 0; i < HIGH; i++) row[i] = a + least(m + i, M - 1) * AM + start * AK;
          vector sums[HIGH][ACROSS] = {};
          for (long k = 0; k < depth; k++)
#pragma unroll
            for (int i = 0; i < HIGH; i++)
#pragma unroll
              for (int j = 0; j < ACROSS; j++) sums[i][j] += row[i][k * AK] * ((vector *)panel[k])[j];
#pragma unroll
          for (int i = 0; i < HIGH; i++)
#pragma unroll
            for (int j = 0; j < ACROSS; j++) ((vector *)tile[i])[j] = sums[i][j];
          for (long i = 0; i < least(HIGH, bottom - m); i++)
            for (long j = 0; j < width; j++) {
              T *sum = c + (m + i) * N + n + j;
              *sum = start ? *sum + tile[i][j] : tile[i][j];
            }
        }
      }
}
