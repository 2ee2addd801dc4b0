/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The reader, compare and export, on files that a small encoder of this
 * test's own makes. The museum (tests/format/) has the broken files.
 */
#include "check.h"
#include "image.h"

#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>
#include <zstd.h>

#define P PS_PAGE_SIZE

/* ---------------------------------------------------------------- encoder */

typedef struct bytes {
    uint8_t *data;
    size_t length;
    size_t capacity;
} bytes;

static void append(bytes *to, const void *data, size_t length)
{
    if (to->length + length > to->capacity) {
        to->capacity = 2 * (to->length + length) + 4096;
        to->data = realloc(to->data, to->capacity);
        if (!to->data) {
            abort();
        }
    }
    if (data) {
        memcpy(to->data + to->length, data, length);
    } else {
        memset(to->data + to->length, 0, length);
    }
    to->length += length;
}

static void align(bytes *to, size_t alignment)
{
    append(to, NULL, (alignment - to->length % alignment) % alignment);
}

typedef struct encoder {
    uint32_t per_block;
    int raw;
    bytes sections[PS_SECTION_TYPES];
    bytes pages; /* canonical */
    uint64_t top_entries;
} encoder;

static void add_ram(encoder *to, const char *name, const uint64_t *entries,
                    uint64_t pages, uint64_t address)
{
    ps_format_ram_block record = {
        .name_length = (uint8_t)strlen(name),
        .length = pages * P,
        .address = address,
        .first_leaf = to->top_entries,
    };
    uint64_t *counts[4] = {0};
    uint64_t absent = 0, zero = 0, fill = 0, data = 0;

    counts[PS_CLASS_ABSENT] = &absent;
    counts[PS_CLASS_ZERO] = &zero;
    counts[PS_CLASS_FILL] = &fill;
    counts[PS_CLASS_DATA] = &data;
    memcpy(record.name, name, strlen(name));
    for (uint64_t first = 0; first < pages; first += PS_LEAF_PAGES) {
        uint64_t left = pages - first, top = entries[first];
        uint64_t n = left < PS_LEAF_PAGES ? left : PS_LEAF_PAGES;
        bytes *leaves = &to->sections[PS_SECTION_LEAVES];
        bool uniform = ps_entry_class(top) != PS_CLASS_DATA;

        for (uint64_t i = 0; i < n; i++) {
            uniform = uniform && entries[first + i] == top;
            ++*counts[ps_entry_class(entries[first + i])];
        }
        if (!uniform) {
            top = ps_entry_make(PS_CLASS_LEAF, 0, leaves->length / P);
            append(leaves, entries + first, n * 8);
            align(leaves, P);
        }
        append(&to->sections[PS_SECTION_TOP_MAP], &top, 8);
        to->top_entries++;
    }
    record.pages_absent = absent;
    record.pages_zero = zero;
    record.pages_fill = fill;
    record.pages_data = data;
    append(&to->sections[PS_SECTION_RAM_BLOCKS], &record, sizeof(record));
}

static void add_page(encoder *to, const uint8_t *page, uint32_t owner)
{
    XXH128_hash_t hash = XXH3_128bits(page, P);
    ps_format_signature signature = {hash.low64, hash.high64};

    append(&to->pages, page, P);
    append(&to->sections[PS_SECTION_SIGNATURES], &signature, sizeof(signature));
    append(&to->sections[PS_SECTION_OWNERS], &owner, sizeof(owner));
}

static void put_part(bytes *out, const bytes *data, uint64_t *offset)
{
    align(out, 8);
    *offset = out->length;
    append(out, data->data, data->length);
}

static void add_blocks(encoder *from, bytes *out)
{
    size_t step = from->per_block * P;

    for (size_t at = 0; at < from->pages.length; at += step) {
        size_t plain =
            from->pages.length - at < step ? from->pages.length - at : step;
        uint8_t packed[64 * P];
        ps_format_block record = {.form = PS_BLOCK_RAW};
        const uint8_t *data = from->pages.data + at;
        size_t stored = plain;

        if (!from->raw) {
            size_t n = ZSTD_compress(packed, sizeof(packed), data, plain, 1);

            if (!ZSTD_isError(n) && n < plain) {
                record.form = PS_BLOCK_ZSTD;
                data = packed;
                stored = n;
            }
        }
        if (record.form == PS_BLOCK_RAW) {
            align(out, PS_BLOCK_ALIGNMENT);
        }
        record.offset = out->length;
        record.length = (uint32_t)stored;
        record.checksum = XXH3_64bits(data, stored);
        append(out, data, stored);
        append(&from->sections[PS_SECTION_BLOCK_INDEX], &record,
               sizeof(record));
    }
}

static bytes seal(encoder *from)
{
    static const uint32_t sizes[PS_SECTION_TYPES] = {
        0, 1, 40, 1, 1, 1, 320, 8, 4096, 8, 24, 16, 4, 64, 16, 16};
    ps_format_header header = {
        .version = 1,
        .header_length = sizeof(header),
        .uuid = "a uuid of bytes",
        .pages_per_block = from->per_block,
    };
    ps_format_trailer trailer = {0};
    bytes out = {0}, table = {0};
    uint64_t at;

    append(&out, NULL, sizeof(header));
    add_blocks(from, &out);
    for (uint32_t type = 1; type < PS_SECTION_TYPES; type++) {
        const bytes *data = &from->sections[type];
        ps_format_section row = {
            .type = type,
            .flags = type != PS_SECTION_META && type <= PS_SECTION_OWNERS,
            .length = data->length,
            .record_size = sizes[type],
        };
        bytes sums = {0};
        uint64_t offset;

        for (size_t done = 0; done < data->length; done += P) {
            uint64_t sum =
                XXH3_64bits(data->data + done,
                            data->length - done < P ? data->length - done : P);

            append(&sums, &sum, sizeof(sum));
        }
        put_part(&out, data, &offset);
        row.offset = offset;
        put_part(&out, &sums, &offset);
        row.sums_offset = offset;
        row.sums_checksum = XXH3_64bits(sums.data, sums.length);
        append(&table, &row, sizeof(row));
        free(sums.data);
    }
    put_part(&out, &table, &at);
    trailer.table_offset = at;
    trailer.table_length = table.length;
    trailer.table_checksum = XXH3_64bits(table.data, table.length);
    trailer.file_length = out.length + sizeof(trailer);
    memcpy(trailer.uuid, header.uuid, sizeof(trailer.uuid));
    memcpy(trailer.magic, PS_TRAILER_MAGIC, 8);
    trailer.checksum =
        XXH3_64bits(&trailer, offsetof(ps_format_trailer, checksum));
    append(&out, &trailer, sizeof(trailer));
    memcpy(header.magic, PS_HEADER_MAGIC, 8);
    header.checksum =
        XXH3_64bits(&header, offsetof(ps_format_header, checksum));
    memcpy(out.data, &header, sizeof(header));
    free(table.data);
    for (uint32_t type = 0; type < PS_SECTION_TYPES; type++) {
        free(from->sections[type].data);
    }
    free(from->pages.data);
    *from = (encoder){0};
    return out;
}

static int file_of(const bytes *data)
{
    int fd = memfd_create("snapshot", MFD_CLOEXEC);

    if (fd < 0 ||
        write(fd, data->data, data->length) != (ssize_t)data->length) {
        abort();
    }
    return fd;
}

static void text_page(uint8_t *page, uint32_t seed)
{
    for (uint32_t i = 0; i < P; i++) {
        page[i] = (uint8_t)(i % 97 + (i % 64 == 0 ? seed >> (i / 64 % 4) : 0));
    }
    memcpy(page, &seed, sizeof(seed));
}

static const uint8_t configuration[] = {7, 0, 0, 0, 4, 'n', 'o', 'n', 'e'};

static void add_small_sections(encoder *to, const void *config,
                               size_t config_length)
{
    ps_format_stream stream = {
        .stream_version = 3,
        .ram_section_id = 2,
        .ram_version = 4,
        .flags =
            PS_STREAM_FOOTERS | PS_STREAM_CONFIGURATION | PS_STREAM_DESCRIPTION,
        .page_bits = 12,
    };

    append(&to->sections[PS_SECTION_META], "{}", 2);
    append(&to->sections[PS_SECTION_STREAM], &stream, sizeof(stream));
    append(&to->sections[PS_SECTION_CONFIGURATION], config, config_length);
    append(&to->sections[PS_SECTION_DEVICES], "devices!", 8);
    append(&to->sections[PS_SECTION_DESCRIPTION], "{\"page_size\": 4096}", 19);
}

#define GUEST_PAGES 1100u

/*
 * pc.ram: 1,100 pages. 0..9 data 0..9, 20 is data 3 again, 30 fill of one
 * byte, 31 fill of 8 bytes, 512..1023 fill (uniform leaf), rest zero.
 * rom: one page, data 10.
 */
static bytes guest(int raw, uint32_t per_block, uint32_t change,
                   const void *config, size_t config_length)
{
    encoder to = {.per_block = per_block, .raw = raw};
    uint64_t *entries = calloc(GUEST_PAGES, 8);
    uint64_t rom = ps_entry_make(PS_CLASS_DATA, 0, 10);
    uint8_t page[P];

    add_small_sections(&to, config, config_length);
    for (uint32_t i = 0; i < GUEST_PAGES; i++) {
        entries[i] = ps_entry_make(PS_CLASS_ZERO, 0, 0);
        if (i >= 512 && i < 1024) {
            entries[i] = ps_entry_make(PS_CLASS_FILL, 0, 0x5a);
        }
    }
    for (uint32_t i = 0; i < 10; i++) {
        entries[i] = ps_entry_make(PS_CLASS_DATA, 0, i);
        text_page(page, i == change ? 1000 + i : i);
        add_page(&to, page, i);
    }
    text_page(page, 10);
    add_page(&to, page, 3 * PS_LEAF_PAGES);
    entries[20] = entries[3];
    entries[30] = ps_entry_make(PS_CLASS_FILL, 0, 0x77);
    entries[31] = ps_entry_make(PS_CLASS_FILL, 3, 0);
    if (change == 31) {
        entries[30] = entries[31];
    }
    append(&to.sections[PS_SECTION_FILL_UNITS], "12345678", 8);
    add_ram(&to, "pc.ram", entries, GUEST_PAGES, 0x1000);
    add_ram(&to, "rom", &rom, 1, 0xffff0000);
    free(entries);
    return seal(&to);
}

static bytes plain_guest(int raw, uint32_t per_block, uint32_t change)
{
    return guest(raw, per_block, change, configuration, sizeof(configuration));
}

/* ------------------------------------------------------------------ tests */

static ps_image *open_ok(int fd)
{
    ps_error err = {0};
    ps_image *image = NULL;

    CHECK_MSG(ps_image_open(fd, &image, &err) == PS_OK, "%s", err.message);
    return image;
}

static void check_is_sound(ps_image *image)
{
    ps_error errors[4], err = {0};
    ps_job job = {0};
    size_t count = 99;

    CHECK(ps_image_check(image, &job, errors, 4, &count, &err) == PS_OK);
    CHECK_MSG(count == 0, "%zu: %s", count, errors[0].message);
    CHECK(job.done == job.total && job.total == image->file_length);
    job.cancel = 1;
    CHECK(ps_image_check(image, &job, errors, 4, &count, &err) ==
          PS_ERR_CANCELLED);
}

static void test_read(int raw, uint32_t per_block)
{
    bytes data = plain_guest(raw, per_block, UINT32_MAX);
    int fd = file_of(&data);
    ps_image *image = open_ok(fd);
    ps_error err = {0};
    ps_image_info info;
    ps_ram_block ram;
    uint8_t want[P], got[P];
    uint64_t entry = 0, page = 0;
    uint32_t block = 0;

    ps_image_get_info(image, &info);
    CHECK(info.ram_blocks == 2 && info.canonical_pages == 11);
    CHECK(info.pages_data == 12 && info.pages_fill == 514);
    CHECK(info.leaves == 4 && info.stream.footers && info.stream.description);
    CHECK(ps_image_ram_block(image, 1, &ram, &err) == PS_OK);
    CHECK(strcmp(ram.name, "rom") == 0 && ram.first_leaf == 3);
    CHECK(ps_image_ram_block(image, 2, &ram, &err) == PS_ERR_ARGUMENT);
    CHECK(ps_image_find_ram(image, "rom", 3) == 1);
    CHECK(ps_image_find_ram(image, "ro", 2) == -1);

    for (uint32_t i = 0; i < 10; i++) {
        text_page(want, i);
        CHECK(ps_image_read_pages(image, 0, i, 1, got, &err) == PS_OK);
        CHECK(memcmp(want, got, P) == 0);
    }
    text_page(want, 3);
    CHECK(ps_image_read_pages(image, 0, 20, 1, got, &err) == PS_OK);
    CHECK(memcmp(want, got, P) == 0);
    CHECK(ps_image_read_pages(image, 0, 31, 1, got, &err) == PS_OK);
    CHECK(memcmp(got, "12345678", 8) == 0 && memcmp(got, got + 8, P - 8) == 0);
    CHECK(ps_image_read_pages(image, 0, 600, 1, got, &err) == PS_OK);
    CHECK(got[0] == 0x5a && memcmp(got, got + 1, P - 1) == 0);
    CHECK(ps_image_read_pages(image, 0, 1099, 2, got, &err) == PS_ERR_ARGUMENT);
    CHECK(ps_image_read_pages(image, 0, UINT64_MAX, 2, got, &err) ==
          PS_ERR_ARGUMENT);
    CHECK(ps_image_read_pages(image, 7, 0, 1, got, &err) == PS_ERR_ARGUMENT);

    CHECK(ps_image_entry(image, 3 * 512, &entry, &err) == PS_OK);
    CHECK(entry == ps_entry_make(PS_CLASS_DATA, 0, 10));
    CHECK(ps_image_entry(image, 4 * 512, &entry, &err) == PS_ERR_ARGUMENT);
    CHECK(ps_image_place(image, 1099, &block, &page));
    CHECK(block == 0 && page == 1099);
    CHECK(!ps_image_place(image, 1100, &block, &page));
    CHECK(ps_image_place(image, 1536, &block, &page));
    CHECK(block == 1 && page == 0);
    CHECK(!ps_image_place(image, 1537, &block, &page));
    CHECK(!ps_image_place(image, UINT64_MAX, &block, &page));
    check_is_sound(image);
    ps_image_destroy(image);
    close(fd);
    free(data.data);
}

static void test_runs(void)
{
    static const ps_run want[] = {
        {0, 10, PS_CLASS_DATA, 0},    {10, 10, PS_CLASS_ZERO, 0},
        {20, 1, PS_CLASS_DATA, 1},    {21, 9, PS_CLASS_ZERO, 0},
        {30, 2, PS_CLASS_FILL, 0},    {32, 480, PS_CLASS_ZERO, 0},
        {512, 512, PS_CLASS_FILL, 0}, {1024, 76, PS_CLASS_ZERO, 0},
    };
    bytes data = plain_guest(0, 4, UINT32_MAX);
    int fd = file_of(&data);
    ps_image *image = open_ok(fd);
    ps_error err = {0};

    for (size_t capacity = 1; capacity < 10; capacity++) {
        uint64_t next = 0;
        size_t seen = 0;

        while (next < GUEST_PAGES) {
            ps_run runs[10];
            size_t count;

            CHECK(ps_image_runs(image, 0, next, runs, capacity, &count, &next,
                                &err) == PS_OK);
            CHECK(count > 0 && count <= capacity);
            for (size_t i = 0; i < count && seen < 8; i++, seen++) {
                CHECK(memcmp(&runs[i], &want[seen], sizeof(runs[i])) == 0);
            }
        }
        CHECK(seen == 8 && next == GUEST_PAGES);
    }
    ps_image_destroy(image);
    close(fd);
    free(data.data);
}

static void test_blocks(int raw)
{
    bytes data = plain_guest(raw, 4, UINT32_MAX);
    int fd = file_of(&data);
    ps_image *image = open_ok(fd);
    uint8_t pages[4 * P], want[P], got[P];
    ps_decoder decoder;
    ps_error err = {0};

    CHECK(ps_decoder_init(&decoder, image, &err) == PS_OK);
    CHECK(image->locality_blocks == 3);
    for (uint64_t i = 0; i < 3; i++) {
        ps_block_info info;

        CHECK(ps_image_block(image, i, &info, &err) == PS_OK);
        CHECK(info.pages == (i < 2 ? 4 : 3) && info.first == 4 * i);
        CHECK(info.form == (raw ? PS_BLOCK_RAW : PS_BLOCK_ZSTD));
        CHECK(ps_decoder_read(&decoder, fd, &info, pages, &err) == PS_OK);
        for (uint32_t slot = 0; slot < info.pages; slot++) {
            uint64_t canonical = info.first + slot, owner = 0;
            int ret;

            text_page(want, (uint32_t)canonical);
            CHECK(memcmp(pages + slot * P, want, P) == 0);
            CHECK(ps_image_owner(image, canonical, &owner, &err) == PS_OK);
            CHECK(owner == (canonical < 10 ? canonical : 1536));
            ret = ps_image_read_raw_page(image, &info, canonical, got, &err);
            CHECK(ret == (raw ? PS_OK : PS_ERR_ARGUMENT));
            CHECK(!raw || memcmp(got, want, P) == 0);
        }
        CHECK(ps_image_read_raw_page(image, &info, info.first + 4, got, &err) ==
              PS_ERR_ARGUMENT);
        data.data[info.offset + 5] ^= 1;
        CHECK(ps_decoder_decode(&decoder, &info, data.data + info.offset, pages,
                                &err) == PS_ERR_DAMAGED);
        CHECK(strstr(err.message, "checksum") && err.offset == info.offset);
    }
    if (raw) { /* the file itself: the signature tells */
        ps_block_info info;

        CHECK(ps_image_block(image, 1, &info, &err) == PS_OK);
        CHECK(pwrite(fd, "x", 1, (off_t)info.offset + 2 * (off_t)P + 7) == 1);
        CHECK(ps_image_read_raw_page(image, &info, 5, got, &err) == PS_OK);
        CHECK(ps_image_read_raw_page(image, &info, 6, got, &err) ==
              PS_ERR_DAMAGED);
        CHECK(err.offset == info.offset + 2 * P);
    }
    CHECK(ps_image_block(image, 3, &(ps_block_info){0}, &err) ==
          PS_ERR_ARGUMENT);
    CHECK(ps_image_owner(image, 11, &(uint64_t){0}, &err) == PS_ERR_ARGUMENT);
    ps_decoder_deinit(&decoder);
    ps_image_destroy(image);
    close(fd);
    free(data.data);
}

/* Cut at every length: an error of open, never anything else. */
static void test_truncated(void)
{
    bytes data = plain_guest(0, 16, UINT32_MAX);
    int fd = file_of(&data);
    ps_error err = {0};

    for (size_t length = data.length - 1; length > 0; length -= 7) {
        ps_image *image = NULL;
        int ret;

        CHECK(ftruncate(fd, (off_t)length) == 0);
        ret = ps_image_open(fd, &image, &err);
        CHECK_MSG(ret == PS_ERR_TRUNCATED, "%zu: %d", length, ret);
        if (ret == PS_OK) {
            ps_image_destroy(image);
        }
        if (length < 8) {
            break;
        }
    }
    close(fd);
    free(data.data);
}

/* Cut while it is open: an error, no SIGBUS, and no reading of stale bytes. */
static void test_cut_under_us(void)
{
    bytes data = plain_guest(0, 4, UINT32_MAX);
    int fd = file_of(&data);
    ps_image *image = open_ok(fd);
    uint8_t page[P];
    ps_error err = {0};

    CHECK(ftruncate(fd, 5000) == 0);
    CHECK(ps_image_read_pages(image, 0, 0, 1, page, &err) == PS_ERR_TRUNCATED);
    CHECK(ps_image_read_pages(image, 0, 0, 1, page, &err) == PS_ERR_TRUNCATED);
    CHECK(pwrite(fd, data.data, data.length, 0) == (ssize_t)data.length);
    CHECK(ps_image_read_pages(image, 0, 0, 1, page, &err) == PS_OK);
    ps_image_destroy(image);
    close(fd);
    free(data.data);
}

/* Any flipped bit is found, or changes no page. */
static void test_flips(int raw)
{
    bytes data = plain_guest(raw, 4, UINT32_MAX);
    int fd = file_of(&data);
    uint8_t *want = calloc(GUEST_PAGES, P), *got = malloc(GUEST_PAGES * P);
    ps_image *image = open_ok(fd);
    ps_error err = {0};
    unsigned same = 0, refused = 0;

    CHECK(ps_image_read_pages(image, 0, 0, GUEST_PAGES, want, &err) == PS_OK);
    ps_image_destroy(image);
    for (size_t at = 0; at < data.length; at += 61) {
        uint8_t flipped = data.data[at] ^ (uint8_t)(1u << at % 8);

        CHECK(pwrite(fd, &flipped, 1, (off_t)at) == 1);
        if (ps_image_open(fd, &image, &err) == PS_OK) {
            ps_error errors[8];
            size_t count = 0;

            if (ps_image_read_pages(image, 0, 0, GUEST_PAGES, got, &err) ==
                PS_OK) {
                CHECK(memcmp(want, got, GUEST_PAGES * P) == 0);
                same++;
            }
            CHECK(ps_image_check(image, NULL, errors, 8, &count, &err) ==
                  PS_OK);
            CHECK_MSG(count > 0, "a flip at %zu is not found", at);
            ps_image_destroy(image);
        } else {
            refused++;
        }
        CHECK(pwrite(fd, data.data + at, 1, (off_t)at) == 1);
    }
    CHECK(same > 0 && refused > 0);
    close(fd);
    free(want);
    free(got);
    free(data.data);
}

static void compare(ps_image *a, ps_image *b, uint64_t pages, size_t runs,
                    uint64_t first)
{
    ps_difference found[2] = {{0}};
    ps_error err = {0};
    ps_job job = {0};
    uint64_t differ;
    size_t count;

    CHECK(ps_image_compare(a, 0, b, 0, &job, found, 2, &count, &differ, &err) ==
          PS_OK);
    CHECK_MSG(differ == pages && count == runs, "%llu pages, %zu runs",
              (unsigned long long)differ, count);
    CHECK(runs == 0 || found[0].first == first);
    CHECK(job.done == GUEST_PAGES * P && job.total == job.done);
}

static void test_compare(void)
{
    bytes made[4] = {plain_guest(0, 4, UINT32_MAX),
                     plain_guest(1, 64, UINT32_MAX), plain_guest(0, 4, 3),
                     plain_guest(0, 4, 31)};
    ps_image *images[4];
    ps_error err = {0};
    uint64_t pages;
    size_t count;
    int fds[4];

    for (int i = 0; i < 4; i++) {
        fds[i] = file_of(&made[i]);
        images[i] = open_ok(fds[i]);
    }
    compare(images[0], images[0], 0, 0, 0);
    compare(images[0], images[1], 0, 0, 0); /* other file, other blocks */
    compare(images[0], images[2], 2, 2, 3); /* page 3 and its twin, 20 */
    compare(images[2], images[1], 2, 2, 3);
    compare(images[0], images[3], 1, 1, 30); /* another fill unit */
    CHECK(ps_image_compare(images[0], 0, images[1], 1, NULL, NULL, 0, &count,
                           &pages, &err) == PS_ERR_ARGUMENT);
    CHECK(ps_image_compare(images[0], 0, images[2], 0, NULL, NULL, 0, &count,
                           &pages, &err) == PS_OK);
    CHECK(count == 2 && pages == 2);
    for (int i = 0; i < 4; i++) {
        ps_image_destroy(images[i]);
        close(fds[i]);
        free(made[i].data);
    }
}

static void put_be(bytes *to, uint64_t value, size_t length)
{
    for (size_t i = length; i-- > 0;) {
        append(to, &(uint8_t){(uint8_t)(value >> (8 * i))}, 1);
    }
}

/* The stream that QEMU would send for guest(), spelled out. */
static bytes expected_stream(const void *config, size_t config_length,
                             bool addresses)
{
    bytes out = {0};
    uint8_t page[P];

    append(&out, "QEVM\0\0\0\3", 8);
    append(&out, config, config_length);
    append(&out, "\1\0\0\0\2\3ram\0\0\0\0\0\0\0\4", 17);
    put_be(&out, (GUEST_PAGES + 1) * P | 4, 8);
    append(&out, "\6pc.ram", 7);
    put_be(&out, GUEST_PAGES * P, 8);
    if (addresses) {
        put_be(&out, 0x1000, 8);
    }
    append(&out, "\3rom", 4);
    put_be(&out, P, 8);
    if (addresses) {
        put_be(&out, 0xffff0000, 8);
    }
    put_be(&out, 0x10, 8);
    append(&out, "\x7e\0\0\0\2", 5);
    append(&out, "\2\0\0\0\2", 5);
    for (uint32_t i = 0; i < GUEST_PAGES; i++) {
        uint64_t offset = i * P | (i > 0 ? 0x20 : 0);
        bool zero =
            (i >= 10 && i < 512 && i != 20 && i != 30 && i != 31) || i >= 1024;

        put_be(&out, offset | (zero ? 2 : 8), 8);
        if (i == 0) {
            append(&out, "\6pc.ram", 7);
        }
        if (zero) {
            append(&out, "\0", 1);
            continue;
        }
        text_page(page, i == 20 ? 3 : i);
        if (i >= 512) {
            memset(page, 0x5a, P);
        } else if (i == 30) {
            memset(page, 0x77, P);
        } else if (i == 31) {
            for (size_t at = 0; at < P; at += 8) {
                memcpy(page + at, "12345678", 8);
            }
        }
        append(&out, page, P);
    }
    put_be(&out, 0x10, 8);
    append(&out, "\x7e\0\0\0\2", 5);
    append(&out, "\2\0\0\0\2", 5);
    put_be(&out, 8, 8);
    append(&out, "\3rom", 4);
    text_page(page, 10);
    append(&out, page, P);
    put_be(&out, 0x10, 8);
    append(&out, "\x7e\0\0\0\2", 5);
    append(&out, "\3\0\0\0\2", 5);
    put_be(&out, 0x10, 8);
    append(&out, "\x7e\0\0\0\2", 5);
    append(&out, "devices!\0\6\0\0\0\x13{\"page_size\": 4096}", 33);
    return out;
}

static void test_export(const void *config, size_t config_length,
                        bool addresses)
{
    bytes data = guest(0, 4, UINT32_MAX, config, config_length);
    bytes want = expected_stream(config, config_length, addresses);
    bytes got = {0};
    int fd = file_of(&data);
    int out = memfd_create("stream", MFD_CLOEXEC);
    ps_image *image = open_ok(fd);
    ps_error err = {0};
    ps_job job = {0};

    CHECK_MSG(ps_image_export(image, out, &job, &err) == PS_OK, "%s",
              err.message);
    CHECK(job.done == (GUEST_PAGES + 1) * P && job.total == job.done);
    append(&got, NULL, (size_t)lseek(out, 0, SEEK_END));
    CHECK(pread(out, got.data, got.length, 0) == (ssize_t)got.length);
    CHECK_MSG(got.length == want.length, "%zu, not %zu", got.length,
              want.length);
    CHECK(memcmp(got.data, want.data,
                 got.length < want.length ? got.length : want.length) == 0);
    job.cancel = 1;
    CHECK(ps_image_export(image, out, &job, &err) == PS_ERR_CANCELLED);
    ps_image_destroy(image);
    close(out);
    close(fd);
    free(got.data);
    free(want.data);
    free(data.data);
}

static void test_export_pipe(void)
{
    bytes data = plain_guest(0, 4, UINT32_MAX);
    int fd = file_of(&data), pipes[2];
    ps_image *image = open_ok(fd);
    ps_error err = {0};

    signal(SIGPIPE, SIG_IGN);
    CHECK(pipe(pipes) == 0);
    close(pipes[0]);
    CHECK(ps_image_export(image, pipes[1], NULL, &err) == PS_ERR_IO);
    CHECK(err.os_errno == EPIPE);
    close(pipes[1]);
    ps_image_destroy(image);
    close(fd);
    free(data.data);
}

static double now(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec * 1e3 + (double)at.tv_nsec / 1e6;
}

/* A guest of that many GiB of which `used` pages have content. */
static void test_large(uint64_t gib, uint32_t used)
{
    uint64_t pages = gib << 18;
    uint64_t *entries = malloc(pages * 8);
    encoder to = {.per_block = 16};
    uint8_t page[P];
    ps_image_info info;
    ps_error err = {0};
    ps_image *image;
    uint64_t before;
    double start, opened, mapped;
    bytes data;
    int fd;

    add_small_sections(&to, configuration, sizeof(configuration));
    for (uint64_t i = 0; i < pages; i++) {
        entries[i] = i < used ? ps_entry_make(PS_CLASS_DATA, 0, i)
                              : ps_entry_make(PS_CLASS_ZERO, 0, 0);
    }
    for (uint32_t i = 0; i < used; i++) {
        text_page(page, i);
        add_page(&to, page, i);
    }
    add_ram(&to, "pc.ram", entries, pages, UINT64_MAX);
    data = seal(&to);
    fd = file_of(&data);

    start = now();
    image = open_ok(fd);
    opened = now() - start;
    ps_image_get_info(image, &info);
    before = info.memory_bytes;
    start = now();
    for (uint64_t i = 0, entry = 0; i < pages; i++) {
        if (ps_image_entry(image, i, &entry, &err) != PS_OK ||
            entry != entries[i]) {
            CHECK_MSG(false, "page %llu", (unsigned long long)i);
            break;
        }
    }
    mapped = now() - start;
    ps_image_get_info(image, &info);
    fprintf(stderr,
            "%3llu GiB, %6u pages used: file %llu, index %llu bytes, open "
            "%.3f ms, memory %llu; all entries %.1f ns each, memory %llu\n",
            (unsigned long long)gib, used, (unsigned long long)info.file_bytes,
            (unsigned long long)info.index_bytes, opened,
            (unsigned long long)before, mapped * 1e6 / (double)pages,
            (unsigned long long)info.memory_bytes);
    CHECK(before < 64 << 10);
    ps_image_destroy(image);
    close(fd);
    free(entries);
    free(data.data);
}

int main(int argc, char **argv)
{
    static const uint8_t capabilities[] =
        "\7\0\0\0\4none"
        "\5\x1e"
        "configuration/target-page-bits\0\0\0\1\0\0\0\xc"
        "\5\x1a"
        "configuration/capabilities\0\0\0\1\0\0\0\2"
        "\7x-thing"
        "\xfx-ignore-shared";
    static const uint8_t others[] = "\7\0\0\0\4none"
                                    "\5\x1a"
                                    "configuration/capabilities\0\0\0\1\0\0\0\1"
                                    "\7x-thing";

    if (argc > 1) { /* figures: GiB, MiB in use */
        test_large((uint64_t)atoi(argv[1]),
                   argc > 2 ? (uint32_t)atoi(argv[2]) << 8 : 4096);
        return check_done();
    }
    test_read(0, 4);
    test_read(1, 1);
    test_read(0, 64);
    test_runs();
    test_blocks(0);
    test_blocks(1);
    test_truncated();
    test_cut_under_us();
    test_flips(0);
    test_flips(1);
    test_compare();
    test_export(configuration, sizeof(configuration), false);
    test_export(capabilities, sizeof(capabilities) - 1, true);
    test_export(others, sizeof(others) - 1, false);
    test_export_pipe();
    test_large(1, 1024);
    test_large(16, 1024);
    return check_done();
}
