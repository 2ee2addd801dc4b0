/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Between the passes of a save: guest memory, as it waits in the spool, is
 * shown to spaces.c, which says which pages are neighbours. The second pass
 * numbers canonical pages in that order.
 */
#include "saver.h"

#include <stdio.h>

static const char spool_reading[] = "reading the page spool";

/* Guest memory as ps_spaces_find() reads it. */
typedef struct ps_saved_memory {
    const ps_saver *saver;
    ps_guest_memory memory;
} ps_saved_memory;

static int read_fill(const ps_saver *s, const ps_fill *fill, size_t offset,
                     size_t length, uint8_t *out, ps_error *err)
{
    size_t mask = ((size_t)1 << ps_fill_log2(fill)) - 1;
    uint8_t unit[PS_FILL_SLOT];
    int code = ps_saver_read_unit(s, fill, unit, err);

    for (size_t i = 0; !code && i < length; i++) {
        out[i] = unit[(offset + i) & mask];
    }
    return code;
}

static int read_memory(void *opaque, uint64_t address, size_t length, void *out,
                       ps_error *err)
{
    const ps_saved_memory *saved = opaque;
    const ps_saver *s = saved->saver;
    uint64_t global = ps_guest_global(&saved->memory, address);
    size_t offset = (size_t)(address & (PS_PAGE_SIZE - 1));
    uint64_t group = global / PS_GROUP_PAGES;
    uint32_t ref = 0;

    if (ps_saver_is_cancelled(s)) {
        return ps_saver_cancelled(err);
    }
    if (global != PS_NOWHERE && s->groups[group] != 0) {
        ref = ps_saver_refs(s, group)[global % PS_GROUP_PAGES];
    }
    if (ref == 0) {
        memset(out, 0, length);
        return PS_OK;
    }
    if (ref & PS_REF_FILL) {
        return read_fill(s, ps_saver_fill(s, (ref & ~PS_REF_FILL) - 1), offset,
                         length, out, err);
    }
    return ps_pread_all(s->options.spool_fd, out, length,
                        (uint64_t)(ref - 1) * PS_PAGE_SIZE + offset,
                        spool_reading, err);
}

/* A bit for each page that is not zero. */
static void mark_used(const ps_saver *s, uint64_t *used)
{
    for (uint64_t group = 0; group < s->leaves * PS_LEAF_GROUPS; group++) {
        const uint32_t *refs;

        if (s->groups[group] == 0) {
            continue;
        }
        refs = ps_saver_refs(s, group);
        for (uint32_t i = 0; i < PS_GROUP_PAGES; i++) {
            if (refs[i] != 0) {
                ps_bit_set(used, group * PS_GROUP_PAGES + i);
            }
        }
    }
}

static int take_ranges(const ps_saver *s, const ps_physical_range *ranges,
                       size_t count, ps_guest_range *out, ps_error *err)
{
    for (size_t i = 0; i < count; i++) {
        const ps_physical_range *from = &ranges[i];
        const ps_saver_block *block;

        if (from->block >= s->block_count) {
            return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                           "there is no RAM block %u", from->block);
        }
        block = &s->blocks[from->block];
        if (from->page > block->pages ||
            from->pages > block->pages - from->page) {
            return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                           "RAM block %.*s has no %llu pages from %llu on",
                           block->name_length, block->name,
                           (unsigned long long)from->pages,
                           (unsigned long long)from->page);
        }
        out[i] = (ps_guest_range){
            .address = from->address,
            .first = block->first_leaf * PS_LEAF_PAGES + from->page,
            .pages = from->pages,
        };
    }
    return PS_OK;
}

static void describe(const ps_spaces *spaces, ps_locality *out)
{
    const ps_spaces_stats *stats = &spaces->stats;
    size_t at = 0;

    if (spaces->mode) {
        snprintf(out->mode, sizeof(out->mode), "%s",
                 ps_paging_mode_name(spaces->mode));
    }
    if (spaces->reason) {
        snprintf(out->note, sizeof(out->note), "%s", spaces->reason);
        at = strlen(out->note);
    }
    for (uint32_t note = 1; note != 0 && note <= spaces->notes; note *= 2) {
        if ((spaces->notes & note) && at < sizeof(out->note)) {
            at +=
                (size_t)snprintf(out->note + at, sizeof(out->note) - at, "%s%s",
                                 at ? "; " : "", ps_spaces_note_text(note));
        }
    }
    out->spaces = spaces->space_count;
    out->runs = spaces->run_count;
    out->candidates = stats->candidates;
    out->live = stats->live;
    out->dead = stats->dead;
    out->duplicates = stats->duplicates;
    out->pairs = stats->pairs;
    out->files = stats->files;
    out->from_user = stats->sources[PS_SOURCE_USER];
    out->from_files = stats->sources[PS_SOURCE_FILE];
    out->from_kernel = stats->sources[PS_SOURCE_KERNEL];
    out->from_rest = stats->sources[PS_SOURCE_REST];
    out->from_free = stats->sources[PS_SOURCE_FREE];
}

int ps_saver_locate(ps_saver *saver, const ps_cpu_paging *cpus,
                    size_t cpu_count, const ps_physical_range *ranges,
                    size_t range_count, ps_locality *out, ps_error *err)
{
    ps_saver *s = saver;
    PS_AUTOFREE ps_guest_range *known =
        calloc(range_count ? range_count : 1, sizeof(*known));
    size_t used_length = (size_t)(s->leaves * (PS_LEAF_PAGES / 8));
    ps_saved_memory saved = {.saver = s};
    uint64_t began = ps_clock_ns(CLOCK_MONOTONIC);
    void *used;
    int code;

    *out = (ps_locality){.mode = ""};
    if (!s->ended) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "the stream has not ended");
    }
    if (!known) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "out of memory");
    }
    if (take_ranges(s, ranges, range_count, known, err) ||
        ps_reserve(used_length, &used, err)) {
        return err->code;
    }
    mark_used(s, used);
    saved.memory = (ps_guest_memory){
        .read = read_memory,
        .opaque = &saved,
        .ranges = known,
        .range_count = range_count,
        .used = used,
        .leaves = s->leaves,
    };
    ps_spaces_destroy(s->spaces);
    s->spaces = NULL;
    code = ps_spaces_find(cpus, cpu_count, &saved.memory, &s->spaces, err);
    ps_unreserve(used, used_length);
    if (code) {
        return code;
    }
    describe(s->spaces, out);
    out->duration = ps_clock_ns(CLOCK_MONOTONIC) - began;
    return PS_OK;
}
