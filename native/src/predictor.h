/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which pages will be touched next, told from where faults have been.
 *
 * Places lie on *lines*: the pages of an address space by virtual address,
 * RAM by physical address, a file by canonical number. The pager cannot see a
 * touch of a page that is there; but a guest that goes through what was sent
 * with a fault comes to the first page behind it. So every fault leaves a
 * record of the place where its window ends (and the one before it begins). A
 * later fault just there says that the window was right: the next is twice as
 * large, in the same direction and stride. A record that nobody confirms for
 * a while says that it was not: windows of new places in that region of the
 * line shrink, down to none. Such a record costs nothing to keep when its
 * window was empty, so a region is watched also while nothing is prefetched
 * in it. (Regions, because one process has memory of both kinds: an index all
 * of which is used again and again, and values that nobody reads twice.)
 */
#ifndef PS_PREDICTOR_H
#define PS_PREDICTOR_H

#include "common.h"

#define PS_PREDICTOR_RECORDS 4096u
#define PS_PREDICTOR_INDEX 16384u /* a power of two */
#define PS_PREDICTOR_LINES 256u   /* likewise */
#define PS_PREDICTOR_REGIONS 4096u
#define PS_PREDICTOR_REGION_BITS 9 /* 2 MiB of pages */

typedef struct ps_prediction {
    int64_t stride; /* from the fault to the next place */
    uint32_t pages; /* 0: nothing */
    bool confirms;  /* an earlier window ended here */
    bool soon;      /* and not long ago: no coincidence */
    bool covered; /* a window on its way brings what follows: leave no record */
    uint64_t by;  /* number of the record of that window */
} ps_prediction;

struct ps_prediction_record {
    uint64_t line;
    uint64_t at;     /* of the fault */
    uint64_t ahead;  /* the place behind the window */
    uint64_t behind; /* before it; UINT64_MAX: none */
    uint64_t number; /* counts up, tells a record from its successors */
    int64_t stride;
    uint32_t pages; /* that the window was to have */
    uint32_t sent;  /* that it had */
    uint32_t kind;  /* the caller's */
    bool confirmed;
};

/* What is known about a line. */
struct ps_prediction_line {
    uint64_t line;
    uint64_t last; /* place of the fault before */
    int64_t delta; /* from the one before that */
    uint64_t from; /* the window sent last: places from .. to */
    uint64_t to;
    uint64_t every;  /* of them one in so many */
    uint64_t record; /* its number */
    double right;    /* how many of its windows are right, 0..1 */
};

struct ps_prediction_region {
    uint64_t line;
    uint64_t number;
    double right; /* as of its line */
};

typedef struct ps_predictor {
    uint32_t largest; /* window, in pages */
    uint64_t next;    /* record number */
    struct ps_prediction_record *records;
    uint16_t *index; /* by place: slot of the record + 1 */
    struct ps_prediction_line *lines;
    struct ps_prediction_region *regions;
} ps_predictor;

int ps_predictor_init(ps_predictor *predictor, uint32_t largest, ps_error *err);
void ps_predictor_deinit(ps_predictor *predictor);

/* Is a fault at this place foreseen? */
bool ps_predictor_expects(const ps_predictor *predictor, uint64_t line,
                          uint64_t at);
/* A fault. *confirmed is the record that it confirms, or NULL. */
ps_prediction ps_predictor_fault(ps_predictor *predictor, uint64_t line,
                                 uint64_t at,
                                 const struct ps_prediction_record **confirmed);
/*
 * The window of the fault at `at` ends before place `ahead`; returns the
 * number of its record.
 */
uint64_t ps_predictor_window(ps_predictor *predictor, uint64_t line,
                             uint64_t at, const ps_prediction *prediction,
                             uint64_t ahead, uint32_t kind);
/* So many pages of a window were sent. */
void ps_predictor_sent(ps_predictor *predictor, uint64_t number,
                       uint32_t pages);

#endif
