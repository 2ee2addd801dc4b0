/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A snapshot as an ordinary QEMU migration stream, for `-incoming file:`,
 * `exec:cat ..` and every other program that reads such streams.
 *
 * The form is that of a precopy migration without capabilities (QEMU:
 * migration/savevm.c, migration/ram.c): no page sizes in the block list, no
 * commands before RAM. One thing depends on the configuration, which is sent
 * as it was saved: if its sub-section `configuration/capabilities` lists
 * x-ignore-shared, the destination needs that capability as well and expects
 * an address with each RAM block, so these are written.
 */
#include "image.h"

#define BUFFER_BYTES ((size_t)1 << 20)
#define RECORD_MAX (8 + 1 + 255 + PS_PAGE_SIZE) /* one page, block named */
#define PAGES_PER_SECTION 4096u
#define QEMU_VM_FILE_MAGIC 0x5145564du /* "QEVM" */

typedef struct exporter {
    ps_image *image;
    ps_job *job;
    int fd;
    uint8_t *buffer;
    size_t used;
} exporter;

static int put_flush(exporter *to, ps_error *err)
{
    int ret =
        ps_write_all(to->fd, to->buffer, to->used, "migration stream", err);

    to->used = 0;
    return ret;
}

/* Room for a record; the put functions below do not look. */
static int put_reserve(exporter *to, size_t length, ps_error *err)
{
    return BUFFER_BYTES - to->used < length ? put_flush(to, err) : PS_OK;
}

static void put_byte(exporter *to, uint8_t value)
{
    to->buffer[to->used++] = value;
}

static void put_be32(exporter *to, uint32_t value)
{
    ps_put_be32(to->buffer + to->used, value);
    to->used += 4;
}

static void put_be64(exporter *to, uint64_t value)
{
    ps_put_be64(to->buffer + to->used, value);
    to->used += 8;
}

static void put_name(exporter *to, const char *name)
{
    size_t length = strlen(name); /* at most 255, as open has checked */

    put_byte(to, (uint8_t)length);
    memcpy(to->buffer + to->used, name, length);
    to->used += length;
}

static void put_footer(exporter *to)
{
    if (to->image->stream.flags & PS_STREAM_FOOTERS) {
        put_byte(to, QEMU_VM_SECTION_FOOTER);
        put_be32(to, to->image->stream.ram_section_id);
    }
}

/* A whole section of the snapshot, in pieces. */
static int put_section(exporter *to, uint32_t type, ps_error *err)
{
    uint64_t length = to->image->sections[type].length;
    uint64_t at = 0;
    int ret = PS_OK;

    while (!ret && at < length) {
        size_t piece = length - at < 65536 ? (size_t)(length - at) : 65536;

        ret = put_reserve(to, piece, err);
        if (!ret) {
            ret = ps_image_read_section(to->image, type, at,
                                        to->buffer + to->used, piece, err);
        }
        if (!ret) {
            to->used += piece;
            at += piece;
        }
    }
    return ret;
}

/* A big-endian reader over the configuration; short input ends it. */
typedef struct cursor {
    const uint8_t *at;
    size_t left;
} cursor;

static const uint8_t *take(cursor *from, size_t length)
{
    const uint8_t *at = from->at;

    if (from->left < length) {
        from->left = 0;
        return NULL;
    }
    from->at += length;
    from->left -= length;
    return at;
}

static bool take_be32(cursor *from, uint32_t *value)
{
    const uint8_t *at = take(from, 4);

    *value = at ? ps_get_be32(at) : 0;
    return at != NULL;
}

static bool take_name(cursor *from, const char *name, bool *same)
{
    const uint8_t *length = take(from, 1);
    const uint8_t *text = length ? take(from, *length) : NULL;

    *same = text && strlen(name) == *length && memcmp(text, name, *length) == 0;
    return text != NULL;
}

/* Does the configuration list x-ignore-shared? Sub-sections other than the
   two that precede it in QEMU's order end the search. */
static bool lists_ignore_shared(cursor from)
{
    uint32_t length, version, count;
    const uint8_t *mark;

    if (!take(&from, 1) || !take_be32(&from, &length) || !take(&from, length)) {
        return false;
    }
    while ((mark = take(&from, 1)) && *mark == QEMU_VM_SUBSECTION) {
        cursor name = from;
        bool page_bits, capabilities, same;

        if (!take_name(&name, "configuration/target-page-bits", &page_bits) ||
            !take_name(&from, "configuration/capabilities", &capabilities) ||
            !take_be32(&from, &version)) {
            return false;
        }
        if (page_bits) {
            (void)take(&from, 4);
            continue;
        }
        if (!capabilities || !take_be32(&from, &count)) {
            return false;
        }
        while (count-- > 0 && take_name(&from, "x-ignore-shared", &same)) {
            if (same) {
                return true;
            }
        }
        return false;
    }
    return false;
}

static int put_start(exporter *to, ps_error *err)
{
    const ps_image *image = to->image;
    size_t length = (size_t)image->sections[PS_SECTION_CONFIGURATION].length;
    const uint8_t *configuration;
    uint64_t total = 0;
    bool addresses;
    int ret;

    put_be32(to, QEMU_VM_FILE_MAGIC);
    put_be32(to, image->stream.stream_version);
    ret = put_section(to, PS_SECTION_CONFIGURATION, err);
    if (!ret) {
        ret = ps_section_bytes(to->image, PS_SECTION_CONFIGURATION, 0, length,
                               &configuration, err);
    }
    if (!ret) {
        ret = put_reserve(to, RECORD_MAX, err);
    }
    if (ret) {
        return ret;
    }
    addresses = lists_ignore_shared((cursor){configuration, length});
    put_byte(to, QEMU_VM_SECTION_START);
    put_be32(to, image->stream.ram_section_id);
    put_name(to, "ram");
    put_be32(to, image->stream.ram_instance);
    put_be32(to, image->stream.ram_version);
    for (uint32_t i = 0; i < image->ram_count; i++) {
        total += image->ram_blocks[i].length;
    }
    put_be64(to, total | RAM_SAVE_FLAG_MEM_SIZE);
    for (uint32_t i = 0; !ret && i < image->ram_count; i++) {
        const ps_ram_block *block = &image->ram_blocks[i];

        if (addresses && block->address == UINT64_MAX) {
            return ps_fail(err, PS_ERR_UNSUPPORTED, PS_NOWHERE,
                           "the configuration lists x-ignore-shared, but the "
                           "address of RAM block %s is not known",
                           block->name);
        }
        ret = put_reserve(to, RECORD_MAX, err);
        if (!ret) {
            put_name(to, block->name);
            put_be64(to, block->length);
            if (addresses) {
                put_be64(to, block->address);
            }
        }
    }
    if (!ret) {
        ret = put_reserve(to, RECORD_MAX, err);
    }
    if (!ret) {
        put_be64(to, RAM_SAVE_FLAG_EOS);
        put_footer(to);
    }
    return ret;
}

static int put_page(exporter *to, uint32_t block, uint64_t page, bool name,
                    ps_error *err)
{
    uint64_t offset = page << PS_PAGE_BITS;
    const uint8_t *content;
    uint64_t entry;
    int ret;

    ret = ps_image_entry(to->image, ps_image_global(to->image, block, page),
                         &entry, err);
    if (!ret) {
        ret = put_reserve(to, RECORD_MAX, err);
    }
    if (ret) {
        return ret;
    }
    switch (ps_entry_class(entry)) {
    case PS_CLASS_ABSENT:
        return ps_fail(err, PS_ERR_UNSUPPORTED, PS_NOWHERE,
                       "RAM block %s, page %llu: the snapshot does not have "
                       "it, and a stream must",
                       to->image->ram[block].name, (unsigned long long)page);
    case PS_CLASS_ZERO:
        content = NULL;
        offset |= RAM_SAVE_FLAG_ZERO;
        break;
    default:
        ret = ps_image_page(to->image, entry, &content, err);
        if (ret) {
            return ret;
        }
        offset |= RAM_SAVE_FLAG_PAGE;
        break;
    }
    put_be64(to, name ? offset : offset | RAM_SAVE_FLAG_CONTINUE);
    if (name) {
        put_name(to, to->image->ram[block].name);
    }
    if (content) {
        memcpy(to->buffer + to->used, content, PS_PAGE_SIZE);
        to->used += PS_PAGE_SIZE;
    } else {
        put_byte(to, 0); /* QEMU refuses any other fill value */
    }
    return PS_OK;
}

/* One PART section; every one names its RAM block again. */
static int put_part(exporter *to, uint32_t block, uint64_t first,
                    uint64_t count, ps_error *err)
{
    int ret = put_reserve(to, RECORD_MAX, err);

    if (ret) {
        return ret;
    }
    put_byte(to, QEMU_VM_SECTION_PART);
    put_be32(to, to->image->stream.ram_section_id);
    for (uint64_t i = 0; !ret && i < count; i++) {
        ret = put_page(to, block, first + i, i == 0, err);
    }
    if (!ret) {
        ret = put_reserve(to, RECORD_MAX, err);
    }
    if (ret) {
        return ret;
    }
    put_be64(to, RAM_SAVE_FLAG_EOS);
    put_footer(to);
    if (to->job) {
        __atomic_fetch_add(&to->job->done, count * PS_PAGE_SIZE,
                           __ATOMIC_RELAXED);
        if (__atomic_load_n(&to->job->cancel, __ATOMIC_RELAXED)) {
            return ps_fail(err, PS_ERR_CANCELLED, PS_NOWHERE, "cancelled");
        }
    }
    return PS_OK;
}

static int put_end(exporter *to, ps_error *err)
{
    const ps_image *image = to->image;
    int ret = put_reserve(to, RECORD_MAX, err);

    if (ret) {
        return ret;
    }
    put_byte(to, QEMU_VM_SECTION_END);
    put_be32(to, image->stream.ram_section_id);
    put_be64(to, RAM_SAVE_FLAG_EOS);
    put_footer(to);
    ret = put_section(to, PS_SECTION_DEVICES, err);
    if (!ret) {
        ret = put_reserve(to, RECORD_MAX, err);
    }
    if (ret) {
        return ret;
    }
    put_byte(to, QEMU_VM_EOF);
    if (image->stream.flags & PS_STREAM_DESCRIPTION) {
        put_byte(to, QEMU_VM_VMDESCRIPTION);
        put_be32(to, (uint32_t)image->sections[PS_SECTION_DESCRIPTION].length);
        ret = put_section(to, PS_SECTION_DESCRIPTION, err);
    }
    return ret ? ret : put_flush(to, err);
}

int ps_image_export(ps_image *image, int fd, ps_job *job, ps_error *err)
{
    PS_AUTOFREE uint8_t *buffer = malloc(BUFFER_BYTES);
    exporter to = {.image = image, .job = job, .fd = fd, .buffer = buffer};
    uint64_t total = 0;
    int ret;

    if (!buffer) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "out of memory");
    }
    for (uint32_t i = 0; i < image->ram_count; i++) {
        total += image->ram_blocks[i].length;
    }
    if (job) {
        __atomic_store_n(&job->total, total, __ATOMIC_RELAXED);
    }
    ret = put_start(&to, err);
    for (uint32_t i = 0; !ret && i < image->ram_count; i++) {
        uint64_t pages = image->ram[i].pages;

        for (uint64_t first = 0; !ret && first < pages;
             first += PAGES_PER_SECTION) {
            uint64_t left = pages - first;

            ret = put_part(&to, i, first,
                           left < PAGES_PER_SECTION ? left : PAGES_PER_SECTION,
                           err);
        }
    }
    return ret ? ret : put_end(&to, err);
}
