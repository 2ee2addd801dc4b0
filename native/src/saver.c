/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * First pass of a save: the stream in, classified page by page, into a page
 * map in memory and a spool of distinct pages on disk. The guest waits for
 * this pass, so it reads in large pieces, looks at each byte once and writes
 * in large pieces.
 */
#include "saver.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>
#include <zstd.h>

#define INPUT_BYTES ((size_t)1 << 20)
#define SPOOL_SLOTS 256u /* 1 MiB */
#define HASH_SLOTS 1024u /* at first */
#define ARRAY_BYTES ((size_t)64 << 10)
/* What the parser and other fixed things hold, generously. */
#define FIXED_BYTES ((uint64_t)1 << 20)

static const char spool_writing[] = "writing the page spool";
static const char spool_reading[] = "reading the page spool";
static const char units_writing[] = "writing the spool of fill units";
static const char units_reading[] = "reading the spool of fill units";

int ps_saver_cancelled(ps_error *err)
{
    return ps_fail(err, PS_ERR_CANCELLED, PS_NOWHERE, "cancelled");
}

static int saver_failed(ps_saver *s, const ps_error *err)
{
    if (err->code != PS_ERR_ARGUMENT) {
        s->error = *err;
    }
    return err->code;
}

/* ----------------------------------------------------------------- arrays */

/* Room for one more item; its bytes are 0 if it was never used. */
static int array_reserve(ps_array *a, size_t item, ps_error *err)
{
    size_t wanted = ((size_t)a->count + 1) * item;
    size_t reserved = a->reserved ? a->reserved : ARRAY_BYTES;
    void *memory;

    if (wanted <= a->reserved) {
        return PS_OK;
    }
    if (a->count >= PS_MAX_REFS) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, PS_NOWHERE,
                       "the guest has more than %u distinct pages",
                       PS_MAX_REFS);
    }
    while (reserved < wanted) {
        reserved *= 2;
    }
    if (!a->memory) {
        if (ps_reserve(reserved, &a->memory, err)) {
            return err->code;
        }
    } else {
        memory = mremap(a->memory, a->reserved, reserved, MREMAP_MAYMOVE);
        if (memory == MAP_FAILED) {
            return ps_fail_errno(err, PS_NOWHERE, "reserving memory");
        }
        a->memory = memory;
    }
    a->reserved = reserved;
    return PS_OK;
}

static void array_free(ps_array *a)
{
    ps_unreserve(a->memory, a->reserved);
    memset(a, 0, sizeof(*a));
}

/* ------------------------------------------------------------------ hashes */

typedef uint64_t hash_of_fn(const ps_saver *s, uint32_t index);

static uint64_t hash_of_canonical(const ps_saver *s, uint32_t index)
{
    return ps_saver_canonical(s, index)->low & s->signature_mask;
}

static uint64_t hash_of_fill(const ps_saver *s, uint32_t index)
{
    return ps_saver_fill(s, index)->hash >> 3;
}

static size_t hash_bytes(const ps_hash *h)
{
    return h->slots ? ((size_t)h->mask + 1) * sizeof(*h->slots) : 0;
}

static void hash_free(ps_hash *h)
{
    ps_unreserve(h->slots, hash_bytes(h));
    memset(h, 0, sizeof(*h));
}

static void hash_put(ps_hash *h, uint64_t hash, uint32_t index)
{
    uint64_t at = hash & h->mask;

    while (h->slots[at] != 0) {
        at = (at + 1) & h->mask;
    }
    h->slots[at] = index + 1;
    h->count++;
}

static void note_memory(ps_saver *s, uint64_t more);

static inline int hash_reserve(ps_saver *s, ps_hash *h, hash_of_fn *hash_of,
                               ps_error *err)
{
    uint64_t slots = h->slots ? h->mask + 1 : 0;
    ps_hash grown = {.mask = slots ? slots * 2 - 1 : HASH_SLOTS - 1};
    void *memory;

    if (h->count * 10 < slots * 7) {
        return PS_OK;
    }
    if (ps_reserve((size_t)(grown.mask + 1) * sizeof(uint32_t), &memory, err)) {
        return err->code;
    }
    grown.slots = memory;
    note_memory(s, hash_bytes(&grown));
    for (uint64_t at = 0; at < slots; at++) {
        if (h->slots[at] != 0) {
            uint32_t index = h->slots[at] - 1;

            hash_put(&grown, hash_of(s, index), index);
        }
    }
    hash_free(h);
    *h = grown;
    return PS_OK;
}

/* Remove an index, and move what was pushed behind it back. */
static inline void hash_remove(ps_saver *s, ps_hash *h, hash_of_fn *hash_of,
                               uint32_t index)
{
    uint64_t hole = hash_of(s, index) & h->mask;
    uint64_t at;

    while (h->slots[hole] != index + 1) {
        hole = (hole + 1) & h->mask;
    }
    for (at = (hole + 1) & h->mask; h->slots[at] != 0;
         at = (at + 1) & h->mask) {
        uint64_t home = hash_of(s, h->slots[at] - 1) & h->mask;

        /* It may fill the hole unless its home lies behind the hole. */
        if (((at - home) & h->mask) >= ((at - hole) & h->mask)) {
            h->slots[hole] = h->slots[at];
            hole = at;
        }
    }
    h->slots[hole] = 0;
    h->count--;
}

/* ------------------------------------------------------------------- stats */

static uint64_t memory_now(const ps_saver *s)
{
    uint64_t groups = s->leaves * PS_LEAF_GROUPS;
    uint64_t bytes = FIXED_BYTES + sizeof(*s) + INPUT_BYTES +
                     (SPOOL_SLOTS + 1) * PS_PAGE_SIZE;

    bytes += s->leaves * PS_LEAF_PAGES / 8 + groups * sizeof(uint32_t);
    bytes += (uint64_t)s->refs.count * PS_GROUP_PAGES * sizeof(uint32_t);
    bytes += (uint64_t)s->canonicals.count * sizeof(ps_canonical);
    bytes += (uint64_t)s->fills.count * sizeof(ps_fill);
    bytes += hash_bytes(&s->canonical_hash) + hash_bytes(&s->fill_hash);
    bytes += s->block_capacity * sizeof(ps_saver_block);
    for (size_t i = 0; i < PS_KEPT_SECTIONS; i++) {
        bytes += s->sections[i].length;
    }
    return bytes + s->writer_bytes;
}

/* memory_bytes is the most that there was at any time. */
static void note_memory(ps_saver *s, uint64_t more)
{
    uint64_t bytes = memory_now(s) + more;

    if (bytes > s->stats.memory_bytes) {
        s->stats.memory_bytes = bytes;
    }
}

void ps_saver_publish(ps_saver *s)
{
    uint64_t values[PS_STATS_FIELDS];

    _Static_assert(sizeof(values) == sizeof(s->stats), "all are uint64_t");
    note_memory(s, 0);
    memcpy(values, &s->stats, sizeof(values));
    for (size_t i = 0; i < PS_STATS_FIELDS; i++) {
        atomic_store_explicit(&s->published[i], values[i],
                              memory_order_relaxed);
    }
}

void ps_saver_get_stats(const ps_saver *saver, ps_saver_stats *out)
{
    uint64_t values[PS_STATS_FIELDS];

    for (size_t i = 0; i < PS_STATS_FIELDS; i++) {
        values[i] =
            atomic_load_explicit(&saver->published[i], memory_order_relaxed);
    }
    memcpy(out, values, sizeof(values));
}

/* ------------------------------------------------------------------- spool */

static uint32_t spool_buffered(const ps_saver *s)
{
    return s->canonicals.count - s->spool_first;
}

static int spool_flush(ps_saver *s, ps_error *err)
{
    size_t length = (size_t)spool_buffered(s) * PS_PAGE_SIZE;

    if (length == 0) {
        return PS_OK;
    }
    if (ps_pwrite_all(s->options.spool_fd, s->spool_buffer, length,
                      (uint64_t)s->spool_first * PS_PAGE_SIZE, spool_writing,
                      err)) {
        err->offset = PS_NOWHERE;
        return err->code;
    }
    s->spool_first = s->canonicals.count;
    s->stats.spool_bytes = (uint64_t)s->spool_first * PS_PAGE_SIZE;
    return PS_OK;
}

static int spool_same(ps_saver *s, uint32_t slot, const uint8_t *page,
                      bool *same, ps_error *err)
{
    const uint8_t *bytes = s->scratch;

    if (slot >= s->spool_first) {
        bytes = s->spool_buffer + (slot - s->spool_first) * PS_PAGE_SIZE;
    } else if (ps_pread_all(s->options.spool_fd, s->scratch, PS_PAGE_SIZE,
                            (uint64_t)slot * PS_PAGE_SIZE, spool_reading,
                            err)) {
        return err->code;
    }
    *same = memcmp(bytes, page, PS_PAGE_SIZE) == 0;
    return PS_OK;
}

/* A slot with these bytes: a free one, else the next. */
static int spool_put(ps_saver *s, const uint8_t *page, uint32_t *slot,
                     ps_error *err)
{
    ps_array *a = &s->canonicals;

    if (a->free == 0) {
        if (spool_buffered(s) == SPOOL_SLOTS && spool_flush(s, err)) {
            return err->code;
        }
        if (array_reserve(a, sizeof(ps_canonical), err)) {
            return err->code;
        }
        *slot = a->count;
        memcpy(s->spool_buffer + (*slot - s->spool_first) * PS_PAGE_SIZE, page,
               PS_PAGE_SIZE);
        a->count++;
        return PS_OK;
    }
    *slot = a->free - 1;
    if (*slot >= s->spool_first) {
        memcpy(s->spool_buffer + (*slot - s->spool_first) * PS_PAGE_SIZE, page,
               PS_PAGE_SIZE);
    } else if (ps_pwrite_all(s->options.spool_fd, page, PS_PAGE_SIZE,
                             (uint64_t)*slot * PS_PAGE_SIZE, spool_writing,
                             err)) {
        err->offset = PS_NOWHERE;
        return err->code;
    }
    a->free = ps_saver_canonical(s, *slot)->number;
    return PS_OK;
}

/* --------------------------------------------------------- canonical pages */

/* One more reference to a page with this content. */
static int intern_data(ps_saver *s, const uint8_t *page,
                       const ps_page_info *info, uint32_t *ref, ps_error *err)
{
    ps_hash *h = &s->canonical_hash;
    uint64_t low = info->signature_low & s->signature_mask;
    uint64_t high = info->signature_high & s->signature_mask;
    ps_canonical *canonical;
    uint32_t index = 0;

    if (hash_reserve(s, h, hash_of_canonical, err)) {
        return err->code;
    }
    for (uint64_t at = low & h->mask; h->slots[at] != 0;
         at = (at + 1) & h->mask) {
        bool same = false;

        index = h->slots[at] - 1;
        canonical = ps_saver_canonical(s, index);
        if ((canonical->low & s->signature_mask) != low ||
            (canonical->high & s->signature_mask) != high) {
            continue;
        }
        if (spool_same(s, index, page, &same, err)) {
            return err->code;
        }
        if (same) {
            canonical->refs++;
            s->stats.pages_shared++;
            *ref = index + 1;
            return PS_OK;
        }
    }
    if (spool_put(s, page, &index, err)) {
        return err->code;
    }
    canonical = ps_saver_canonical(s, index);
    canonical->low = info->signature_low;
    canonical->high = info->signature_high;
    canonical->refs = 1;
    canonical->number = PS_UNNUMBERED;
    hash_put(h, low, index);
    s->stats.pages_data++;
    *ref = index + 1;
    return PS_OK;
}

static void release_data(ps_saver *s, uint32_t index)
{
    ps_canonical *canonical = ps_saver_canonical(s, index);

    if (--canonical->refs > 0) {
        s->stats.pages_shared--;
        return;
    }
    hash_remove(s, &s->canonical_hash, hash_of_canonical, index);
    canonical->number = s->canonicals.free;
    s->canonicals.free = index + 1;
    s->stats.pages_data--;
}

/* -------------------------------------------------------------- fill units */

int ps_saver_read_unit(const ps_saver *s, const ps_fill *fill,
                       uint8_t unit[PS_FILL_SLOT], ps_error *err)
{
    size_t size = (size_t)1 << ps_fill_log2(fill);

    if (size <= sizeof(fill->unit)) {
        memcpy(unit, &fill->unit, size);
        return PS_OK;
    }
    return ps_pread_all(s->options.units_fd, unit, size,
                        fill->unit * PS_FILL_SLOT, units_reading, err);
}

static int fill_same(const ps_saver *s, const ps_fill *fill,
                     const uint8_t *unit, size_t size, bool *same,
                     ps_error *err)
{
    uint8_t bytes[PS_FILL_SLOT];

    if (ps_saver_read_unit(s, fill, bytes, err)) {
        return err->code;
    }
    *same = memcmp(bytes, unit, size) == 0;
    return PS_OK;
}

static int fill_put(ps_saver *s, const uint8_t *unit, size_t size,
                    uint32_t hash, uint32_t *index, ps_error *err)
{
    ps_array *a = &s->fills;
    uint64_t value = 0;
    ps_fill *fill;

    if (a->free == 0 && array_reserve(a, sizeof(ps_fill), err)) {
        return err->code;
    }
    *index = a->free ? a->free - 1 : a->count;
    if (size <= sizeof(value)) {
        memcpy(&value, unit, size);
    } else {
        value = *index;
        if (ps_pwrite_all(s->options.units_fd, unit, size, value * PS_FILL_SLOT,
                          units_writing, err)) {
            err->offset = PS_NOWHERE;
            return err->code;
        }
    }
    fill = ps_saver_fill(s, *index);
    if (a->free) {
        a->free = (uint32_t)fill->value;
    } else {
        a->count++;
    }
    fill->unit = value;
    fill->value = UINT64_MAX;
    fill->refs = 1;
    fill->hash = hash;
    return PS_OK;
}

static int intern_fill(ps_saver *s, const uint8_t *unit, uint32_t log2,
                       uint32_t *ref, ps_error *err)
{
    ps_hash *h = &s->fill_hash;
    size_t size = (size_t)1 << log2;
    uint32_t hash =
        (uint32_t)(XXH3_64bits(unit, size) & s->signature_mask) << 3 | log2;
    uint32_t index = 0;

    if (hash_reserve(s, h, hash_of_fill, err)) {
        return err->code;
    }
    for (uint64_t at = (hash >> 3) & h->mask; h->slots[at] != 0;
         at = (at + 1) & h->mask) {
        ps_fill *fill;
        bool same = false;

        index = h->slots[at] - 1;
        fill = ps_saver_fill(s, index);
        if (fill->hash != hash) {
            continue;
        }
        if (fill_same(s, fill, unit, size, &same, err)) {
            return err->code;
        }
        if (same) {
            fill->refs++;
            *ref = PS_REF_FILL | (index + 1);
            return PS_OK;
        }
    }
    if (fill_put(s, unit, size, hash, &index, err)) {
        return err->code;
    }
    hash_put(h, hash >> 3, index);
    *ref = PS_REF_FILL | (index + 1);
    return PS_OK;
}

static void release_fill(ps_saver *s, uint32_t index)
{
    ps_fill *fill = ps_saver_fill(s, index);

    if (--fill->refs > 0) {
        return;
    }
    hash_remove(s, &s->fill_hash, hash_of_fill, index);
    fill->value = s->fills.free;
    s->fills.free = index + 1;
}

/* ---------------------------------------------------------------- page map */

static void release(ps_saver *s, uint32_t ref)
{
    if (ref & PS_REF_FILL) {
        release_fill(s, (ref & ~PS_REF_FILL) - 1);
        s->stats.pages_fill--;
    } else if (ref) {
        release_data(s, ref - 1);
    } else {
        s->stats.pages_zero--;
    }
}

/* The page has this content now; what it had before is forgotten. */
static int set_page(ps_saver *s, uint32_t block, uint64_t page_offset,
                    uint32_t ref, ps_error *err)
{
    ps_saver_block *b = &s->blocks[block];
    uint64_t page =
        b->first_leaf * PS_LEAF_PAGES + (page_offset >> PS_PAGE_BITS);
    uint64_t group = page / PS_GROUP_PAGES;
    uint64_t bit = UINT64_C(1) << (page & 63);
    bool resent = (s->seen[page / 64] & bit) != 0;
    uint32_t old = 0;

    if (s->groups[group] != 0 || ref != 0) {
        uint32_t *place;

        if (s->groups[group] == 0) {
            if (array_reserve(&s->refs, PS_GROUP_PAGES * sizeof(uint32_t),
                              err)) {
                return err->code;
            }
            s->groups[group] = ++s->refs.count;
        }
        place = &ps_saver_refs(s, group)[page % PS_GROUP_PAGES];
        old = *place;
        *place = ref;
    }
    s->stats.pages_seen++;
    if (resent) {
        s->stats.pages_resent++;
        release(s, old);
    } else {
        s->seen[page / 64] |= bit;
        b->seen++;
    }
    if (ref == 0) {
        s->stats.pages_zero++;
    } else if (ref & PS_REF_FILL) {
        s->stats.pages_fill++;
    }
    return PS_OK;
}

static int take_page(ps_saver *s, const ps_event *event, ps_error *err)
{
    ps_page_info info;
    uint32_t ref = 0;

    ps_page_classify(event->data, &info);
    if (info.page_class == PS_CLASS_DATA) {
        if (intern_data(s, event->data, &info, &ref, err)) {
            return err->code;
        }
    } else if (info.page_class == PS_CLASS_FILL) {
        if (intern_fill(s, event->data, info.unit_log2, &ref, err)) {
            return err->code;
        }
    }
    return set_page(s, event->block, event->page_offset, ref, err);
}

/* --------------------------------------------------------- everything else */

static int take_block(ps_saver *s, const ps_event *event, ps_error *err)
{
    ps_saver_block *block;

    if (s->block_count == s->block_capacity) {
        uint32_t capacity = s->block_capacity ? 2 * s->block_capacity : 16;
        void *blocks = realloc(s->blocks, capacity * sizeof(*s->blocks));

        if (!blocks) {
            return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE,
                           "out of memory for the RAM block list");
        }
        s->blocks = blocks;
        s->block_capacity = capacity;
    }
    block = &s->blocks[s->block_count++];
    memset(block, 0, sizeof(*block));
    block->length = event->length;
    block->page_size = event->page_size;
    block->address = event->address;
    block->pages = event->length >> PS_PAGE_BITS;
    block->first_leaf = s->leaves;
    block->name_length = (uint8_t)event->name_length;
    memcpy(block->name, event->name, event->name_length);
    s->leaves += ps_leaves_of(block->pages);
    s->stats.ram_bytes += event->length;
    return PS_OK;
}

static int take_blocks_end(ps_saver *s, ps_error *err)
{
    void *memory;

    if (s->leaves > PS_MAX_LEAVES) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, PS_NOWHERE,
                       "the guest has more than 2^32 pages");
    }
    if (ps_reserve((size_t)(s->leaves * PS_LEAF_PAGES / 8), &memory, err)) {
        return err->code;
    }
    s->seen = memory;
    if (ps_reserve((size_t)(s->leaves * PS_LEAF_GROUPS * sizeof(uint32_t)),
                   &memory, err)) {
        return err->code;
    }
    s->groups = memory;
    return PS_OK;
}

static int keep_section(ps_saver *s, uint32_t type, const uint8_t *data,
                        size_t length, ps_error *err)
{
    uint8_t *copy = malloc(length ? length : 1);

    if (!copy) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE,
                       "out of memory for a section of %zu bytes", length);
    }
    if (length > 0) {
        memcpy(copy, data, length);
    }
    free(s->sections[type].data);
    s->sections[type].data = copy;
    s->sections[type].length = length;
    return PS_OK;
}

static int take_event(ps_saver *s, const ps_event *event, ps_error *err)
{
    switch (event->type) {
    case PS_EVENT_PAGE:
        return take_page(s, event, err);
    case PS_EVENT_ZERO:
        return set_page(s, event->block, event->page_offset, 0, err);
    case PS_EVENT_BLOCK:
        return take_block(s, event, err);
    case PS_EVENT_BLOCKS_END:
        return take_blocks_end(s, err);
    case PS_EVENT_CONFIGURATION:
        return keep_section(s, PS_SECTION_CONFIGURATION, event->data,
                            event->data_length, err);
    case PS_EVENT_DEVICES:
        return keep_section(s, PS_SECTION_DEVICES, event->data,
                            event->data_length, err);
    case PS_EVENT_DESCRIPTION:
        return keep_section(s, PS_SECTION_DESCRIPTION, event->data,
                            event->data_length, err);
    default:
        return PS_OK;
    }
}

static int feed_part(ps_saver *s, const uint8_t *in, size_t length,
                     ps_error *err)
{
    size_t done = 0;
    ps_event event;

    do {
        size_t used;

        if (ps_parser_push(s->parser, in + done, length - done, &used, &event,
                           err) ||
            take_event(s, &event, err)) {
            return err->code;
        }
        done += used;
    } while (event.type != PS_EVENT_NONE);
    s->stats.bytes_in += length;
    return PS_OK;
}

int ps_saver_feed(ps_saver *saver, const uint8_t *in, size_t length,
                  ps_error *err)
{
    ps_saver *s = saver;

    if (s->error.code) {
        *err = s->error;
        return err->code;
    }
    if (!s->parser) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "input after the end of the stream");
    }
    while (length > 0) {
        size_t part = length < INPUT_BYTES ? length : INPUT_BYTES;

        if (ps_saver_is_cancelled(s)) {
            return ps_saver_cancelled(err);
        }
        if (feed_part(s, in, part, err)) {
            ps_saver_publish(s);
            return saver_failed(s, err);
        }
        ps_saver_publish(s);
        in += part;
        length -= part;
    }
    return PS_OK;
}

/* Wait until there is something to read, or for a cancel. */
static int wait_readable(ps_saver *s, int fd, ps_error *err)
{
    struct pollfd fds[] = {
        {.fd = fd, .events = POLLIN},
        {.fd = s->cancel_fd, .events = POLLIN},
    };

    while (poll(fds, 2, -1) < 0) {
        if (errno != EINTR) {
            return ps_fail_errno(err, PS_NOWHERE, "waiting for the stream");
        }
    }
    return ps_saver_is_cancelled(s) ? ps_saver_cancelled(err) : PS_OK;
}

int ps_saver_drain(ps_saver *saver, int fd, ps_error *err)
{
    ps_saver *s = saver;

    if (fd < 0) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "no descriptor to read the stream from");
    }
    for (;;) {
        ssize_t n;

        if (wait_readable(s, fd, err)) {
            return err->code;
        }
        n = read(fd, s->input, INPUT_BYTES);
        if (n < 0 && (errno == EINTR || errno == EAGAIN)) {
            continue;
        }
        if (n < 0) {
            return ps_fail_errno(err, s->stats.bytes_in, "reading the stream");
        }
        if (n == 0) {
            return PS_OK;
        }
        if (ps_saver_feed(s, s->input, (size_t)n, err)) {
            return err->code;
        }
    }
}

/* The first page that never came, by name and offset. */
static int check_complete(const ps_saver *s, ps_error *err)
{
    for (uint32_t i = 0; i < s->block_count; i++) {
        const ps_saver_block *b = &s->blocks[i];
        uint64_t first = b->first_leaf * PS_LEAF_PAGES;
        uint64_t page = 0;

        if (b->seen == b->pages) {
            continue;
        }
        while (s->seen[(first + page) / 64] >> ((first + page) & 63) & 1) {
            page++;
        }
        if (b->address != UINT64_MAX) {
            return ps_fail(err, PS_ERR_UNSUPPORTED, PS_NOWHERE,
                           "RAM block '%.*s' was saved with x-ignore-shared: "
                           "its memory is not in the stream, from offset "
                           "0x%llx on",
                           b->name_length > 60 ? 60 : b->name_length, b->name,
                           (unsigned long long)(page << PS_PAGE_BITS));
        }
        return ps_fail(err, PS_ERR_TRUNCATED, PS_NOWHERE,
                       "%llu pages of RAM block '%.*s' are not in the stream, "
                       "the first at offset 0x%llx",
                       (unsigned long long)(b->pages - b->seen),
                       b->name_length > 60 ? 60 : b->name_length, b->name,
                       (unsigned long long)(page << PS_PAGE_BITS));
    }
    return PS_OK;
}

static int end_stream(ps_saver *s, ps_error *err)
{
    ps_event event = {.type = PS_EVENT_NONE};

    while (event.type != PS_EVENT_END) {
        if (ps_parser_finish(s->parser, &event, err) ||
            take_event(s, &event, err)) {
            return err->code;
        }
    }
    if (check_complete(s, err) || spool_flush(s, err)) {
        return err->code;
    }
    ps_parser_info(s->parser, &s->stream);
    ps_parser_destroy(s->parser);
    s->parser = NULL;
    s->ended = true;
    /* Nothing is looked up any more. */
    hash_free(&s->canonical_hash);
    hash_free(&s->fill_hash);
    return PS_OK;
}

int ps_saver_end(ps_saver *saver, ps_error *err)
{
    ps_saver *s = saver;
    int code;

    if (s->error.code) {
        *err = s->error;
        return err->code;
    }
    if (s->ended) {
        return PS_OK;
    }
    if (ps_saver_is_cancelled(s)) {
        return ps_saver_cancelled(err);
    }
    code = end_stream(s, err);
    ps_saver_publish(s);
    return code ? saver_failed(s, err) : PS_OK;
}

void ps_saver_stream_info(const ps_saver *saver, ps_stream_info *out)
{
    if (saver->parser) {
        ps_parser_info(saver->parser, out);
    } else {
        *out = saver->stream;
    }
}

uint32_t ps_saver_block_count(const ps_saver *saver)
{
    return saver->block_count;
}

int ps_saver_ram_block(const ps_saver *saver, uint32_t index, ps_ram_block *out,
                       ps_error *err)
{
    const ps_saver_block *block;

    if (index >= saver->block_count) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "there is no RAM block %u", index);
    }
    block = &saver->blocks[index];
    *out = (ps_ram_block){
        .length = block->length,
        .page_size = block->page_size,
        .address = block->address,
        .first_leaf = block->first_leaf,
    };
    memcpy(out->name, block->name, block->name_length);
    return PS_OK;
}

int ps_saver_section(ps_saver *saver, uint32_t type, const uint8_t **data,
                     size_t *length, ps_error *err)
{
    if (type >= PS_KEPT_SECTIONS || type < PS_SECTION_META ||
        type == PS_SECTION_STREAM) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "section %u is not kept", type);
    }
    *data = saver->sections[type].data;
    *length = saver->sections[type].length;
    return PS_OK;
}

int ps_saver_set_section(ps_saver *saver, uint32_t type, const uint8_t *data,
                         size_t length, ps_error *err)
{
    uint64_t most;

    switch (type) {
    case PS_SECTION_META:
        most = PS_MAX_META_BYTES;
        break;
    case PS_SECTION_CONFIGURATION:
        most = PS_MAX_CONFIGURATION_BYTES;
        break;
    case PS_SECTION_DEVICES:
        most = PS_MAX_DEVICE_BYTES;
        break;
    default:
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "section %u cannot be set", type);
    }
    if (length > most) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "section %u is larger than %llu bytes", type,
                       (unsigned long long)most);
    }
    return keep_section(saver, type, data, length, err);
}

void ps_saver_cancel(ps_saver *saver)
{
    uint64_t one = 1;

    atomic_store_explicit(&saver->cancelled, true, memory_order_relaxed);
    /* Wakes a drain that waits; can only fail when it is set already. */
    if (write(saver->cancel_fd, &one, sizeof(one)) < 0) {
        return;
    }
}

void ps_saver_set_signature_mask(ps_saver *saver, uint64_t mask)
{
    saver->signature_mask = mask;
}

static int check_options(const ps_saver_options *o, ps_error *err)
{
    if (o->pages_per_block == 0 ||
        o->pages_per_block > PS_MAX_PAGES_PER_BLOCK ||
        (o->pages_per_block & (o->pages_per_block - 1))) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "%u pages per block: not a power of two from 1 to %u",
                       o->pages_per_block, PS_MAX_PAGES_PER_BLOCK);
    }
    if (o->threads == 0 || o->threads > 64) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "%u threads: not from 1 to 64", o->threads);
    }
    if (o->zstd_level != INT32_MIN && (o->zstd_level < ZSTD_minCLevel() ||
                                       o->zstd_level > ZSTD_maxCLevel())) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE, "zstd has no level %d",
                       o->zstd_level);
    }
    return PS_OK;
}

int ps_saver_create(const ps_saver_options *options, ps_saver **out,
                    ps_error *err)
{
    ps_saver *s;

    if (check_options(options, err)) {
        return err->code;
    }
    s = calloc(1, sizeof(*s));
    if (!s) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE,
                       "out of memory for the saver");
    }
    s->options = *options;
    s->signature_mask = UINT64_MAX;
    s->spool_buffer = malloc(SPOOL_SLOTS * PS_PAGE_SIZE);
    s->input = malloc(INPUT_BYTES);
    s->scratch = malloc(PS_PAGE_SIZE);
    s->cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!s->spool_buffer || !s->input || !s->scratch) {
        ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "out of memory for the saver");
    } else if (s->cancel_fd < 0) {
        ps_fail_errno(err, PS_NOWHERE, "creating an eventfd");
    } else if (ps_parser_create(&s->parser, err) == PS_OK) {
        *out = s;
        return PS_OK;
    }
    ps_saver_destroy(s);
    return err->code;
}

void ps_saver_destroy(ps_saver *saver)
{
    ps_saver *s = saver;

    if (!s) {
        return;
    }
    ps_parser_destroy(s->parser);
    for (size_t i = 0; i < PS_KEPT_SECTIONS; i++) {
        free(s->sections[i].data);
    }
    free(s->blocks);
    ps_spaces_destroy(s->spaces);
    ps_unreserve(s->seen, (size_t)(s->leaves * PS_LEAF_PAGES / 8));
    ps_unreserve(s->groups,
                 (size_t)(s->leaves * PS_LEAF_GROUPS * sizeof(uint32_t)));
    array_free(&s->refs);
    array_free(&s->canonicals);
    array_free(&s->fills);
    hash_free(&s->canonical_hash);
    hash_free(&s->fill_hash);
    free(s->spool_buffer);
    free(s->input);
    free(s->scratch);
    if (s->cancel_fd >= 0) {
        close(s->cancel_fd);
    }
    free(s);
}
