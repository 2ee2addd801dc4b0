/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reading snapshot files. The order of the checks, and what is checked at
 * open, when a section is first used, and by ps_image_check() alone:
 *
 *   open        header, trailer, section table, STREAM, RAM_BLOCKS, and that
 *               the lengths of all other sections fit these
 *   first use   a section's checksum array; each chunk's checksum; entries of
 *               the page map (classes, reserved bits, values within bounds);
 *               records of the block index and owners within bounds
 *   block read  the block's checksum, the frame's content size
 *   check       the rest of FORMAT.md, which no read depends on
 *
 * Nothing that open does grows with the guest.
 */
#include "image.h"
#include "block_cache.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <xxhash.h>
#include <zstd.h>

/* Chunks that one pread may bring in beyond those asked for. */
#define READAHEAD_CHUNKS 16u
/* Decoded blocks that ps_image_page() keeps. */
#define CACHE_BYTES (UINT64_C(32) << 20)
/* zstd's frame magic; older formats that libzstd may know are refused. */
#define ZSTD_FRAME_MAGIC 0xfd2fb528u

/* What ps_image_page() keeps. */
struct ps_image_cache {
    ps_block_cache blocks;
    uint8_t expanded[PS_PAGE_SIZE]; /* one page of class zero or fill */
    uint64_t expanded_entry;
};

static const struct {
    const char *name;
    uint32_t record_size;
    uint32_t flags;
    bool required;
    uint64_t limit; /* of the length, in bytes */
} section_rules[PS_SECTION_TYPES] = {
    [PS_SECTION_META] = {"META", 1, 0, false, PS_MAX_META_BYTES},
    [PS_SECTION_STREAM] = {"STREAM", sizeof(ps_format_stream), 1, true,
                           sizeof(ps_format_stream)},
    [PS_SECTION_CONFIGURATION] = {"CONFIGURATION", 1, 1, false,
                                  PS_MAX_CONFIGURATION_BYTES},
    [PS_SECTION_DEVICES] = {"DEVICES", 1, 1, true, PS_MAX_DEVICE_BYTES},
    [PS_SECTION_DESCRIPTION] = {"DESCRIPTION", 1, 1, false,
                                PS_MAX_DESCRIPTION_BYTES},
    [PS_SECTION_RAM_BLOCKS] = {"RAM_BLOCKS", sizeof(ps_format_ram_block), 1,
                               true,
                               PS_MAX_RAM_BLOCKS * sizeof(ps_format_ram_block)},
    [PS_SECTION_TOP_MAP] = {"TOP_MAP", 8, 1, true, PS_MAX_LEAVES * 8},
    [PS_SECTION_LEAVES] = {"LEAVES", PS_LEAF_PAGES * 8, 1, true,
                           PS_MAX_LEAVES * PS_LEAF_PAGES * 8},
    [PS_SECTION_FILL_UNITS] = {"FILL_UNITS", 8, 1, true,
                               PS_MAX_CANONICAL_PAGES * 64},
    [PS_SECTION_BLOCK_INDEX] = {"BLOCK_INDEX", sizeof(ps_format_block), 1, true,
                                PS_MAX_CANONICAL_PAGES *
                                    sizeof(ps_format_block)},
    [PS_SECTION_SIGNATURES] = {"SIGNATURES", sizeof(ps_format_signature), 1,
                               true,
                               PS_MAX_CANONICAL_PAGES *
                                   sizeof(ps_format_signature)},
    [PS_SECTION_OWNERS] = {"OWNERS", sizeof(ps_format_owner), 1, true,
                           PS_MAX_CANONICAL_PAGES * sizeof(ps_format_owner)},
    [PS_SECTION_SPACES] = {"SPACES", sizeof(ps_format_space), 0, false,
                           PS_MAX_SPACES * sizeof(ps_format_space)},
    [PS_SECTION_VIRTUAL_RUNS] = {"VIRTUAL_RUNS", sizeof(ps_format_run), 0,
                                 false, PS_MAX_RUNS * sizeof(ps_format_run)},
    [PS_SECTION_RUN_INDEX] = {"RUN_INDEX", sizeof(ps_format_run_index), 0,
                              false, PS_MAX_RUNS * sizeof(ps_format_run_index)},
};

const char *ps_section_name(uint32_t type)
{
    return type > 0 && type < PS_SECTION_TYPES ? section_rules[type].name
                                               : "of an unknown type";
}

/* ------------------------------------------------------------------ open */

static int open_header(ps_image *image, ps_error *err)
{
    ps_format_header *header = &image->header;
    size_t have = sizeof(*header);
    int ret;

    memset(header, 0, sizeof(*header));
    if (image->file_length < have) {
        have = (size_t)image->file_length;
    }
    ret = ps_pread_all(image->fd, header, have, 0, "header", err);
    if (ret) {
        return ret;
    }
    if (have == 0) {
        return ps_fail(err, PS_ERR_NOT_OURS, 0,
                       "not a snapshot: the file is empty");
    }
    if (memcmp(header->magic, PS_HEADER_MAGIC,
               have < PS_MAGIC_LENGTH ? have : PS_MAGIC_LENGTH) != 0) {
        return ps_fail(err, PS_ERR_NOT_OURS, 0,
                       "not a snapshot: it does not begin with PSNAP");
    }
    if (image->file_length < PS_HEADER_LENGTH + PS_TRAILER_LENGTH) {
        return ps_fail(err, PS_ERR_TRUNCATED, image->file_length,
                       "the file ends here, before its trailer");
    }
    if (XXH3_64bits(header, offsetof(ps_format_header, checksum)) !=
        header->checksum) {
        return ps_fail(err, PS_ERR_DAMAGED, 0, "header: checksum is wrong");
    }
    if (header->version > PS_FORMAT_VERSION) {
        return ps_fail(err, PS_ERR_VERSION, 8,
                       "format version %u is newer than %u, the newest that "
                       "this program reads",
                       header->version, PS_FORMAT_VERSION);
    }
    if (header->version != PS_FORMAT_VERSION ||
        header->header_length != PS_HEADER_LENGTH) {
        return ps_fail(err, PS_ERR_DAMAGED, 8,
                       "header: version %u with length %u does not exist",
                       header->version, header->header_length);
    }
    if (header->incompatible & ~PS_INCOMPATIBLE_KNOWN) {
        return ps_fail(err, PS_ERR_FEATURE, 16,
                       "unknown incompatible features 0x%llx",
                       (unsigned long long)(header->incompatible &
                                            ~PS_INCOMPATIBLE_KNOWN));
    }
    if (!ps_all_zero(header->parent, sizeof(header->parent))) {
        return ps_fail(err, PS_ERR_DAMAGED, 48,
                       "header: it names a parent, which version 1 has not");
    }
    if (header->pages_per_block == 0 ||
        header->pages_per_block > PS_MAX_PAGES_PER_BLOCK ||
        (header->pages_per_block & (header->pages_per_block - 1)) != 0) {
        return ps_fail(err, PS_ERR_DAMAGED, 64,
                       "header: %u pages per locality block are not a power "
                       "of two up to %u",
                       header->pages_per_block, PS_MAX_PAGES_PER_BLOCK);
    }
    if (!ps_all_zero(header->reserved, sizeof(header->reserved))) {
        return ps_fail(err, PS_ERR_DAMAGED,
                       offsetof(ps_format_header, reserved),
                       "header: reserved bytes are not 0");
    }
    image->pages_per_block = header->pages_per_block;
    image->block_mask = header->pages_per_block - 1;
    image->block_shift = (uint32_t)__builtin_ctz(header->pages_per_block);
    return PS_OK;
}

static int open_trailer(ps_image *image, ps_format_trailer *trailer,
                        ps_error *err)
{
    uint64_t at = image->file_length - PS_TRAILER_LENGTH;
    bool magic, sum;
    int ret;

    ret =
        ps_pread_all(image->fd, trailer, sizeof(*trailer), at, "trailer", err);
    if (ret) {
        return ret;
    }
    magic = memcmp(trailer->magic, PS_TRAILER_MAGIC, PS_MAGIC_LENGTH) == 0;
    sum = XXH3_64bits(trailer, offsetof(ps_format_trailer, checksum)) ==
          trailer->checksum;
    if (!magic && !sum) {
        return ps_fail(err, PS_ERR_TRUNCATED, image->file_length,
                       "there is no trailer: the file was cut here, or never "
                       "completed");
    }
    if (!magic || !sum) {
        return ps_fail(err, PS_ERR_DAMAGED, at, "trailer: %s is wrong",
                       magic ? "checksum" : "magic");
    }
    if (trailer->file_length != image->file_length) {
        return ps_fail(err,
                       trailer->file_length > image->file_length
                           ? PS_ERR_TRUNCATED
                           : PS_ERR_DAMAGED,
                       at, "trailer: the file should have %llu bytes, not %llu",
                       (unsigned long long)trailer->file_length,
                       (unsigned long long)image->file_length);
    }
    if (memcmp(trailer->uuid, image->header.uuid, sizeof(trailer->uuid))) {
        return ps_fail(err, PS_ERR_DAMAGED, at,
                       "trailer: its uuid is not the header's");
    }
    if (!ps_all_zero(trailer->reserved, sizeof(trailer->reserved))) {
        return ps_fail(err, PS_ERR_DAMAGED, at,
                       "trailer: reserved bytes are not 0");
    }
    if (trailer->table_length % sizeof(ps_format_section) != 0 ||
        trailer->table_length > PS_MAX_SECTIONS * sizeof(ps_format_section)) {
        return ps_fail(err, PS_ERR_DAMAGED, at,
                       "trailer: a section table of %llu bytes cannot be",
                       (unsigned long long)trailer->table_length);
    }
    if (trailer->table_offset % PS_PART_ALIGNMENT != 0 ||
        trailer->table_offset < PS_HEADER_LENGTH ||
        trailer->table_offset > at ||
        trailer->table_length > at - trailer->table_offset) {
        return ps_fail(err, PS_ERR_DAMAGED, at,
                       "trailer: the section table is out of place");
    }
    return PS_OK;
}

/* A section or its checksum array lies where it may. */
static bool part_in_place(uint64_t offset, uint64_t length,
                          uint64_t table_offset)
{
    return offset % PS_PART_ALIGNMENT == 0 && offset >= PS_HEADER_LENGTH &&
           offset <= table_offset && length <= table_offset - offset;
}

static int open_table(ps_image *image, const ps_format_trailer *trailer,
                      ps_error *err)
{
    ps_format_section table[PS_MAX_SECTIONS];
    ps_part parts[2 * PS_MAX_SECTIONS];
    size_t count = (size_t)trailer->table_length / sizeof(table[0]);
    size_t part_count = 0;
    int ret;

    ret = ps_pread_all(image->fd, table, (size_t)trailer->table_length,
                       trailer->table_offset, "section table", err);
    if (ret) {
        return ret;
    }
    if (XXH3_64bits(table, (size_t)trailer->table_length) !=
        trailer->table_checksum) {
        return ps_fail(err, PS_ERR_DAMAGED, trailer->table_offset,
                       "section table: checksum is wrong");
    }
    for (size_t i = 0; i < count; i++) {
        const ps_format_section *from = &table[i];
        uint64_t at = trailer->table_offset + i * sizeof(table[0]);
        bool known = from->type > 0 && from->type < PS_SECTION_TYPES;
        const char *name = ps_section_name(from->type);
        ps_section *section;

        if (i > 0 && from->type <= table[i - 1].type) {
            return ps_fail(err, PS_ERR_DAMAGED, at,
                           "section table: type %u follows type %u", from->type,
                           table[i - 1].type);
        }
        if ((from->flags & ~(uint32_t)PS_SECTION_FLAGS_KNOWN) ||
            from->reserved) {
            return ps_fail(err, PS_ERR_DAMAGED, at,
                           "section table, type %u: reserved bits are not 0",
                           from->type);
        }
        if (!known && (from->flags & PS_SECTION_FLAG_REQUIRED)) {
            return ps_fail(err, PS_ERR_FEATURE, at,
                           "unknown section type %u, which the file says "
                           "must be known",
                           from->type);
        }
        if (from->record_size == 0 || from->length % from->record_size != 0) {
            return ps_fail(err, PS_ERR_DAMAGED, at,
                           "section %s: its length is not a multiple of its "
                           "record size",
                           name);
        }
        if (known &&
            (from->flags != section_rules[from->type].flags ||
             from->record_size != section_rules[from->type].record_size)) {
            return ps_fail(err, PS_ERR_DAMAGED, at,
                           "section %s: record size %u with flags %u is not "
                           "of version 1",
                           name, from->record_size, from->flags);
        }
        if (from->length == 0 && from->sums_checksum != XXH3_64bits("", 0)) {
            return ps_fail(err, PS_ERR_DAMAGED, at,
                           "section %s: checksum of no bytes is wrong", name);
        }
        if (from->length > 0 &&
            (!part_in_place(from->offset, from->length,
                            trailer->table_offset) ||
             !part_in_place(from->sums_offset, 8 * ps_chunks_of(from->length),
                            trailer->table_offset))) {
            return ps_fail(err, PS_ERR_DAMAGED, at,
                           "section %s: it is out of place", name);
        }
        if (known && from->length > section_rules[from->type].limit) {
            return ps_fail(err, PS_ERR_DAMAGED, at,
                           "section %s: %llu bytes are more than it may have",
                           name, (unsigned long long)from->length);
        }
        section = known ? &image->sections[from->type]
                        : &image->other[image->other_count++];
        *section = (ps_section){
            .offset = from->offset,
            .length = from->length,
            .sums_offset = from->sums_offset,
            .sums_checksum = from->sums_checksum,
            .type = from->type,
            .record_size = from->record_size,
        };
        if (from->length > 0) {
            parts[part_count++] = (ps_part){from->offset, from->length};
            parts[part_count++] =
                (ps_part){from->sums_offset, 8 * ps_chunks_of(from->length)};
        }
    }
    for (uint32_t type = 1; type < PS_SECTION_TYPES; type++) {
        if (section_rules[type].required && image->sections[type].type == 0) {
            return ps_fail(err, PS_ERR_DAMAGED, trailer->table_offset,
                           "section %s is missing", section_rules[type].name);
        }
    }
    qsort(parts, part_count, sizeof(parts[0]), ps_part_order);
    for (size_t i = 1; i < part_count; i++) {
        if (parts[i].offset < parts[i - 1].offset + parts[i - 1].length) {
            return ps_fail(err, PS_ERR_DAMAGED, parts[i].offset,
                           "section table: two parts of the file overlap");
        }
    }
    image->table_offset = trailer->table_offset;
    image->table_length = trailer->table_length;
    image->blocks_end =
        part_count > 0 ? parts[0].offset : trailer->table_offset;
    return PS_OK;
}

static int open_stream(ps_image *image, ps_error *err)
{
    const ps_section *section = &image->sections[PS_SECTION_STREAM];
    ps_format_stream *stream = &image->stream;
    const uint8_t *bytes;
    int ret;

    if (section->length != sizeof(*stream)) {
        return ps_fail(err, PS_ERR_DAMAGED, section->offset,
                       "section STREAM: it has not exactly one record");
    }
    ret = ps_section_bytes(image, PS_SECTION_STREAM, 0, sizeof(*stream), &bytes,
                           err);
    if (ret) {
        return ret;
    }
    memcpy(stream, bytes, sizeof(*stream));
    if (stream->stream_version != 3 || stream->ram_version != 4 ||
        stream->page_bits != PS_PAGE_BITS) {
        return ps_fail(err, PS_ERR_DAMAGED, section->offset,
                       "section STREAM: stream version %u, RAM version %u, "
                       "page bits %u are not 3, 4, 12",
                       stream->stream_version, stream->ram_version,
                       stream->page_bits);
    }
    if ((stream->flags & ~(uint32_t)PS_STREAM_FLAGS_KNOWN) ||
        !ps_all_zero(stream->reserved, sizeof(stream->reserved))) {
        return ps_fail(err, PS_ERR_DAMAGED, section->offset,
                       "section STREAM: reserved bits are not 0");
    }
    if (((stream->flags & PS_STREAM_CONFIGURATION) != 0) !=
        (image->sections[PS_SECTION_CONFIGURATION].length != 0)) {
        return ps_fail(err, PS_ERR_DAMAGED, section->offset,
                       "section STREAM: it %s a CONFIGURATION",
                       stream->flags & PS_STREAM_CONFIGURATION ? "promises"
                                                               : "denies");
    }
    if (!(stream->flags & PS_STREAM_DESCRIPTION) &&
        image->sections[PS_SECTION_DESCRIPTION].length != 0) {
        return ps_fail(err, PS_ERR_DAMAGED, section->offset,
                       "section STREAM: it denies a DESCRIPTION");
    }
    return PS_OK;
}

static int ram_block_name(ps_image *image, uint32_t index,
                          const ps_format_ram_block *from, uint64_t at,
                          ps_error *err)
{
    ps_ram_block *to = &image->ram_blocks[index];
    size_t length = from->name_length;

    if (length == 0 || memchr(from->name, 0, length) ||
        !ps_all_zero(from->name + length, sizeof(from->name) - length)) {
        return ps_fail(err, PS_ERR_DAMAGED, at,
                       "RAM block %u: its name is malformed", index);
    }
    memcpy(to->name, from->name, length);
    to->name[length] = 0;
    if (ps_image_find_ram(image, to->name, length) >= 0) {
        return ps_fail(err, PS_ERR_DAMAGED, at,
                       "RAM block %u: another one has its name", index);
    }
    return PS_OK;
}

/* a + b + c + d, false where that does not fit. */
static bool add_counts(const ps_format_ram_block *block, uint64_t *sum)
{
    return !__builtin_add_overflow(block->pages_zero, block->pages_fill, sum) &&
           !__builtin_add_overflow(*sum, block->pages_data, sum) &&
           !__builtin_add_overflow(*sum, block->pages_absent, sum);
}

static int open_ram_blocks(ps_image *image, ps_error *err)
{
    const ps_section *section = &image->sections[PS_SECTION_RAM_BLOCKS];
    uint32_t count = (uint32_t)(section->length / sizeof(ps_format_ram_block));
    uint64_t bytes = 0, leaf = 0;
    const uint8_t *data;
    int ret;

    ret = ps_section_bytes(image, PS_SECTION_RAM_BLOCKS, 0,
                           (size_t)section->length, &data, err);
    if (ret) {
        return ret;
    }
    image->ram = calloc(count ? count : 1, sizeof(image->ram[0]));
    image->ram_blocks = calloc(count ? count : 1, sizeof(image->ram_blocks[0]));
    if (!image->ram || !image->ram_blocks) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "out of memory");
    }
    for (uint32_t i = 0; i < count; i++) {
        uint64_t at = section->offset + i * sizeof(ps_format_ram_block);
        ps_ram_block *to = &image->ram_blocks[i];
        ps_format_ram_block from;
        uint64_t pages, sum;

        memcpy(&from, data + i * sizeof(from), sizeof(from));
        ret = ram_block_name(image, i, &from, at, err);
        if (ret) {
            return ret;
        }
        if (from.length == 0 || from.length % PS_PAGE_SIZE != 0 ||
            from.length > PS_MAX_RAM_BYTES - bytes) {
            return ps_fail(err, PS_ERR_DAMAGED, at,
                           "RAM block %s: a length of %llu bytes cannot be",
                           to->name, (unsigned long long)from.length);
        }
        bytes += from.length;
        pages = from.length >> PS_PAGE_BITS;
        if (from.first_leaf != leaf) {
            return ps_fail(err, PS_ERR_DAMAGED, at,
                           "RAM block %s: it should begin at entry %llu of "
                           "the top map",
                           to->name, (unsigned long long)leaf);
        }
        leaf += ps_leaves_of(pages);
        if (!add_counts(&from, &sum) || sum != pages) {
            return ps_fail(err, PS_ERR_DAMAGED, at,
                           "RAM block %s: its counts do not add up to its "
                           "pages",
                           to->name);
        }
        to->length = from.length;
        to->page_size = from.page_size;
        to->address = from.address;
        to->first_leaf = from.first_leaf;
        to->pages_zero = from.pages_zero;
        to->pages_fill = from.pages_fill;
        to->pages_data = from.pages_data;
        to->pages_absent = from.pages_absent;
        image->ram[i] = (ps_image_ram){
            .first_page = from.first_leaf << PS_LEAF_BITS,
            .pages = pages,
            .page_size = from.page_size,
            .name = to->name,
        };
        image->ram_count = i + 1;
    }
    image->leaves = leaf;
    return PS_OK;
}

/* The lengths of the sections fit each other. */
static int open_lengths(ps_image *image, ps_error *err)
{
    const ps_section *sections = image->sections;
    uint64_t data = 0, fill = 0, blocks;

    for (uint32_t i = 0; i < image->ram_count; i++) {
        data += image->ram_blocks[i].pages_data;
        fill += image->ram_blocks[i].pages_fill;
    }
    image->stored_leaves = sections[PS_SECTION_LEAVES].length >> PS_CHUNK_BITS;
    image->canonical_pages =
        sections[PS_SECTION_SIGNATURES].length / sizeof(ps_format_signature);
    image->locality_blocks =
        sections[PS_SECTION_BLOCK_INDEX].length / sizeof(ps_format_block);
    blocks = (image->canonical_pages + image->block_mask) >> image->block_shift;
    if (sections[PS_SECTION_TOP_MAP].length / 8 != image->leaves ||
        image->leaves > PS_MAX_LEAVES) {
        return ps_fail(err, PS_ERR_DAMAGED, sections[PS_SECTION_TOP_MAP].offset,
                       "section TOP_MAP: it should have %llu entries",
                       (unsigned long long)image->leaves);
    }
    if (image->stored_leaves > image->leaves) {
        return ps_fail(err, PS_ERR_DAMAGED, sections[PS_SECTION_LEAVES].offset,
                       "section LEAVES: it has more leaves than the top map "
                       "has entries");
    }
    if (sections[PS_SECTION_FILL_UNITS].length > 64 * fill) {
        return ps_fail(err, PS_ERR_DAMAGED,
                       sections[PS_SECTION_FILL_UNITS].offset,
                       "section FILL_UNITS: it has more than the fill pages "
                       "can use");
    }
    if (image->canonical_pages > data) {
        return ps_fail(err, PS_ERR_DAMAGED,
                       sections[PS_SECTION_SIGNATURES].offset,
                       "section SIGNATURES: it has more than there are data "
                       "pages");
    }
    if (sections[PS_SECTION_OWNERS].length / sizeof(ps_format_owner) !=
        image->canonical_pages) {
        return ps_fail(err, PS_ERR_DAMAGED, sections[PS_SECTION_OWNERS].offset,
                       "section OWNERS: it should have %llu records",
                       (unsigned long long)image->canonical_pages);
    }
    if (sections[PS_SECTION_RUN_INDEX].length / sizeof(ps_format_run_index) !=
        sections[PS_SECTION_VIRTUAL_RUNS].length / sizeof(ps_format_run)) {
        return ps_fail(err, PS_ERR_DAMAGED,
                       sections[PS_SECTION_RUN_INDEX].offset,
                       "section RUN_INDEX: it should have a record for each "
                       "virtual run");
    }
    if (image->locality_blocks != blocks) {
        return ps_fail(err, PS_ERR_DAMAGED,
                       sections[PS_SECTION_BLOCK_INDEX].offset,
                       "section BLOCK_INDEX: it should have %llu records",
                       (unsigned long long)blocks);
    }
    return PS_OK;
}

static int open_all(ps_image *image, ps_error *err)
{
    ps_format_trailer trailer;
    struct stat st;
    int ret;

    if (fstat(image->fd, &st) < 0) {
        return ps_fail_errno(err, PS_NOWHERE, "snapshot");
    }
    if (!S_ISREG(st.st_mode)) {
        return ps_fail(err, PS_ERR_NOT_OURS, PS_NOWHERE,
                       "not a snapshot: not a regular file");
    }
    image->file_length = (uint64_t)st.st_size;
    image->device = st.st_dev;
    image->inode = st.st_ino;
    ret = open_header(image, err);
    if (!ret) {
        ret = open_trailer(image, &trailer, err);
    }
    if (!ret) {
        ret = open_table(image, &trailer, err);
    }
    if (!ret) {
        ret = open_stream(image, err);
    }
    if (!ret) {
        ret = open_ram_blocks(image, err);
    }
    if (!ret) {
        ret = open_lengths(image, err);
    }
    return ret;
}

int ps_image_open(int fd, ps_image **out, ps_error *err)
{
    ps_image *image = calloc(1, sizeof(*image));
    int ret;

    if (!image) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "out of memory");
    }
    image->fd = fd;
    ret = open_all(image, err);
    if (ret) {
        ps_image_destroy(image);
        return ret;
    }
    *out = image;
    return PS_OK;
}

static void section_deinit(ps_section *section)
{
    ps_unreserve(section->bytes, (size_t)section->length);
    free(section->loaded);
    free(section->sums);
}

void ps_image_destroy(ps_image *image)
{
    if (!image) {
        return;
    }
    if (image->cache) {
        ps_block_cache_deinit(&image->cache->blocks);
        free(image->cache);
    }
    for (uint32_t type = 0; type < PS_SECTION_TYPES; type++) {
        section_deinit(&image->sections[type]);
    }
    for (uint32_t i = 0; i < image->other_count; i++) {
        section_deinit(&image->other[i]);
    }
    free(image->ram);
    free(image->ram_blocks);
    free(image);
}

/* -------------------------------------------------------------- sections */

/* Reserve a section's memory; read and check its checksum array. */
static int section_prepare(ps_image *image, ps_section *section, ps_error *err)
{
    uint64_t chunks = ps_chunks_of(section->length);
    void *bytes = NULL;
    PS_AUTOFREE uint64_t *sums = NULL;
    PS_AUTOFREE uint64_t *loaded = NULL;
    char what[64];
    int ret;

    if (section->bytes) {
        return PS_OK;
    }
    sums = malloc((size_t)chunks * 8);
    loaded = calloc((size_t)((chunks + 63) / 64), 8);
    if (!sums || !loaded) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "out of memory");
    }
    snprintf(what, sizeof(what), "checksums of section %s",
             ps_section_name(section->type));
    ret = ps_pread_all(image->fd, sums, (size_t)chunks * 8,
                       section->sums_offset, what, err);
    if (ret) {
        return ret;
    }
    if (XXH3_64bits(sums, (size_t)chunks * 8) != section->sums_checksum) {
        return ps_fail(err, PS_ERR_DAMAGED, section->sums_offset,
                       "section %s: checksum of its checksums is wrong",
                       ps_section_name(section->type));
    }
    ret = ps_reserve((size_t)section->length, &bytes, err);
    if (ret) {
        return ret;
    }
    section->bytes = bytes;
    section->sums = sums;
    section->loaded = loaded;
    sums = NULL;
    loaded = NULL;
    return PS_OK;
}

/* What is wrong with a page entry; NULL: nothing. */
static const char *entry_fault(const ps_image *image, uint64_t entry, bool top)
{
    uint32_t log2 = ps_entry_unit_log2(entry);
    uint64_t value = ps_entry_value(entry);
    uint64_t units;

    if (entry & PS_ENTRY_RESERVED) {
        return "reserved bits are not 0";
    }
    if (ps_entry_class(entry) != PS_CLASS_FILL && log2 != 0) {
        return "reserved bits are not 0";
    }
    switch (ps_entry_class(entry)) {
    case PS_CLASS_ABSENT:
    case PS_CLASS_ZERO:
        return value ? "an absent or zero page has a value" : NULL;
    case PS_CLASS_FILL:
        if (log2 > PS_FILL_MAX_LOG2) {
            return "the fill unit is too long";
        }
        if (log2 <= PS_FILL_INLINE_LOG2) {
            return value >> (8u << log2) ? "the fill unit is malformed" : NULL;
        }
        units = image->sections[PS_SECTION_FILL_UNITS].length;
        if (units < (1u << log2) ||
            value > (units - (1u << log2)) / PS_FILL_GRAIN) {
            return "the fill unit lies outside of FILL_UNITS";
        }
        return NULL;
    case PS_CLASS_DATA:
        if (top) {
            return "a whole leaf cannot be of class data";
        }
        return value >= image->canonical_pages
                   ? "there is no such canonical page"
                   : NULL;
    case PS_CLASS_LEAF:
        if (!top) {
            return "a leaf cannot refer to a leaf";
        }
        return value >= image->stored_leaves ? "there is no such leaf" : NULL;
    default:
        return "unknown class";
    }
}

/* Entries are looked at once, when their chunk is loaded; everyone else may
   rely on them. */
static int chunk_validate(const ps_image *image, const ps_section *section,
                          uint64_t chunk, ps_error *err)
{
    const uint64_t *entries =
        (const uint64_t *)(const void *)(section->bytes +
                                         (chunk << PS_CHUNK_BITS));
    bool top = section->type == PS_SECTION_TOP_MAP;
    uint64_t leaf = UINT64_MAX;

    if (!top && section->type != PS_SECTION_LEAVES) {
        return PS_OK;
    }
    for (size_t i = 0; i < ps_chunk_length(section, chunk) / 8; i++) {
        const char *fault = entry_fault(image, entries[i], top);

        if (!fault && ps_entry_class(entries[i]) == PS_CLASS_LEAF) {
            uint64_t value = ps_entry_value(entries[i]);

            if (leaf != UINT64_MAX && value != leaf + 1) {
                fault = "leaves are not referred to in order";
            }
            leaf = value;
        }
        if (fault) {
            return ps_fail(err, PS_ERR_DAMAGED,
                           section->offset + (chunk << PS_CHUNK_BITS) + i * 8,
                           "%s %llu, entry %zu: %s", top ? "top map" : "leaf",
                           (unsigned long long)chunk, i, fault);
        }
    }
    return PS_OK;
}

/* Check a chunk whose bytes were just read. */
static int chunk_accept(const ps_image *image, ps_section *section,
                        uint64_t chunk, ps_error *err)
{
    const uint8_t *bytes = section->bytes + (chunk << PS_CHUNK_BITS);
    int ret;

    if (XXH3_64bits(bytes, ps_chunk_length(section, chunk)) !=
        section->sums[chunk]) {
        return ps_fail(
            err, PS_ERR_DAMAGED, section->offset + (chunk << PS_CHUNK_BITS),
            "section %s, chunk %llu: checksum is wrong",
            ps_section_name(section->type), (unsigned long long)chunk);
    }
    ret = chunk_validate(image, section, chunk, err);
    if (ret) {
        return ret;
    }
    section->loaded[chunk >> 6] |= UINT64_C(1) << (chunk & 63);
    section->chunks_loaded++;
    return PS_OK;
}

/*
 * Load chunks first .. last, which are there, and some that follow. Only the
 * wanted ones can make it fail.
 */
int ps_section_load(ps_image *image, ps_section *section, uint64_t first,
                    uint64_t last, ps_error *err)
{
    uint64_t chunks = ps_chunks_of(section->length);
    int ret = section_prepare(image, section, err);

    while (!ret && first <= last) {
        uint64_t end = first, limit;
        uint64_t from, length;
        ps_error ignored;
        char what[64];

        if (ps_section_chunk_loaded(section, first)) {
            first++;
            continue;
        }
        limit = (last - first < READAHEAD_CHUNKS ? first + READAHEAD_CHUNKS
                                                 : last + 1);
        if (limit - first > 16 * READAHEAD_CHUNKS) {
            limit = first + 16 * READAHEAD_CHUNKS;
        }
        limit = limit < chunks ? limit : chunks;
        while (end < limit && !ps_section_chunk_loaded(section, end)) {
            end++;
        }
        from = first << PS_CHUNK_BITS;
        length = (end << PS_CHUNK_BITS) - from;
        if (length > section->length - from) {
            length = section->length - from;
        }
        snprintf(what, sizeof(what), "section %s",
                 ps_section_name(section->type));
        ret = ps_pread_all(image->fd, section->bytes + from, (size_t)length,
                           section->offset + from, what, err);
        if (ret) {
            /* Perhaps only what was read ahead is out of reach. */
            end = first + 1;
            ret = ps_pread_all(image->fd, section->bytes + from,
                               ps_chunk_length(section, first),
                               section->offset + from, what, err);
        }
        for (; !ret && first < end; first++) {
            ret = chunk_accept(image, section, first,
                               first <= last ? err : &ignored);
            if (ret && first > last) {
                ret = PS_OK;
            }
        }
    }
    return ret;
}

int ps_section_bytes(ps_image *image, uint32_t type, uint64_t offset,
                     size_t length, const uint8_t **out, ps_error *err)
{
    ps_section *section;
    uint64_t first, last;
    int ret;

    *out = NULL;
    if (type == 0 || type >= PS_SECTION_TYPES ||
        offset > image->sections[type].length ||
        length > image->sections[type].length - offset) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "section %s has no %zu bytes at %llu",
                       ps_section_name(type), length,
                       (unsigned long long)offset);
    }
    section = &image->sections[type];
    if (length == 0) {
        *out = section->bytes ? section->bytes : (const uint8_t *)"";
        return PS_OK;
    }
    first = offset >> PS_CHUNK_BITS;
    last = (offset + length - 1) >> PS_CHUNK_BITS;
    for (uint64_t chunk = first; chunk <= last; chunk++) {
        if (!ps_section_chunk_loaded(section, chunk)) {
            ret = ps_section_load(image, section, chunk, last, err);
            if (ret) {
                return ret;
            }
            break;
        }
    }
    *out = section->bytes + offset;
    return PS_OK;
}

uint64_t ps_image_section_length(const ps_image *image, uint32_t type)
{
    return type < PS_SECTION_TYPES ? image->sections[type].length : 0;
}

int ps_image_read_section(ps_image *image, uint32_t type, uint64_t offset,
                          uint8_t *buffer, size_t length, ps_error *err)
{
    const uint8_t *bytes;
    int ret = ps_section_bytes(image, type, offset, length, &bytes, err);

    if (!ret && length > 0) {
        memcpy(buffer, bytes, length);
    }
    return ret;
}

/* ---------------------------------------------------------- page entries */

int ps_image_top_entry(ps_image *image, uint64_t leaf, uint64_t *out,
                       ps_error *err)
{
    const uint8_t *bytes;
    int ret;

    *out = 0;
    if (leaf >= image->leaves) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "the top map has no entry %llu",
                       (unsigned long long)leaf);
    }
    ret = ps_section_bytes(image, PS_SECTION_TOP_MAP, leaf * 8, 8, &bytes, err);
    if (!ret) {
        memcpy(out, bytes, sizeof(*out));
    }
    return ret;
}

int ps_image_leaf(ps_image *image, uint64_t leaf, const uint64_t **out,
                  ps_error *err)
{
    const uint8_t *bytes;
    int ret;

    *out = NULL;
    if (leaf >= image->stored_leaves) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "there is no leaf %llu", (unsigned long long)leaf);
    }
    ret = ps_section_bytes(image, PS_SECTION_LEAVES, leaf << PS_CHUNK_BITS,
                           PS_CHUNK_SIZE, &bytes, err);
    if (!ret) {
        *out = (const uint64_t *)(const void *)bytes;
    }
    return ret;
}

int ps_image_entry_slow(ps_image *image, uint64_t global, uint64_t *out,
                        ps_error *err)
{
    const uint64_t *entries;
    uint64_t entry;
    int ret;

    ret = ps_image_top_entry(image, global >> PS_LEAF_BITS, &entry, err);
    if (ret) {
        return ret;
    }
    if (ps_entry_class(entry) == PS_CLASS_LEAF) {
        ret = ps_image_leaf(image, ps_entry_value(entry), &entries, err);
        if (ret) {
            return ret;
        }
        entry = entries[global & (PS_LEAF_PAGES - 1)];
    }
    *out = entry;
    return PS_OK;
}

bool ps_image_place(const ps_image *image, uint64_t global, uint32_t *block,
                    uint64_t *page)
{
    uint32_t low = 0, high = image->ram_count;

    /* The last block that does not begin after it. */
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;

        if (image->ram[middle].first_page <= global) {
            low = middle;
        } else {
            high = middle;
        }
    }
    if (low == high || global < image->ram[low].first_page ||
        global - image->ram[low].first_page >= image->ram[low].pages) {
        return false;
    }
    *block = low;
    *page = global - image->ram[low].first_page;
    return true;
}

int32_t ps_image_find_ram(const ps_image *image, const char *name,
                          size_t length)
{
    for (uint32_t i = 0; i < image->ram_count; i++) {
        if (strlen(image->ram[i].name) == length &&
            memcmp(image->ram[i].name, name, length) == 0) {
            return (int32_t)i;
        }
    }
    return -1;
}

int ps_image_fill_unit(ps_image *image, uint64_t entry, uint8_t *unit,
                       size_t *length, ps_error *err)
{
    uint32_t log2 = ps_entry_unit_log2(entry);
    uint64_t value = ps_entry_value(entry);
    const uint8_t *bytes;
    int ret;

    *length = 0;
    if (ps_entry_class(entry) == PS_CLASS_ZERO) {
        unit[0] = 0;
        *length = 1;
        return PS_OK;
    }
    if (ps_entry_class(entry) != PS_CLASS_FILL || log2 > PS_FILL_MAX_LOG2) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "the page is neither zero nor fill");
    }
    *length = (size_t)1 << log2;
    if (log2 <= PS_FILL_INLINE_LOG2) {
        memcpy(unit, &value, *length);
        return PS_OK;
    }
    ret = ps_section_bytes(image, PS_SECTION_FILL_UNITS, value * PS_FILL_GRAIN,
                           *length, &bytes, err);
    if (!ret) {
        memcpy(unit, bytes, *length);
    }
    return ret;
}

int ps_image_expand(ps_image *image, uint64_t entry, uint8_t *page,
                    ps_error *err)
{
    size_t length;
    int ret;

    if (entry == PS_CLASS_ZERO) {
        memset(page, 0, PS_PAGE_SIZE);
        return PS_OK;
    }
    ret = ps_image_fill_unit(image, entry, page, &length, err);
    if (ret) {
        return ret;
    }
    for (; length < PS_PAGE_SIZE; length *= 2) {
        memcpy(page + length, page, length);
    }
    return PS_OK;
}

/* -------------------------------------- canonical pages, locality blocks */

static int check_canonical(const ps_image *image, uint64_t canonical,
                           ps_error *err)
{
    if (canonical >= image->canonical_pages) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "there is no canonical page %llu",
                       (unsigned long long)canonical);
    }
    return PS_OK;
}

int ps_image_owner(ps_image *image, uint64_t canonical, uint64_t *global,
                   ps_error *err)
{
    const uint8_t *bytes;
    ps_format_owner owner;
    uint32_t block;
    uint64_t page;
    int ret = check_canonical(image, canonical, err);

    if (!ret) {
        ret = ps_section_bytes(image, PS_SECTION_OWNERS,
                               canonical * sizeof(owner), sizeof(owner), &bytes,
                               err);
    }
    if (ret) {
        return ret;
    }
    memcpy(&owner, bytes, sizeof(owner));
    if (!ps_image_place(image, owner, &block, &page)) {
        return ps_fail(err, PS_ERR_DAMAGED,
                       image->sections[PS_SECTION_OWNERS].offset +
                           canonical * sizeof(owner),
                       "owner of canonical page %llu: there is no page %u",
                       (unsigned long long)canonical, owner);
    }
    *global = owner;
    return PS_OK;
}

int ps_image_signature(ps_image *image, uint64_t canonical,
                       ps_format_signature *out, ps_error *err)
{
    const uint8_t *bytes;
    int ret = check_canonical(image, canonical, err);

    if (!ret) {
        ret = ps_section_bytes(image, PS_SECTION_SIGNATURES,
                               canonical * sizeof(*out), sizeof(*out), &bytes,
                               err);
    }
    if (!ret) {
        memcpy(out, bytes, sizeof(*out));
    }
    return ret;
}

/* What is wrong with where and how a block is stored; NULL: nothing. */
static const char *block_fault(const ps_image *image, const ps_block_info *info)
{
    size_t plain = (size_t)info->pages * PS_PAGE_SIZE;

    if (info->offset < PS_HEADER_LENGTH || info->offset > image->blocks_end ||
        info->stored > image->blocks_end - info->offset) {
        return "it is out of place";
    }
    switch (info->form) {
    case PS_BLOCK_RAW:
        return info->stored != plain                    ? "its length is wrong"
               : info->offset % PS_BLOCK_ALIGNMENT != 0 ? "it is not aligned"
                                                        : NULL;
    case PS_BLOCK_ZSTD:
        return info->stored == 0 || info->stored >= plain
                   ? "its length is wrong"
                   : NULL;
    default:
        return "it is stored in an unknown form";
    }
}

int ps_image_block(ps_image *image, uint64_t number, ps_block_info *out,
                   ps_error *err)
{
    ps_format_block record;
    const uint8_t *bytes = NULL;
    const char *fault;
    uint64_t left;
    int ret;

    if (number >= image->locality_blocks) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "there is no locality block %llu",
                       (unsigned long long)number);
    }
    ret =
        ps_section_bytes(image, PS_SECTION_BLOCK_INDEX, number * sizeof(record),
                         sizeof(record), &bytes, err);
    if (ret) {
        return ret;
    }
    memcpy(&record, bytes, sizeof(record));
    out->number = number;
    out->offset = record.offset;
    out->checksum = record.checksum;
    out->stored = record.length;
    out->form = record.form;
    out->first = number << image->block_shift;
    left = image->canonical_pages - out->first;
    out->pages =
        left < image->pages_per_block ? (uint32_t)left : image->pages_per_block;
    fault = block_fault(image, out);
    if (fault) {
        return ps_fail(err, PS_ERR_DAMAGED,
                       image->sections[PS_SECTION_BLOCK_INDEX].offset +
                           number * sizeof(record),
                       "locality block %llu: %s", (unsigned long long)number,
                       fault);
    }
    return PS_OK;
}

int ps_decoder_init(ps_decoder *decoder, const ps_image *image, ps_error *err)
{
    *decoder = (ps_decoder){
        .zstd = ZSTD_createDCtx(),
        .capacity = (size_t)image->pages_per_block * PS_PAGE_SIZE,
    };
    decoder->stored = malloc(decoder->capacity);
    if (!decoder->zstd || !decoder->stored) {
        ps_decoder_deinit(decoder);
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "out of memory");
    }
    return PS_OK;
}

void ps_decoder_deinit(ps_decoder *decoder)
{
    ZSTD_freeDCtx(decoder->zstd);
    free(decoder->stored);
    *decoder = (ps_decoder){0};
}

static int block_checksum(const ps_block_info *info, const uint8_t *stored,
                          ps_error *err)
{
    if (XXH3_64bits(stored, info->stored) != info->checksum) {
        return ps_fail(err, PS_ERR_DAMAGED, info->offset,
                       "locality block %llu: checksum is wrong",
                       (unsigned long long)info->number);
    }
    return PS_OK;
}

static int block_damaged(const ps_block_info *info, const char *fault,
                         ps_error *err)
{
    return ps_fail(err, PS_ERR_DAMAGED, info->offset, "locality block %llu: %s",
                   (unsigned long long)info->number, fault);
}

int ps_decoder_decode(ps_decoder *decoder, const ps_block_info *info,
                      const uint8_t *stored, uint8_t *out, ps_error *err)
{
    size_t plain = (size_t)info->pages * PS_PAGE_SIZE;
    uint32_t magic;
    size_t got;
    int ret = block_checksum(info, stored, err);

    if (ret) {
        return ret;
    }
    if (info->form == PS_BLOCK_RAW) {
        if (stored != out) {
            memcpy(out, stored, plain);
        }
        return PS_OK;
    }
    if (info->stored < sizeof(magic)) {
        return block_damaged(info, "it is not a zstd frame", err);
    }
    memcpy(&magic, stored, sizeof(magic));
    if (magic != ZSTD_FRAME_MAGIC) {
        return block_damaged(info, "it is not a zstd frame", err);
    }
    if (ZSTD_getFrameContentSize(stored, info->stored) != plain) {
        return block_damaged(
            info, "its frame does not state the size of its pages", err);
    }
    if (ZSTD_findFrameCompressedSize(stored, info->stored) != info->stored) {
        return block_damaged(info, "it is not one whole zstd frame", err);
    }
    got = ZSTD_decompressDCtx(decoder->zstd, out, plain, stored, info->stored);
    if (ZSTD_isError(got)) {
        return block_damaged(info, ZSTD_getErrorName(got), err);
    }
    if (got != plain) {
        return block_damaged(info, "its frame has another size", err);
    }
    return PS_OK;
}

int ps_decoder_read(ps_decoder *decoder, int fd, const ps_block_info *info,
                    uint8_t *out, ps_error *err)
{
    uint8_t *stored = info->form == PS_BLOCK_RAW ? out : decoder->stored;
    char what[48];
    int ret;

    snprintf(what, sizeof(what), "locality block %llu",
             (unsigned long long)info->number);
    ret = ps_pread_all(fd, stored, info->stored, info->offset, what, err);
    if (ret) {
        return ret;
    }
    return ps_decoder_decode(decoder, info, stored, out, err);
}

int ps_image_read_raw_page(ps_image *image, const ps_block_info *info,
                           uint64_t canonical, uint8_t *page, ps_error *err)
{
    uint64_t slot = canonical - info->first;
    ps_format_signature want;
    XXH128_hash_t is;
    uint64_t at;
    int ret;

    if (info->form != PS_BLOCK_RAW || canonical < info->first ||
        slot >= info->pages) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "canonical page %llu cannot be read alone",
                       (unsigned long long)canonical);
    }
    ret = ps_image_signature(image, canonical, &want, err);
    if (ret) {
        return ret;
    }
    at = info->offset + slot * PS_PAGE_SIZE;
    ret = ps_pread_all(image->fd, page, PS_PAGE_SIZE, at,
                       "a page of a locality block", err);
    if (ret) {
        return ret;
    }
    is = XXH3_128bits(page, PS_PAGE_SIZE);
    if (is.low64 != want.low || is.high64 != want.high) {
        return ps_fail(err, PS_ERR_DAMAGED, at,
                       "locality block %llu, page %llu: signature is wrong",
                       (unsigned long long)info->number,
                       (unsigned long long)slot);
    }
    return PS_OK;
}

/* ----------------------------------------------------------------- cache */

static int cache_create(ps_image *image, ps_error *err)
{
    struct ps_image_cache *cache = calloc(1, sizeof(*cache));
    int ret;

    if (!cache) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "out of memory");
    }
    ret = ps_block_cache_init(&cache->blocks, image, CACHE_BYTES, err);
    if (ret) {
        free(cache);
        return ret;
    }
    cache->expanded_entry = PS_CLASS_ZERO;
    image->cache = cache;
    return PS_OK;
}

static int cached_block(ps_image *image, uint64_t number, const uint8_t **pages,
                        ps_error *err)
{
    ps_block_cache *blocks = &image->cache->blocks;
    ps_block_info info;
    int ret;

    *pages = ps_block_cache_find(blocks, number);
    if (*pages) {
        return PS_OK;
    }
    ret = ps_image_block(image, number, &info, err);
    return ret ? ret : ps_block_cache_load(blocks, &info, pages, err);
}

int ps_image_page(ps_image *image, uint64_t entry, const uint8_t **page,
                  ps_error *err)
{
    struct ps_image_cache *cache;
    uint64_t canonical = ps_entry_value(entry);
    int ret;

    if (!image->cache) {
        ret = cache_create(image, err);
        if (ret) {
            return ret;
        }
    }
    cache = image->cache;
    switch (ps_entry_class(entry)) {
    case PS_CLASS_ZERO:
    case PS_CLASS_FILL:
        if (entry != cache->expanded_entry) {
            cache->expanded_entry = 0; /* of no page, should this fail */
            ret = ps_image_expand(image, entry, cache->expanded, err);
            if (ret) {
                return ret;
            }
            cache->expanded_entry = entry;
        }
        *page = cache->expanded;
        return PS_OK;
    case PS_CLASS_DATA:
        ret = check_canonical(image, canonical, err);
        if (!ret) {
            ret =
                cached_block(image, canonical >> image->block_shift, page, err);
        }
        if (!ret) {
            *page += (canonical & image->block_mask) * PS_PAGE_SIZE;
        }
        return ret;
    default:
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "a page of class %u has no content",
                       ps_entry_class(entry));
    }
}

/* ------------------------------------------------------------- interface */

static int check_pages(const ps_image *image, uint32_t block, uint64_t first,
                       uint64_t count, ps_error *err)
{
    if (block >= image->ram_count) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "there is no RAM block %u", block);
    }
    if (first > image->ram[block].pages ||
        count > image->ram[block].pages - first) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "RAM block %s has no %llu pages from %llu on",
                       image->ram[block].name, (unsigned long long)count,
                       (unsigned long long)first);
    }
    return PS_OK;
}

void ps_image_get_info(const ps_image *image, ps_image_info *out)
{
    const struct ps_image_cache *cache = image->cache;

    *out = (ps_image_info){
        .format_version = image->header.version,
        .pages_per_block = image->pages_per_block,
        .incompatible_features = image->header.incompatible,
        .compatible_features = image->header.compatible,
        .file_bytes = image->file_length,
        .index_bytes = image->file_length - image->blocks_end,
        .ram_blocks = image->ram_count,
        .leaves = image->leaves,
        .canonical_pages = image->canonical_pages,
        .locality_blocks = image->locality_blocks,
        .memory_bytes =
            sizeof(*image) + image->ram_count * (sizeof(image->ram[0]) +
                                                 sizeof(image->ram_blocks[0])),
        .stream =
            {
                .stream_version = image->stream.stream_version,
                .ram_section_id = image->stream.ram_section_id,
                .ram_instance = image->stream.ram_instance,
                .ram_version = image->stream.ram_version,
                .footers = (image->stream.flags & PS_STREAM_FOOTERS) != 0,
                .configuration =
                    (image->stream.flags & PS_STREAM_CONFIGURATION) != 0,
                .description =
                    (image->stream.flags & PS_STREAM_DESCRIPTION) != 0,
                .target_page_bits = image->stream.page_bits,
            },
    };
    memcpy(out->uuid, image->header.uuid, sizeof(out->uuid));
    memcpy(out->parent, image->header.parent, sizeof(out->parent));
    for (uint32_t i = 0; i < image->ram_count; i++) {
        out->pages_zero += image->ram_blocks[i].pages_zero;
        out->pages_fill += image->ram_blocks[i].pages_fill;
        out->pages_data += image->ram_blocks[i].pages_data;
        out->pages_absent += image->ram_blocks[i].pages_absent;
    }
    for (uint32_t type = 0; type < PS_SECTION_TYPES; type++) {
        const ps_section *section = &image->sections[type];

        if (section->bytes) {
            out->memory_bytes += section->chunks_loaded * PS_CHUNK_SIZE +
                                 ps_chunks_of(section->length) * 8 +
                                 ps_chunks_of(section->length) / 8;
        }
    }
    if (cache) {
        out->memory_bytes +=
            sizeof(*cache) + ps_block_cache_memory(&cache->blocks);
    }
}

int ps_image_ram_block(const ps_image *image, uint32_t index, ps_ram_block *out,
                       ps_error *err)
{
    if (index >= image->ram_count) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "there is no RAM block %u", index);
    }
    *out = image->ram_blocks[index];
    return PS_OK;
}

int ps_image_entries(ps_image *image, uint32_t block, uint64_t first,
                     uint64_t count, uint64_t *out, ps_error *err)
{
    int ret = check_pages(image, block, first, count, err);

    for (uint64_t i = 0; !ret && i < count; i++) {
        ret = ps_image_entry(image, ps_image_global(image, block, first + i),
                             &out[i], err);
    }
    return ret;
}

int ps_image_read_pages(ps_image *image, uint32_t block, uint64_t first,
                        uint64_t count, uint8_t *out, ps_error *err)
{
    int ret = check_pages(image, block, first, count, err);

    for (uint64_t i = 0; !ret && i < count; i++) {
        const uint8_t *page;
        uint64_t entry;

        ret = ps_image_entry(image, ps_image_global(image, block, first + i),
                             &entry, err);
        if (ret) {
            break;
        }
        if (ps_entry_class(entry) == PS_CLASS_ABSENT) {
            return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                           "RAM block %s, page %llu: the snapshot does not "
                           "have it",
                           image->ram[block].name,
                           (unsigned long long)(first + i));
        }
        ret = ps_image_page(image, entry, &page, err);
        if (!ret) {
            memcpy(out + i * PS_PAGE_SIZE, page, PS_PAGE_SIZE);
        }
    }
    return ret;
}

/* The pages from page on that surely have the entry of page: the rest of its
   leaf where the top map speaks for it, else one. */
static int entry_span(ps_image *image, uint32_t block, uint64_t page,
                      uint64_t *entry, uint64_t *span, ps_error *err)
{
    uint64_t global = ps_image_global(image, block, page);
    uint64_t left = image->ram[block].pages - page;
    int ret;

    ret = ps_image_top_entry(image, global >> PS_LEAF_BITS, entry, err);
    if (ret) {
        return ret;
    }
    if (ps_entry_class(*entry) == PS_CLASS_LEAF) {
        *span = 1;
        return ps_image_entry(image, global, entry, err);
    }
    *span = PS_LEAF_PAGES - (global & (PS_LEAF_PAGES - 1));
    if (*span > left) {
        *span = left;
    }
    return PS_OK;
}

int ps_image_runs(ps_image *image, uint32_t block, uint64_t first, ps_run *runs,
                  size_t capacity, size_t *count, uint64_t *next, ps_error *err)
{
    uint64_t page = first;
    int ret = check_pages(image, block, first, 0, err);

    *count = 0;
    *next = first;
    while (!ret && page < image->ram[block].pages) {
        ps_run *run = *count > 0 ? &runs[*count - 1] : NULL;
        uint64_t entry, span, owner;
        uint32_t page_class, shared = 0;

        ret = entry_span(image, block, page, &entry, &span, err);
        if (ret) {
            break;
        }
        page_class = ps_entry_class(entry);
        if (page_class == PS_CLASS_DATA) {
            ret = ps_image_owner(image, ps_entry_value(entry), &owner, err);
            if (ret) {
                break;
            }
            shared = owner != ps_image_global(image, block, page);
        }
        if (run && run->page_class == page_class && run->shared == shared) {
            run->count += span;
        } else if (*count < capacity) {
            runs[(*count)++] = (ps_run){
                .first = page,
                .count = span,
                .page_class = page_class,
                .shared = shared,
            };
        } else {
            break;
        }
        page += span;
        *next = page;
    }
    return ret;
}
