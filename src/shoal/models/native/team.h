// Threads that run one pass together, borrowed from the OpenMP runtime that PyTorch has loaded: two pools of threads that both wait
// by spinning would take the cores from each other. Its entry points are found by the caller, so nothing is linked.

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel
    int (*thread)(void);                                             // omp_get_thread_num
    int (*threads)(void);                                            // omp_get_num_threads
} Runtime;

typedef struct {
    _Atomic int64_t next[2];  // next task of this step and of the one after it
    _Atomic int64_t arrived, step;
    int64_t num_threads;
} Shared;

typedef struct {
    Shared *shared;
    int64_t thread, step;
} Team;

// The next task of this step; tasks are shared out as threads become free, since a core may be busy with something else.
static inline int64_t take(Team *team) {
    return atomic_fetch_add_explicit(&team->shared->next[team->step & 1], 1, memory_order_relaxed);
}

// Wait until every thread has finished this step. After a while of spinning a thread offers its core to others.
static inline void meet(Team *team) {
    Shared *shared = team->shared;
    const int64_t step = team->step++;
    if (atomic_fetch_add_explicit(&shared->arrived, 1, memory_order_acq_rel) == shared->num_threads - 1) {
        atomic_store_explicit(&shared->next[step & 1], 0, memory_order_relaxed);
        atomic_store_explicit(&shared->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&shared->step, step + 1, memory_order_release);
        return;
    }
    for (int64_t spins = 0; atomic_load_explicit(&shared->step, memory_order_acquire) == step; spins++) {
        if (spins < 4000) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        } else {
            sched_yield();
        }
    }
}
