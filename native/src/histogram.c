/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "histogram.h"

#define LINEAR (1u << PS_HISTOGRAM_BITS)

static uint32_t bucket_of(uint64_t value)
{
    uint32_t exponent;

    if (value < LINEAR) {
        return (uint32_t)value;
    }
    exponent = 63 - (uint32_t)__builtin_clzll(value);
    return ((exponent - PS_HISTOGRAM_BITS + 1) << PS_HISTOGRAM_BITS) |
           ((uint32_t)(value >> (exponent - PS_HISTOGRAM_BITS)) & (LINEAR - 1));
}

/* The largest value of a bucket. */
static uint64_t bucket_end(uint32_t bucket)
{
    uint32_t range = bucket >> PS_HISTOGRAM_BITS;

    if (range == 0) {
        return bucket;
    }
    return ((((uint64_t)LINEAR | (bucket & (LINEAR - 1))) + 1) << (range - 1)) -
           1;
}

void ps_histogram_add(ps_histogram *histogram, uint64_t value)
{
    ps_counter_add(&histogram->counts[bucket_of(value)], 1);
    ps_counter_add(&histogram->total, 1);
    if (value > ps_counter_get(&histogram->max)) {
        atomic_store_explicit(&histogram->max, value, memory_order_relaxed);
    }
}

uint64_t ps_histogram_quantile(const ps_histogram *histogram, uint32_t permille)
{
    uint64_t total = ps_counter_get(&histogram->total);
    uint64_t max = ps_counter_get(&histogram->max);
    uint64_t rank =
        total / 1000 * permille + (total % 1000 * permille + 999) / 1000;
    uint64_t seen = 0;

    if (total == 0) {
        return 0;
    }
    for (uint32_t i = 0; i < PS_HISTOGRAM_BUCKETS; i++) {
        seen += ps_counter_get(&histogram->counts[i]);
        if (seen >= rank && seen > 0) {
            uint64_t end = bucket_end(i);

            return end < max ? end : max;
        }
    }
    return max;
}
