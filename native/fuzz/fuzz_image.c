/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Any bytes as a snapshot file. Each input is read twice: as it is, and with
 * all checksums put right, so that what lies behind them is reached.
 */
#include "image.h"

#include <stdio.h>
#include <sys/mman.h>
#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#define MAX_FILE ((size_t)1 << 20)
#define MAX_EXPORT (UINT64_C(8) << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static bool within(uint64_t offset, uint64_t length, size_t size)
{
    return offset <= size && length <= size - offset;
}

/* The checksums of the stored bytes of all locality blocks. */
static void reseal_blocks(uint8_t *file, size_t size,
                          const ps_format_section *section)
{
    for (uint64_t at = 0; at + sizeof(ps_format_block) <= section->length;
         at += sizeof(ps_format_block)) {
        uint8_t *where = file + section->offset + at;
        ps_format_block block;

        memcpy(&block, where, sizeof(block));
        if (within(block.offset, block.length, size)) {
            block.checksum = XXH3_64bits(file + block.offset, block.length);
            memcpy(where, &block, sizeof(block));
        }
    }
}

static void reseal_section(uint8_t *file, size_t size,
                           ps_format_section *section)
{
    uint64_t chunks = ps_chunks_of(section->length);

    if (!within(section->offset, section->length, size) ||
        !within(section->sums_offset, chunks * 8, size)) {
        return;
    }
    if (section->type == PS_SECTION_BLOCK_INDEX) {
        reseal_blocks(file, size, section);
    }
    for (uint64_t i = 0; i < chunks; i++) {
        uint64_t left = section->length - i * PS_CHUNK_SIZE;
        uint64_t sum = XXH3_64bits(file + section->offset + i * PS_CHUNK_SIZE,
                                   left < PS_CHUNK_SIZE ? left : PS_CHUNK_SIZE);

        memcpy(file + section->sums_offset + i * 8, &sum, sizeof(sum));
    }
    section->sums_checksum =
        XXH3_64bits(file + section->sums_offset, chunks * 8);
}

static void reseal(uint8_t *file, size_t size)
{
    ps_format_header header;
    ps_format_trailer trailer;

    if (size < sizeof(header) + sizeof(trailer)) {
        return;
    }
    memcpy(&header, file, sizeof(header));
    memcpy(&trailer, file + size - sizeof(trailer), sizeof(trailer));
    memcpy(header.magic, PS_HEADER_MAGIC, PS_MAGIC_LENGTH);
    header.checksum =
        XXH3_64bits(&header, offsetof(ps_format_header, checksum));
    memcpy(file, &header, sizeof(header));
    if (within(trailer.table_offset, trailer.table_length, size)) {
        for (uint64_t at = 0;
             at + sizeof(ps_format_section) <= trailer.table_length;
             at += sizeof(ps_format_section)) {
            ps_format_section section;

            memcpy(&section, file + trailer.table_offset + at, sizeof(section));
            reseal_section(file, size, &section);
            memcpy(file + trailer.table_offset + at, &section, sizeof(section));
        }
        trailer.table_checksum =
            XXH3_64bits(file + trailer.table_offset, trailer.table_length);
    }
    trailer.file_length = size;
    memcpy(trailer.uuid, header.uuid, sizeof(trailer.uuid));
    memcpy(trailer.magic, PS_TRAILER_MAGIC, PS_MAGIC_LENGTH);
    trailer.checksum =
        XXH3_64bits(&trailer, offsetof(ps_format_trailer, checksum));
    memcpy(file + size - sizeof(trailer), &trailer, sizeof(trailer));
}

static void read_block(ps_image *image, uint32_t block)
{
    uint64_t pages = image->ram[block].pages, next = 0;
    uint64_t step = pages / 64 + 1;
    uint64_t entries[16];
    uint8_t page[4096];
    ps_run runs[16];
    size_t count = 1;
    ps_error err;

    for (int i = 0; i < 64 && count > 0 && next < pages; i++) {
        if (ps_image_runs(image, block, next, runs, 16, &count, &next, &err)) {
            break;
        }
    }
    for (uint64_t at = 0; at < pages; at += step) {
        (void)ps_image_read_pages(image, block, at, 1, page, &err);
        (void)ps_image_entries(
            image, block, at, pages - at < 16 ? pages - at : 16, entries, &err);
    }
}

static void read_canonical(ps_image *image)
{
    uint64_t step = image->canonical_pages / 64 + 1;
    uint8_t page[4096];
    ps_error err;

    for (uint64_t i = 0; i < image->canonical_pages; i += step) {
        ps_block_info info;
        uint64_t owner;

        (void)ps_image_owner(image, i, &owner, &err);
        if (ps_image_block(image, i >> image->block_shift, &info, &err) ==
            PS_OK) {
            (void)ps_image_read_raw_page(image, &info, i, page, &err);
        }
    }
}

static void read_spaces(ps_image *image)
{
    uint64_t spaces = ps_image_space_count(image);
    uint64_t runs = ps_image_run_count(image);
    ps_page_mapping mappings[4];
    ps_error err;

    for (uint64_t i = 0; i < spaces && i < 64; i++) {
        ps_space_info space;

        (void)ps_image_space(image, i, &space, &err);
    }
    for (uint64_t i = 0; i < runs; i += runs / 64 + 1) {
        ps_run_info run;
        size_t count;

        if (ps_image_virtual_run(image, i, &run, &err) == PS_OK) {
            (void)ps_image_mappings(image, run.block, run.page, mappings, 4,
                                    &count, &err);
        }
    }
}

static void use(ps_image *image, int null)
{
    ps_error errors[4], err;
    ps_image_info info;
    uint64_t bytes = 0, pages;
    uint8_t data[512];
    size_t count;

    ps_image_get_info(image, &info);
    for (uint32_t type = 0; type < 20; type++) {
        uint64_t length = ps_image_section_length(image, type);

        (void)ps_image_read_section(image, type, length / 2, data,
                                    length - length / 2 < sizeof(data)
                                        ? length - length / 2
                                        : sizeof(data),
                                    &err);
    }
    for (uint32_t i = 0; i < info.ram_blocks; i++) {
        bytes += image->ram[i].pages * PS_PAGE_SIZE;
        read_block(image, i);
        (void)ps_image_compare(image, i, image, i, NULL, NULL, 0, &count,
                               &pages, &err);
    }
    read_canonical(image);
    read_spaces(image);
    (void)ps_image_check(image, NULL, errors, 4, &count, &err);
    if (bytes <= MAX_EXPORT) {
        (void)ps_image_export(image, null, NULL, &err);
    }
}

static void run(const uint8_t *data, size_t size)
{
    static int fd = -1, null = -1;
    ps_image *image;
    ps_error err;

    if (fd < 0) {
        fd = memfd_create("snapshot", MFD_CLOEXEC);
        null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    }
    if (ftruncate(fd, 0) < 0 || pwrite(fd, data, size, 0) != (ssize_t)size) {
        abort();
    }
    if (ps_image_open(fd, &image, &err) == PS_OK) {
        use(image, null);
        ps_image_destroy(image);
    } else if (err.code == PS_OK || err.message[0] == 0) {
        abort(); /* an error must say what it is */
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *copy;

    if (size > MAX_FILE) {
        return 0;
    }
    run(data, size);
    copy = malloc(size ? size : 1);
    if (!copy) {
        return 0;
    }
    if (size > 0) {
        memcpy(copy, data, size);
    }
    reseal(copy, size);
    run(copy, size);
    free(copy);
    return 0;
}
