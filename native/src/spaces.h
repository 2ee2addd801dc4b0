/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The address spaces of a guest, found in its memory without symbols, and the
 * order of its pages that follows from them. What a guest's memory says can
 * make this find nothing, never fail and never take long.
 *
 * Memory: at most 64 bytes for each used page, plus 4 MiB, plus 100 bytes for
 * each MiB of RAM. Runs and pages of files beyond that are left out, with a
 * note for runs.
 */
#ifndef PS_SPACES_H
#define PS_SPACES_H

#include "format.h"
#include "walk.h"

/* Counts are of used pages, each counted once in a space. */
typedef struct ps_space {
    uint64_t root; /* guest-physical address of its topmost table */
    uint32_t kind;
    uint32_t reserved;
    uint64_t first_run;
    uint64_t run_count;
    uint64_t pages;
    uint64_t exclusive; /* no other user space maps them */
    uint64_t shared;
} ps_space;

/*
 * Pages that are contiguous in virtual memory, in physical memory and in
 * global page numbers, all in one leaf (global number / 512). The first and
 * the last one are used; zero pages between them are within the run when they
 * are mapped in the same way, so that they do not cut it.
 */
typedef struct ps_virtual_run {
    uint64_t address; /* virtual, canonical; its low 12 bits are 0 */
    uint32_t first;   /* global page number */
    uint16_t pages;   /* 1 .. 512 */
    uint16_t flags;   /* ps_map_flag that hold for any of the pages */
} ps_virtual_run;

/* A run that holds a page of a leaf. */
typedef struct ps_run_ref {
    uint32_t first; /* global number of the run's first page */
    uint32_t run;   /* index */
} ps_run_ref;

_Static_assert(sizeof(ps_virtual_run) == 16, "the memory bound counts on it");
_Static_assert(sizeof(ps_run_ref) == 8, "the memory bound counts on it");

/* Why a page stands where it does in the locality order. */
enum ps_source {
    PS_SOURCE_USER = 0,
    PS_SOURCE_FILE = 1,   /* page cache, not mapped, by file */
    PS_SOURCE_KERNEL = 2, /* vmalloc, image, modules, vmemmap */
    PS_SOURCE_REST = 3,   /* nothing but the direct map */
    PS_SOURCE_FREE = 4,   /* what is left in memory that the guest freed */
    PS_SOURCES = 5,
};

enum ps_spaces_note {
    PS_NOTE_BUDGET = 1,     /* tables refer to each other too often */
    PS_NOTE_MEMORY = 2,     /* more mappings than the memory bound allows */
    PS_NOTE_DAMAGED = 4,    /* tables that make no sense were left out */
    PS_NOTE_NO_KERNEL = 8,  /* only the spaces that were running are known */
    PS_NOTE_NO_FILES = 16,  /* struct page was not found */
    PS_NOTE_NO_DIRECT = 32, /* no direct map was recognised */
};

typedef struct ps_spaces_stats {
    uint64_t used;       /* pages */
    uint64_t candidates; /* pages that look like a topmost table */
    uint64_t live;
    uint64_t dead;       /* no used page is mapped, or most is nonsense */
    uint64_t duplicates; /* its tables are those of another one */
    uint64_t pairs;      /* live ones that have a KPTI sibling */
    uint64_t tables;     /* read */
    uint64_t damaged;    /* entries of live spaces that were left out: nonsense,
                            tables outside RAM, loops */
    uint64_t runs_dropped;
    uint64_t direct_map; /* used pages in it */
    uint64_t files;      /* that have pages in the page cache, unmapped */
    uint64_t sources[PS_SOURCES]; /* pages of the order */
} ps_spaces_stats;

typedef struct ps_spaces {
    const ps_paging_mode *mode; /* NULL: address spaces are not known */
    const char *reason;         /* why not: a clause, static; else NULL */
    uint32_t notes;
    ps_spaces_stats stats;

    ps_space *spaces; /* user spaces by root; then the kernel's, if known */
    uint64_t space_count;
    ps_virtual_run *runs; /* by space, then by address */
    uint64_t run_count;
    ps_run_ref *refs;    /* by leaf, then by first page, then by run */
    uint64_t *leaf_refs; /* leaves + 1: where a leaf's refs begin */
    uint64_t leaves;
    uint32_t *order; /* every used page once */
    uint64_t order_count;

    uint64_t direct_delta; /* virtual - physical in the direct map */
    bool direct_known;
    uint64_t page_structs; /* virtual address of frame 0's struct page */
    bool page_structs_known;

    /* Reserved bytes, and how many runs they hold. */
    size_t runs_bytes;
    uint64_t max_runs;
} ps_spaces;

/*
 * Find the address spaces and compute the order. cpus: one for each vCPU.
 * Fails for want of memory, when memory->read does, and with
 * PS_ERR_ARGUMENT if the ranges are not as they have to be.
 */
int ps_spaces_find(const ps_cpu_paging *cpus, size_t cpu_count,
                   const ps_guest_memory *memory, ps_spaces **out,
                   ps_error *err);
void ps_spaces_destroy(ps_spaces *spaces);
/* Bytes that it holds. */
uint64_t ps_spaces_memory(const ps_spaces *spaces);

/* One of ps_spaces_note as a sentence. */
const char *ps_spaces_note_text(uint32_t note);

/* Index of the space that a run belongs to. */
uint64_t ps_spaces_of_run(const ps_spaces *spaces, uint64_t run);
/* Index of the run of a space that maps a virtual address, or of the first
   one behind it; first_run + run_count: there is none. */
uint64_t ps_spaces_run_at(const ps_spaces *spaces, uint64_t space,
                          uint64_t address);

/* ------------------------------------------ used by the parts of it alone */

/* A user page that was writable, to recognise its struct page by. */
typedef struct ps_sample {
    uint64_t frame;
    uint64_t page; /* virtual address / 4096 */
} ps_sample;

#define PS_MAX_SAMPLES 512u

/* A page of a file in the page cache. */
typedef struct ps_file_page {
    uint64_t mapping; /* address of the struct address_space */
    uint32_t index;   /* of the page in the file */
    uint32_t global;
} ps_file_page;

/*
 * page_structs.c: of the pages that `placed` does not have, those in the page
 * cache, by file and index, and those that are free. *out is the caller's to
 * free; at most `limit` pages.
 */
int ps_page_structs_read(ps_spaces *spaces, const ps_guest_memory *memory,
                         const ps_sample *samples, size_t sample_count,
                         const uint64_t *placed, uint64_t limit,
                         ps_file_page **out, uint64_t *count,
                         uint64_t *free_pages, ps_error *err);

/* locality.c: the reverse index with the counts of sharing, and the order. */
int ps_spaces_index(ps_spaces *spaces, const ps_guest_memory *memory,
                    ps_error *err);
int ps_spaces_order(ps_spaces *spaces, const ps_guest_memory *memory,
                    const ps_sample *samples, size_t sample_count,
                    ps_error *err);

#endif
