/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A log-linear histogram: every power of two is divided into 32 equal
 * buckets, so that a value is known to 3 % whatever its size, in 15 KiB.
 * One thread adds; any thread may read.
 */
#ifndef PS_HISTOGRAM_H
#define PS_HISTOGRAM_H

#include <stdatomic.h>

#include "common.h"

#define PS_HISTOGRAM_BITS 5
#define PS_HISTOGRAM_BUCKETS ((64 - PS_HISTOGRAM_BITS + 1) << PS_HISTOGRAM_BITS)

typedef struct ps_histogram {
    _Atomic uint64_t counts[PS_HISTOGRAM_BUCKETS];
    _Atomic uint64_t total;
    _Atomic uint64_t max;
} ps_histogram;

/* Add to a counter that only this thread writes. */
static inline void ps_counter_add(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_store_explicit(
        counter, atomic_load_explicit(counter, memory_order_relaxed) + n,
        memory_order_relaxed);
}

static inline void ps_counter_sub(_Atomic uint64_t *counter, uint64_t n)
{
    uint64_t was = atomic_load_explicit(counter, memory_order_relaxed);

    atomic_store_explicit(counter, was > n ? was - n : 0, memory_order_relaxed);
}

static inline uint64_t ps_counter_get(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

void ps_histogram_add(ps_histogram *histogram, uint64_t value);
/* The smallest value that at least permille of the values do not exceed, up
   to the width of its bucket; 0 of none. */
uint64_t ps_histogram_quantile(const ps_histogram *histogram,
                               uint32_t permille);

#endif
