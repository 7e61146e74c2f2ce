// The sums of the columns of x (R, M), in blocks of rows and then over the blocks.
//
// cpu.py defines T, NAME, the sizes, and PART, how many columns a part computes.

enum { ROWS = 64, WIDE = 4 * LANES };  // rows of a block; columns at once

FULL void NAME(T *restrict sums, const T *restrict x, const int core_id) {
  const long last = least((core_id + 1) * PART, M);
  for (long m = core_id * PART; m < last; m += WIDE) {
    T total[WIDE] = {};
    for (long block = 0; block < R; block += ROWS) {
      T sum[WIDE] = {};
      for (long r = block; r < least(block + ROWS, R); r++) {
        if (m + WIDE <= last)
          for (long j = 0; j < WIDE; j++) sum[j] += x[r * M + m + j];
        else
          for (long j = 0; j < last - m; j++) sum[j] += x[r * M + m + j];
      }
      for (long j = 0; j < WIDE; j++) total[j] += sum[j];
    }
    for (long j = 0; j < least(WIDE, last - m); j++) sums[m + j] = total[j];
  }
}
