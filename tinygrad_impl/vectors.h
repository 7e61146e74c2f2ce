// What the kernels of the CPU device have in common. They are in float32 or float64, which is T.

#if defined(__AVX512F__)
enum { BYTES = 64, ACROSS = 4 };
// or clang, tuning for some processors, would halve such vectors, and run out of registers
#define FULL __attribute__((min_vector_width(512)))
#elif defined(__AVX__)
enum { BYTES = 32, ACROSS = 2 };
#define FULL
#else
enum { BYTES = 16, ACROSS = 4 };
#define FULL
#endif
// What is kept in registers are the sums of a tile of HIGH rows by ACROSS vectors. LINE elements are a cache line.
enum { HIGH = 6, LANES = BYTES / sizeof(T), LINE = 64 / sizeof(T) };
#define INLINE static inline __attribute__((always_inline))
typedef T vector __attribute__((ext_vector_type(LANES), aligned(sizeof(T))));

INLINE long least(long x, long y) { return x < y ? x : y; }
INLINE long parts(long size, long part) { return (size + part - 1) / part; }

// exp(x) to a unit or two in float64's last place; at most 2^1023. Of |r| <= log(2) / 2 it is Taylor's polynomial.
INLINE double exponential(double x) {
  const double round = 0x1.8p52;
  x = x < -708 ? -708 : x > 709 ? 709 : x;
  const double shifted = x * 1.4426950408889634 + round, k = shifted - round;  // the last bits of `shifted` are k's
  const double r = (x - k * 0x1.62e42fefap-1) - k * 0x1.cf79abc9e3b39p-40;       // log(2) in two parts
  double sum = 1 / 6227020800.;
  const double factorials[] = {479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1};
#pragma unroll
  for (int n = 0; n < 13; n++) sum = sum * r + 1 / factorials[n];
  long bits;
  double power;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  __builtin_memcpy(&power, &bits, sizeof power);
  return sum * power;
}
