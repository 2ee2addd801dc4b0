/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Both passes of a save: what goes in comes out, and at what cost. */
#include "check.h"
#include "saver.h"
#include "stream.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define BUDGET(pages) ((UINT64_C(64) << 20) + 48 * (uint64_t)(pages))

#ifdef __SANITIZE_ADDRESS__
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

static const uint8_t uuid[16] = {1, 2, 3, 4};
static const uint8_t parent[16] = {0};

static int temporary(void)
{
    int fd = memfd_create("test", MFD_CLOEXEC);

    CHECK(fd >= 0);
    return fd;
}

static ps_saver *make_saver(const ps_saver_options *options)
{
    ps_saver_options o = {.pages_per_block = 16, .zstd_level = 3, .threads = 2};
    ps_saver *saver = NULL;
    ps_error err = {0};

    if (options) {
        o = *options;
    }
    o.spool_fd = temporary();
    o.units_fd = temporary();
    CHECK_MSG(ps_saver_create(&o, &saver, &err) == PS_OK, "%s", err.message);
    return saver;
}

static void drop_saver(ps_saver *saver)
{
    close(saver->options.spool_fd);
    close(saver->options.units_fd);
    ps_saver_destroy(saver);
}

static ps_saver_stats stats_of(const ps_saver *saver)
{
    ps_saver_stats stats;

    ps_saver_get_stats(saver, &stats);
    return stats;
}

/* ------------------------------------------------------------------ models */

/* What a page holds: kind 0 zero, 1..7 fill of log2 + 1, 8 data. */
typedef struct content {
    uint32_t kind;
    uint32_t number;
} content;

#define DATA 8u

static void make_content(uint8_t *page, content c)
{
    if (c.kind == DATA) {
        make_page(page, c.number);
    } else if (c.kind == 0) {
        memset(page, 0, PS_PAGE_SIZE);
    } else {
        size_t size = (size_t)1 << (c.kind - 1);
        uint8_t unit[64];

        for (size_t i = 0; i < size; i++) {
            unit[i] = (uint8_t)(c.number + 1 + i);
        }
        for (size_t i = 0; i < PS_PAGE_SIZE; i += size) {
            memcpy(page + i, unit, size);
        }
    }
}

typedef struct model {
    content *pages;
    uint64_t count;
    stream s;
} model;

static model model_begin(uint64_t count)
{
    model m = {.count = count, .s = {.footers = true}};

    m.pages = calloc(count, sizeof(*m.pages));
    put_header(&m.s);
    put_machine(&m.s);
    put_ram_start(&m.s);
    put_total(&m.s, (count + 1) * PS_PAGE_SIZE);
    put_block(&m.s, "pc.ram", count * PS_PAGE_SIZE);
    put_block(&m.s, "pc.bios", PS_PAGE_SIZE);
    put_eos(&m.s);
    put_ram_part(&m.s);
    put_zero(&m.s, "pc.bios", 0);
    return m;
}

static void model_send(model *m, uint64_t page, content c)
{
    uint8_t bytes[PS_PAGE_SIZE];

    m->pages[page] = c;
    if (c.kind == 0 && (c.number & 1) == 0) {
        put_zero(&m->s, "pc.ram", page * PS_PAGE_SIZE);
    } else {
        make_content(bytes, c);
        put_page(&m->s, "pc.ram", page * PS_PAGE_SIZE, bytes);
    }
}

static void model_end(model *m)
{
    put_eos(&m->s);
    put_ram_end(&m->s);
    put_device(&m->s, "timer", "12345678", 8);
    put_u8(&m->s, QEMU_VM_EOF);
    put_description(&m->s, "{\"devices\": [1, 2]}");
}

static void model_free(model *m)
{
    free(m->pages);
    stream_free(&m->s);
}

/* --------------------------------------------------------------- snapshots */

static ps_saver *save_stream(const stream *s, const ps_saver_options *options,
                             uint64_t mask)
{
    ps_saver *saver = make_saver(options);
    ps_error err = {0};

    ps_saver_set_signature_mask(saver, mask);
    CHECK_MSG(ps_saver_feed(saver, s->data, s->length, &err) == PS_OK, "%s",
              err.message);
    CHECK_MSG(ps_saver_end(saver, &err) == PS_OK, "%s", err.message);
    return saver;
}

static int write_file(ps_saver *saver)
{
    ps_error err = {0};
    int fd = temporary();

    CHECK_MSG(ps_saver_write(saver, fd, uuid, parent, &err) == PS_OK, "%s",
              err.message);
    return fd;
}

static ps_image *open_file(int fd)
{
    ps_image *image = NULL;
    ps_error err = {0};
    ps_error errors[4];
    size_t count = 0;

    CHECK_MSG(ps_image_open(fd, &image, &err) == PS_OK, "%s", err.message);
    if (image) {
        ps_job job = {0};

        CHECK_MSG(ps_image_check(image, &job, errors, 4, &count, &err) == PS_OK,
                  "%s", err.message);
        CHECK_MSG(count == 0, "%zu errors: %s", count, errors[0].message);
    }
    return image;
}

static uint8_t *map_file(int fd, size_t *length)
{
    struct stat st;
    uint8_t *bytes;

    CHECK(fstat(fd, &st) == 0);
    *length = (size_t)st.st_size;
    bytes = mmap(NULL, *length, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(bytes != MAP_FAILED);
    return bytes;
}

/* Every page of the file is what the model says, class and bytes. */
static void check_model(const model *m, int fd)
{
    ps_image *image = open_file(fd);
    uint8_t expected[PS_PAGE_SIZE];
    uint8_t bytes[PS_PAGE_SIZE];
    ps_error err = {0};

    for (uint64_t i = 0; image && i < m->count; i++) {
        content c = m->pages[i];
        uint64_t entry = 0;

        CHECK_MSG(ps_image_entries(image, 0, i, 1, &entry, &err) == PS_OK, "%s",
                  err.message);
        CHECK(ps_entry_class(entry) == (c.kind == 0      ? PS_CLASS_ZERO
                                        : c.kind == DATA ? PS_CLASS_DATA
                                                         : PS_CLASS_FILL));
        CHECK_MSG(ps_image_read_pages(image, 0, i, 1, bytes, &err) == PS_OK,
                  "%s", err.message);
        make_content(expected, c);
        CHECK_MSG(memcmp(bytes, expected, PS_PAGE_SIZE) == 0, "page %llu",
                  (unsigned long long)i);
    }
    ps_image_destroy(image);
}

static void check_stats(const model *m, const ps_saver *saver)
{
    ps_saver_stats stats = stats_of(saver);
    uint64_t zero = 1; /* pc.bios */
    uint64_t fill = 0;
    uint64_t data = 0;

    for (uint64_t i = 0; i < m->count; i++) {
        zero += m->pages[i].kind == 0;
        data += m->pages[i].kind == DATA;
        fill += m->pages[i].kind != 0 && m->pages[i].kind != DATA;
    }
    CHECK(stats.pages_zero == zero);
    CHECK(stats.pages_fill == fill);
    CHECK(stats.pages_data + stats.pages_shared == data);
    CHECK(stats.bytes_in == m->s.length);
    CHECK(stats.ram_bytes == (m->count + 1) * PS_PAGE_SIZE);
    CHECK(stats.memory_bytes <= BUDGET(m->count - zero));
}

/* ------------------------------------------------------------------- tests */

static void test_small(void)
{
    const uint8_t *data;
    size_t length;
    stream s = {.footers = true};
    uint64_t entries[4];
    ps_stream_info stream_info;
    ps_image_info info;
    ps_image *image;
    ps_saver *saver;
    ps_saver_stats stats;
    ps_error err = {0};
    int fd;

    put_whole(&s);
    saver = save_stream(&s, NULL, UINT64_MAX);
    stats = stats_of(saver);
    CHECK(stats.pages_seen == 6 && stats.pages_resent == 0);
    CHECK(stats.pages_zero == 2 && stats.pages_fill == 1);
    CHECK(stats.pages_data == 2 && stats.pages_shared == 1);
    CHECK(ps_saver_section(saver, PS_SECTION_CONFIGURATION, &data, &length,
                           &err) == PS_OK);
    CHECK(length == 12 && memcmp(data, s.data + 8, 12) == 0);
    CHECK(ps_saver_section(saver, PS_SECTION_DEVICES, &data, &length, &err) ==
          PS_OK);
    CHECK(length == 32);
    CHECK(ps_saver_section(saver, PS_SECTION_DESCRIPTION, &data, &length,
                           &err) == PS_OK);
    CHECK(length == 15 && data[0] == '{');
    CHECK(ps_saver_section(saver, PS_SECTION_META, &data, &length, &err) ==
              PS_OK &&
          length == 0);
    CHECK(ps_saver_section(saver, PS_SECTION_STREAM, &data, &length, &err) ==
          PS_ERR_ARGUMENT);
    CHECK(ps_saver_section(saver, 99, &data, &length, &err) == PS_ERR_ARGUMENT);
    CHECK(ps_saver_set_section(saver, PS_SECTION_META,
                               (const uint8_t *)"{\"a\": 1}", 8,
                               &err) == PS_OK);
    CHECK(ps_saver_set_section(saver, PS_SECTION_OWNERS, s.data, 8, &err) ==
          PS_ERR_ARGUMENT);
    CHECK(ps_saver_set_section(saver, PS_SECTION_META, s.data,
                               PS_MAX_META_BYTES + 1, &err) == PS_ERR_ARGUMENT);
    ps_saver_stream_info(saver, &stream_info);
    CHECK(stream_info.footers && stream_info.description);
    fd = write_file(saver);
    image = open_file(fd);
    ps_image_get_info(image, &info);
    CHECK(info.ram_blocks == 2);
    CHECK(info.canonical_pages == 2);
    CHECK(info.pages_zero == 2 && info.pages_fill == 1);
    CHECK(info.pages_data == 3 && info.pages_absent == 0);
    CHECK(memcmp(info.uuid, uuid, 16) == 0);
    CHECK(memcmp(&info.stream, &stream_info, sizeof(stream_info)) == 0);
    CHECK(ps_image_section_length(image, PS_SECTION_META) == 8);
    CHECK(ps_image_entries(image, 0, 0, 4, entries, &err) == PS_OK);
    CHECK(entries[0] == entries[3]);
    CHECK(entries[1] == ps_entry_make(PS_CLASS_ZERO, 0, 0));
    CHECK(entries[2] == ps_entry_make(PS_CLASS_DATA, 0, 1));
    CHECK(ps_image_entries(image, 1, 1, 1, entries, &err) == PS_OK);
    CHECK(entries[0] == ps_entry_make(PS_CLASS_FILL, 0, 0xff));
    ps_image_destroy(image);
    stats = stats_of(saver);
    CHECK(stats.bytes_out == (uint64_t)lseek(fd, 0, SEEK_END));
    CHECK(stats.blocks_total == 1 && stats.blocks_written == 1);
    close(fd);
    CHECK(ps_saver_feed(saver, s.data, 1, &err) == PS_ERR_ARGUMENT);
    drop_saver(saver);
    stream_free(&s);
}

static void test_splits(void)
{
    stream s = {.footers = true};
    ps_saver *whole;
    uint8_t *first;
    size_t length;
    int fd;

    put_whole(&s);
    whole = save_stream(&s, NULL, UINT64_MAX);
    fd = write_file(whole);
    drop_saver(whole);
    first = map_file(fd, &length);
    for (size_t part = 1; part < 5000; part += 611) {
        ps_saver *saver = make_saver(NULL);
        ps_error err = {0};
        uint8_t *again;
        size_t again_length;
        int again_fd;

        for (size_t at = 0; at < s.length; at += part) {
            size_t n = s.length - at < part ? s.length - at : part;

            CHECK(ps_saver_feed(saver, s.data + at, n, &err) == PS_OK);
        }
        CHECK(ps_saver_end(saver, &err) == PS_OK);
        CHECK(ps_saver_end(saver, &err) == PS_OK); /* does no harm */
        again_fd = write_file(saver);
        again = map_file(again_fd, &again_length);
        CHECK(again_length == length && memcmp(again, first, length) == 0);
        munmap(again, again_length);
        close(again_fd);
        drop_saver(saver);
    }
    munmap(first, length);
    close(fd);
    stream_free(&s);
}

static void test_fills(void)
{
    model m = model_begin(700);
    ps_image_info info;
    ps_image *image;
    ps_saver *saver;
    int fd;

    for (uint32_t i = 0; i < 700; i++) {
        model_send(&m, i, (content){i % 8, i / 8 % 20});
    }
    model_end(&m);
    saver = save_stream(&m.s, NULL, UINT64_MAX);
    check_stats(&m, saver);
    fd = write_file(saver);
    check_model(&m, fd);
    image = open_file(fd);
    ps_image_get_info(image, &info);
    CHECK(info.canonical_pages == 0);
    /* 20 units each of 8, 16, 32 and 64 bytes, once. */
    CHECK(ps_image_section_length(image, PS_SECTION_FILL_UNITS) ==
          20 * (8 + 16 + 32 + 64));
    ps_image_destroy(image);
    close(fd);
    drop_saver(saver);
    model_free(&m);
    /* A whole leaf of one fill is in the top map alone. */
    m = model_begin(1024);
    for (uint32_t i = 0; i < 1024; i++) {
        model_send(&m, i, (content){1 + i / 512 * 6, 7});
    }
    model_end(&m);
    saver = save_stream(&m.s, NULL, UINT64_MAX);
    fd = write_file(saver);
    check_model(&m, fd);
    image = open_file(fd);
    CHECK(ps_image_section_length(image, PS_SECTION_LEAVES) == 0);
    CHECK(ps_image_section_length(image, PS_SECTION_TOP_MAP) == 24);
    ps_image_destroy(image);
    close(fd);
    drop_saver(saver);
    model_free(&m);
}

static bool file_has(int fd, content c)
{
    uint8_t page[PS_PAGE_SIZE];
    size_t length;
    uint8_t *bytes = map_file(fd, &length);
    bool found;

    make_content(page, c);
    found =
        memmem(bytes, length, page, c.kind == DATA ? PS_PAGE_SIZE : 64) != NULL;
    munmap(bytes, length);
    return found;
}

/* The last one counts and nothing of those before is left. */
static void test_resent(void)
{
    const ps_saver_options options = {
        .pages_per_block = 4, .zstd_level = INT32_MIN, .threads = 1};
    static const content steps[][2] = {
        {{DATA, 1}, {DATA, 2}}, {{DATA, 3}, {0, 0}},    {{DATA, 4}, {0, 1}},
        {{DATA, 5}, {7, 50}},   {{7, 60}, {DATA, 6}},   {{7, 70}, {0, 0}},
        {{0, 0}, {DATA, 7}},    {{DATA, 8}, {DATA, 8}}, {{0, 0}, {0, 0}},
        {{4, 9}, {5, 9}},
    };
    enum {
        COUNT = sizeof(steps) / sizeof(steps[0])
    };
    model m = model_begin(COUNT);
    ps_saver_stats stats;
    ps_image_info info;
    ps_image *image;
    ps_saver *saver;
    int fd;

    for (uint32_t turn = 0; turn < 2; turn++) {
        for (uint32_t i = 0; i < COUNT; i++) {
            model_send(&m, i, steps[i][turn]);
        }
    }
    model_end(&m);
    saver = save_stream(&m.s, &options, UINT64_MAX);
    check_stats(&m, saver);
    stats = stats_of(saver);
    CHECK(stats.pages_resent == COUNT);
    fd = write_file(saver);
    check_model(&m, fd);
    for (uint32_t i = 0; i < COUNT; i++) {
        if (steps[i][0].kind >= 7 && steps[i][0].number != 8) {
            CHECK_MSG(!file_has(fd, steps[i][0]), "step %u", i);
        }
        if (steps[i][1].kind >= 7) {
            CHECK_MSG(file_has(fd, steps[i][1]), "step %u", i);
        }
    }
    image = open_file(fd);
    ps_image_get_info(image, &info);
    CHECK(info.canonical_pages == 4); /* 2, 6, 7, 8 */
    ps_image_destroy(image);
    close(fd);
    drop_saver(saver);
    model_free(&m);
}

static uint32_t next_random(uint64_t *state)
{
    *state = *state * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

/*
 * Random pages, sent again and again, few contents: the tables come and go.
 * With a mask that leaves few bits most signatures are equal, so only the
 * bytes tell pages apart.
 */
static void test_random(uint64_t mask, uint32_t pages, uint32_t sends,
                        uint32_t contents)
{
    model m = model_begin(pages);
    uint64_t state = mask + sends;
    ps_saver *saver;
    int fd;

    for (uint32_t i = 0; i < pages; i++) {
        model_send(&m, i, (content){0, 0});
    }
    for (uint32_t i = 0; i < sends; i++) {
        uint32_t page = next_random(&state) % pages;
        uint32_t kind = next_random(&state) % 16;

        kind = kind < DATA ? kind : DATA;
        model_send(&m, page,
                   (content){kind, next_random(&state) %
                                       (kind == DATA ? contents : 100)});
    }
    model_end(&m);
    saver = save_stream(&m.s, NULL, mask);
    check_stats(&m, saver);
    fd = write_file(saver);
    check_model(&m, fd);
    close(fd);
    drop_saver(saver);
    model_free(&m);
}

/* Whatever the options, the same pages; whatever the threads, the same file. */
static void test_options(void)
{
    static const uint32_t per_block[] = {1, 2, 16, 256, 512};
    static const int32_t levels[] = {INT32_MIN, -5, 1, 9};
    static const uint32_t threads[] = {1, 3, 64};
    model m = model_begin(3000);

    for (uint32_t i = 0; i < 3000; i++) {
        uint8_t page[PS_PAGE_SIZE];

        if (i % 3) {
            /* Half of it compresses. */
            make_page(page, i % 1000);
            memset(page + 100, 0, i % 3 == 1 ? 3000 : 0);
            put_page(&m.s, "pc.ram", i * PS_PAGE_SIZE, page);
        } else {
            model_send(&m, i, (content){i % 5 == 0 ? DATA : 0, i});
        }
    }
    model_end(&m);
    for (size_t b = 0; b < 5; b++) {
        for (size_t l = 0; l < 4; l++) {
            uint8_t *first = NULL;
            size_t first_length = 0;

            for (size_t t = 0; t < 3; t++) {
                const ps_saver_options options = {.pages_per_block =
                                                      per_block[b],
                                                  .zstd_level = levels[l],
                                                  .threads = threads[t]};
                ps_saver *saver = save_stream(&m.s, &options, UINT64_MAX);
                int fd = write_file(saver);
                size_t length;
                uint8_t *bytes = map_file(fd, &length);

                if (!first) {
                    uint8_t *copy = malloc(length);

                    memcpy(copy, bytes, length);
                    first = copy;
                    first_length = length;
                    ps_image_destroy(open_file(fd));
                }
                CHECK(length == first_length &&
                      memcmp(bytes, first, length) == 0);
                CHECK(stats_of(saver).memory_bytes <= BUDGET(2200));
                munmap(bytes, length);
                close(fd);
                drop_saver(saver);
            }
            free(first);
        }
    }
    model_free(&m);
}

static void test_bad_options(void)
{
    static const ps_saver_options bad[] = {
        {.pages_per_block = 0, .threads = 1},
        {.pages_per_block = 3, .threads = 1},
        {.pages_per_block = 1024, .threads = 1},
        {.pages_per_block = 16, .threads = 0},
        {.pages_per_block = 16, .threads = 65},
        {.pages_per_block = 16, .threads = 1, .zstd_level = 1000},
    };
    ps_saver *saver;
    ps_error err;

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        CHECK(ps_saver_create(&bad[i], &saver, &err) == PS_ERR_ARGUMENT);
    }
    ps_saver_destroy(NULL);
}

static void test_incomplete(void)
{
    model m = model_begin(600);
    ps_error err = {0};
    ps_saver *saver;
    stream s = {.footers = true};
    int fd = temporary();

    for (uint32_t i = 0; i < 600; i++) {
        if (i != 517 && i != 599) {
            model_send(&m, i, (content){i % 2 ? DATA : 0, i});
        }
    }
    model_end(&m);
    saver = make_saver(NULL);
    CHECK(ps_saver_write(saver, fd, uuid, parent, &err) == PS_ERR_ARGUMENT);
    CHECK(ps_saver_feed(saver, m.s.data, m.s.length, &err) == PS_OK);
    CHECK(ps_saver_end(saver, &err) == PS_ERR_TRUNCATED);
    CHECK_MSG(strstr(err.message, "2 pages of RAM block 'pc.ram'") &&
                  strstr(err.message, "0x205000"),
              "%s", err.message);
    CHECK(ps_saver_write(saver, fd, uuid, parent, &err) == PS_ERR_TRUNCATED);
    drop_saver(saver);
    model_free(&m);
    /* With x-ignore-shared it is not a damage. */
    put_header(&s);
    put_machine(&s);
    put_capability(&s, "x-ignore-shared");
    put_ram_start(&s);
    put_total(&s, 0x2000);
    put_block(&s, "pc.ram", 0x2000);
    put_u64(&s, 0x100000);
    put_eos(&s);
    put_ram_end(&s);
    put_u8(&s, QEMU_VM_EOF);
    saver = make_saver(NULL);
    CHECK(ps_saver_feed(saver, s.data, s.length, &err) == PS_OK);
    CHECK(ps_saver_end(saver, &err) == PS_ERR_UNSUPPORTED);
    CHECK_MSG(strstr(err.message, "x-ignore-shared") &&
                  strstr(err.message, "'pc.ram'"),
              "%s", err.message);
    drop_saver(saver);
    stream_free(&s);
    /* Cut anywhere; the parser's own tests know every byte. */
    s.footers = true;
    put_whole(&s);
    for (size_t length = 0; length < s.length - 20; length += 97) {
        saver = make_saver(NULL);
        CHECK(ps_saver_feed(saver, s.data, length, &err) == PS_OK);
        CHECK_MSG(ps_saver_end(saver, &err) == PS_ERR_TRUNCATED, "%zu: %s",
                  length, err.message);
        drop_saver(saver);
    }
    stream_free(&s);
    close(fd);
}

static model distinct_model(uint32_t pages)
{
    model m = model_begin(pages);

    for (uint32_t i = 0; i < pages; i++) {
        model_send(&m, i, (content){DATA, i});
    }
    model_end(&m);
    return m;
}

static void test_disk_full(void)
{
    model m = distinct_model(600);
    struct rlimit old;
    struct rlimit small;
    ps_error err = {0};
    ps_saver *saver = make_saver(NULL);
    int spool = saver->options.spool_fd;
    int full = open("/dev/full", O_RDWR | O_CLOEXEC);
    int fd = temporary();

    CHECK(full >= 0);
    saver->options.spool_fd = full;
    CHECK(ps_saver_feed(saver, m.s.data, m.s.length, &err) == PS_ERR_IO);
    CHECK(err.os_errno == ENOSPC);
    CHECK_MSG(strstr(err.message, "writing the page spool"), "%s", err.message);
    CHECK(ps_saver_end(saver, &err) == PS_ERR_IO);
    saver->options.spool_fd = spool;
    drop_saver(saver);
    /* While the snapshot is written. */
    saver = save_stream(&m.s, NULL, UINT64_MAX);
    CHECK(ps_saver_write(saver, full, uuid, parent, &err) == PS_ERR_IO);
    CHECK(err.os_errno == ENOSPC);
    CHECK_MSG(strstr(err.message, "writing the snapshot"), "%s", err.message);
    /* A failed write can be tried again elsewhere. */
    CHECK(ps_saver_write(saver, fd, uuid, parent, &err) == PS_OK);
    check_model(&m, fd);
    drop_saver(saver);
    close(fd);
    close(full);
    /* A limit on the size of files. */
    signal(SIGXFSZ, SIG_IGN);
    CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
    small = old;
    small.rlim_cur = 1u << 20;
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    saver = make_saver(NULL);
    CHECK(ps_saver_feed(saver, m.s.data, m.s.length, &err) == PS_ERR_IO);
    CHECK(err.os_errno == EFBIG);
    drop_saver(saver);
    CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
    model_free(&m);
}

/* A spool that does not give back what it was given. */
static void test_bad_spool(void)
{
    model m = distinct_model(300);
    ps_error err = {0};
    ps_saver *saver = save_stream(&m.s, NULL, UINT64_MAX);
    int fd = temporary();

    CHECK(pwrite(saver->options.spool_fd, "x", 1, 77 * 4096 + 5) == 1);
    CHECK(ps_saver_write(saver, fd, uuid, parent, &err) == PS_ERR_DAMAGED);
    CHECK(ftruncate(saver->options.spool_fd, 100 * 4096) == 0);
    CHECK(ps_saver_write(saver, fd, uuid, parent, &err) != PS_OK);
    close(fd);
    drop_saver(saver);
    model_free(&m);
}

typedef struct drain {
    ps_saver *saver;
    int fd;
    int code;
    ps_error err;
} drain;

static void *drain_thread(void *argument)
{
    drain *d = argument;

    d->code = ps_saver_drain(d->saver, d->fd, &d->err);
    return NULL;
}

static void test_drain(void)
{
    model m = distinct_model(3000);
    drain d = {.saver = make_saver(NULL)};
    pthread_t thread;
    int pair[2];
    int fd;

    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    d.fd = pair[0];
    CHECK(fcntl(d.fd, F_SETFL, O_NONBLOCK) == 0);
    pthread_create(&thread, NULL, drain_thread, &d);
    for (size_t at = 0; at < m.s.length;) {
        size_t part = 1 + at % 300000;
        ssize_t n;

        part = part < m.s.length - at ? part : m.s.length - at;
        n = write(pair[1], m.s.data + at, part);
        CHECK(n > 0);
        at += n > 0 ? (size_t)n : part;
    }
    close(pair[1]);
    pthread_join(thread, NULL);
    CHECK_MSG(d.code == PS_OK, "%s", d.err.message);
    CHECK(ps_saver_end(d.saver, &d.err) == PS_OK);
    fd = write_file(d.saver);
    check_model(&m, fd);
    close(fd);
    close(pair[0]);
    CHECK(ps_saver_drain(d.saver, -1, &d.err) == PS_ERR_ARGUMENT);
    drop_saver(d.saver);
    /* From a file, as convert does. */
    d.saver = make_saver(NULL);
    fd = temporary();
    CHECK(write(fd, m.s.data, m.s.length) == (ssize_t)m.s.length);
    CHECK(lseek(fd, 0, SEEK_SET) == 0);
    CHECK(ps_saver_drain(d.saver, fd, &d.err) == PS_OK);
    CHECK(ps_saver_end(d.saver, &d.err) == PS_OK);
    close(fd);
    drop_saver(d.saver);
    model_free(&m);
}

static void pause_ms(long ms)
{
    struct timespec t = {.tv_nsec = ms * 1000000};

    nanosleep(&t, NULL);
}

static void test_cancel(void)
{
    model m = distinct_model(2000);
    drain d = {.saver = make_saver(NULL)};
    pthread_t thread;
    ps_error err = {0};
    int pair[2];
    int fd = temporary();

    /* A drain that waits for a peer that says nothing. */
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    d.fd = pair[0];
    pthread_create(&thread, NULL, drain_thread, &d);
    pause_ms(20);
    ps_saver_cancel(d.saver);
    ps_saver_cancel(d.saver);
    pthread_join(thread, NULL);
    CHECK(d.code == PS_ERR_CANCELLED);
    CHECK(ps_saver_feed(d.saver, m.s.data, 8, &err) == PS_ERR_CANCELLED);
    CHECK(ps_saver_end(d.saver, &err) == PS_ERR_CANCELLED);
    drop_saver(d.saver);
    close(pair[0]);
    close(pair[1]);
    /* The second pass. */
    d.saver = save_stream(&m.s, NULL, UINT64_MAX);
    ps_saver_cancel(d.saver);
    CHECK(ps_saver_write(d.saver, fd, uuid, parent, &err) == PS_ERR_CANCELLED);
    drop_saver(d.saver);
    close(fd);
    model_free(&m);
}

static uint64_t resident(void)
{
    unsigned long size = 0;
    unsigned long total = 0;
    FILE *f = fopen("/proc/self/statm", "r");

    CHECK(f && fscanf(f, "%lu %lu", &size, &total) == 2);
    if (f) {
        fclose(f);
    }
    return (uint64_t)total * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Feed what is in the stream and start it anew. */
static void feed(ps_saver *saver, stream *s)
{
    ps_error err = {0};

    CHECK_MSG(ps_saver_feed(saver, s->data, s->length, &err) == PS_OK, "%s",
              err.message);
    s->length = 0;
}

static void begin_guest(stream *s, uint64_t pages)
{
    put_header(s);
    put_machine(s);
    put_ram_start(s);
    put_total(s, pages * PS_PAGE_SIZE);
    put_block(s, "pc.ram", pages * PS_PAGE_SIZE);
    put_eos(s);
    put_ram_part(s);
}

static void end_guest(ps_saver *saver, stream *s)
{
    ps_error err = {0};

    put_eos(s);
    put_ram_end(s);
    put_u8(s, QEMU_VM_EOF);
    feed(saver, s);
    CHECK_MSG(ps_saver_end(saver, &err) == PS_OK, "%s", err.message);
}

/* Many distinct pages: the worst case for the tables. */
static void test_memory(void)
{
    const ps_saver_options options = {
        .pages_per_block = 1, .zstd_level = INT32_MIN, .threads = 2};
    const uint64_t pages = SANITIZED ? 20000 : 100000;
    ps_saver *saver = make_saver(&options);
    stream s = {.footers = true};
    uint8_t page[PS_PAGE_SIZE];
    ps_saver_stats stats;
    uint64_t before = 0;
    uint64_t after;
    int fd;

    begin_guest(&s, pages);
    for (uint64_t i = 0; i < pages; i++) {
        make_page(page, i);
        put_page(&s, i ? NULL : "pc.ram", i * PS_PAGE_SIZE, page);
        if (s.length > (1u << 20)) {
            if (i < 512) {
                before = resident();
            }
            feed(saver, &s);
        }
    }
    end_guest(saver, &s);
    fd = write_file(saver);
    after = resident();
    stats = stats_of(saver);
    CHECK(stats.pages_data == pages);
    CHECK(stats.memory_bytes <= BUDGET(pages));
    /* The tables alone, without the buffers that cost the same always. */
    CHECK_MSG(stats.memory_bytes <= (UINT64_C(8) << 20) + 48 * pages, "%llu",
              (unsigned long long)stats.memory_bytes);
    if (!SANITIZED) {
        CHECK_MSG(after - before <= BUDGET(pages), "%llu",
                  (unsigned long long)(after - before));
    }
    printf("%llu distinct pages: %.1f bytes a page by count, "
           "%.1f MiB resident\n",
           (unsigned long long)pages,
           (double)stats.memory_bytes / (double)pages,
           (double)(after - before) / 1048576.0);
    ps_image_destroy(open_file(fd));
    close(fd);
    drop_saver(saver);
    stream_free(&s);
}

/* 64 GiB of which little is used: everything follows what is used. */
static void test_sparse(void)
{
    const uint64_t pages = UINT64_C(64) << 18;
    const uint64_t run = 64;
    const uint64_t runs = 64; /* 16 MiB in all */
    ps_saver *saver = make_saver(NULL);
    stream s = {.footers = true};
    uint8_t page[PS_PAGE_SIZE];
    ps_saver_stats stats;
    ps_image_info info;
    ps_image *image;
    uint64_t before = resident();
    uint64_t used = 0;
    int fd;

    begin_guest(&s, pages);
    put_zero(&s, "pc.ram", 0);
    for (uint64_t i = 1; i < pages; i++) {
        if (i / run % (pages / run / runs) == 1) {
            make_page(page, i);
            put_page(&s, NULL, i * PS_PAGE_SIZE, page);
            used++;
        } else {
            put_zero(&s, NULL, i * PS_PAGE_SIZE);
        }
        if (s.length > (1u << 20)) {
            feed(saver, &s);
        }
    }
    CHECK(used == run * runs);
    end_guest(saver, &s);
    fd = write_file(saver);
    stats = stats_of(saver);
    CHECK(stats.pages_zero == pages - used);
    CHECK(stats.memory_bytes <= BUDGET(used));
    if (!SANITIZED) {
        CHECK(resident() - before <= BUDGET(used));
    }
    image = open_file(fd);
    ps_image_get_info(image, &info);
    /* A leaf for each used 2 MiB, and 8 bytes for each other. */
    CHECK(ps_image_section_length(image, PS_SECTION_LEAVES) == runs * 4096);
    CHECK(ps_image_section_length(image, PS_SECTION_TOP_MAP) ==
          pages / 512 * 8);
    CHECK(info.index_bytes < (1u << 20));
    printf("64 GiB guest, %llu MiB used: file %.1f MiB, index %.2f MiB, "
           "saver's memory %.1f MiB\n",
           (unsigned long long)(used >> 8), (double)info.file_bytes / 1048576.0,
           (double)info.index_bytes / 1048576.0,
           (double)stats.memory_bytes / 1048576.0);
    ps_image_destroy(image);
    close(fd);
    drop_saver(saver);
    stream_free(&s);
}

int main(void)
{
    test_small();
    test_splits();
    test_fills();
    test_resent();
    test_random(UINT64_MAX, 500, 4000, 200);
    test_random(0, 200, 1000, 60);
    test_random(7, 500, 4000, 100);
    test_random(UINT64_MAX, 4000, 6000, 1000000);
    test_options();
    test_bad_options();
    test_incomplete();
    test_disk_full();
    test_bad_spool();
    test_drain();
    test_cancel();
    test_memory();
    test_sparse();
    return check_done();
}
