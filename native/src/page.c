/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a page is: zero, a repeated unit, or data with its signature. */
#include "common.h"

#include <xxhash.h>

#define MAX_UNIT 64u

/*
 * A page repeats a unit of 64 bytes or less exactly if it equals itself 64
 * bytes on. For nearly every page of data the first cache line decides that,
 * so what such a page costs is its hash.
 */
void ps_page_classify(const uint8_t *page, ps_page_info *out)
{
    uint32_t unit = MAX_UNIT;
    uint32_t log2 = 6;

    out->unit_log2 = 0;
    out->signature_low = 0;
    out->signature_high = 0;
    if (memcmp(page, page + MAX_UNIT, PS_PAGE_SIZE - MAX_UNIT) != 0) {
        XXH128_hash_t hash = XXH3_128bits(page, PS_PAGE_SIZE);

        out->page_class = PS_CLASS_DATA;
        out->signature_low = hash.low64;
        out->signature_high = hash.high64;
        return;
    }
    while (unit > 1 && memcmp(page, page + unit / 2, unit / 2) == 0) {
        unit /= 2;
        log2--;
    }
    if (unit == 1 && page[0] == 0) {
        out->page_class = PS_CLASS_ZERO;
        return;
    }
    out->page_class = PS_CLASS_FILL;
    out->unit_log2 = log2;
}
