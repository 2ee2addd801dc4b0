/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Page tables of a guest: which mode its CPUs are in, and what a table maps.
 * No I/O of its own: guest memory comes through ps_guest_memory.
 *
 * An entry is never trusted. A table that lies outside RAM, repeats itself or
 * makes no sense ends there and is counted; the number of tables that are
 * read is bounded by a budget. The only failures are those of memory->read.
 */
#ifndef PS_WALK_H
#define PS_WALK_H

#include "common.h"

/* A part of guest-physical memory that is RAM of the snapshot. */
typedef struct ps_guest_range {
    uint64_t address; /* guest-physical, page aligned */
    uint64_t first;   /* global page number of its first page */
    uint64_t pages;
} ps_guest_range;

/*
 * Guest memory. Ranges are sorted by address and do not overlap; a page of
 * RAM that is in none of them has no guest-physical address that is known.
 * A page is used when it is not zero: `used` has a bit for each global page
 * number (8 words for each of the `leaves`).
 */
typedef struct ps_guest_memory {
    /* Guest-physical memory, never across the end of a page, only of pages
       that lie in a range and are used. */
    int (*read)(void *opaque, uint64_t address, size_t length, void *out,
                ps_error *err);
    void *opaque;
    const ps_guest_range *ranges;
    size_t range_count;
    const uint64_t *used;
    uint64_t leaves;
} ps_guest_memory;

/* The range that an address lies in; NULL. *next: else the next one's. */
const ps_guest_range *ps_guest_range_at(const ps_guest_memory *memory,
                                        uint64_t address, uint64_t *next);
/* Global number of the page at a guest-physical address; PS_NOWHERE. */
uint64_t ps_guest_global(const ps_guest_memory *memory, uint64_t address);
/* The reverse. */
uint64_t ps_guest_address(const ps_guest_memory *memory, uint64_t global);

static inline bool ps_bit_test(const uint64_t *bits, uint64_t i)
{
    return (bits[i >> 6] >> (i & 63) & 1) != 0;
}

static inline void ps_bit_clear(uint64_t *bits, uint64_t i)
{
    bits[i >> 6] &= ~(UINT64_C(1) << (i & 63));
}

static inline void ps_bit_set(uint64_t *bits, uint64_t i)
{
    bits[i >> 6] |= UINT64_C(1) << (i & 63);
}

/* Of a mapping. ACCESSED and DIRTY as far as the hardware tells. */
enum ps_map_flag {
    PS_MAP_USER = 1,
    PS_MAP_WRITABLE = 2,
    PS_MAP_EXECUTABLE = 4, /* aarch64: by user mode */
    PS_MAP_ACCESSED = 8,
    PS_MAP_DIRTY = 16,
    PS_MAP_LARGE = 32, /* not of the lowest level */
};

typedef struct ps_paging_mode ps_paging_mode;

/* One table with the virtual addresses that go through it. */
typedef struct ps_paging_half {
    const ps_paging_mode *mode;
    uint64_t root;      /* guest-physical */
    uint64_t first;     /* virtual, canonical */
    uint64_t last;      /* inclusive */
    uint32_t root_mask; /* entries of the topmost table - 1 */
} ps_paging_half;

/*
 * How a CPU translates. mode NULL: not in a way that is followed, and reason
 * is a clause that says why (static).
 */
typedef struct ps_paging {
    const ps_paging_mode *mode; /* of the user half */
    const char *reason;
    ps_paging_half user;
    ps_paging_half kernel; /* mode NULL: has none */
} ps_paging;

void ps_paging_detect(const ps_cpu_paging *cpu, ps_paging *out);
const char *ps_paging_mode_name(const ps_paging_mode *mode);
/* As FORMAT.md numbers them. */
uint32_t ps_paging_mode_number(const ps_paging_mode *mode);
uint32_t ps_paging_mode_levels(const ps_paging_mode *mode);

/*
 * May this be an entry of a table at `level` (0 is the lowest) that refers to
 * another table? Then its address.
 */
bool ps_paging_table(const ps_paging_mode *mode, uint32_t level, uint64_t entry,
                     uint64_t *address);

/* ------------------------------------------------------------- iterator */

#define PS_MAX_LEVELS 5u
#define PS_TABLE_ENTRIES 512u

typedef struct ps_mapping {
    uint64_t address; /* virtual, canonical */
    uint64_t physical;
    uint64_t bytes; /* 0: there are no more */
    uint32_t flags; /* of ps_map_flag */
} ps_mapping;

/* Counts since ps_walk_init(). */
typedef struct ps_walk_stats {
    uint64_t tables;  /* read */
    uint64_t known;   /* of these, or skipped: marked before */
    uint64_t outside; /* tables that do not lie in RAM */
    uint64_t loops;   /* tables that are their own parents */
    uint64_t damaged; /* entries that no kernel writes */
    bool exhausted;   /* the budget was too small */
} ps_walk_stats;

typedef struct ps_walk {
    /* Set before ps_walk_init(). */
    const ps_guest_memory *memory;
    uint64_t *budget;  /* one for each table read */
    uint64_t *marks;   /* NULL, or a bit for each page: it is a table */
    uint32_t *trail;   /* NULL, or room for the tables that get a mark: as many
                          as there are used pages */
    bool once;         /* do not enter tables that are marked already */
    bool strict;       /* end at the first thing that makes no sense */
    uint32_t required; /* flags: mappings without them are left out */
    /* Its own. */
    ps_walk_stats stats;
    size_t trail_count;
    ps_paging_half half;
    uint64_t next;
    uint32_t level;
    uint32_t top;
    bool done;
    struct {
        uint64_t address;
        uint32_t rights;
        uint64_t entries[PS_TABLE_ENTRIES];
    } tables[PS_MAX_LEVELS];
} ps_walk;

/* Begin a walk over a half, in ascending virtual order. */
int ps_walk_init(ps_walk *walk, const ps_paging_half *half, ps_error *err);
/* Entries that were left out because they make no sense. */
static inline uint64_t ps_walk_nonsense(const ps_walk *walk)
{
    return walk->stats.damaged + walk->stats.outside + walk->stats.loops;
}
/* The next mapping, also of memory that is not RAM; out->bytes 0: the end. */
int ps_walk_next(ps_walk *walk, ps_mapping *out, ps_error *err);

#endif
