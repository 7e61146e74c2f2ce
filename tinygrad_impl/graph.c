// Kernels one after the other, whose parts are the units of a phase: cpu_graph.py calls NAME on every thread.

typedef struct {
  const void *kernel;
  long parts, core;  // which argument says the part, or -1
  long arguments[ARGUMENTS];
} call;

typedef struct {
  const call *calls;
  phase *phases;  // zeros
  int (*yield)(void);
  long count;
} given;

void NAME(const given *m) {
  for (long i = 0; i < m->count; i++) {
    const call *c = m->calls + i;
    for (long part; (part = take(m->phases + i)) < c->parts; finish(m->phases + i)) {
      long a[ARGUMENTS];
      for (long j = 0; j < ARGUMENTS; j++) a[j] = j == c->core ? part : c->arguments[j];
      // a kernel leaves alone the arguments that it does not have
      ((void (*)(long, long, long, long, long, long, long, long, long, long, long, long, long, long, long, long))c->kernel)(
          a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]);
    }
    wait_for(m->phases + i, c->parts, m->yield);
  }
}
