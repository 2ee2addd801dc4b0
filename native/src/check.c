/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * ps_image_check(): every rule of FORMAT.md, also those that no read depends
 * on. What open and first use enforce is checked by using it.
 */
#include "image.h"

#include <stdarg.h>
#include <stdio.h>
#include <xxhash.h>
#include <zstd.h>

typedef struct checker {
    ps_image *image;
    ps_job *job;
    ps_error *errors;
    size_t capacity;
    size_t count;
    uint64_t next_leaf; /* that the top map should refer to */
} checker;

static void check_add(checker *check, const ps_error *found)
{
    if (check->count < check->capacity) {
        check->errors[check->count] = *found;
    }
    check->count++;
}

__attribute__((format(printf, 3, 4))) static void
check_damage(checker *check, uint64_t offset, const char *format, ...)
{
    ps_error found = {.code = PS_ERR_DAMAGED, .offset = offset};
    va_list args;

    va_start(args, format);
    vsnprintf(found.message, sizeof(found.message), format, args);
    va_end(args);
    check_add(check, &found);
}

/* Of a failed read: damage is noted and the check goes on; what says nothing
   about the file ends it. */
static int check_failed(checker *check, const ps_error *err)
{
    switch (err->code) {
    case PS_ERR_DAMAGED:
    case PS_ERR_TRUNCATED:
    case PS_ERR_IO:
        check_add(check, err);
        return PS_OK;
    default:
        return err->code;
    }
}

static int check_progress(checker *check, uint64_t bytes, ps_error *err)
{
    if (!check->job) {
        return PS_OK;
    }
    __atomic_fetch_add(&check->job->done, bytes, __ATOMIC_RELAXED);
    if (__atomic_load_n(&check->job->cancel, __ATOMIC_RELAXED)) {
        return ps_fail(err, PS_ERR_CANCELLED, PS_NOWHERE, "cancelled");
    }
    return PS_OK;
}

/* Every chunk of a section is there and right. */
static int check_section(checker *check, ps_section *section, bool *sound,
                         ps_error *err)
{
    uint64_t chunks = ps_chunks_of(section->length);
    int ret = PS_OK;

    *sound = true;
    for (uint64_t chunk = 0; !ret && chunk < chunks; chunk++) {
        if (!ps_section_chunk_loaded(section, chunk)) {
            ret = ps_section_load(check->image, section, chunk, chunk, err);
        }
        if (ret) {
            *sound = false;
            ret = check_failed(check, err);
            if (!section->bytes) {
                break; /* its checksums are wrong: no chunk can be read */
            }
        }
        if (!ret) {
            ret = check_progress(check, ps_chunk_length(section, chunk), err);
        }
    }
    return ret;
}

/* The unit is the shortest one: of units of 2^n bytes one is shorter than
   another of the same page exactly if that one's halves are equal. */
static int check_fill(checker *check, uint64_t entry, uint64_t at,
                      ps_error *err)
{
    uint8_t unit[1u << PS_FILL_MAX_LOG2];
    size_t length;
    int ret = ps_image_fill_unit(check->image, entry, unit, &length, err);

    if (ret) {
        return check_failed(check, err);
    }
    if (length == 1 ? unit[0] == 0
                    : memcmp(unit, unit + length / 2, length / 2) == 0) {
        check_damage(check, at, "page map: a fill page has a shorter unit");
    }
    return PS_OK;
}

/* One leaf's worth of the map; counts classes of the pages that are there. */
static int check_leaf(checker *check, uint64_t number, uint64_t pages,
                      uint64_t counts[4], ps_error *err)
{
    ps_image *image = check->image;
    uint64_t at = image->sections[PS_SECTION_TOP_MAP].offset + number * 8;
    const uint64_t *entries;
    uint64_t top, leaf;
    int ret = ps_image_top_entry(image, number, &top, err);

    if (ret) {
        return check_failed(check, err);
    }
    if (ps_entry_class(top) != PS_CLASS_LEAF) {
        counts[ps_entry_class(top)] += pages;
        return ps_entry_class(top) == PS_CLASS_FILL
                   ? check_fill(check, top, at, err)
                   : PS_OK;
    }
    leaf = ps_entry_value(top);
    if (leaf != check->next_leaf) {
        check_damage(check, at, "top map, entry %llu: leaf %llu, not %llu",
                     (unsigned long long)number, (unsigned long long)leaf,
                     (unsigned long long)check->next_leaf);
    }
    check->next_leaf = leaf + 1;
    ret = ps_image_leaf(image, leaf, &entries, err);
    if (ret) {
        return check_failed(check, err);
    }
    at = image->sections[PS_SECTION_LEAVES].offset + (leaf << PS_CHUNK_BITS);
    for (uint64_t i = 0; !ret && i < PS_LEAF_PAGES; i++) {
        if (i >= pages) {
            if (entries[i] != 0) {
                check_damage(check, at + i * 8,
                             "leaf %llu, entry %llu: not 0 beyond the end of "
                             "its RAM block",
                             (unsigned long long)leaf, (unsigned long long)i);
            }
            continue;
        }
        counts[ps_entry_class(entries[i])]++;
        if (ps_entry_class(entries[i]) == PS_CLASS_FILL) {
            ret = check_fill(check, entries[i], at + i * 8, err);
        }
    }
    return ret;
}

static int check_map(checker *check, ps_error *err)
{
    ps_image *image = check->image;
    int ret = PS_OK;

    for (uint32_t i = 0; !ret && i < image->ram_count; i++) {
        const ps_ram_block *ram = &image->ram_blocks[i];
        uint64_t pages = image->ram[i].pages;
        uint64_t counts[4] = {0};

        for (uint64_t first = 0; !ret && first < pages;
             first += PS_LEAF_PAGES) {
            uint64_t left = pages - first;

            ret = check_leaf(check, ram->first_leaf + (first >> PS_LEAF_BITS),
                             left < PS_LEAF_PAGES ? left : PS_LEAF_PAGES,
                             counts, err);
        }
        if (!ret && (counts[PS_CLASS_ZERO] != ram->pages_zero ||
                     counts[PS_CLASS_FILL] != ram->pages_fill ||
                     counts[PS_CLASS_DATA] != ram->pages_data ||
                     counts[PS_CLASS_ABSENT] != ram->pages_absent)) {
            check_damage(check,
                         image->sections[PS_SECTION_RAM_BLOCKS].offset +
                             i * sizeof(ps_format_ram_block),
                         "RAM block %s: its counts of pages are not those of "
                         "the page map",
                         ram->name);
        }
    }
    if (!ret && check->next_leaf != image->stored_leaves) {
        check_damage(check, image->sections[PS_SECTION_LEAVES].offset,
                     "section LEAVES: %llu leaves, the top map refers to "
                     "%llu",
                     (unsigned long long)image->stored_leaves,
                     (unsigned long long)check->next_leaf);
    }
    return ret;
}

/* Each canonical page is what the entry of its owner refers to; so each is
   referred to. */
static int check_owners(checker *check, ps_error *err)
{
    ps_image *image = check->image;
    int ret = PS_OK;

    for (uint64_t i = 0; !ret && i < image->canonical_pages; i++) {
        uint64_t owner, entry;

        ret = ps_image_owner(image, i, &owner, err);
        if (!ret) {
            ret = ps_image_entry(image, owner, &entry, err);
        }
        if (ret) {
            ret = check_failed(check, err);
        } else if (entry != ps_entry_make(PS_CLASS_DATA, 0, i)) {
            check_damage(check,
                         image->sections[PS_SECTION_OWNERS].offset +
                             i * sizeof(ps_format_owner),
                         "owner of canonical page %llu: page %llu does not "
                         "refer to it",
                         (unsigned long long)i, (unsigned long long)owner);
        }
    }
    return ret;
}

/* The runs of a space ascend and do not overlap. */
static int check_space(checker *check, uint64_t index, uint64_t *next_run,
                       ps_error *err)
{
    ps_image *image = check->image;
    uint64_t at = image->sections[PS_SECTION_SPACES].offset +
                  index * sizeof(ps_format_space);
    uint64_t end = 0;
    ps_space_info space;
    int ret = ps_image_space(image, index, &space, err);

    if (ret) {
        return check_failed(check, err);
    }
    if (space.first_run != *next_run) {
        check_damage(check, at, "space %llu: its runs begin at %llu, not %llu",
                     (unsigned long long)index,
                     (unsigned long long)space.first_run,
                     (unsigned long long)*next_run);
        return PS_OK; /* and no run is looked at twice */
    }
    *next_run = space.first_run + space.run_count;
    for (uint64_t i = space.first_run; !ret && i < *next_run; i++) {
        ps_format_run run;

        ret = ps_image_run(image, i, &run, err);
        if (!ret) {
            ret = check_progress(check, 0, err);
        } else {
            ret = check_failed(check, err);
            continue;
        }
        if (run.address < end) {
            check_damage(check, at, "virtual run %llu: it does not ascend",
                         (unsigned long long)i);
        }
        /* The last page of all may end at 2^64. */
        end = run.address + ((uint64_t)(run.pages - 1) << PS_PAGE_BITS) + 1;
    }
    return ret;
}

/* The index has each run, in order of its first page. */
static int check_run_index(checker *check, ps_error *err)
{
    ps_image *image = check->image;
    const ps_section *section = &image->sections[PS_SECTION_RUN_INDEX];
    uint64_t runs = ps_image_run_count(image);
    PS_AUTOFREE uint8_t *seen = calloc((size_t)(runs / 8 + 1), 1);
    uint64_t before = 0;

    if (!seen) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "out of memory");
    }
    for (uint64_t i = 0; i < runs; i++) {
        uint64_t at = i * sizeof(ps_format_run_index);
        const char *fault = NULL;
        ps_format_run_index entry;
        ps_format_run run;
        ps_space_info space;
        int ret;

        memcpy(&entry, section->bytes + at, sizeof(entry));
        if (entry.run >= runs || entry.reserved != 0 ||
            entry.space >= ps_image_space_count(image)) {
            fault = "there is no such run or space";
        } else if (ps_image_run(image, entry.run, &run, err) ||
                   ps_image_space(image, entry.space, &space, err)) {
            continue; /* said already */
        } else if (run.first != entry.first || run.pages != entry.pages ||
                   entry.run < space.first_run ||
                   entry.run - space.first_run >= space.run_count) {
            fault = "its run is another one";
        } else if (entry.first < before) {
            fault = "it does not ascend";
        } else if (seen[entry.run / 8] >> entry.run % 8 & 1) {
            fault = "its run was named before";
        } else {
            seen[entry.run / 8] |= (uint8_t)(1u << entry.run % 8);
            before = entry.first;
        }
        if (fault) {
            check_damage(check, section->offset + at, "run index %llu: %s",
                         (unsigned long long)i, fault);
        }
        ret = check_progress(check, 0, err);
        if (ret) {
            return ret;
        }
    }
    return PS_OK;
}

static int check_spaces(checker *check, ps_error *err)
{
    uint64_t runs = 0;
    int ret = PS_OK;

    for (uint64_t i = 0; !ret && i < ps_image_space_count(check->image); i++) {
        ret = check_space(check, i, &runs, err);
    }
    if (!ret && runs != ps_image_run_count(check->image)) {
        check_damage(check,
                     check->image->sections[PS_SECTION_VIRTUAL_RUNS].offset,
                     "section VIRTUAL_RUNS: the spaces have %llu runs of %llu",
                     (unsigned long long)runs,
                     (unsigned long long)ps_image_run_count(check->image));
    }
    return ret ? ret : check_run_index(check, err);
}

/* Bytes from .. to of the file are 0. */
static int check_padding(checker *check, uint64_t from, uint64_t to,
                         ps_error *err)
{
    uint8_t buffer[PS_CHUNK_SIZE];

    while (from < to) {
        size_t length =
            to - from < sizeof(buffer) ? (size_t)(to - from) : sizeof(buffer);
        int ret = ps_pread_all(check->image->fd, buffer, length, from,
                               "padding", err);

        if (ret) {
            return check_failed(check, err);
        }
        if (!ps_all_zero(buffer, length)) {
            check_damage(check, from, "padding is not 0");
            return PS_OK;
        }
        from += length;
        ret = check_progress(check, 0, err);
        if (ret) {
            return ret;
        }
    }
    return PS_OK;
}

/* The pages of a decoded block are what their signatures say, and none is
   one that the page map should tell. */
static int check_block_pages(checker *check, const ps_block_info *info,
                             const uint8_t *pages, ps_error *err)
{
    for (uint32_t slot = 0; slot < info->pages; slot++) {
        ps_format_signature want;
        ps_page_info is;
        int ret =
            ps_image_signature(check->image, info->first + slot, &want, err);

        if (ret) {
            return check_failed(check, err);
        }
        ps_page_classify(pages + slot * PS_PAGE_SIZE, &is);
        if (is.page_class != PS_CLASS_DATA) {
            check_damage(check, info->offset,
                         "locality block %llu, page %u: it is a %s page",
                         (unsigned long long)info->number, slot,
                         is.page_class == PS_CLASS_ZERO ? "zero" : "fill");
        } else if (is.signature_low != want.low ||
                   is.signature_high != want.high) {
            check_damage(check, info->offset,
                         "locality block %llu, page %u: signature is wrong",
                         (unsigned long long)info->number, slot);
        }
    }
    return PS_OK;
}

static int check_blocks(checker *check, ps_error *err)
{
    ps_image *image = check->image;
    uint64_t end = PS_HEADER_LENGTH;
    PS_AUTOFREE uint8_t *pages = NULL;
    ps_decoder decoder;
    int ret = ps_decoder_init(&decoder, image, err);

    if (ret) {
        return ret;
    }
    pages = malloc(decoder.capacity);
    if (!pages) {
        ret = ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "out of memory");
    }
    for (uint64_t i = 0; !ret && i < image->locality_blocks; i++) {
        ps_block_info info;

        ret = ps_image_block(image, i, &info, err);
        if (ret) {
            ret = check_failed(check, err);
            continue;
        }
        if (info.offset < end) {
            check_damage(check, info.offset,
                         "locality block %llu: it begins before the end of "
                         "the one before",
                         (unsigned long long)i);
        } else {
            ret = check_padding(check, end, info.offset, err);
        }
        end = info.offset + info.stored;
        if (!ret) {
            ret = ps_decoder_read(&decoder, image->fd, &info, pages, err);
            ret = ret ? check_failed(check, err)
                      : check_block_pages(check, &info, pages, err);
        }
        if (!ret) {
            ret = check_progress(check, info.stored, err);
        }
    }
    if (!ret && end < image->blocks_end) {
        ret = check_padding(check, end, image->blocks_end, err);
    }
    ps_decoder_deinit(&decoder);
    return ret;
}

static void add_part(ps_part *parts, size_t *count, uint64_t offset,
                     uint64_t length)
{
    if (length > 0) {
        parts[(*count)++] = (ps_part){offset, length};
    }
}

static void add_section_parts(ps_part *parts, size_t *count,
                              const ps_section *section)
{
    add_part(parts, count, section->offset, section->length);
    add_part(parts, count, section->sums_offset,
             8 * ps_chunks_of(section->length));
}

/* The padding between sections, checksum arrays, table and trailer. */
static int check_gaps(checker *check, ps_error *err)
{
    ps_image *image = check->image;
    ps_part parts[2 * (PS_SECTION_TYPES + PS_MAX_SECTIONS) + 2];
    size_t count = 0;
    uint64_t end = image->blocks_end;
    int ret = PS_OK;

    for (uint32_t type = 1; type < PS_SECTION_TYPES; type++) {
        add_section_parts(parts, &count, &image->sections[type]);
    }
    for (uint32_t i = 0; i < image->other_count; i++) {
        add_section_parts(parts, &count, &image->other[i]);
    }
    qsort(parts, count, sizeof(parts[0]), ps_part_order);
    add_part(parts, &count, image->table_offset, image->table_length);
    add_part(parts, &count, image->file_length - PS_TRAILER_LENGTH,
             PS_TRAILER_LENGTH);
    for (size_t i = 0; !ret && i < count; i++) {
        ret = check_padding(check, end, parts[i].offset, err);
        end = parts[i].offset + parts[i].length;
    }
    return ret;
}

/* Two canonical pages with one signature: have they one content? */
static int check_pair(checker *check, uint64_t a, uint64_t b, ps_error *err)
{
    uint8_t copy[PS_PAGE_SIZE];
    const uint8_t *page;
    int ret = ps_image_page(check->image, ps_entry_make(PS_CLASS_DATA, 0, a),
                            &page, err);

    if (!ret) {
        memcpy(copy, page, sizeof(copy));
        ret = ps_image_page(check->image, ps_entry_make(PS_CLASS_DATA, 0, b),
                            &page, err);
    }
    if (ret) {
        return err->code == PS_ERR_NOMEM ? ret : PS_OK; /* said already */
    }
    if (memcmp(copy, page, sizeof(copy)) == 0) {
        check_damage(check,
                     check->image->sections[PS_SECTION_SIGNATURES].offset +
                         b * sizeof(ps_format_signature),
                     "canonical pages %llu and %llu have the same content",
                     (unsigned long long)a, (unsigned long long)b);
    }
    return PS_OK;
}

/* No content is stored twice: a hash table of canonical numbers, plus 1. */
static int check_unique(checker *check, ps_error *err)
{
    ps_image *image = check->image;
    const ps_section *section = &image->sections[PS_SECTION_SIGNATURES];
    uint64_t n = image->canonical_pages, mask = 1;
    const ps_format_signature *all =
        (const ps_format_signature *)(const void *)section->bytes;
    uint32_t *table;
    void *memory;
    int ret;

    if (n == 0) {
        return PS_OK;
    }
    while (mask < 2 * n) {
        mask *= 2;
    }
    ret = ps_reserve((size_t)mask * sizeof(*table), &memory, err);
    if (ret) {
        return ret;
    }
    table = memory;
    mask--;
    for (uint64_t i = 0; !ret && i < n && i < UINT32_MAX; i++) {
        uint64_t slot = all[i].low & mask;

        while (table[slot] != 0) {
            uint64_t other = table[slot] - 1;

            if (all[other].low == all[i].low &&
                all[other].high == all[i].high) {
                ret = check_pair(check, other, i, err);
                break;
            }
            slot = (slot + 1) & mask;
        }
        if (table[slot] == 0) {
            table[slot] = (uint32_t)i + 1;
        }
        if (!ret && i % 65536 == 0) {
            ret = check_progress(check, 0, err);
        }
    }
    ps_unreserve(memory, (size_t)(mask + 1) * sizeof(*table));
    return ret;
}

int ps_image_check(ps_image *image, ps_job *job, ps_error *errors,
                   size_t capacity, size_t *count, ps_error *err)
{
    checker check = {
        .image = image,
        .job = job,
        .errors = errors,
        .capacity = capacity,
    };
    bool sound[PS_SECTION_TYPES] = {false}, other;
    int ret = PS_OK;

    if (job) {
        __atomic_store_n(&job->total, image->file_length, __ATOMIC_RELAXED);
    }
    for (uint32_t type = 1; !ret && type < PS_SECTION_TYPES; type++) {
        ret = check_section(&check, &image->sections[type], &sound[type], err);
    }
    for (uint32_t i = 0; !ret && i < image->other_count; i++) {
        ret = check_section(&check, &image->other[i], &other, err);
    }
    if (!ret) {
        ret = check_gaps(&check, err);
    }
    /* What follows would only repeat that a section cannot be read. */
    if (!ret && sound[PS_SECTION_TOP_MAP] && sound[PS_SECTION_LEAVES] &&
        sound[PS_SECTION_FILL_UNITS]) {
        ret = check_map(&check, err);
        if (!ret && sound[PS_SECTION_OWNERS]) {
            ret = check_owners(&check, err);
        }
    }
    if (!ret && sound[PS_SECTION_SPACES] && sound[PS_SECTION_VIRTUAL_RUNS] &&
        sound[PS_SECTION_RUN_INDEX]) {
        ret = check_spaces(&check, err);
    }
    if (!ret && sound[PS_SECTION_BLOCK_INDEX] && sound[PS_SECTION_SIGNATURES]) {
        ret = check_blocks(&check, err);
        if (!ret) {
            ret = check_unique(&check, err);
        }
    }
    if (!ret && job) {
        __atomic_store_n(&job->done, image->file_length, __ATOMIC_RELAXED);
    }
    *count = check.count;
    return ret;
}
