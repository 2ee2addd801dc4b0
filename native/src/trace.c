/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "trace.h"

int ps_trace_init(ps_trace *trace, int fd, const uint8_t *uuid, ps_error *err)
{
    ps_trace_header header = {
        .version = 1,
        .record_size = sizeof(ps_trace_record),
    };

    *trace = (ps_trace){.fd = fd};
    if (fd < 0) {
        return PS_OK;
    }
    trace->records = malloc(PS_TRACE_RECORDS * sizeof(*trace->records));
    if (!trace->records) {
        trace->fd = -1;
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "no memory");
    }
    memcpy(header.magic, PS_TRACE_MAGIC, sizeof(header.magic));
    memcpy(header.uuid, uuid, sizeof(header.uuid));
    header.realtime = ps_clock_ns(CLOCK_REALTIME);
    if (ps_write_all(fd, &header, sizeof(header), "writing the trace", err)) {
        trace->fd = -1; /* it is worth no guest */
    }
    return PS_OK;
}

void ps_trace_deinit(ps_trace *trace)
{
    ps_trace_flush(trace);
    free(trace->records);
    *trace = (ps_trace){.fd = -1};
}

void ps_trace_add(ps_trace *trace, const ps_trace_record *record)
{
    if (trace->fd < 0) {
        return;
    }
    trace->records[trace->count++] = *record;
    if (trace->count == PS_TRACE_RECORDS) {
        ps_trace_flush(trace);
    }
}

void ps_trace_flush(ps_trace *trace)
{
    ps_error ignored;

    if (trace->fd >= 0 && trace->count > 0 &&
        ps_write_all(trace->fd, trace->records,
                     trace->count * sizeof(*trace->records),
                     "writing the trace", &ignored)) {
        trace->fd = -1;
    }
    trace->count = 0;
}
