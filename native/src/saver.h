/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The saver between its two passes, as saver.c fills it and writer.c reads
 * it. Nobody else includes this, tests excepted.
 *
 * What a page costs in memory (the bound is 64 MiB + 48 bytes for each page
 * that is not zero):
 *   - any page: one bit in `seen`, and 4 bytes in `groups` for 16 of them;
 *   - not zero: a reference of 4 bytes, in an array for its group;
 *   - each distinct content: 24 bytes in `canonicals` or `fills`, and 4 in a
 *     hash table that is at most 70 % full, so 6 to 12, or 17 for the moment
 *     in which it doubles.
 */
#ifndef PS_SAVER_H
#define PS_SAVER_H

#include <stdatomic.h>

#include "common.h"
#include "format.h"
#include "spaces.h"

/*
 * A page reference: 0 is a zero page (or one that was never seen), else the
 * index + 1 of a canonical page or, with the highest bit, of a fill.
 */
#define PS_REF_FILL UINT32_C(0x80000000)
#define PS_MAX_REFS UINT32_C(0x7ffffff0)
#define PS_GROUP_PAGES 16u
#define PS_LEAF_GROUPS (PS_LEAF_PAGES / PS_GROUP_PAGES)
#define PS_UNNUMBERED UINT32_MAX

/* A distinct page. Its index is also its slot in the spool. */
typedef struct ps_canonical {
    uint64_t low;
    uint64_t high;
    uint32_t refs;   /* 0: free */
    uint32_t number; /* free: the next free one + 1; else its number in the
                        file, set in the second pass */
} ps_canonical;

/* A distinct fill unit. */
typedef struct ps_fill {
    uint64_t unit;  /* of 8 bytes or less; else its slot in the units file */
    uint64_t value; /* free: the next free one + 1; else that of its page
                       entry, set in the second pass */
    uint32_t refs;
    uint32_t hash; /* the low three bits are log2 of the unit's size */
} ps_fill;

_Static_assert(sizeof(ps_canonical) == 24, "the memory bound counts on it");
_Static_assert(sizeof(ps_fill) == 24, "the memory bound counts on it");

#define PS_FILL_SLOT 64u /* bytes in the units file */

static inline uint32_t ps_fill_log2(const ps_fill *fill)
{
    return fill->hash & 7;
}

/* An array that grows in place of copying: untouched parts cost nothing. */
typedef struct ps_array {
    void *memory;
    size_t reserved;
    uint32_t count; /* used so far, free ones included */
    uint32_t free;  /* index + 1 of the first free one */
} ps_array;

/* Open addressing; a slot is an index + 1. */
typedef struct ps_hash {
    uint32_t *slots;
    uint64_t mask;
    uint64_t count;
} ps_hash;

typedef struct ps_saver_block {
    uint64_t length;
    uint64_t page_size;
    uint64_t address;
    uint64_t first_leaf;
    uint64_t pages;
    uint64_t seen;
    uint8_t name_length;
    char name[255];
} ps_saver_block;

typedef struct ps_bytes {
    uint8_t *data;
    size_t length;
} ps_bytes;

#define PS_KEPT_SECTIONS (PS_SECTION_DESCRIPTION + 1)
#define PS_STATS_FIELDS (sizeof(ps_saver_stats) / sizeof(uint64_t))

struct ps_saver {
    ps_saver_options options;
    ps_parser *parser; /* NULL once the stream is over */
    ps_stream_info stream;
    bool ended;
    ps_error error; /* code 0: none yet */
    ps_bytes sections[PS_KEPT_SECTIONS];

    ps_saver_block *blocks;
    uint32_t block_count;
    uint32_t block_capacity;

    uint64_t leaves;
    uint64_t *seen;   /* a bit for each global page number */
    uint32_t *groups; /* 0, or index + 1 in refs, for 16 pages each */
    ps_array refs;    /* uint32_t[16] */
    ps_array canonicals;
    ps_array fills;
    ps_hash canonical_hash;
    ps_hash fill_hash;
    uint64_t signature_mask; /* all ones, but in tests of collisions */

    uint8_t *spool_buffer; /* slots not written yet, from this one on */
    uint32_t spool_first;
    uint8_t *input;
    uint8_t *scratch; /* one page read back */

    ps_spaces *spaces; /* found between the passes, or NULL */

    atomic_bool cancelled;
    int cancel_fd;
    ps_saver_stats stats;  /* of the working thread */
    uint64_t writer_bytes; /* memory of the second pass */
    _Atomic uint64_t published[PS_STATS_FIELDS];
};

static inline ps_canonical *ps_saver_canonical(const ps_saver *s, uint32_t i)
{
    return (ps_canonical *)s->canonicals.memory + i;
}

static inline ps_fill *ps_saver_fill(const ps_saver *s, uint32_t i)
{
    return (ps_fill *)s->fills.memory + i;
}

/* The 16 references of a group that has any. */
static inline uint32_t *ps_saver_refs(const ps_saver *s, uint64_t group)
{
    return (uint32_t *)s->refs.memory +
           (size_t)(s->groups[group] - 1) * PS_GROUP_PAGES;
}

static inline bool ps_saver_is_cancelled(const ps_saver *s)
{
    return atomic_load_explicit(&s->cancelled, memory_order_relaxed);
}

int ps_saver_cancelled(ps_error *err);
/* The unit of a fill, 1 to 64 bytes. */
int ps_saver_read_unit(const ps_saver *s, const ps_fill *fill,
                       uint8_t unit[PS_FILL_SLOT], ps_error *err);
/* Make the working thread's figures visible to the others. */
void ps_saver_publish(ps_saver *s);

/* Tests: bits of a signature that count when two are compared. */
void ps_saver_set_signature_mask(ps_saver *saver, uint64_t mask);

#endif
