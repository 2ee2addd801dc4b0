/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A record for each fault, into a file (qemu_pagesaver/TRACE.md is the
 * specification). Records are collected and written many at a time.
 */
#ifndef PS_TRACE_H
#define PS_TRACE_H

#include "common.h"

#define PS_TRACE_MAGIC "PSTRACE\n"
#define PS_TRACE_NONE8 UINT8_MAX
#define PS_TRACE_RECORDS 2048u

enum {
    PS_TRACE_LATE = 1u << 0,     /* the page was on its way */
    PS_TRACE_ZERO = 1u << 1,     /* a page of zeros */
    PS_TRACE_CONFIRMS = 1u << 2, /* an earlier window ended just here */
};

typedef struct ps_trace_header {
    uint8_t magic[8];
    uint32_t version; /* 1 */
    uint32_t record_size;
    uint8_t uuid[16];  /* of the snapshot */
    uint64_t realtime; /* ns since 1970, when record time is 0 */
    uint8_t reserved[24];
} ps_trace_header;

_Static_assert(sizeof(ps_trace_header) == 64, "trace header");

typedef struct ps_trace_record {
    uint64_t time;    /* ns since the pager began */
    uint64_t address; /* guest-virtual; all ones: not known */
    uint32_t page;    /* global page number */
    uint32_t space;   /* all ones: none */
    int16_t stride;   /* from page to page of what was sent with it */
    uint16_t window;  /* pages that were sent with it */
    uint8_t kind;     /* a ps_prefetch_kind, 255: nothing was looked for */
    uint8_t flags;
    uint16_t reserved;
} ps_trace_record;

_Static_assert(sizeof(ps_trace_record) == 32, "trace record");

typedef struct ps_trace {
    int fd; /* -1: nothing is traced */
    uint32_t count;
    ps_trace_record *records;
} ps_trace;

int ps_trace_init(ps_trace *trace, int fd, const uint8_t *uuid, ps_error *err);
void ps_trace_deinit(ps_trace *trace);
/* A trace that cannot be written ends: it is worth no guest. */
void ps_trace_add(ps_trace *trace, const ps_trace_record *record);
void ps_trace_flush(ps_trace *trace);

#endif
