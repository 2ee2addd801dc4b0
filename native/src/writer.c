/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Second pass of a save: the snapshot file, front to back (FORMAT.md).
 *
 * Canonical pages are numbered in the order in which the pages in locality
 * order (saver_locality.c) refer to them first, so the same walk meets them
 * in ascending order and no list of owners is needed. Threads read blocks from
 * the spool, check and compress them; the calling thread writes the results in
 * order.
 */
#include "saver.h"

#include <pthread.h>
#include <sys/mman.h>
#include <xxhash.h>
#include <zstd.h>

#define OUTPUT_BYTES ((size_t)1 << 20)
/* All jobs together; a job has its pages and their compressed form. */
#define JOBS_BYTES ((size_t)32 << 20)
#define JOB_PAGES 256u     /* with few threads: 1 MiB */
#define JOB_PAGES_MANY 64u /* with many */
#define INDEX_BUFFER 4096u /* block index entries */

static const char writing[] = "writing the snapshot";
static const char spool_writing[] = "writing the page spool";
static const char spool_reading[] = "reading the page spool";

typedef struct ps_output {
    int fd;
    uint8_t *buffer;
    size_t length;
    uint64_t offset; /* of the buffer in the file */
} ps_output;

enum ps_job_state {
    JOB_FREE,
    JOB_READY,
    JOB_DONE
};

/* Some consecutive locality blocks. */
typedef struct ps_write_job {
    enum ps_job_state state;
    uint64_t first; /* canonical page */
    uint32_t pages;
    uint8_t *content;
    uint8_t *packed;          /* NULL: nothing is compressed */
    ps_format_block *results; /* offset: within content or packed */
    ps_error error;           /* code 0: none */
} ps_write_job;

typedef struct ps_writer {
    ps_saver *s;
    ps_output out;
    uint32_t *order; /* canonical number -> index in the spool */
    size_t order_bytes;
    uint64_t canonicals;
    uint64_t units_bytes;
    uint64_t leaves_stored;
    ps_format_ram_block *ram;

    uint32_t job_blocks; /* blocks in a job */
    uint32_t job_count;
    ps_write_job *jobs;
    size_t packed_bytes; /* room for one block */
    uint32_t thread_count;
    pthread_t *threads;
    pthread_mutex_t lock;
    pthread_cond_t ready;
    pthread_cond_t done;
    uint64_t jobs_given; /* by the caller, under the lock */
    uint64_t jobs_taken; /* by the threads */
    bool quit;

    ps_format_block *index; /* entries not yet spooled */
    uint32_t index_length;
    uint64_t index_spooled;

    ps_format_section sections[PS_SECTION_RUN_INDEX];
    uint32_t section_count;
    ps_format_section *section; /* being written */
    uint8_t chunk[PS_CHUNK_SIZE];
    size_t chunk_length;
    uint64_t *sums;
    size_t sums_count;
    size_t sums_capacity;
} ps_writer;

/* ------------------------------------------------------------------ output */

static int out_flush(ps_output *out, ps_error *err)
{
    if (out->length > 0 && ps_pwrite_all(out->fd, out->buffer, out->length,
                                         out->offset, writing, err)) {
        return err->code;
    }
    out->offset += out->length;
    out->length = 0;
    return PS_OK;
}

static uint64_t out_position(const ps_output *out)
{
    return out->offset + out->length;
}

static int out_write(ps_output *out, const void *data, size_t length,
                     ps_error *err)
{
    if (length > OUTPUT_BYTES - out->length && out_flush(out, err)) {
        return err->code;
    }
    if (length >= OUTPUT_BYTES) {
        if (ps_pwrite_all(out->fd, data, length, out->offset, writing, err)) {
            return err->code;
        }
        out->offset += length;
    } else if (length > 0) {
        memcpy(out->buffer + out->length, data, length);
        out->length += length;
    }
    return PS_OK;
}

static int out_align(ps_output *out, uint64_t alignment, ps_error *err)
{
    static const uint8_t zeros[PS_BLOCK_ALIGNMENT];
    uint64_t over = out_position(out) & (alignment - 1);

    return over ? out_write(out, zeros, (size_t)(alignment - over), err)
                : PS_OK;
}

/* ---------------------------------------------------------------- sections */

static int section_begin(ps_writer *w, uint32_t type, uint32_t record_size,
                         ps_error *err)
{
    if (out_align(&w->out, PS_PART_ALIGNMENT, err)) {
        return err->code;
    }
    w->section = &w->sections[w->section_count++];
    memset(w->section, 0, sizeof(*w->section));
    w->section->type = type;
    w->section->flags = type == PS_SECTION_META || type > PS_SECTION_OWNERS
                            ? 0
                            : PS_SECTION_FLAG_REQUIRED;
    w->section->offset = out_position(&w->out);
    w->section->record_size = record_size;
    w->chunk_length = 0;
    w->sums_count = 0;
    return PS_OK;
}

static int section_sum(ps_writer *w, ps_error *err)
{
    if (w->sums_count == w->sums_capacity) {
        size_t capacity = w->sums_capacity ? 2 * w->sums_capacity : 1024;
        void *sums = realloc(w->sums, capacity * sizeof(*w->sums));

        if (!sums) {
            return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE,
                           "out of memory for checksums");
        }
        w->sums = sums;
        w->sums_capacity = capacity;
    }
    w->sums[w->sums_count++] = XXH3_64bits(w->chunk, w->chunk_length);
    w->chunk_length = 0;
    return PS_OK;
}

static int section_write(ps_writer *w, const void *data, size_t length,
                         ps_error *err)
{
    const uint8_t *at = data;

    w->section->length += length;
    while (length > 0) {
        size_t part = PS_CHUNK_SIZE - w->chunk_length;

        if (part > length) {
            part = length;
        }
        memcpy(w->chunk + w->chunk_length, at, part);
        if (out_write(&w->out, at, part, err)) {
            return err->code;
        }
        w->chunk_length += part;
        at += part;
        length -= part;
        if (w->chunk_length == PS_CHUNK_SIZE && section_sum(w, err)) {
            return err->code;
        }
    }
    return PS_OK;
}

static int section_end(ps_writer *w, ps_error *err)
{
    size_t length;

    if ((w->chunk_length > 0 && section_sum(w, err)) ||
        out_align(&w->out, PS_PART_ALIGNMENT, err)) {
        return err->code;
    }
    length = w->sums_count * sizeof(*w->sums);
    w->section->sums_offset = out_position(&w->out);
    w->section->sums_checksum = XXH3_64bits(w->sums, length);
    if (out_write(&w->out, w->sums, length, err)) {
        return err->code;
    }
    if (ps_saver_is_cancelled(w->s)) {
        return ps_saver_cancelled(err);
    }
    w->s->stats.bytes_out = out_position(&w->out);
    ps_saver_publish(w->s);
    return PS_OK;
}

static int write_section(ps_writer *w, uint32_t type, uint32_t record_size,
                         const void *data, size_t length, ps_error *err)
{
    if (section_begin(w, type, record_size, err) ||
        section_write(w, data, length, err)) {
        return err->code;
    }
    return section_end(w, err);
}

/* ------------------------------------------------------------ the page map */

/*
 * Every page that is not zero: in locality order where that is known, else
 * ascending.
 */
typedef struct ps_used_pages {
    uint64_t next; /* global page number to look at, or place in the order */
} ps_used_pages;

static bool walk(const ps_saver *s, ps_used_pages *at, uint64_t *page,
                 uint32_t *ref)
{
    uint64_t end = s->leaves * PS_LEAF_PAGES;

    if (s->spaces) {
        if (at->next == s->spaces->order_count) {
            return false;
        }
        *page = s->spaces->order[at->next++];
        *ref = ps_saver_refs(s, *page / PS_GROUP_PAGES)[*page % PS_GROUP_PAGES];
        return true;
    }
    while (at->next < end) {
        uint64_t group = at->next / PS_GROUP_PAGES;

        if (s->groups[group] == 0) {
            at->next = (group + 1) * PS_GROUP_PAGES;
            continue;
        }
        *page = at->next++;
        *ref = ps_saver_refs(s, group)[*page % PS_GROUP_PAGES];
        if (*ref != 0) {
            return true;
        }
    }
    return false;
}

static ps_fill *fill_of(const ps_saver *s, uint32_t ref)
{
    return ps_saver_fill(s, (ref & ~PS_REF_FILL) - 1);
}

static int number_fill(ps_writer *w, ps_fill *fill, ps_error *err)
{
    uint32_t log2 = ps_fill_log2(fill);
    uint8_t unit[PS_FILL_SLOT] = {0};

    if (log2 > PS_FILL_INLINE_LOG2) {
        fill->value = w->units_bytes / PS_FILL_GRAIN;
        w->units_bytes += UINT64_C(1) << log2;
        return PS_OK;
    }
    if (ps_saver_read_unit(w->s, fill, unit, err)) {
        return err->code;
    }
    memcpy(&fill->value, unit, sizeof(fill->value));
    return PS_OK;
}

static uint32_t block_of(const ps_saver *s, uint64_t page)
{
    uint32_t low = 0, high = s->block_count;

    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;

        if (s->blocks[middle].first_leaf * PS_LEAF_PAGES <= page) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Give numbers to what is referred to, and count classes. */
static int number_pages(ps_writer *w, ps_error *err)
{
    ps_saver *s = w->s;
    ps_used_pages at = {0};
    uint64_t page;
    uint32_t ref;

    for (uint32_t i = 0; i < s->canonicals.count; i++) {
        ps_saver_canonical(s, i)->number = PS_UNNUMBERED;
    }
    for (uint32_t i = 0; i < s->fills.count; i++) {
        ps_saver_fill(s, i)->value = UINT64_MAX;
    }
    while (walk(s, &at, &page, &ref)) {
        uint32_t block = block_of(s, page);

        if (ref & PS_REF_FILL) {
            ps_fill *fill = fill_of(s, ref);

            w->ram[block].pages_fill++;
            if (fill->value == UINT64_MAX && number_fill(w, fill, err)) {
                return err->code;
            }
        } else {
            ps_canonical *canonical = ps_saver_canonical(s, ref - 1);

            w->ram[block].pages_data++;
            if (canonical->number == PS_UNNUMBERED) {
                w->order[w->canonicals] = ref - 1;
                canonical->number = (uint32_t)w->canonicals++;
            }
        }
    }
    return PS_OK;
}

static uint64_t entry_of(const ps_saver *s, uint64_t page)
{
    uint64_t group = page / PS_GROUP_PAGES;
    uint32_t ref = 0;

    if (s->groups[group] != 0) {
        ref = ps_saver_refs(s, group)[page % PS_GROUP_PAGES];
    }
    if (ref & PS_REF_FILL) {
        const ps_fill *fill = fill_of(s, ref);

        return ps_entry_make(PS_CLASS_FILL, ps_fill_log2(fill), fill->value);
    }
    if (ref) {
        return ps_entry_make(PS_CLASS_DATA, 0,
                             ps_saver_canonical(s, ref - 1)->number);
    }
    if (s->seen[page / 64] >> (page & 63) & 1) {
        return ps_entry_make(PS_CLASS_ZERO, 0, 0);
    }
    return ps_entry_make(PS_CLASS_ABSENT, 0, 0);
}

/* The entries of a leaf; true where one of them stands for all. */
static bool read_leaf(const ps_saver *s, const ps_saver_block *b, uint64_t leaf,
                      uint64_t entries[PS_LEAF_PAGES])
{
    uint64_t first = (b->first_leaf + leaf) * PS_LEAF_PAGES;
    uint64_t left = b->pages - leaf * PS_LEAF_PAGES;
    uint32_t count = left < PS_LEAF_PAGES ? (uint32_t)left : PS_LEAF_PAGES;
    bool uniform = true;

    for (uint32_t i = 0; i < count; i++) {
        entries[i] = entry_of(s, first + i);
        uniform = uniform && entries[i] == entries[0];
    }
    memset(entries + count, 0, (PS_LEAF_PAGES - count) * sizeof(*entries));
    return uniform && ps_entry_class(entries[0]) != PS_CLASS_DATA;
}

/* Nothing but pages of zeros, told without looking at each. */
static bool leaf_is_zero(const ps_saver *s, const ps_saver_block *b,
                         uint64_t leaf)
{
    uint64_t number = b->first_leaf + leaf;

    if (b->seen != b->pages) {
        return false;
    }
    for (uint32_t i = 0; i < PS_LEAF_GROUPS; i++) {
        if (s->groups[number * PS_LEAF_GROUPS + i] != 0) {
            return false;
        }
    }
    return true;
}

/* The top map, or the leaves that it refers to. */
static int write_map(ps_writer *w, bool top, ps_error *err)
{
    const ps_saver *s = w->s;
    uint64_t entries[PS_LEAF_PAGES];
    uint64_t stored = 0;

    if (section_begin(w, top ? PS_SECTION_TOP_MAP : PS_SECTION_LEAVES,
                      top ? sizeof(uint64_t) : sizeof(entries), err)) {
        return err->code;
    }
    for (uint32_t i = 0; i < s->block_count; i++) {
        const ps_saver_block *b = &s->blocks[i];

        for (uint64_t leaf = 0; leaf < ps_leaves_of(b->pages); leaf++) {
            uint64_t entry;

            if (leaf_is_zero(s, b, leaf)) {
                entry = ps_entry_make(PS_CLASS_ZERO, 0, 0);
            } else if (read_leaf(s, b, leaf, entries)) {
                entry = entries[0];
            } else {
                entry = ps_entry_make(PS_CLASS_LEAF, 0, stored++);
                if (!top && section_write(w, entries, sizeof(entries), err)) {
                    return err->code;
                }
            }
            if (top && section_write(w, &entry, sizeof(entry), err)) {
                return err->code;
            }
        }
        if (ps_saver_is_cancelled(s)) {
            return ps_saver_cancelled(err);
        }
    }
    return section_end(w, err);
}

static int write_ram_blocks(ps_writer *w, ps_error *err)
{
    const ps_saver *s = w->s;

    for (uint32_t i = 0; i < s->block_count; i++) {
        const ps_saver_block *b = &s->blocks[i];
        ps_format_ram_block *out = &w->ram[i];

        out->name_length = b->name_length;
        memcpy(out->name, b->name, b->name_length);
        out->length = b->length;
        out->page_size = b->page_size;
        out->address = b->address;
        out->first_leaf = b->first_leaf;
        out->pages_absent = b->pages - b->seen;
        out->pages_zero = b->seen - out->pages_fill - out->pages_data;
    }
    return write_section(w, PS_SECTION_RAM_BLOCKS, sizeof(*w->ram), w->ram,
                         s->block_count * sizeof(*w->ram), err);
}

static int write_units(ps_writer *w, ps_error *err)
{
    ps_used_pages at = {0};
    uint64_t written = 0;
    uint64_t page;
    uint32_t ref;

    if (section_begin(w, PS_SECTION_FILL_UNITS, PS_FILL_GRAIN, err)) {
        return err->code;
    }
    while (written < w->units_bytes && walk(w->s, &at, &page, &ref)) {
        uint8_t unit[PS_FILL_SLOT];
        const ps_fill *fill;
        uint32_t log2;

        if (!(ref & PS_REF_FILL)) {
            continue;
        }
        fill = fill_of(w->s, ref);
        log2 = ps_fill_log2(fill);
        if (log2 <= PS_FILL_INLINE_LOG2 ||
            fill->value != written / PS_FILL_GRAIN) {
            continue;
        }
        if (ps_saver_read_unit(w->s, fill, unit, err) ||
            section_write(w, unit, (size_t)1 << log2, err)) {
            return err->code;
        }
        written += UINT64_C(1) << log2;
    }
    return section_end(w, err);
}

static int write_signatures(ps_writer *w, ps_error *err)
{
    if (section_begin(w, PS_SECTION_SIGNATURES, sizeof(ps_format_signature),
                      err)) {
        return err->code;
    }
    for (uint64_t i = 0; i < w->canonicals; i++) {
        const ps_canonical *canonical = ps_saver_canonical(w->s, w->order[i]);
        ps_format_signature signature = {canonical->low, canonical->high};

        if (section_write(w, &signature, sizeof(signature), err)) {
            return err->code;
        }
    }
    return section_end(w, err);
}

static int write_owners(ps_writer *w, ps_error *err)
{
    ps_used_pages at = {0};
    uint64_t written = 0;
    uint64_t page;
    uint32_t ref;

    if (section_begin(w, PS_SECTION_OWNERS, sizeof(ps_format_owner), err)) {
        return err->code;
    }
    while (written < w->canonicals && walk(w->s, &at, &page, &ref)) {
        ps_format_owner owner = (ps_format_owner)page;

        if ((ref & PS_REF_FILL) ||
            ps_saver_canonical(w->s, ref - 1)->number != written) {
            continue;
        }
        if (section_write(w, &owner, sizeof(owner), err)) {
            return err->code;
        }
        written++;
    }
    return section_end(w, err);
}

/* ---------------------------------------------------------- address spaces */

static int write_space_records(ps_writer *w, ps_error *err)
{
    const ps_spaces *spaces = w->s->spaces;

    if (section_begin(w, PS_SECTION_SPACES, sizeof(ps_format_space), err)) {
        return err->code;
    }
    for (uint64_t i = 0; i < spaces->space_count; i++) {
        const ps_space *from = &spaces->spaces[i];
        ps_format_space record = {
            .root = from->root,
            .kind = from->kind,
            .mode = ps_paging_mode_number(spaces->mode),
            .first_run = from->first_run,
            .run_count = from->run_count,
            .pages = from->pages,
            .pages_shared = from->shared,
        };

        if (section_write(w, &record, sizeof(record), err)) {
            return err->code;
        }
    }
    return section_end(w, err);
}

static int write_runs(ps_writer *w, ps_error *err)
{
    const ps_spaces *spaces = w->s->spaces;

    if (section_begin(w, PS_SECTION_VIRTUAL_RUNS, sizeof(ps_format_run), err)) {
        return err->code;
    }
    for (uint64_t i = 0; i < spaces->run_count; i++) {
        const ps_virtual_run *from = &spaces->runs[i];
        ps_format_run record = {
            .address = from->address,
            .first = from->first,
            .pages = from->pages,
        };

        if (section_write(w, &record, sizeof(record), err)) {
            return err->code;
        }
    }
    return section_end(w, err);
}

static int write_run_index(ps_writer *w, ps_error *err)
{
    const ps_spaces *spaces = w->s->spaces;

    if (section_begin(w, PS_SECTION_RUN_INDEX, sizeof(ps_format_run_index),
                      err)) {
        return err->code;
    }
    for (uint64_t i = 0; i < spaces->run_count; i++) {
        const ps_run_ref *from = &spaces->refs[i];
        ps_format_run_index record = {
            .first = from->first,
            .run = from->run,
            .space = (uint32_t)ps_spaces_of_run(spaces, from->run),
            .pages = spaces->runs[from->run].pages,
        };

        if (section_write(w, &record, sizeof(record), err)) {
            return err->code;
        }
    }
    return section_end(w, err);
}

static int write_spaces(ps_writer *w, ps_error *err)
{
    if (!w->s->spaces || w->s->spaces->space_count == 0) {
        return PS_OK;
    }
    return write_space_records(w, err) || write_runs(w, err) ||
                   write_run_index(w, err)
               ? err->code
               : PS_OK;
}

/* --------------------------------------------------------- locality blocks */

/* Pages of a job from the spool: one read for each run of slots. */
static int job_read(const ps_writer *w, ps_write_job *job, ps_error *err)
{
    const uint32_t *slots = w->order + job->first;
    uint32_t page = 0;

    while (page < job->pages) {
        uint32_t run = 1;

        while (page + run < job->pages &&
               slots[page + run] == slots[page] + run) {
            run++;
        }
        if (ps_pread_all(w->s->options.spool_fd,
                         job->content + (size_t)page * PS_PAGE_SIZE,
                         (size_t)run * PS_PAGE_SIZE,
                         (uint64_t)slots[page] * PS_PAGE_SIZE, spool_reading,
                         err)) {
            return err->code;
        }
        page += run;
    }
    /* A bad disk must not end up under good checksums. */
    for (page = 0; page < job->pages; page++) {
        const ps_canonical *canonical = ps_saver_canonical(w->s, slots[page]);
        XXH128_hash_t hash = XXH3_128bits(
            job->content + (size_t)page * PS_PAGE_SIZE, PS_PAGE_SIZE);

        if (hash.low64 != canonical->low || hash.high64 != canonical->high) {
            return ps_fail(err, PS_ERR_DAMAGED, PS_NOWHERE,
                           "the page spool has changed at offset %llu: its "
                           "storage is bad",
                           (unsigned long long)slots[page] * PS_PAGE_SIZE);
        }
    }
    return PS_OK;
}

static int job_pack(const ps_writer *w, ps_write_job *job, ZSTD_CCtx *zstd,
                    ps_error *err)
{
    uint32_t per_block = w->s->options.pages_per_block;

    for (uint32_t page = 0, i = 0; page < job->pages; page += per_block, i++) {
        ps_format_block *result = &job->results[i];
        uint32_t left = job->pages - page;
        size_t size = (left < per_block ? left : per_block) * PS_PAGE_SIZE;
        const uint8_t *content = job->content + page * PS_PAGE_SIZE;
        const uint8_t *stored = content;

        result->offset = page * PS_PAGE_SIZE;
        result->length = (uint32_t)size;
        result->form = PS_BLOCK_RAW;
        if (zstd) {
            uint8_t *packed = job->packed + i * w->packed_bytes;
            size_t length =
                ZSTD_compressCCtx(zstd, packed, w->packed_bytes, content, size,
                                  w->s->options.zstd_level);

            if (ZSTD_isError(length)) {
                return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE,
                               "compressing a block: %s",
                               ZSTD_getErrorName(length));
            }
            if (length < size) {
                stored = packed;
                result->offset = i * w->packed_bytes;
                result->length = (uint32_t)length;
                result->form = PS_BLOCK_ZSTD;
            }
        }
        result->checksum = XXH3_64bits(stored, result->length);
    }
    return PS_OK;
}

static void job_run(const ps_writer *w, ps_write_job *job, ZSTD_CCtx *zstd)
{
    ps_error error = {.code = PS_OK};

    if (w->packed_bytes && !zstd) {
        ps_fail(&error, PS_ERR_NOMEM, PS_NOWHERE, "out of memory for zstd");
    } else if (job_read(w, job, &error) == PS_OK) {
        job_pack(w, job, zstd, &error);
    }
    job->error = error;
}

static void *job_thread(void *argument)
{
    ps_writer *w = argument;
    ZSTD_CCtx *zstd = w->packed_bytes ? ZSTD_createCCtx() : NULL;

    pthread_mutex_lock(&w->lock);
    for (;;) {
        ps_write_job *job;

        while (!w->quit && w->jobs_taken == w->jobs_given) {
            pthread_cond_wait(&w->ready, &w->lock);
        }
        if (w->quit) {
            break;
        }
        job = &w->jobs[w->jobs_taken++ % w->job_count];
        pthread_mutex_unlock(&w->lock);
        job_run(w, job, zstd);
        pthread_mutex_lock(&w->lock);
        job->state = JOB_DONE;
        pthread_cond_signal(&w->done);
    }
    pthread_mutex_unlock(&w->lock);
    ZSTD_freeCCtx(zstd);
    return NULL;
}

/* The index of the blocks grows with the pages: it goes behind the spool. */
static int index_flush(ps_writer *w, ps_error *err)
{
    size_t length = w->index_length * sizeof(*w->index);

    if (length > 0 &&
        ps_pwrite_all(w->s->options.spool_fd, w->index, length,
                      (uint64_t)w->s->canonicals.count * PS_PAGE_SIZE +
                          w->index_spooled * sizeof(*w->index),
                      spool_writing, err)) {
        err->offset = PS_NOWHERE;
        return err->code;
    }
    w->index_spooled += w->index_length;
    w->index_length = 0;
    return PS_OK;
}

static int write_index(ps_writer *w, ps_error *err)
{
    uint64_t at = (uint64_t)w->s->canonicals.count * PS_PAGE_SIZE;
    uint64_t left = w->index_spooled * sizeof(*w->index);

    if (section_begin(w, PS_SECTION_BLOCK_INDEX, sizeof(*w->index), err)) {
        return err->code;
    }
    while (left > 0) {
        size_t part = INDEX_BUFFER * sizeof(*w->index);

        part = left < part ? (size_t)left : part;
        if (ps_pread_all(w->s->options.spool_fd, w->index, part, at,
                         spool_reading, err) ||
            section_write(w, w->index, part, err)) {
            return err->code;
        }
        at += part;
        left -= part;
    }
    return section_end(w, err);
}

static int job_write(ps_writer *w, const ps_write_job *job, ps_error *err)
{
    uint32_t per_block = w->s->options.pages_per_block;
    uint32_t blocks = (job->pages + per_block - 1) / per_block;

    for (uint32_t i = 0; i < blocks; i++) {
        ps_format_block block = job->results[i];
        const uint8_t *bytes = job->content + block.offset;

        if (block.form == PS_BLOCK_ZSTD) {
            bytes = job->packed + block.offset;
        } else if (out_align(&w->out, PS_BLOCK_ALIGNMENT, err)) {
            return err->code;
        }
        block.offset = out_position(&w->out);
        if (out_write(&w->out, bytes, block.length, err)) {
            return err->code;
        }
        if (w->index_length == INDEX_BUFFER && index_flush(w, err)) {
            return err->code;
        }
        w->index[w->index_length++] = block;
    }
    w->s->stats.blocks_written += blocks;
    w->s->stats.bytes_out = out_position(&w->out);
    ps_saver_publish(w->s);
    return PS_OK;
}

/* Wait for a job; without threads, do it. */
static int job_finish(ps_writer *w, ps_write_job *job, ZSTD_CCtx *zstd,
                      ps_error *err)
{
    if (w->thread_count == 0) {
        job_run(w, job, zstd);
    } else {
        pthread_mutex_lock(&w->lock);
        while (job->state != JOB_DONE) {
            pthread_cond_wait(&w->done, &w->lock);
        }
        pthread_mutex_unlock(&w->lock);
    }
    job->state = JOB_FREE;
    if (job->error.code) {
        *err = job->error;
        return err->code;
    }
    return job_write(w, job, err);
}

static void job_give(ps_writer *w, uint64_t number, uint64_t job_pages)
{
    ps_write_job *job = &w->jobs[number % w->job_count];
    uint64_t left = w->canonicals - number * job_pages;

    job->first = number * job_pages;
    job->pages = (uint32_t)(left < job_pages ? left : job_pages);
    if (w->thread_count == 0) {
        return;
    }
    pthread_mutex_lock(&w->lock);
    job->state = JOB_READY;
    w->jobs_given++;
    pthread_cond_signal(&w->ready);
    pthread_mutex_unlock(&w->lock);
}

static int write_blocks(ps_writer *w, ZSTD_CCtx *zstd, ps_error *err)
{
    uint64_t job_pages =
        (uint64_t)w->job_blocks * w->s->options.pages_per_block;
    uint64_t jobs = (w->canonicals + job_pages - 1) / job_pages;
    uint64_t given = 0;

    for (uint64_t number = 0; number < jobs; number++) {
        if (ps_saver_is_cancelled(w->s)) {
            return ps_saver_cancelled(err);
        }
        while (given < jobs && given < number + w->job_count) {
            job_give(w, given++, job_pages);
        }
        if (job_finish(w, &w->jobs[number % w->job_count], zstd, err)) {
            return err->code;
        }
    }
    return index_flush(w, err);
}

/* ------------------------------------------------------------- the file */

static int write_header(ps_writer *w, const uint8_t *uuid,
                        const uint8_t *parent, ps_error *err)
{
    ps_format_header header = {.version = PS_FORMAT_VERSION};

    memcpy(header.magic, PS_HEADER_MAGIC, PS_MAGIC_LENGTH);
    header.header_length = PS_HEADER_LENGTH;
    memcpy(header.uuid, uuid, sizeof(header.uuid));
    memcpy(header.parent, parent, sizeof(header.parent));
    header.pages_per_block = w->s->options.pages_per_block;
    header.checksum =
        XXH3_64bits(&header, offsetof(ps_format_header, checksum));
    return out_write(&w->out, &header, sizeof(header), err);
}

static int write_trailer(ps_writer *w, const uint8_t *uuid, ps_error *err)
{
    ps_format_trailer trailer = {0};
    size_t length = w->section_count * sizeof(w->sections[0]);

    if (out_align(&w->out, PS_PART_ALIGNMENT, err)) {
        return err->code;
    }
    trailer.table_offset = out_position(&w->out);
    trailer.table_length = length;
    trailer.table_checksum = XXH3_64bits(w->sections, length);
    trailer.file_length = trailer.table_offset + length + sizeof(trailer);
    memcpy(trailer.uuid, uuid, sizeof(trailer.uuid));
    trailer.checksum =
        XXH3_64bits(&trailer, offsetof(ps_format_trailer, checksum));
    memcpy(trailer.magic, PS_TRAILER_MAGIC, PS_MAGIC_LENGTH);
    if (out_write(&w->out, w->sections, length, err) ||
        out_write(&w->out, &trailer, sizeof(trailer), err)) {
        return err->code;
    }
    return out_flush(&w->out, err);
}

static int write_stream(ps_writer *w, ps_error *err)
{
    const ps_saver *s = w->s;
    ps_format_stream stream = {
        .stream_version = s->stream.stream_version,
        .ram_section_id = s->stream.ram_section_id,
        .ram_instance = s->stream.ram_instance,
        .ram_version = s->stream.ram_version,
        .page_bits = s->stream.target_page_bits,
    };

    if (s->stream.footers) {
        stream.flags |= PS_STREAM_FOOTERS;
    }
    if (s->sections[PS_SECTION_CONFIGURATION].length > 0) {
        stream.flags |= PS_STREAM_CONFIGURATION;
    }
    if (s->sections[PS_SECTION_DESCRIPTION].length > 0) {
        stream.flags |= PS_STREAM_DESCRIPTION;
    }
    return write_section(w, PS_SECTION_STREAM, sizeof(stream), &stream,
                         sizeof(stream), err);
}

/* A section of bytes as they are; left out where there are none. */
static int write_kept(ps_writer *w, uint32_t type, ps_error *err)
{
    const ps_bytes *kept = &w->s->sections[type];

    if (kept->length == 0 && type != PS_SECTION_DEVICES) {
        return PS_OK;
    }
    return write_section(w, type, 1, kept->data, kept->length, err);
}

static int write_sections(ps_writer *w, ps_error *err)
{
    if (write_kept(w, PS_SECTION_META, err) || write_stream(w, err) ||
        write_kept(w, PS_SECTION_CONFIGURATION, err) ||
        write_kept(w, PS_SECTION_DEVICES, err) ||
        write_kept(w, PS_SECTION_DESCRIPTION, err) ||
        write_ram_blocks(w, err) || write_map(w, true, err) ||
        write_map(w, false, err) || write_units(w, err) ||
        write_index(w, err) || write_signatures(w, err)) {
        return err->code;
    }
    return write_owners(w, err) || write_spaces(w, err) ? err->code : PS_OK;
}

/* --------------------------------------------------------- setting it up */

static void writer_clear(ps_writer *w)
{
    if (w->thread_count > 0) {
        pthread_mutex_lock(&w->lock);
        w->quit = true;
        pthread_cond_broadcast(&w->ready);
        pthread_mutex_unlock(&w->lock);
        for (uint32_t i = 0; i < w->thread_count; i++) {
            pthread_join(w->threads[i], NULL);
        }
    }
    for (uint32_t i = 0; w->jobs && i < w->job_count; i++) {
        free(w->jobs[i].content);
        free(w->jobs[i].packed);
        free(w->jobs[i].results);
    }
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->ready);
    pthread_cond_destroy(&w->done);
    free(w->jobs);
    free(w->threads);
    free(w->index);
    free(w->sums);
    free(w->ram);
    free(w->out.buffer);
    ps_unreserve(w->order, w->order_bytes);
}

static int writer_out_of_memory(ps_error *err)
{
    return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE,
                   "out of memory for writing the snapshot");
}

/* As many jobs as fit their memory, one more than threads at most. */
static int setup_jobs(ps_writer *w, ps_error *err)
{
    const ps_saver_options *o = &w->s->options;
    uint32_t pages = o->threads <= 8 ? JOB_PAGES : JOB_PAGES_MANY;
    size_t block_bytes = o->pages_per_block * PS_PAGE_SIZE;
    size_t job_bytes;

    w->job_blocks = pages > o->pages_per_block ? pages / o->pages_per_block : 1;
    if (o->zstd_level != INT32_MIN) {
        w->packed_bytes = ZSTD_compressBound(block_bytes);
    }
    job_bytes = w->job_blocks * (block_bytes + w->packed_bytes);
    w->job_count = (uint32_t)(JOBS_BYTES / job_bytes);
    if (w->job_count > o->threads + 1) {
        w->job_count = o->threads + 1;
    }
    w->s->writer_bytes += w->job_count * job_bytes;
    w->jobs = calloc(w->job_count, sizeof(*w->jobs));
    if (!w->jobs) {
        return writer_out_of_memory(err);
    }
    for (uint32_t i = 0; i < w->job_count; i++) {
        ps_write_job *job = &w->jobs[i];

        job->content = malloc(w->job_blocks * block_bytes);
        job->results = calloc(w->job_blocks, sizeof(*job->results));
        if (w->packed_bytes) {
            job->packed = malloc(w->job_blocks * w->packed_bytes);
        }
        if (!job->content || !job->results ||
            (w->packed_bytes && !job->packed)) {
            return writer_out_of_memory(err);
        }
    }
    return PS_OK;
}

static int setup_threads(ps_writer *w, ps_error *err)
{
    uint32_t threads = w->s->options.threads;

    if (threads == 1) {
        return PS_OK; /* the caller's */
    }
    if (threads > w->job_count) {
        threads = w->job_count;
    }
    w->threads = calloc(threads, sizeof(*w->threads));
    if (!w->threads) {
        return writer_out_of_memory(err);
    }
    while (w->thread_count < threads) {
        int code =
            pthread_create(&w->threads[w->thread_count], NULL, job_thread, w);

        if (code) {
            errno = code;
            return ps_fail_errno(err, PS_NOWHERE, "starting a thread");
        }
        w->thread_count++;
    }
    return PS_OK;
}

static int setup(ps_writer *w, ps_error *err)
{
    ps_saver *s = w->s;
    void *order;

    w->order_bytes = (size_t)s->stats.pages_data * sizeof(*w->order);
    if (ps_reserve(w->order_bytes, &order, err)) {
        return err->code;
    }
    w->order = order;
    w->out.buffer = malloc(OUTPUT_BYTES);
    w->index = calloc(INDEX_BUFFER, sizeof(*w->index));
    w->ram = calloc(s->block_count, sizeof(*w->ram));
    if (!w->out.buffer || !w->index || !w->ram) {
        return writer_out_of_memory(err);
    }
    s->writer_bytes = OUTPUT_BYTES + INDEX_BUFFER * sizeof(*w->index) +
                      w->order_bytes + s->block_count * sizeof(*w->ram) +
                      s->leaves * PS_LEAF_PAGES * sizeof(uint64_t) / 512 +
                      (s->spaces ? ps_spaces_memory(s->spaces) : 0);
    if (setup_jobs(w, err) || number_pages(w, err)) {
        return err->code;
    }
    s->stats.blocks_written = 0;
    s->stats.blocks_total = (w->canonicals + s->options.pages_per_block - 1) /
                            s->options.pages_per_block;
    ps_saver_publish(s);
    return setup_threads(w, err);
}

static int write_snapshot(ps_writer *w, const uint8_t *uuid,
                          const uint8_t *parent, ps_error *err)
{
    ZSTD_CCtx *zstd = NULL;
    int code;

    if (setup(w, err) || write_header(w, uuid, parent, err)) {
        return err->code;
    }
    if (w->thread_count == 0 && w->packed_bytes) {
        zstd = ZSTD_createCCtx();
    }
    code = write_blocks(w, zstd, err);
    ZSTD_freeCCtx(zstd);
    if (code || write_sections(w, err) || write_trailer(w, uuid, err)) {
        return err->code;
    }
    w->s->stats.bytes_out = out_position(&w->out);
    ps_saver_publish(w->s);
    return PS_OK;
}

int ps_saver_write(ps_saver *saver, int fd, const uint8_t *uuid,
                   const uint8_t *parent, ps_error *err)
{
    ps_writer w = {
        .s = saver,
        .out = {.fd = fd},
        .lock = PTHREAD_MUTEX_INITIALIZER,
        .ready = PTHREAD_COND_INITIALIZER,
        .done = PTHREAD_COND_INITIALIZER,
    };
    int code;

    if (saver->error.code) {
        *err = saver->error;
        return err->code;
    }
    if (!saver->ended) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "the stream has not ended");
    }
    code = write_snapshot(&w, uuid, parent, err);
    writer_clear(&w);
    saver->writer_bytes = 0;
    return code;
}
