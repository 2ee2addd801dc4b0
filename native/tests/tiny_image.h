/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The smallest encoder of snapshots, for tests of what reads them: pages are
 * made by formula, so that a test knows every byte without keeping it, and
 * the test decides which page lies in which locality block.
 */
#ifndef PS_TESTS_TINY_IMAGE_H
#define PS_TESTS_TINY_IMAGE_H

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>
#include <zstd.h>

#include "format.h"

#define TINY_BLOCKS 4u

/* A page: its class, and for fill and data which content. */
typedef struct tiny_page {
    uint32_t page_class;
    uint32_t id;
} tiny_page;

typedef struct tiny_image {
    /* Set by the test. */
    uint32_t pages_per_block;
    bool zstd;
    bool footers;
    bool backwards; /* canonical pages in descending order of their owners */
    uint32_t blocks;
    const char *name[TINY_BLOCKS];
    uint64_t pages[TINY_BLOCKS];
    tiny_page (*page)(uint32_t block, uint64_t page);
    const ps_format_space *spaces;
    uint32_t space_count;
    const ps_format_run *runs;
    uint32_t run_count;
    /* Made. */
    int fd;
    uint64_t canonical_pages;
    uint64_t *block_offset;
    uint32_t *block_length;
} tiny_image;

#define TINY_SECTION_ID 3u

/* 4096 bytes of a page. Data: no two ids have a common prefix. */
static inline void tiny_content(tiny_page page, uint8_t *out)
{
    uint64_t x = page.id * UINT64_C(0x9e3779b97f4a7c15) + 1;
    uint32_t unit = page.id | 0x01000000u;

    memset(out, 0, PS_PAGE_SIZE);
    if (page.page_class == PS_CLASS_FILL) {
        for (size_t i = 0; i < PS_PAGE_SIZE; i += sizeof(unit)) {
            memcpy(out + i, &unit, sizeof(unit));
        }
    } else if (page.page_class == PS_CLASS_DATA) {
        memcpy(out, &page.id, sizeof(page.id));
        for (size_t i = 8; i < PS_PAGE_SIZE; i += 16) { /* half zero */
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            memcpy(out + i, &x, sizeof(x));
        }
    }
}

typedef struct tiny_section {
    uint32_t type;
    uint32_t record;
    const void *data;
    size_t length;
} tiny_section;

static inline uint64_t tiny_put(int fd, uint64_t *at, uint64_t align,
                                const void *data, size_t length)
{
    uint64_t offset = (*at + align - 1) / align * align;

    if (pwrite(fd, data, length, (off_t)offset) != (ssize_t)length) {
        perror("tiny_image");
        abort();
    }
    *at = offset + length;
    return offset;
}

static inline void *tiny_alloc(size_t length)
{
    void *p = calloc(1, length ? length : 1);

    if (!p) {
        abort();
    }
    return p;
}

/* Canonical numbers by content id, owners by canonical number. */
typedef struct tiny_index {
    uint64_t *entries;
    uint64_t leaves;
    uint32_t *number; /* by id, UINT32_MAX: none */
    uint32_t *id;     /* by canonical number */
    uint32_t *owner;
    uint64_t count;
} tiny_index;

static inline void tiny_number(const tiny_image *tiny, tiny_index *index)
{
    uint64_t total, leaf = 0, n = 0;

    for (uint32_t b = 0; b < tiny->blocks; b++) {
        leaf += (tiny->pages[b] + PS_LEAF_PAGES - 1) / PS_LEAF_PAGES;
    }
    index->leaves = leaf;
    total = leaf * PS_LEAF_PAGES;
    index->entries = tiny_alloc(total * 8);
    index->number = tiny_alloc((total + 1) * 4);
    index->id = tiny_alloc((total + 1) * 4);
    index->owner = tiny_alloc((total + 1) * 4);
    memset(index->number, 0xff, (total + 1) * 4);
    leaf = 0;
    for (uint32_t b = 0; b < tiny->blocks; b++) {
        for (uint64_t p = 0; p < tiny->pages[b]; p++) {
            tiny_page page = tiny->page(b, p);
            uint64_t global = leaf * PS_LEAF_PAGES + p;

            if (page.page_class == PS_CLASS_DATA) {
                if (page.id > total) {
                    abort();
                }
                if (index->number[page.id] == UINT32_MAX) {
                    index->number[page.id] = (uint32_t)n;
                    index->id[n] = page.id;
                    index->owner[n++] = (uint32_t)global;
                }
                index->entries[global] =
                    ps_entry_make(PS_CLASS_DATA, 0, index->number[page.id]);
            } else if (page.page_class == PS_CLASS_FILL) {
                index->entries[global] =
                    ps_entry_make(PS_CLASS_FILL, 2, page.id | 0x01000000u);
            } else {
                index->entries[global] = page.page_class;
            }
        }
        leaf += (tiny->pages[b] + PS_LEAF_PAGES - 1) / PS_LEAF_PAGES;
    }
    index->count = n;
    if (tiny->backwards) {
        for (uint64_t i = 0; i < n / 2; i++) {
            uint32_t id = index->id[i], owner = index->owner[i];

            index->id[i] = index->id[n - 1 - i];
            index->owner[i] = index->owner[n - 1 - i];
            index->id[n - 1 - i] = id;
            index->owner[n - 1 - i] = owner;
        }
        for (uint64_t i = 0; i < total; i++) {
            if (ps_entry_class(index->entries[i]) == PS_CLASS_DATA) {
                index->entries[i] =
                    ps_entry_make(PS_CLASS_DATA, 0,
                                  n - 1 - ps_entry_value(index->entries[i]));
            }
        }
    }
}

/* The canonical pages, block by block. */
static inline void tiny_put_blocks(tiny_image *tiny, const tiny_index *index,
                                   uint64_t *at, ps_format_block *records,
                                   ps_format_signature *signatures)
{
    size_t whole = tiny->pages_per_block * PS_PAGE_SIZE;
    uint8_t *plain = tiny_alloc(whole);
    uint8_t *packed = tiny_alloc(ZSTD_compressBound(whole));

    for (uint64_t c = 0; c < index->count; c += tiny->pages_per_block) {
        uint64_t number = c / tiny->pages_per_block;
        size_t length = 0, stored;
        bool zstd = tiny->zstd;

        for (uint64_t i = c; i < c + tiny->pages_per_block && i < index->count;
             i++) {
            tiny_page page = {PS_CLASS_DATA, index->id[i]};
            XXH128_hash_t hash;

            tiny_content(page, plain + length);
            hash = XXH3_128bits(plain + length, PS_PAGE_SIZE);
            signatures[i].low = hash.low64;
            signatures[i].high = hash.high64;
            length += PS_PAGE_SIZE;
        }
        stored = length;
        if (zstd) {
            stored = ZSTD_compress(packed, ZSTD_compressBound(whole), plain,
                                   length, 1);
            zstd = !ZSTD_isError(stored) && stored < length;
            stored = zstd ? stored : length;
        }
        records[number].length = (uint32_t)stored;
        records[number].form = zstd ? PS_BLOCK_ZSTD : PS_BLOCK_RAW;
        records[number].checksum = XXH3_64bits(zstd ? packed : plain, stored);
        records[number].offset = tiny_put(tiny->fd, at, zstd ? 1 : 4096,
                                          zstd ? packed : plain, stored);
        tiny->block_offset[number] = records[number].offset;
        tiny->block_length[number] = (uint32_t)stored;
    }
    free(plain);
    free(packed);
}

/* Top map and leaves; uniform leaves have no entries of their own. */
static inline uint64_t tiny_leaves(const tiny_index *index, uint64_t *top,
                                   uint64_t *leaves)
{
    uint64_t stored = 0;

    for (uint64_t leaf = 0; leaf < index->leaves; leaf++) {
        const uint64_t *from = index->entries + leaf * PS_LEAF_PAGES;
        bool uniform = ps_entry_class(from[0]) != PS_CLASS_DATA;

        for (uint32_t i = 1; i < PS_LEAF_PAGES; i++) {
            uniform &= from[i] == from[0];
        }
        if (uniform) {
            top[leaf] = from[0];
            continue;
        }
        top[leaf] = ps_entry_make(PS_CLASS_LEAF, 0, stored);
        memcpy(leaves + stored * PS_LEAF_PAGES, from, PS_LEAF_PAGES * 8);
        stored++;
    }
    return stored;
}

static inline void tiny_ram_blocks(const tiny_image *tiny,
                                   const tiny_index *index,
                                   ps_format_ram_block *out)
{
    uint64_t leaf = 0;

    for (uint32_t b = 0; b < tiny->blocks; b++) {
        uint64_t counts[4] = {0};

        for (uint64_t p = 0; p < tiny->pages[b]; p++) {
            counts[ps_entry_class(index->entries[leaf * PS_LEAF_PAGES + p])]++;
        }
        out[b].name_length = (uint8_t)strlen(tiny->name[b]);
        memcpy(out[b].name, tiny->name[b], out[b].name_length);
        out[b].length = tiny->pages[b] * PS_PAGE_SIZE;
        out[b].address = UINT64_MAX;
        out[b].first_leaf = leaf;
        out[b].pages_absent = counts[PS_CLASS_ABSENT];
        out[b].pages_zero = counts[PS_CLASS_ZERO];
        out[b].pages_fill = counts[PS_CLASS_FILL];
        out[b].pages_data = counts[PS_CLASS_DATA];
        leaf += (tiny->pages[b] + PS_LEAF_PAGES - 1) / PS_LEAF_PAGES;
    }
}

static inline void tiny_finish(const tiny_image *tiny, uint64_t at,
                               const tiny_section *sections, size_t count)
{
    ps_format_header header = {.version = PS_FORMAT_VERSION,
                               .header_length = PS_HEADER_LENGTH,
                               .pages_per_block = tiny->pages_per_block};
    ps_format_trailer trailer = {0};
    ps_format_section *table = tiny_alloc(count * sizeof(*table));

    memcpy(header.magic, PS_HEADER_MAGIC, PS_MAGIC_LENGTH);
    memset(header.uuid, 0x42, sizeof(header.uuid));
    header.uuid[6] = 0x40;
    header.uuid[8] = 0x80;
    header.checksum =
        XXH3_64bits(&header, offsetof(ps_format_header, checksum));
    for (size_t i = 0; i < count; i++) {
        uint64_t chunks = ps_chunks_of(sections[i].length);
        uint64_t *sums = tiny_alloc(chunks * 8);

        for (uint64_t c = 0; c < chunks; c++) {
            size_t from = c * PS_CHUNK_SIZE;
            size_t n = sections[i].length - from;

            sums[c] = XXH3_64bits((const uint8_t *)sections[i].data + from,
                                  n < PS_CHUNK_SIZE ? n : PS_CHUNK_SIZE);
        }
        table[i].type = sections[i].type;
        table[i].flags = sections[i].type <= PS_SECTION_OWNERS
                             ? PS_SECTION_FLAG_REQUIRED
                             : 0;
        table[i].record_size = sections[i].record;
        table[i].length = sections[i].length;
        table[i].sums_checksum = XXH3_64bits(sums, chunks * 8);
        if (sections[i].length) {
            table[i].offset = tiny_put(tiny->fd, &at, 8, sections[i].data,
                                       sections[i].length);
            table[i].sums_offset = tiny_put(tiny->fd, &at, 8, sums, chunks * 8);
        }
        free(sums);
    }
    trailer.table_length = count * sizeof(*table);
    trailer.table_checksum = XXH3_64bits(table, trailer.table_length);
    trailer.table_offset =
        tiny_put(tiny->fd, &at, 8, table, trailer.table_length);
    trailer.file_length = at + sizeof(trailer);
    memcpy(trailer.uuid, header.uuid, sizeof(header.uuid));
    trailer.checksum =
        XXH3_64bits(&trailer, offsetof(ps_format_trailer, checksum));
    memcpy(trailer.magic, PS_TRAILER_MAGIC, PS_MAGIC_LENGTH);
    tiny_put(tiny->fd, &at, 1, &trailer, sizeof(trailer));
    at = 0;
    tiny_put(tiny->fd, &at, 1, &header, sizeof(header));
    free(table);
}

static inline int tiny_run_order(const void *a, const void *b)
{
    const ps_format_run_index *x = a, *y = b;

    return (x->first > y->first) - (x->first < y->first);
}

static inline ps_format_run_index *tiny_run_index(const tiny_image *tiny)
{
    ps_format_run_index *index = tiny_alloc(tiny->run_count * sizeof(*index));

    for (uint32_t space = 0; space < tiny->space_count; space++) {
        const ps_format_space *from = &tiny->spaces[space];

        for (uint64_t i = 0; i < from->run_count; i++) {
            uint32_t run = (uint32_t)(from->first_run + i);

            index[run] = (ps_format_run_index){
                .first = tiny->runs[run].first,
                .run = run,
                .space = space,
                .pages = tiny->runs[run].pages,
            };
        }
    }
    qsort(index, tiny->run_count, sizeof(*index), tiny_run_order);
    return index;
}

static inline void tiny_make(tiny_image *tiny)
{
    ps_format_stream stream = {.stream_version = 3,
                               .ram_section_id = TINY_SECTION_ID,
                               .ram_version = 4,
                               .flags = tiny->footers ? PS_STREAM_FOOTERS : 0,
                               .page_bits = 12};
    ps_format_ram_block ram[TINY_BLOCKS] = {0};
    ps_format_signature *signatures;
    ps_format_block *records;
    ps_format_run_index *run_index = tiny_run_index(tiny);
    tiny_index index = {0};
    uint64_t *top, *leaves, stored, blocks, at = PS_HEADER_LENGTH;

    tiny->fd = memfd_create("tiny.psnap", MFD_CLOEXEC);
    tiny_number(tiny, &index);
    tiny->canonical_pages = index.count;
    blocks = (index.count + tiny->pages_per_block - 1) / tiny->pages_per_block;
    tiny->block_offset = tiny_alloc(blocks * 8);
    tiny->block_length = tiny_alloc(blocks * 4);
    records = tiny_alloc(blocks * sizeof(*records));
    signatures = tiny_alloc(index.count * sizeof(*signatures));
    tiny_put_blocks(tiny, &index, &at, records, signatures);
    top = tiny_alloc(index.leaves * 8);
    leaves = tiny_alloc(index.leaves * 4096);
    stored = tiny_leaves(&index, top, leaves);
    tiny_ram_blocks(tiny, &index, ram);
    tiny_finish(
        tiny, at,
        (const tiny_section[]){
            {PS_SECTION_STREAM, 40, &stream, sizeof(stream)},
            {PS_SECTION_DEVICES, 1, NULL, 0},
            {PS_SECTION_RAM_BLOCKS, 320, ram, tiny->blocks * sizeof(ram[0])},
            {PS_SECTION_TOP_MAP, 8, top, index.leaves * 8},
            {PS_SECTION_LEAVES, 4096, leaves, stored * 4096},
            {PS_SECTION_FILL_UNITS, 8, NULL, 0},
            {PS_SECTION_BLOCK_INDEX, 24, records, blocks * sizeof(*records)},
            {PS_SECTION_SIGNATURES, 16, signatures,
             index.count * sizeof(*signatures)},
            {PS_SECTION_OWNERS, 4, index.owner, index.count * 4},
            {PS_SECTION_SPACES, 64, tiny->spaces, tiny->space_count * 64},
            {PS_SECTION_VIRTUAL_RUNS, 16, tiny->runs, tiny->run_count * 16},
            {PS_SECTION_RUN_INDEX, 16, run_index, tiny->run_count * 16},
        },
        12);
    free(run_index);
    free(records);
    free(signatures);
    free(top);
    free(leaves);
    free(index.entries);
    free(index.number);
    free(index.id);
    free(index.owner);
}

static inline void tiny_free(tiny_image *tiny)
{
    close(tiny->fd);
    free(tiny->block_offset);
    free(tiny->block_length);
}

#endif
