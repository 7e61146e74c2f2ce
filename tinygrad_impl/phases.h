// A phase has units, which whoever is free takes, so that a thread that the system holds up is not waited for with more
// than one. All threads go through the same phases.

enum { SPINS = 2000 };  // before a thread that waits lets others run

typedef struct {
  long taken, apart[7];  // units that someone has begun; in another cache line than
  long done, too[7];     // those that are done
} phase;

// The unit that a thread is to compute next; from `units` on there is none.
INLINE long take(phase *p) { return __atomic_fetch_add(&p->taken, 1, __ATOMIC_RELAXED); }
INLINE void finish(phase *p) { __atomic_fetch_add(&p->done, 1, __ATOMIC_RELEASE); }

INLINE void wait_for(phase *p, long units, int (*yield)(void)) {
  for (long spins = 0; __atomic_load_n(&p->done, __ATOMIC_ACQUIRE) < units; spins++) {
    if (spins >= SPINS) yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}
