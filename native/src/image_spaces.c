/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Address spaces as a snapshot has them: which pages lie beside each other in
 * guest-virtual memory. What is read here decides which page comes when,
 * never what it contains; still every number is bounded before it is used.
 */
#include "image.h"

/* Runs of one leaf that are looked at for the mappings of a page: 512 pages,
   each mapped by some processes. */
#define MAX_LOOKS 16384u

uint64_t ps_image_space_count(const ps_image *image)
{
    return image->sections[PS_SECTION_SPACES].length / sizeof(ps_format_space);
}

uint64_t ps_image_run_count(const ps_image *image)
{
    return image->sections[PS_SECTION_VIRTUAL_RUNS].length /
           sizeof(ps_format_run);
}

/* Record number of a section, loaded and checked. */
static int record(ps_image *image, uint32_t type, uint64_t number, void *out,
                  size_t size, ps_error *err)
{
    const uint8_t *bytes;
    int ret = ps_section_bytes(image, type, number * size, size, &bytes, err);

    if (!ret) {
        memcpy(out, bytes, size);
    }
    return ret;
}

static int damaged(ps_image *image, uint32_t type, uint64_t number,
                   const char *fault, ps_error *err)
{
    const ps_section *section = &image->sections[type];

    return ps_fail(err, PS_ERR_DAMAGED,
                   section->offset + number * section->record_size,
                   "section %s, record %llu: %s", ps_section_name(type),
                   (unsigned long long)number, fault);
}

int ps_image_space(ps_image *image, uint64_t index, ps_space_info *out,
                   ps_error *err)
{
    uint64_t runs = ps_image_run_count(image);
    ps_format_space space;
    int ret =
        record(image, PS_SECTION_SPACES, index, &space, sizeof(space), err);

    if (ret) {
        return ret;
    }
    if ((space.kind != PS_SPACE_USER && space.kind != PS_SPACE_KERNEL) ||
        !ps_all_zero(space.reserved, sizeof(space.reserved)) ||
        space.first_run > runs || space.run_count > runs - space.first_run) {
        return damaged(image, PS_SECTION_SPACES, index,
                       "it has an unknown kind, runs that are not there, or "
                       "reserved bits that are not 0",
                       err);
    }
    *out = (ps_space_info){
        .root = space.root,
        .kind = space.kind,
        .mode = space.mode,
        .first_run = space.first_run,
        .run_count = space.run_count,
        .pages = space.pages,
        .pages_shared = space.pages_shared,
    };
    return PS_OK;
}

int ps_image_run(ps_image *image, uint64_t number, ps_format_run *out,
                 ps_error *err)
{
    uint32_t block;
    uint64_t page;
    int ret =
        record(image, PS_SECTION_VIRTUAL_RUNS, number, out, sizeof(*out), err);

    if (ret) {
        return ret;
    }
    if (out->pages == 0 ||
        (out->first & (PS_LEAF_PAGES - 1)) + out->pages > PS_LEAF_PAGES ||
        (out->address & (PS_PAGE_SIZE - 1)) != 0 || out->reserved != 0 ||
        !ps_image_place(image, out->first, &block, &page) ||
        out->pages > image->ram[block].pages - page) {
        return damaged(image, PS_SECTION_VIRTUAL_RUNS, number,
                       "its pages are not those of a RAM block", err);
    }
    return PS_OK;
}

int ps_image_virtual_run(ps_image *image, uint64_t index, ps_run_info *out,
                         ps_error *err)
{
    ps_format_run run;
    int ret = ps_image_run(image, index, &run, err);

    if (ret) {
        return ret;
    }
    *out = (ps_run_info){.address = run.address, .pages = run.pages};
    ps_image_place(image, run.first, &out->block, &out->page);
    return PS_OK;
}

/* The first record of the index whose run begins after a page. */
static int index_after(ps_image *image, uint64_t global, uint64_t *out,
                       ps_error *err)
{
    uint64_t low = 0, high = ps_image_run_count(image);

    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        ps_format_run_index entry;
        int ret = record(image, PS_SECTION_RUN_INDEX, middle, &entry,
                         sizeof(entry), err);

        if (ret) {
            return ret;
        }
        if (entry.first <= global) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    *out = low;
    return PS_OK;
}

int ps_image_find_mappings(ps_image *image, uint64_t global,
                           ps_page_mapping *out, size_t capacity, size_t *count,
                           ps_error *err)
{
    uint64_t leaf = global & ~(uint64_t)(PS_LEAF_PAGES - 1);
    uint64_t at;
    int ret = index_after(image, global, &at, err);

    *count = 0;
    /* A run is in one leaf: those before cannot reach the page. */
    for (uint32_t look = 0; !ret && at > 0 && look < MAX_LOOKS; look++) {
        ps_format_run_index entry;
        ps_format_run run;

        ret = record(image, PS_SECTION_RUN_INDEX, --at, &entry, sizeof(entry),
                     err);
        if (ret || entry.first < leaf || *count == capacity) {
            break;
        }
        if (global - entry.first >= entry.pages) {
            continue;
        }
        if (entry.run >= ps_image_run_count(image) ||
            entry.space >= ps_image_space_count(image)) {
            return damaged(image, PS_SECTION_RUN_INDEX, at,
                           "there is no such run or space", err);
        }
        ret = ps_image_run(image, entry.run, &run, err);
        if (!ret && (run.first != entry.first || run.pages != entry.pages)) {
            return damaged(image, PS_SECTION_RUN_INDEX, at,
                           "its run is another one", err);
        }
        if (!ret) {
            uint64_t index = global - run.first;

            out[(*count)++] = (ps_page_mapping){
                .address = run.address + (index << PS_PAGE_BITS),
                .run = entry.run,
                .space = entry.space,
                .index = (uint32_t)index,
            };
        }
    }
    return ret;
}

int ps_image_mappings(ps_image *image, uint32_t block, uint64_t page,
                      ps_page_mapping *out, size_t capacity, size_t *count,
                      ps_error *err)
{
    *count = 0;
    if (block >= image->ram_count || page >= image->ram[block].pages) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "there is no page %llu in RAM block %u",
                       (unsigned long long)page, block);
    }
    return ps_image_find_mappings(image, ps_image_global(image, block, page),
                                  out, capacity, count, err);
}
