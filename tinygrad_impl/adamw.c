// AdamW (Loshchilov & Hutter 2019) of parameters that lie in one range of SIZE elements, and the squares of gradients.
//
// cpu_adamw.py defines T, NAME, SIZE, and PART, how many elements a part computes; and for AdamW BETA1, BETA2, EPS and
// SEGMENTS, each {its beginning, its end, the weight decay}. Reading and writing takes longest: each is read once.

#if defined(SEGMENTS)
typedef struct {
  long start, end;
  double decay;
} segment;

// scalars: the gradients' factor and the rest of it, the learning rate, 1 - beta1^t, 1 - beta2^t
FULL void NAME(
    T *restrict p, T *restrict exp_avg, T *restrict exp_avg_sq, const T *restrict gradients, const T *scalars,
    const int core_id) {
  static const segment segments[] = SEGMENTS;
  const T scale = scalars[0], rest = scalars[1], lr = scalars[2], correction1 = scalars[3], correction2 = scalars[4];
  const T rate = lr / correction1, beta1 = BETA1, beta2 = BETA2, rest1 = 1 - BETA1, rest2 = 1 - BETA2, eps = EPS;
  const long first = core_id * PART, last = least(first + PART, SIZE);
  for (unsigned long n = 0; n < sizeof segments / sizeof *segments; n++) {
    const long begin = first > segments[n].start ? first : segments[n].start, end = least(last, segments[n].end);
    const T keep = 1 - lr * (T)segments[n].decay;
    for (long i = begin; i < end; i++) {
      const T g = gradients[i] * scale + gradients[i] * rest;
      const T m = beta1 * exp_avg[i] + rest1 * g, v = beta2 * exp_avg_sq[i] + rest2 * g * g;
      exp_avg[i] = m, exp_avg_sq[i] = v;
      p[i] = p[i] * keep - rate * m / (__builtin_sqrt(v / correction2) + eps);
    }
  }
}
#else
// sums (pieces,): of the squares of PIECE elements each
FULL void NAME(T *restrict sums, const T *restrict gradients, const int core_id) {
  for (long first = core_id * PART; first < least((core_id + 1) * PART, SIZE); first += PIECE) {
    double lanes[2 * LANES] = {};
    for (long i = first; i < least(first + PIECE, SIZE); i += 2 * LANES)
      for (long j = 0; j < 2 * LANES; j++) lanes[j] += (double)gradients[i + j] * gradients[i + j];
    for (long j = 1; j < 2 * LANES; j++) lanes[0] += lanes[j];
    sums[first / PIECE] = lanes[0];
  }
}
#endif
