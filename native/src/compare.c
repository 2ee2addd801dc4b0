/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Do two snapshots hold the same pages? Zero and fill pages are compared by
 * their units, data pages by signature and then by bytes: different
 * signatures prove that pages differ, equal ones prove nothing.
 */
#include "image.h"

#include <xxhash.h>

#define UNIT_BYTES 64u

typedef struct comparison {
    ps_image *a;
    ps_image *b;
    bool same_file;
    /* By canonical page of a: the one of b, plus 1, that was found equal.
       Pages shared by many places are compared once. */
    uint64_t *equal_to;
    size_t equal_to_length;
} comparison;

/* The unit of a zero or fill page, repeated to 64 bytes: two such pages are
   equal exactly if these are. */
static int widest_unit(ps_image *image, uint64_t entry,
                       uint8_t unit[UNIT_BYTES], ps_error *err)
{
    size_t length;
    int ret = ps_image_fill_unit(image, entry, unit, &length, err);

    for (; !ret && length < UNIT_BYTES; length *= 2) {
        memcpy(unit + length, unit, length);
    }
    return ret;
}

static int compare_units(comparison *with, uint64_t entry_a, uint64_t entry_b,
                         bool *equal, ps_error *err)
{
    uint8_t unit_a[UNIT_BYTES], unit_b[UNIT_BYTES];
    int ret = widest_unit(with->a, entry_a, unit_a, err);

    if (!ret) {
        ret = widest_unit(with->b, entry_b, unit_b, err);
    }
    if (!ret) {
        *equal = memcmp(unit_a, unit_b, UNIT_BYTES) == 0;
    }
    return ret;
}

/* The signature that a page has, or would have if it were of class data. */
static int page_signature(ps_image *image, uint64_t entry,
                          ps_format_signature *out, ps_error *err)
{
    uint8_t page[PS_PAGE_SIZE];
    XXH128_hash_t hash;
    int ret;

    if (ps_entry_class(entry) == PS_CLASS_DATA) {
        return ps_image_signature(image, ps_entry_value(entry), out, err);
    }
    ret = ps_image_expand(image, entry, page, err);
    if (!ret) {
        hash = XXH3_128bits(page, sizeof(page));
        *out = (ps_format_signature){hash.low64, hash.high64};
    }
    return ret;
}

static int compare_bytes(comparison *with, uint64_t entry_a, uint64_t entry_b,
                         bool *equal, ps_error *err)
{
    uint8_t copy[PS_PAGE_SIZE];
    const uint8_t *first, *second;
    int ret = ps_image_page(with->a, entry_a, &first, err);

    if (!ret && with->a == with->b) {
        first = memcpy(copy, first, sizeof(copy)); /* may be evicted now */
    }
    if (!ret) {
        ret = ps_image_page(with->b, entry_b, &second, err);
    }
    if (!ret) {
        *equal = memcmp(first, second, PS_PAGE_SIZE) == 0;
    }
    return ret;
}

/* At least one of the two is of class data. */
static int compare_data(comparison *with, uint64_t entry_a, uint64_t entry_b,
                        bool *equal, ps_error *err)
{
    bool both = ps_entry_class(entry_a) == ps_entry_class(entry_b);
    uint64_t *known = NULL;
    ps_format_signature a, b;
    int ret;

    if (both && with->same_file) {
        /* No two canonical pages have the same content. */
        *equal = entry_a == entry_b;
        return PS_OK;
    }
    if (both) {
        known = &with->equal_to[ps_entry_value(entry_a)];
        if (*known == ps_entry_value(entry_b) + 1) {
            *equal = true;
            return PS_OK;
        }
    }
    ret = page_signature(with->a, entry_a, &a, err);
    if (!ret) {
        ret = page_signature(with->b, entry_b, &b, err);
    }
    if (ret) {
        return ret;
    }
    if (a.low != b.low || a.high != b.high) {
        *equal = false;
        return PS_OK;
    }
    ret = compare_bytes(with, entry_a, entry_b, equal, err);
    if (!ret && *equal && known) {
        *known = ps_entry_value(entry_b) + 1;
    }
    return ret;
}

static int compare_entries(comparison *with, uint64_t entry_a, uint64_t entry_b,
                           bool *equal, ps_error *err)
{
    uint32_t class_a = ps_entry_class(entry_a);
    uint32_t class_b = ps_entry_class(entry_b);

    if (class_a == PS_CLASS_ABSENT || class_b == PS_CLASS_ABSENT) {
        *equal = class_a == class_b;
        return PS_OK;
    }
    if (class_a == PS_CLASS_DATA || class_b == PS_CLASS_DATA) {
        return compare_data(with, entry_a, entry_b, equal, err);
    }
    if (entry_a == PS_CLASS_ZERO && entry_b == PS_CLASS_ZERO) {
        *equal = true;
        return PS_OK;
    }
    return compare_units(with, entry_a, entry_b, equal, err);
}

/*
 * How many pages from page on can be compared at once: a leaf's worth where
 * both top maps speak for all of it, else one. RAM blocks begin at a leaf, so
 * the leaves of both images cover the same pages.
 */
static int entries_at(comparison *with, uint32_t block_a, uint32_t block_b,
                      uint64_t page, uint64_t *entry_a, uint64_t *entry_b,
                      uint64_t *span, ps_error *err)
{
    uint64_t global_a = ps_image_global(with->a, block_a, page);
    uint64_t global_b = ps_image_global(with->b, block_b, page);
    uint64_t left = with->a->ram[block_a].pages - page;
    int ret;

    *span = 1;
    if ((page & (PS_LEAF_PAGES - 1)) == 0) {
        ret =
            ps_image_top_entry(with->a, global_a >> PS_LEAF_BITS, entry_a, err);
        if (!ret) {
            ret = ps_image_top_entry(with->b, global_b >> PS_LEAF_BITS, entry_b,
                                     err);
        }
        if (ret) {
            return ret;
        }
        if (ps_entry_class(*entry_a) != PS_CLASS_LEAF &&
            ps_entry_class(*entry_b) != PS_CLASS_LEAF) {
            *span = left < PS_LEAF_PAGES ? left : PS_LEAF_PAGES;
            return PS_OK;
        }
    }
    ret = ps_image_entry(with->a, global_a, entry_a, err);
    if (!ret) {
        ret = ps_image_entry(with->b, global_b, entry_b, err);
    }
    return ret;
}

static int compare_block(comparison *with, uint32_t block_a, uint32_t block_b,
                         ps_job *job, ps_difference *out, size_t capacity,
                         size_t *count, uint64_t *differ, ps_error *err)
{
    uint64_t pages = with->a->ram[block_a].pages;
    uint64_t span, run_end = UINT64_MAX;

    for (uint64_t page = 0; page < pages; page += span) {
        uint64_t entry_a = 0, entry_b = 0;
        bool equal = false;
        int ret;

        if (job && (page & (PS_LEAF_PAGES - 1)) == 0) {
            __atomic_store_n(&job->done, page * PS_PAGE_SIZE, __ATOMIC_RELAXED);
            if (__atomic_load_n(&job->cancel, __ATOMIC_RELAXED)) {
                return ps_fail(err, PS_ERR_CANCELLED, PS_NOWHERE, "cancelled");
            }
        }
        ret = entries_at(with, block_a, block_b, page, &entry_a, &entry_b,
                         &span, err);
        if (!ret) {
            ret = compare_entries(with, entry_a, entry_b, &equal, err);
        }
        if (ret) {
            return ret;
        }
        if (equal) {
            continue;
        }
        *differ += span;
        if (page != run_end) {
            if (*count < capacity) {
                out[*count] = (ps_difference){
                    .block_a = block_a,
                    .block_b = block_b,
                    .first = page,
                };
            }
            ++*count;
        }
        if (*count <= capacity) {
            out[*count - 1].count += span;
        }
        run_end = page + span;
    }
    if (job) {
        __atomic_store_n(&job->done, pages * PS_PAGE_SIZE, __ATOMIC_RELAXED);
    }
    return PS_OK;
}

int ps_image_compare(ps_image *a, uint32_t block_a, ps_image *b,
                     uint32_t block_b, ps_job *job, ps_difference *out,
                     size_t capacity, size_t *count, uint64_t *pages,
                     ps_error *err)
{
    comparison with = {
        .a = a,
        .b = b,
        .same_file =
            a == b || (a->device == b->device && a->inode == b->inode &&
                       memcmp(a->header.uuid, b->header.uuid,
                              sizeof(a->header.uuid)) == 0),
    };
    void *memory = NULL;
    int ret;

    *count = 0;
    *pages = 0;
    if (block_a >= a->ram_count || block_b >= b->ram_count) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "there is no RAM block %u",
                       block_a >= a->ram_count ? block_a : block_b);
    }
    if (a->ram[block_a].pages != b->ram[block_b].pages) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "RAM block %s: the two do not have the same length",
                       a->ram[block_a].name);
    }
    with.equal_to_length =
        (size_t)a->canonical_pages * sizeof(with.equal_to[0]);
    ret = ps_reserve(with.equal_to_length, &memory, err);
    if (ret) {
        return ret;
    }
    with.equal_to = memory;
    if (job) {
        __atomic_store_n(&job->total, a->ram[block_a].pages * PS_PAGE_SIZE,
                         __ATOMIC_RELAXED);
    }
    ret = compare_block(&with, block_a, block_b, job, out, capacity, count,
                        pages, err);
    ps_unreserve(memory, with.equal_to_length);
    return ret;
}
