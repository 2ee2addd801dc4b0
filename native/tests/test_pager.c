/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The pager against a destination that is written here: it asks for pages,
 * reads what comes as QEMU's ram_load_postcopy() would, and knows by formula
 * what every page must be. Nothing may come twice, no zero page unasked.
 */
#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>

#include "check.h"
#include "common.h"
#include "histogram.h"
#include "image.h"
#include "trace.h"
#include "tiny_image.h"

#define RAM 0u
#define ROM 1u
#define RAM_PAGES 4096u
#define ROM_PAGES 64u
#define PATIENCE_MS 10000
#define MAX_LOG 16384u

/* What a test starts from; every field can be changed before begin(). */
struct setup {
    tiny_image tiny;
    ps_pager_options options;
    ps_pager_block blocks[TINY_BLOCKS];
    uint8_t *first;
    size_t first_length;
    bool preempt;
    uint8_t *received; /* bitmap of RAM */
};

struct arrival {
    uint32_t block;
    uint64_t page;
    uint32_t flags;
};

/* One socket, as the destination reads it. */
struct channel {
    int fd;
    uint8_t buffer[65536];
    size_t have;
    size_t at;
    uint32_t last_block;
    uint64_t host_page; /* under way: page of RAM block last_block */
    uint64_t host_have;
    bool over; /* nothing more may come */
};

struct test {
    struct setup setup;
    ps_image *image;
    ps_pager *pager;
    pthread_t thread;
    ps_error error;
    int result;
    int fds[2];
    int preempt_fds[2];
    struct channel main;
    struct channel preempt;
    uint8_t *seen[TINY_BLOCKS];  /* 1: came, 2: asked for */
    struct arrival log[MAX_LOG]; /* of the section read last */
    size_t logged;
    uint64_t pages_seen;
    uint32_t asked_block;
    bool failed; /* the stream made no sense: read no more */
};

static const char *running; /* the test, for messages */

static uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void sleep_ms(long ms)
{
    struct timespec ts = {ms / 1000, ms % 1000 * 1000000};

    nanosleep(&ts, NULL);
}

/*
 * The usual guest: runs of every class, pages that share content with pages
 * far away, a whole leaf of zeros and one of a single fill value. Data id 0
 * is not used.
 */
static tiny_page usual_page(uint32_t block, uint64_t page)
{
    uint64_t leaf = page / 512;

    if (block == ROM) {
        return page < 40 ? (tiny_page){PS_CLASS_DATA, (uint32_t)(4200 + page)}
                         : (tiny_page){PS_CLASS_ZERO, 0};
    }
    if (leaf == 2) {
        return (tiny_page){PS_CLASS_ZERO, 0};
    }
    if (leaf == 3) {
        return (tiny_page){PS_CLASS_FILL, 77};
    }
    if (leaf == 7) { /* shares what leaf 1 owns */
        return page % 2 ? (tiny_page){PS_CLASS_ZERO, 0}
                        : (tiny_page){PS_CLASS_DATA,
                                      (uint32_t)(512 + page % 512 + 1)};
    }
    switch (page % 8) {
    case 0:
        return (tiny_page){PS_CLASS_ZERO, 0};
    case 1:
        return (tiny_page){PS_CLASS_FILL, (uint32_t)page};
    default:
        return (tiny_page){PS_CLASS_DATA, (uint32_t)page + 1};
    }
}

static struct setup usual(void)
{
    return (struct setup){
        .tiny = {.pages_per_block = 16,
                 .footers = true,
                 .blocks = 2,
                 .name = {"pc.ram", "pc.bios"},
                 .pages = {RAM_PAGES, ROM_PAGES},
                 .page = usual_page},
        .options = {.trace_fd = -1,
                    .in_flight_bytes = 64 << 10,
                    .cache_bytes = 1 << 20,
                    .background_delay_ns = 1000000},
    };
}

static tiny_page page_of(const struct test *t, uint32_t block, uint64_t page)
{
    return t->setup.tiny.page(block, page);
}

static bool needs_update(tiny_page page)
{
    return page.page_class >= PS_CLASS_FILL;
}

static uint64_t host_pages(const struct test *t, uint32_t block)
{
    return t->setup.blocks[block].page_size / PS_PAGE_SIZE;
}

/* ------------------------------------------------------- the life of one */

static void *run_pager(void *opaque)
{
    struct test *t = opaque;

    t->result = ps_pager_run(t->pager, &t->error);
    return NULL;
}

static bool create(struct test *t, const struct setup *setup)
{
    ps_error err = {0};
    int r;

    memset(t, 0, sizeof(*t));
    t->setup = *setup;
    t->asked_block = UINT32_MAX;
    tiny_make(&t->setup.tiny);
    for (uint32_t b = 0; b < t->setup.tiny.blocks; b++) {
        ps_pager_block *block = &t->setup.blocks[b];

        block->length = t->setup.tiny.pages[b] * PS_PAGE_SIZE;
        if (block->page_size == 0) {
            block->page_size = PS_PAGE_SIZE;
        }
        t->seen[b] = tiny_alloc(t->setup.tiny.pages[b]);
    }
    r = ps_image_open(t->setup.tiny.fd, &t->image, &err);
    CHECK_MSG(r == PS_OK, "open: %s", err.message);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, t->fds) == 0);
    t->setup.options.fd = t->fds[0];
    t->setup.options.preempt_fd = -1;
    t->main.fd = t->fds[1];
    t->main.last_block = UINT32_MAX;
    t->preempt.last_block = UINT32_MAX;
    t->preempt.fd = -1;
    t->preempt_fds[0] = t->preempt_fds[1] = -1;
    if (setup->preempt) {
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, t->preempt_fds) == 0);
        t->setup.options.preempt_fd = t->preempt_fds[0];
        t->preempt.fd = t->preempt_fds[1];
    }
    r = ps_pager_create(t->image, &t->setup.options, t->setup.blocks,
                        t->setup.tiny.blocks, &t->pager, &err);
    CHECK_MSG(r == PS_OK, "create: %s", err.message);
    if (r) {
        return false;
    }
    if (setup->first) {
        r = ps_pager_send_first(t->pager, setup->first, setup->first_length,
                                &err);
        CHECK_MSG(r == PS_OK, "send first: %s", err.message);
    }
    if (setup->received) {
        r = ps_pager_set_received(t->pager, RAM, setup->received,
                                  (t->setup.tiny.pages[RAM] + 63) / 64 * 8,
                                  &err);
        CHECK_MSG(r == PS_OK, "received: %s", err.message);
    }
    return true;
}

static void begin(struct test *t, const struct setup *setup)
{
    if (!create(t, setup) ||
        pthread_create(&t->thread, NULL, run_pager, t) != 0) {
        abort();
    }
}

static void hang_up(struct test *t)
{
    if (t->fds[1] >= 0) {
        close(t->fds[1]);
        t->fds[1] = -1;
    }
}

static void destroy(struct test *t)
{
    ps_pager_destroy(t->pager);
    ps_image_destroy(t->image);
    hang_up(t);
    close(t->fds[0]);
    if (t->preempt_fds[0] >= 0) {
        close(t->preempt_fds[0]);
        close(t->preempt_fds[1]);
    }
    for (uint32_t b = 0; b < t->setup.tiny.blocks; b++) {
        free(t->seen[b]);
    }
    tiny_free(&t->setup.tiny);
}

/* Wait for the pager to end, as expected. */
static void expect_end(struct test *t, int code, const char *message)
{
    pthread_join(t->thread, NULL);
    CHECK_MSG(t->result == code, "ended with %d (%s), not %d", t->result,
              t->result ? t->error.message : "", code);
    if (message && t->result) {
        CHECK_MSG(strstr(t->error.message, message), "'%s' is not in '%s'",
                  message, t->error.message);
    }
    destroy(t);
}

static ps_pager_stats stats_of(struct test *t)
{
    ps_pager_stats stats;

    ps_pager_get_stats(t->pager, &stats);
    return stats;
}

/* ----------------------------------------------------- what comes from it */

static bool wait_readable(int fd, int ms)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};

    return poll(&p, 1, ms) == 1;
}

static void get(struct test *t, struct channel *c, void *out, size_t length)
{
    uint8_t *to = out;

    while (length > 0 && !t->failed) {
        size_t n = c->have - c->at;
        ssize_t r;

        if (n > 0) {
            n = n < length ? n : length;
            memcpy(to, c->buffer + c->at, n);
            c->at += n;
            to += n;
            length -= n;
            continue;
        }
        if (!wait_readable(c->fd, PATIENCE_MS)) {
            CHECK_MSG(false, "%s: nothing came for %d ms", running,
                      PATIENCE_MS);
            t->failed = true;
            break;
        }
        r = read(c->fd, c->buffer, sizeof(c->buffer));
        if (r <= 0) {
            CHECK_MSG(false, "the pager hung up");
            t->failed = true;
            break;
        }
        c->have = (size_t)r;
        c->at = 0;
    }
    memset(to, 0, length);
}

static uint8_t get_byte(struct test *t, struct channel *c)
{
    uint8_t v;

    get(t, c, &v, 1);
    return v;
}

static uint32_t get_be32(struct test *t, struct channel *c)
{
    uint8_t v[4];

    get(t, c, v, 4);
    return ps_get_be32(v);
}

static bool nothing_comes(struct test *t, struct channel *c, int ms)
{
    return !t->failed && c->at == c->have && !wait_readable(c->fd, ms);
}

static void take_name(struct test *t, struct channel *c)
{
    char name[256];
    uint8_t length = get_byte(t, c);

    get(t, c, name, length);
    name[length] = 0;
    c->last_block = UINT32_MAX;
    for (uint32_t b = 0; b < t->setup.tiny.blocks; b++) {
        if (strcmp(name, t->setup.tiny.name[b]) == 0) {
            c->last_block = b;
        }
    }
    CHECK_MSG(t->failed || c->last_block != UINT32_MAX, "block '%s'", name);
    t->failed |= c->last_block == UINT32_MAX;
}

/* As QEMU does: all target pages of a host page, in order, then it is there */
static void take_page(struct test *t, struct channel *c, uint64_t page,
                      uint32_t flags)
{
    uint8_t is[PS_PAGE_SIZE], want[PS_PAGE_SIZE];
    uint32_t block = c->last_block;
    tiny_page expected = page_of(t, block, page);
    uint64_t host = host_pages(t, block);

    if (flags & RAM_SAVE_FLAG_ZERO) {
        CHECK(get_byte(t, c) == 0);
        CHECK_MSG(!needs_update(expected), "page %llu is not zero",
                  (unsigned long long)page);
        if (host == 1) {
            CHECK_MSG(t->seen[block][page] == 2, "zero page %llu came unasked",
                      (unsigned long long)page);
        }
    } else {
        get(t, c, is, sizeof(is));
        tiny_content(expected, want);
        CHECK_MSG(t->failed || memcmp(is, want, sizeof(is)) == 0,
                  "page %llu has wrong content", (unsigned long long)page);
        CHECK_MSG(needs_update(expected), "a zero page came as bytes");
    }
    if (c->host_have == 0) {
        CHECK_MSG(page % host == 0, "a host page begins at page %llu",
                  (unsigned long long)page);
        c->host_page = page;
    }
    CHECK_MSG(page == c->host_page + c->host_have, "host page out of order");
    if (++c->host_have == host) {
        c->host_have = 0;
    }
    CHECK_MSG((t->seen[block][page] & 1) == 0, "page %llu came twice",
              (unsigned long long)page);
    t->seen[block][page] = 1;
    t->pages_seen++;
    if (t->logged < MAX_LOG) {
        t->log[t->logged++] = (struct arrival){block, page, flags};
    }
}

/* One entry of a RAM section: false at EOS. */
static bool take_entry(struct test *t, struct channel *c)
{
    uint8_t head[8];
    uint64_t entry;
    uint32_t flags;

    get(t, c, head, sizeof(head));
    if (t->failed) {
        return false;
    }
    entry = ps_get_be64(head);
    flags = (uint32_t)(entry & (PS_PAGE_SIZE - 1));
    if (flags == RAM_SAVE_FLAG_EOS) {
        CHECK(entry == RAM_SAVE_FLAG_EOS);
        CHECK_MSG(c->host_have == 0, "EOS within a host page");
        return false;
    }
    if (!(flags & RAM_SAVE_FLAG_CONTINUE)) {
        take_name(t, c);
    }
    flags &= ~(uint32_t)RAM_SAVE_FLAG_CONTINUE;
    if (t->failed || c->last_block == UINT32_MAX ||
        entry >> PS_PAGE_BITS >= t->setup.tiny.pages[c->last_block] ||
        (flags != RAM_SAVE_FLAG_ZERO && flags != RAM_SAVE_FLAG_PAGE)) {
        CHECK_MSG(t->failed, "bad entry 0x%llx", (unsigned long long)entry);
        t->failed = true;
        return false;
    }
    take_page(t, c, entry >> PS_PAGE_BITS, flags);
    return true;
}

/* Read a whole section, or the end of the stream; its type. */
static uint8_t take_section(struct test *t)
{
    struct channel *c = &t->main;
    uint8_t type = get_byte(t, c);

    t->logged = 0;
    if (t->failed || type == QEMU_VM_EOF) {
        c->over = true;
        return QEMU_VM_EOF;
    }
    CHECK_MSG(type == QEMU_VM_SECTION_PART || type == QEMU_VM_SECTION_END,
              "section type %u", type);
    CHECK(get_be32(t, c) == TINY_SECTION_ID);
    while (take_entry(t, c)) {
    }
    if (t->setup.tiny.footers) {
        CHECK(get_byte(t, c) == QEMU_VM_SECTION_FOOTER);
        CHECK(get_be32(t, c) == TINY_SECTION_ID);
    }
    return t->failed ? QEMU_VM_EOF : type;
}

/* ------------------------------------------------------ what it is told */

static void say(struct test *t, const void *bytes, size_t length)
{
    ssize_t n = send(t->fds[1], bytes, length, MSG_NOSIGNAL);

    CHECK_MSG(n == (ssize_t)length || n < 0, "short write");
}

static size_t message(uint8_t *out, uint32_t type, const void *data,
                      size_t length)
{
    out[0] = (uint8_t)(type >> 8);
    out[1] = (uint8_t)type;
    out[2] = (uint8_t)(length >> 8);
    out[3] = (uint8_t)length;
    if (length) {
        memcpy(out + 4, data, length);
    }
    return length + 4;
}

static size_t request_message(struct test *t, uint8_t *out, uint32_t block,
                              uint64_t page)
{
    const char *name = t->setup.tiny.name[block];
    uint8_t data[300];
    size_t length = 12;

    ps_put_be64(data, page << PS_PAGE_BITS);
    ps_put_be32(data + 8, (uint32_t)t->setup.blocks[block].page_size);
    if (block != t->asked_block) {
        data[length++] = (uint8_t)strlen(name);
        memcpy(data + length, name, strlen(name));
        length += strlen(name);
        t->asked_block = block;
        return message(out, 3, data, length);
    }
    return message(out, 4, data, length);
}

static void request(struct test *t, uint32_t block, uint64_t page)
{
    uint8_t bytes[320];
    size_t length = request_message(t, bytes, block, page);

    for (uint64_t i = page; i < page + host_pages(t, block); i++) {
        if (t->seen[block][i] == 0) {
            t->seen[block][i] = 2;
        }
    }
    say(t, bytes, length);
}

static void shut(struct test *t, uint32_t value)
{
    uint8_t bytes[8], data[4];

    ps_put_be32(data, value);
    say(t, bytes, message(bytes, 1, data, 4));
}

static void pong(struct test *t, uint32_t value)
{
    uint8_t bytes[8], data[4];

    ps_put_be32(data, value);
    say(t, bytes, message(bytes, 2, data, 4));
}

/* Ask for a page and see that it and nothing else comes. */
static void fault(struct test *t, uint32_t block, uint64_t page)
{
    request(t, block, page);
    CHECK(take_section(t) == QEMU_VM_SECTION_PART);
    CHECK_MSG(t->logged == host_pages(t, block) && t->log[0].block == block &&
                  t->log[0].page == page,
              "asked for %llu, got %zu pages from %llu",
              (unsigned long long)page, t->logged,
              (unsigned long long)t->log[0].page);
}

/* Read until END and EOF, confirm, and see that everything has come. */
static void read_to_the_end(struct test *t)
{
    uint8_t type;

    while ((type = take_section(t)) == QEMU_VM_SECTION_PART) {
    }
    CHECK(type == QEMU_VM_SECTION_END && t->logged == 0);
    CHECK(get_byte(t, &t->main) == QEMU_VM_EOF);
    CHECK(nothing_comes(t, &t->main, 0));
    for (uint32_t b = 0; b < t->setup.tiny.blocks; b++) {
        uint64_t host = host_pages(t, b);

        for (uint64_t p = 0; p < t->setup.tiny.pages[b]; p += host) {
            bool needed = false;

            for (uint64_t i = p; i < p + host; i++) {
                needed |= needs_update(page_of(t, b, i));
            }
            CHECK_MSG(!needed || (t->seen[b][p] & 1), "page %llu never came",
                      (unsigned long long)p);
        }
    }
}

static void end_well(struct test *t)
{
    ps_pager_stats stats;

    read_to_the_end(t);
    CHECK(stats_of(t).state == PS_PAGER_CLOSING);
    shut(t, 0);
    pthread_join(t->thread, NULL);
    stats = stats_of(t);
    CHECK_MSG(t->result == PS_OK, "%s", t->error.message);
    CHECK(stats.state == PS_PAGER_DONE && stats.pages_left == 0);
    CHECK_MSG(stats.pages_requested + stats.pages_prefetched +
                      stats.pages_background ==
                  t->pages_seen,
              "counted %llu pages, %llu came",
              (unsigned long long)(stats.pages_requested +
                                   stats.pages_prefetched +
                                   stats.pages_background),
              (unsigned long long)t->pages_seen);
    destroy(t);
}

/* ----------------------------------------------------------------- tests */

static uint64_t count_needed(const struct test *t)
{
    uint64_t n = 0;

    for (uint32_t b = 0; b < t->setup.tiny.blocks; b++) {
        for (uint64_t p = 0; p < t->setup.tiny.pages[b]; p++) {
            n += needs_update(page_of(t, b, p));
        }
    }
    return n;
}

static void test_on_demand(bool zstd, bool footers, uint32_t per_block)
{
    struct setup setup = usual();
    struct test t;
    ps_pager_stats stats;
    uint64_t needed;

    setup.tiny.zstd = zstd;
    setup.tiny.footers = footers;
    setup.tiny.pages_per_block = per_block;
    begin(&t, &setup);
    needed = count_needed(&t);
    fault(&t, RAM, 10);          /* data */
    fault(&t, RAM, 9);           /* fill */
    fault(&t, RAM, 8);           /* zero */
    fault(&t, RAM, 2 * 512 + 5); /* zero in a uniform leaf */
    fault(&t, RAM, 3 * 512 + 5); /* fill in a uniform leaf */
    fault(&t, RAM, 7 * 512 + 2); /* shared */
    fault(&t, ROM, 3);           /* another block */
    fault(&t, RAM, 512 + 2);     /* the owner of the shared one */
    CHECK(nothing_comes(&t, &t.main, 20));
    stats = stats_of(&t);
    CHECK(stats.state == PS_PAGER_SERVING && stats.faults == 8);
    CHECK(stats.faults_late == 0 && stats.pages_requested == 8);
    CHECK(stats.pages_zero_sent == 2 && stats.pages_prefetched == 0);
    CHECK(stats.pages_total == needed && stats.pages_left == needed - 6);
    CHECK(stats.pages_avoided == RAM_PAGES + ROM_PAGES - needed - 2);
    CHECK(stats.latency_p50 > 0 && stats.latency_max >= stats.latency_p99);
    CHECK(stats.first_fault_at > 0 &&
          stats.last_fault_at >= stats.first_fault_at);
    CHECK(stats.cpu_ns > 0 && ps_pager_thread(t.pager) > 0);
    if (!zstd) { /* a page alone, never its whole block */
        CHECK(stats.storage_bytes == 4 * PS_PAGE_SIZE);
    }
    request(&t, RAM, 10); /* late: it is here already */
    request(&t, RAM, 8);
    fault(&t, RAM, 11);
    CHECK(stats_of(&t).faults_late == 2);
    ps_pager_finish(t.pager);
    end_well(&t);
}

static void test_finish_before_run(bool zstd, uint32_t per_block)
{
    struct setup setup = usual();
    struct test t;
    ps_pager_stats stats;

    setup.tiny.zstd = zstd;
    setup.tiny.pages_per_block = per_block;
    setup.options.cache_bytes = 1; /* one block */
    if (!create(&t, &setup)) {
        return;
    }
    ps_pager_finish(t.pager);
    pthread_create(&t.thread, NULL, run_pager, &t);
    read_to_the_end(&t);
    stats = stats_of(&t);
    CHECK(stats.pages_background == count_needed(&t));
    CHECK(stats.storage_reads ==
          (t.setup.tiny.canonical_pages + per_block - 1) / per_block);
    shut(&t, 0);
    expect_end(&t, PS_OK, NULL);
}

static void test_background(bool zstd, uint32_t per_block, bool backwards)
{
    struct setup setup = usual();
    struct test t;
    ps_pager_stats stats;
    uint64_t blocks;

    setup.tiny.zstd = zstd;
    setup.tiny.pages_per_block = per_block;
    setup.tiny.backwards = backwards;
    setup.options.background_rate = UINT64_MAX;
    setup.options.cache_bytes = 1; /* one block */
    begin(&t, &setup);
    read_to_the_end(&t);
    stats = stats_of(&t);
    blocks = (t.setup.tiny.canonical_pages + per_block - 1) / per_block;
    CHECK(stats.pages_background == count_needed(&t));
    CHECK_MSG(stats.storage_reads == blocks,
              "%llu reads of %llu blocks: each is to be read once",
              (unsigned long long)stats.storage_reads,
              (unsigned long long)blocks);
    shut(&t, 0);
    expect_end(&t, PS_OK, NULL);
}

static void test_faults_in_background(void)
{
    struct setup setup = usual();
    struct test t;

    setup.options.background_rate = UINT64_MAX;
    setup.options.background_delay_ns = 200000;
    setup.options.prefetch = PS_PREFETCH_PHYSICAL;
    setup.options.prefetch_window = 8;
    setup.tiny.zstd = true;
    begin(&t, &setup);
    for (uint32_t i = 0; i < 300; i++) {
        uint64_t page = i * UINT64_C(2654435761) % RAM_PAGES;
        uint64_t until = now_ns() + UINT64_C(5000000000);

        request(&t, RAM, page);
        while (!(t.seen[RAM][page] & 1) && !t.failed && now_ns() < until) {
            if (take_section(&t) != QEMU_VM_SECTION_PART) {
                break;
            }
        }
        if (t.main.over || (t.seen[RAM][page] & 1) == 0) {
            break; /* all is loaded: END has come */
        }
    }
    if (stats_of(&t).state == PS_PAGER_SERVING) {
        CHECK(stats_of(&t).pages_requested > 0);
        end_well(&t);
    } else {
        shut(&t, 0);
        expect_end(&t, PS_OK, NULL);
    }
}

/* These pages, in one or more sections. */
static void expect_pages(struct test *t, const uint64_t *pages, size_t count)
{
    size_t at = 0;

    while (at < count && take_section(t) == QEMU_VM_SECTION_PART) {
        for (size_t i = 0; i < t->logged; i++, at++) {
            CHECK_MSG(at < count && t->log[i].page == pages[at],
                      "%s: page %llu came, not %llu", running,
                      (unsigned long long)t->log[i].page,
                      (unsigned long long)(at < count ? pages[at] : 0));
        }
    }
    CHECK(at == count);
}

static void test_prefetch(bool zstd)
{
    struct setup setup = usual();
    struct test t;
    ps_pager_stats stats;

    setup.tiny.zstd = zstd;
    setup.options.prefetch = PS_PREFETCH_PHYSICAL;
    setup.options.prefetch_window = 5;
    begin(&t, &setup);
    fault(&t, RAM, 12);
    if (!zstd) {
        /* A guess is worth no reading; a second fault beside it proves it. */
        CHECK(nothing_comes(&t, &t.main, 20));
        fault(&t, RAM, 13);
        expect_pages(&t, (const uint64_t[]){14, 15, 17, 18, 19}, 5);
        ps_pager_finish(t.pager);
        end_well(&t);
        return;
    }
    /* The block is decoded. 16 is a zero page; 17 is a fill page. */
    expect_pages(&t, (const uint64_t[]){13, 14, 15, 17, 18}, 5);
    CHECK(nothing_comes(&t, &t.main, 20));
    request(&t, RAM, 13); /* late: nothing comes, nothing is planned */
    /* Just behind the window: it was right. */
    fault(&t, RAM, 19);
    expect_pages(&t, (const uint64_t[]){20, 21, 22, 23, 25}, 5);
    stats = stats_of(&t);
    CHECK(stats.pages_prefetched == 10);
    CHECK(stats.prefetch[PS_KIND_PHYSICAL].windows == 2);
    CHECK(stats.prefetch[PS_KIND_PHYSICAL].windows_right == 1);
    CHECK(stats.prefetch[PS_KIND_PHYSICAL].pages == 10);
    CHECK(stats.prefetch[PS_KIND_PHYSICAL].pages_right == 5);
    CHECK(stats_of(&t).faults_late == 1);
    ps_pager_finish(t.pager);
    end_well(&t);
}

/*
 * Two processes. The first maps 40 pages that lie anywhere in RAM, with a
 * hole after 24 of them; the second one of these pages and eight others.
 */
#define FIRST_VIRTUAL UINT64_C(0x400000)

static uint32_t scattered(uint32_t i)
{
    return 2 + i * 37 % 512 / 8 * 8 + i % 6; /* always a data page */
}

static void map_processes(ps_format_run *runs, ps_format_space *spaces)
{
    for (uint32_t i = 0; i < 40; i++) {
        runs[i] =
            (ps_format_run){.address = FIRST_VIRTUAL + (i + (i < 14 ? 0 : 2) +
                                                        (i < 24 ? 0 : 100)) *
                                                           PS_PAGE_SIZE,
                            .first = scattered(i),
                            .pages = 1};
    }
    runs[40] =
        (ps_format_run){.address = 0x7000, .first = 512 + 10, .pages = 6};
    runs[41] =
        (ps_format_run){.address = 0xd000, .first = scattered(30), .pages = 1};
    runs[42] =
        (ps_format_run){.address = 0xe000, .first = 512 + 100, .pages = 2};
    spaces[0] = (ps_format_space){
        .root = 0x1000, .kind = PS_SPACE_USER, .run_count = 40};
    spaces[1] = (ps_format_space){
        .root = 0x2000, .kind = PS_SPACE_USER, .first_run = 40, .run_count = 3};
}

static void test_virtual(bool zstd, bool damaged)
{
    ps_format_run runs[43] = {0};
    ps_format_space spaces[2] = {0};
    struct setup setup = usual();
    struct test t;
    uint64_t want[16];

    map_processes(runs, spaces);
    setup.tiny.zstd = zstd;
    setup.tiny.spaces = spaces;
    setup.tiny.space_count = 2;
    setup.tiny.runs = runs;
    setup.tiny.run_count = 43;
    setup.options.prefetch = PS_PREFETCH_VIRTUAL;
    setup.options.prefetch_window = 16;
    if (damaged) {
        runs[5].pages = 0;
    }
    begin(&t, &setup);
    if (damaged) {
        /* The hint is worth nothing, the page is right all the same. */
        fault(&t, RAM, scattered(4));
        fault(&t, RAM, scattered(9));
        ps_pager_finish(t.pager);
        end_well(&t);
        return;
    }
    fault(&t, RAM, scattered(2)); /* what would follow is in other blocks */
    CHECK(nothing_comes(&t, &t.main, 20));
    fault(&t, RAM, scattered(3)); /* but it is true */
    for (uint32_t i = 0; i < 16; i++) {
        want[i] = scattered(4 + i);
    }
    expect_pages(&t, want, 16);
    fault(&t, RAM, scattered(20)); /* right: as far as the hole */
    for (uint32_t i = 0; i < 3; i++) {
        want[i] = scattered(21 + i);
    }
    expect_pages(&t, want, 3);
    CHECK(nothing_comes(&t, &t.main, 20));
    /* The second process; a page of both is where it goes on from there. */
    fault(&t, RAM, 512 + 10);
    if (zstd) { /* what is in its block is at hand */
        expect_pages(&t,
                     (const uint64_t[]){512 + 11, 512 + 12, 512 + 13, 512 + 14,
                                        512 + 15},
                     5);
    }
    CHECK(nothing_comes(&t, &t.main, 20));
    fault(&t, RAM, scattered(30));
    expect_pages(&t, (const uint64_t[]){512 + 100, 512 + 101}, 2);
    CHECK(nothing_comes(&t, &t.main, 20));
    /* Nobody maps it: its neighbours in the file. */
    fault(&t, RAM, 3002);
    if (!zstd) {
        CHECK(nothing_comes(&t, &t.main, 20));
        fault(&t, RAM, 3003);
    }
    CHECK(take_section(&t) == QEMU_VM_SECTION_PART);
    CHECK(t.logged > 0 && t.log[0].page == (zstd ? 3003 : 3004));
    CHECK(stats_of(&t).prefetch[PS_KIND_VIRTUAL].pages_right == 16);
    CHECK(stats_of(&t).prefetch[PS_KIND_FILE].windows > 0);
    ps_pager_finish(t.pager);
    end_well(&t);
}

static void test_trace(void)
{
    ps_format_run runs[43] = {0};
    ps_format_space spaces[2] = {0};
    struct setup setup = usual();
    struct test t;
    ps_trace_header header;
    ps_trace_record records[8];
    int fd = memfd_create("trace", MFD_CLOEXEC);

    map_processes(runs, spaces);
    setup.tiny.spaces = spaces;
    setup.tiny.space_count = 2;
    setup.tiny.runs = runs;
    setup.tiny.run_count = 43;
    setup.options.prefetch = PS_PREFETCH_VIRTUAL;
    setup.options.prefetch_window = 4;
    setup.options.trace_fd = fd;
    begin(&t, &setup);
    fault(&t, RAM, scattered(2));
    CHECK(nothing_comes(&t, &t.main, 20));
    fault(&t, RAM, scattered(3));
    expect_pages(&t,
                 (const uint64_t[]){scattered(4), scattered(5), scattered(6),
                                    scattered(7)},
                 4);
    request(&t, RAM, scattered(4)); /* late */
    fault(&t, RAM, 8);              /* zero */
    ps_pager_finish(t.pager);
    end_well(&t);
    CHECK(pread(fd, &header, sizeof(header), 0) == sizeof(header));
    CHECK(memcmp(header.magic, PS_TRACE_MAGIC, 8) == 0);
    CHECK(header.version == 1 && header.record_size == sizeof(records[0]));
    CHECK(header.uuid[0] == 0x42);
    CHECK(pread(fd, records, sizeof(records), sizeof(header)) ==
          4 * sizeof(records[0]));
    CHECK(records[1].page == scattered(3) && records[1].space == 0);
    CHECK(records[1].address == FIRST_VIRTUAL + 3 * PS_PAGE_SIZE);
    CHECK(records[1].window == 4 && records[1].stride == 1);
    CHECK(records[1].kind == PS_KIND_VIRTUAL);
    CHECK(records[0].flags == 0 && records[1].flags == PS_TRACE_CONFIRMS);
    CHECK(records[2].page == scattered(4) && records[2].flags == PS_TRACE_LATE);
    CHECK(records[3].page == 8 && records[3].flags == PS_TRACE_ZERO);
    CHECK(records[1].time >= records[0].time);
    CHECK(records[3].time >= records[1].time);
    close(fd);
}

/* Requests that are there at the same time all go before any prefetch. */
static void test_order(void)
{
    struct setup setup = usual();
    static const uint64_t pages[] = {2, 42, 130, 3, 514};
    uint8_t bytes[5 * 320];
    size_t length = 0;
    struct test t;

    setup.options.prefetch = PS_PREFETCH_PHYSICAL;
    setup.tiny.zstd = true;
    setup.options.prefetch_window = 4;
    if (!create(&t, &setup)) {
        return;
    }
    for (size_t i = 0; i < 5; i++) {
        length += request_message(&t, bytes + length, RAM, pages[i]);
    }
    CHECK(ps_pager_received_first(t.pager, bytes, length, &t.error) == 0);
    pthread_create(&t.thread, NULL, run_pager, &t);
    for (size_t i = 0; i < 5; i++) {
        CHECK(take_section(&t) == QEMU_VM_SECTION_PART);
        CHECK(t.logged == 1 && t.log[0].page == pages[i]);
    }
    /* Newest window first, and what is left of older ones after it. */
    CHECK(take_section(&t) == QEMU_VM_SECTION_PART);
    CHECK(t.logged == 4 && t.log[0].page == 515);
    CHECK(take_section(&t) == QEMU_VM_SECTION_PART);
    CHECK(t.logged == 4 && t.log[0].page == 4);
    ps_pager_finish(t.pager);
    end_well(&t);
}

static void test_split_messages(void)
{
    struct setup setup = usual();
    struct test t;
    uint8_t bytes[700];
    size_t length;

    begin(&t, &setup);
    length = request_message(&t, bytes, RAM, 10);
    length += request_message(&t, bytes + length, RAM, 11);
    length += request_message(&t, bytes + length, ROM, 1);
    length += message(bytes + length, 7, NULL, 0);
    for (size_t i = 0; i < length; i++) {
        say(&t, bytes + i, 1);
        if (i % 7 == 0) {
            sleep_ms(1);
        }
    }
    for (int i = 0; i < 3; i++) {
        CHECK(take_section(&t) == QEMU_VM_SECTION_PART && t.logged == 1);
    }
    CHECK(t.log[0].block == ROM && t.log[0].page == 1);
    ps_pager_finish(t.pager);
    end_well(&t);
}

/* A request of several host pages: only those that did not come yet. */
static void test_long_request(void)
{
    struct setup setup = usual();
    struct test t;
    uint8_t bytes[320], data[12];
    bool came[8] = {false};

    begin(&t, &setup);
    fault(&t, RAM, 12);
    ps_put_be64(data, 10 << PS_PAGE_BITS);
    ps_put_be32(data + 8, 4 * PS_PAGE_SIZE);
    say(&t, bytes, message(bytes, 4, data, 12));
    for (int i = 0; i < 3; i++) {
        CHECK(take_section(&t) == QEMU_VM_SECTION_PART && t.logged == 1);
        came[t.log[0].page - 8] = true;
    }
    CHECK(came[2] && came[3] && came[5]);
    ps_pager_finish(t.pager);
    end_well(&t);
}

/* 2 MiB host pages: one of zeros, one with a hole of absent pages. */
static tiny_page huge_page(uint32_t block, uint64_t page)
{
    if (block == RAM && page >= 6 * 512 && page < 6 * 512 + 100) {
        return (tiny_page){PS_CLASS_ABSENT, 0};
    }
    return usual_page(block, page);
}

static void test_huge(bool zstd, bool preempt, uint64_t rate)
{
    struct setup setup = usual();
    struct test t;
    ps_pager_stats stats;

    setup.tiny.zstd = zstd;
    setup.tiny.page = huge_page;
    setup.blocks[RAM].page_size = 2 << 20;
    setup.preempt = preempt;
    setup.options.prefetch = PS_PREFETCH_PHYSICAL;
    setup.options.prefetch_window = 16;
    begin(&t, &setup);
    stats = stats_of(&t);
    CHECK(stats.pages_total == 7 * 512 + 40);
    CHECK(stats.pages_avoided == 512 + 24);
    if (!preempt) {
        fault(&t, RAM, 512);
        fault(&t, RAM, 1024); /* all zero */
        fault(&t, RAM, 6 * 512);
        stats = stats_of(&t);
        CHECK(stats.pages_left == 5 * 512 + 40);
        CHECK(stats.pages_requested == 3 * 512);
        CHECK(stats.pages_prefetched == 0); /* host pages are enough */
        fault(&t, ROM, 20);
        if (!zstd) {
            fault(&t, ROM, 21); /* now it is worth reading */
        }
        CHECK(take_section(&t) == QEMU_VM_SECTION_PART && t.logged > 0);
        CHECK(t.log[0].page == (zstd ? 21 : 22));
        CHECK(t.log[0].block == ROM);
    } else {
        request(&t, RAM, 512);
        for (int i = 0; i < 512; i++) {
            CHECK(take_entry(&t, &t.preempt));
        }
        CHECK(nothing_comes(&t, &t.main, 20));
    }
    ps_pager_set_background(t.pager, rate);
    if (rate != UINT64_MAX) {
        sleep_ms(50);
        ps_pager_finish(t.pager);
    }
    if (preempt) { /* QEMU 7.2: EOS after END */
        read_to_the_end(&t);
        CHECK(!take_entry(&t, &t.preempt));
        shut(&t, 0);
        expect_end(&t, PS_OK, NULL);
    } else {
        end_well(&t);
    }
}

static void test_preempt(bool as_in_8_0)
{
    struct setup setup = usual();
    struct test t;

    setup.preempt = true;
    setup.tiny.zstd = true;
    setup.options.prefetch = PS_PREFETCH_PHYSICAL;
    setup.options.prefetch_window = 4;
    begin(&t, &setup);
    request(&t, RAM, 12);
    CHECK(take_entry(&t, &t.preempt) && t.logged == 1);
    CHECK(take_section(&t) == QEMU_VM_SECTION_PART);
    CHECK(t.logged == 4 && t.log[0].page == 13); /* prefetch: main channel */
    request(&t, RAM, 8);                         /* zero */
    request(&t, ROM, 0);
    request(&t, RAM, 14); /* late: it went by the main channel */
    request(&t, RAM, 100);
    for (int i = 0; i < 3; i++) {
        CHECK(take_entry(&t, &t.preempt));
    }
    CHECK(nothing_comes(&t, &t.preempt, 10));
    CHECK(stats_of(&t).faults_late == 1);
    while (!nothing_comes(&t, &t.main, 20) && !t.failed) {
        take_section(&t);
    }
    ps_pager_finish(t.pager);
    read_to_the_end(&t);
    /* QEMU waits for pages that it asked for before it saw END. */
    request(&t, RAM, 1024);
    CHECK(take_entry(&t, &t.preempt));
    if (as_in_8_0) {
        shutdown(t.preempt_fds[1], SHUT_RDWR);
        sleep_ms(20);
    } else {
        uint64_t from = now_ns();

        CHECK(!take_entry(&t, &t.preempt));
        CHECK(now_ns() - from > 300000000);
    }
    request(&t, RAM, 1025); /* nobody can answer this one any more */
    CHECK(nothing_comes(&t, &t.main, 20));
    shut(&t, 0);
    expect_end(&t, PS_OK, NULL);
}

/* The main channel is stuck: requested pages come all the same. */
static void test_preempt_overtakes(void)
{
    struct setup setup = usual();
    struct test t;

    setup.preempt = true;
    begin(&t, &setup);
    ps_pager_finish(t.pager);
    sleep_ms(30);
    request(&t, RAM, 7 * 512 + 100);
    CHECK(take_entry(&t, &t.preempt));
    request(&t, RAM, 8);
    CHECK(take_entry(&t, &t.preempt));
    read_to_the_end(&t);
    shutdown(t.preempt_fds[1], SHUT_RDWR);
    shut(&t, 0);
    expect_end(&t, PS_OK, NULL);
}

static size_t raw_request(uint8_t *out, uint32_t type, uint64_t start,
                          uint32_t length, const char *name)
{
    uint8_t data[300];
    size_t n = 12;

    ps_put_be64(data, start);
    ps_put_be32(data + 8, length);
    if (name) {
        data[n++] = (uint8_t)strlen(name);
        memcpy(data + n, name, strlen(name));
        n += strlen(name);
    }
    return message(out, type, data, n);
}

static void one_hostile(const char *what, const uint8_t *bytes, size_t length,
                        int code, const char *text)
{
    struct setup setup = usual();
    struct test t;

    setup.options.background_rate = 1 << 20;
    begin(&t, &setup);
    say(&t, bytes, length);
    CHECK_MSG(true, "%s", what);
    expect_end(&t, code, text);
}

static void test_hostile(void)
{
    static const struct {
        uint32_t type;
        uint64_t start;
        uint32_t length;
        const char *name;
        const char *text;
    } requests[] = {
        {4, 0, 4096, NULL, "before it named"},
        {3, 0, 4096, "nosuch", "'nosuch'"},
        {3, 0, 4096, "pc.ra", "'pc.ra'"},
        {3, 0, 4096, "\x01\xff", "'?\?'"},
        {3, 1, 4096, "pc.ram", "multiple"},
        {3, 0, 4095, "pc.ram", "multiple"},
        {3, 0, 0, "pc.ram", "0 bytes"},
        {3, RAM_PAGES * 4096ull, 4096, "pc.ram", "which has"},
        {3, RAM_PAGES * 4096ull - 4096, 8192, "pc.ram", "which has"},
        {3, UINT64_MAX - 4095, 4096, "pc.ram", "which has"},
        {3, UINT64_C(1) << 63, 0xfffff000, "pc.ram", "which has"},
    };
    static const struct {
        uint16_t type;
        uint16_t length;
        const char *text;
    } headers[] = {
        {0, 4, "unknown"},        {8, 4, "unknown"},
        {0xffff, 0, "unknown"},   {1, 3, "SHUT"},
        {1, 5, "SHUT"},           {2, 0, "PONG"},
        {3, 13, "REQ_PAGES"},     {3, 269, "REQ_PAGES"},
        {3, 0xffff, "REQ_PAGES"}, {4, 11, "REQ_PAGES"},
        {4, 13, "REQ_PAGES"},     {5, 1, "RECV_BITMAP"},
        {5, 257, "RECV_BITMAP"},  {6, 8, "RESUME_ACK"},
        {7, 1, "SWITCHOVER"},
    };
    uint8_t bytes[400];
    uint8_t data[300] = {0};
    size_t length;

    for (size_t i = 0; i < sizeof(requests) / sizeof(requests[0]); i++) {
        length = raw_request(bytes, requests[i].type, requests[i].start,
                             requests[i].length, requests[i].name);
        one_hostile("request", bytes, length, PS_ERR_PEER, requests[i].text);
    }
    for (size_t i = 0; i < sizeof(headers) / sizeof(headers[0]); i++) {
        bytes[0] = (uint8_t)(headers[i].type >> 8);
        bytes[1] = (uint8_t)headers[i].type;
        bytes[2] = (uint8_t)(headers[i].length >> 8);
        bytes[3] = (uint8_t)headers[i].length;
        one_hostile("header", bytes, 4, PS_ERR_PEER, headers[i].text);
    }
    /* A name that is longer, shorter than the message, or empty. */
    for (int n = -1; n < 2; n++) {
        length = raw_request(bytes, 3, 0, 4096, "pc.ram");
        bytes[4 + 12] = (uint8_t)(n ? 6 + n : 0);
        one_hostile("name", bytes, length, PS_ERR_PEER, "name of length");
    }
    data[0] = 1;
    data[1] = 'x';
    one_hostile("bitmap", bytes, message(bytes, 5, data, 2), PS_ERR_PEER,
                "bitmap");
    ps_put_be32(data, 0);
    one_hostile("early SHUT", bytes, message(bytes, 1, data, 4), PS_ERR_CLOSED,
                "before everything");
    ps_put_be32(data, 1);
    one_hostile("SHUT 1", bytes, message(bytes, 1, data, 4), PS_ERR_PEER,
                "error 1");
}

static tiny_page holes(uint32_t block, uint64_t page)
{
    return page == 5 ? (tiny_page){PS_CLASS_ABSENT, 0}
                     : usual_page(block, page);
}

static void test_absent(void)
{
    struct setup setup = usual();
    struct test t;

    setup.tiny.page = holes;
    begin(&t, &setup);
    fault(&t, RAM, 4);
    request(&t, RAM, 5);
    expect_end(&t, PS_ERR_DAMAGED, "page at 0x5000 of pc.ram");
    begin(&t, &setup); /* never asked for: not missed */
    ps_pager_finish(t.pager);
    end_well(&t);
}

static void test_closed(void)
{
    struct setup setup = usual();
    struct test t;

    begin(&t, &setup);
    fault(&t, RAM, 2);
    hang_up(&t);
    expect_end(&t, PS_ERR_CLOSED, "before everything");

    begin(&t, &setup); /* in the middle of a message, with unread pages */
    say(&t, "\0\4\0", 3);
    ps_pager_finish(t.pager);
    sleep_ms(20);
    hang_up(&t);
    expect_end(&t, PS_ERR_CLOSED, NULL);

    begin(&t, &setup);
    ps_pager_finish(t.pager);
    read_to_the_end(&t);
    hang_up(&t);
    expect_end(&t, PS_ERR_CLOSED, "before it confirmed");

    setup.preempt = true;
    begin(&t, &setup);
    shutdown(t.preempt_fds[1], SHUT_RDWR);
    expect_end(&t, PS_ERR_CLOSED, "before everything");
}

static void test_cancel(void)
{
    struct setup setup = usual();
    struct test t;

    begin(&t, &setup); /* idle */
    fault(&t, RAM, 2);
    ps_pager_cancel(t.pager);
    expect_end(&t, PS_ERR_CANCELLED, NULL);

    begin(&t, &setup); /* nobody reads */
    ps_pager_finish(t.pager);
    sleep_ms(20);
    ps_pager_cancel(t.pager);
    expect_end(&t, PS_ERR_CANCELLED, NULL);

    if (create(&t, &setup)) { /* before it runs */
        ps_pager_cancel(t.pager);
        pthread_create(&t.thread, NULL, run_pager, &t);
        expect_end(&t, PS_ERR_CANCELLED, NULL);
    }
}

static void test_rate(void)
{
    struct setup setup = usual();
    struct test t;
    uint64_t rate = 16 << 20, from, took, bytes;

    setup.options.background_rate = rate;
    begin(&t, &setup);
    from = now_ns();
    while (t.pages_seen < 1500 && !t.failed) {
        CHECK(take_section(&t) == QEMU_VM_SECTION_PART);
    }
    took = now_ns() - from;
    bytes = t.pages_seen * PS_PAGE_SIZE;
    CHECK_MSG((double)bytes / ((double)took / 1e9) < 1.1 * (double)rate,
              "%llu bytes in %llu ns", (unsigned long long)bytes,
              (unsigned long long)took);
    CHECK_MSG((double)bytes / ((double)took / 1e9) > 0.5 * (double)rate,
              "%llu bytes in %llu ns", (unsigned long long)bytes,
              (unsigned long long)took);
    ps_pager_set_background(t.pager, 0);
    while (!nothing_comes(&t, &t.main, 30) && !t.failed) {
        take_section(&t);
    }
    CHECK(stats_of(&t).state == PS_PAGER_SERVING);
    ps_pager_set_background(t.pager, UINT64_MAX);
    end_well(&t);
}

/* A fault resets the ramp, and the background waits for quiet. */
static void test_quiet(void)
{
    struct setup setup = usual();
    struct test t;
    uint64_t from;

    setup.options.background_rate = UINT64_MAX;
    setup.options.background_delay_ns = 60000000;
    begin(&t, &setup);
    sleep_ms(40);
    fault(&t, RAM, 700);
    from = now_ns();
    CHECK(take_section(&t) == QEMU_VM_SECTION_PART);
    CHECK_MSG(now_ns() - from > 50000000, "the background came after %llu ns",
              (unsigned long long)(now_ns() - from));
    end_well(&t);
}

static void test_in_flight(bool finish)
{
    struct setup setup = usual();
    struct test t;
    uint64_t bound = 64 << 10, before;
    int queued = 0;

    setup.options.in_flight_bytes = bound;
    setup.options.background_rate = UINT64_MAX;
    begin(&t, &setup);
    if (finish) {
        ps_pager_finish(t.pager);
        bound = 512 << 10;
    }
    sleep_ms(100); /* nobody reads */
    ioctl(t.fds[0], SIOCOUTQ, &queued);
    CHECK_MSG((uint64_t)queued <= bound + bound / 4 && queued > 4096,
              "%d bytes in flight", queued);
    before = t.pages_seen;
    request(&t, RAM, 7 * 512 + 100); /* it comes behind that, no more */
    while (!(t.seen[RAM][7 * 512 + 100] & 1) && !t.failed) {
        CHECK(take_section(&t) == QEMU_VM_SECTION_PART);
    }
    CHECK_MSG((t.pages_seen - before) * PS_PAGE_SIZE <= bound + bound / 4,
              "%llu pages came before it",
              (unsigned long long)(t.pages_seen - before));
    end_well(&t);
}

static void flip(const struct test *t, uint64_t offset)
{
    uint8_t byte;

    CHECK(pread(t->setup.tiny.fd, &byte, 1, (off_t)offset) == 1);
    byte ^= 0x10;
    CHECK(pwrite(t->setup.tiny.fd, &byte, 1, (off_t)offset) == 1);
}

static void test_damaged(bool zstd)
{
    struct setup setup = usual();
    struct test t;

    setup.tiny.zstd = zstd;
    if (!create(&t, &setup)) {
        return;
    }
    flip(&t, t.setup.tiny.block_offset[3] + t.setup.tiny.block_length[3] / 2);
    pthread_create(&t.thread, NULL, run_pager, &t);
    fault(&t, RAM, 2);
    /* Canonical page 56 is in the middle of block 3: six of eight pages. */
    request(&t, RAM, 56 / 6 * 8 + 2 + 56 % 6);
    expect_end(&t, PS_ERR_DAMAGED, "locality block 3");

    /* In the background; nobody reads, so it must be an early one. */
    if (!create(&t, &setup)) {
        return;
    }
    flip(&t, t.setup.tiny.block_offset[1]);
    ps_pager_finish(t.pager);
    pthread_create(&t.thread, NULL, run_pager, &t);
    pthread_join(t.thread, NULL);
    CHECK(t.result == PS_ERR_DAMAGED);
    CHECK_MSG(strstr(t.error.message, "locality block 1:"), "%s",
              t.error.message);
    /* The file is cut. */
    destroy(&t);
    if (!create(&t, &setup)) {
        return;
    }
    CHECK(ftruncate(t.setup.tiny.fd, (off_t)t.setup.tiny.block_offset[1] + 1) ==
          0);
    ps_pager_finish(t.pager);
    pthread_create(&t.thread, NULL, run_pager, &t);
    pthread_join(t.thread, NULL);
    CHECK(t.result == PS_ERR_TRUNCATED || t.result == PS_ERR_DAMAGED);
    destroy(&t);
}

static void test_received(void)
{
    struct setup setup = usual();
    struct test t;
    uint8_t bitmap[RAM_PAGES / 8] = {0};
    uint64_t had = 0;
    ps_pager_stats stats;

    for (uint64_t p = 0; p < RAM_PAGES; p++) {
        if (p % 3 == 0 || (p > 600 && p < 900)) {
            bitmap[p / 8] |= (uint8_t)(1u << (p % 8));
        }
    }
    setup.received = bitmap;
    if (!create(&t, &setup)) {
        return;
    }
    for (uint64_t p = 0; p < RAM_PAGES; p++) {
        if (bitmap[p / 8] >> (p % 8) & 1) {
            t.seen[RAM][p] = 1; /* must not come again */
            had += needs_update(page_of(&t, RAM, p));
        }
    }
    stats = stats_of(&t);
    CHECK(stats.pages_left == stats.pages_total - had);
    CHECK(ps_pager_set_received(t.pager, RAM, bitmap, 100, &t.error) ==
          PS_ERR_ARGUMENT);
    CHECK(ps_pager_set_received(t.pager, 7, bitmap, 512, &t.error) ==
          PS_ERR_ARGUMENT);
    pthread_create(&t.thread, NULL, run_pager, &t);
    fault(&t, RAM, 4);
    request(&t, RAM, 3); /* QEMU has it */
    ps_pager_finish(t.pager);
    end_well(&t);
}

/* A package of devices that are loaded while pages are asked for. */
static void test_first(bool ping, bool preempt)
{
    static const uint8_t tail[] = {8, 0, 2, 0, 4, 0, 0, 0, 3, 8, 0, 5, 0, 0};
    struct setup setup = usual();
    struct test t;
    size_t length = 3 << 20, got = 0;
    uint8_t *first = tiny_alloc(length);
    uint8_t *is = tiny_alloc(length);

    for (size_t i = 0; i < length; i++) {
        first[i] = (uint8_t)(i * 7 + i / 251);
    }
    if (ping) {
        memcpy(first + length - sizeof(tail), tail, sizeof(tail));
    }
    setup.first = first;
    setup.first_length = length;
    setup.preempt = preempt;
    begin(&t, &setup);
    request(&t, RAM, 2); /* while none of it was read */
    request(&t, RAM, 2);
    if (preempt) {
        CHECK(take_entry(&t, &t.preempt));
    }
    while (got < length && !t.failed) {
        size_t n = length - got < 100000 ? length - got : 100000;

        get(&t, &t.main, is + got, n);
        got += n;
    }
    CHECK(memcmp(first, is, length) == 0);
    if (!preempt) {
        CHECK(take_section(&t) == QEMU_VM_SECTION_PART && t.logged == 1);
    }
    ps_pager_finish(t.pager);
    if (ping) {
        while (!nothing_comes(&t, &t.main, 300) && !t.failed) {
            CHECK(take_section(&t) == QEMU_VM_SECTION_PART);
        }
        CHECK(stats_of(&t).state == PS_PAGER_FINISHING);
        CHECK(stats_of(&t).pages_left == 0);
        if (!preempt) {
            fault(&t, RAM, 8); /* a device wants a zero page: no END yet */
        }
        pong(&t, 2);
        CHECK(nothing_comes(&t, &t.main, 300));
        pong(&t, 3);
    }
    read_to_the_end(&t);
    CHECK(ping || now_ns() - stats_of(&t).last_fault_at >= UINT64_C(200000000));
    if (preempt) {
        shutdown(t.preempt_fds[1], SHUT_RDWR);
    } else {
        request(&t, RAM, 1024); /* nobody reads the answer any more */
        CHECK(nothing_comes(&t, &t.main, 10));
    }
    shut(&t, 0);
    expect_end(&t, PS_OK, NULL);
    free(first);
    free(is);
}

/* Everything was asked for: the end comes by itself. */
static void test_all_requested(void)
{
    struct setup setup = usual();
    struct test t;

    begin(&t, &setup);
    for (uint32_t b = 0; b < 2; b++) {
        for (uint64_t p = 0; p < t.setup.tiny.pages[b]; p++) {
            if (needs_update(page_of(&t, b, p))) {
                fault(&t, b, p);
            }
        }
    }
    end_well(&t);
}

static tiny_page all_zero(uint32_t block, uint64_t page)
{
    (void)block;
    (void)page;
    return (tiny_page){PS_CLASS_ZERO, 0};
}

static void test_nothing_to_do(void)
{
    struct setup setup = usual();
    struct test t;

    setup.tiny.page = all_zero;
    begin(&t, &setup);
    end_well(&t);
}

/* More requests at once than the pager keeps. */
static void test_flood(void)
{
    struct setup setup = usual();
    struct test t;
    uint8_t *bytes = tiny_alloc(3 * RAM_PAGES * 32);
    size_t length = 0;

    if (!create(&t, &setup)) {
        return;
    }
    for (uint32_t i = 0; i < 3 * RAM_PAGES; i++) {
        uint64_t page = i * UINT64_C(2654435761) % RAM_PAGES;

        length += request_message(&t, bytes + length, RAM, page);
        t.seen[RAM][page] = 2;
    }
    CHECK(ps_pager_received_first(t.pager, bytes, length, &t.error) == 0);
    pthread_create(&t.thread, NULL, run_pager, &t);
    while (t.pages_seen < RAM_PAGES && !t.failed) {
        CHECK(take_section(&t) == QEMU_VM_SECTION_PART && t.logged == 1);
    }
    ps_pager_finish(t.pager);
    free(bytes);
    end_well(&t);
}

static void test_arguments(void)
{
    struct setup setup = usual();
    struct test t;
    ps_pager *pager;
    ps_pager_options options;
    ps_pager_block blocks[2];
    ps_error err = {0};

    if (!create(&t, &setup)) {
        return;
    }
    options = t.setup.options;
    memcpy(blocks, t.setup.blocks, sizeof(blocks));
    CHECK(ps_pager_create(t.image, &options, blocks, 1, &pager, &err) ==
          PS_ERR_ARGUMENT);
    blocks[1].length += PS_PAGE_SIZE;
    CHECK(ps_pager_create(t.image, &options, blocks, 2, &pager, &err) ==
          PS_ERR_ARGUMENT);
    blocks[1].length -= PS_PAGE_SIZE;
    blocks[1].page_size = 2 << 20; /* 256 KiB of it */
    CHECK(ps_pager_create(t.image, &options, blocks, 2, &pager, &err) ==
          PS_ERR_ARGUMENT);
    blocks[1].page_size = 12288;
    CHECK(ps_pager_create(t.image, &options, blocks, 2, &pager, &err) ==
          PS_ERR_ARGUMENT);
    blocks[1].page_size = 4096;
    options.in_flight_bytes = 0;
    CHECK(ps_pager_create(t.image, &options, blocks, 2, &pager, &err) ==
          PS_ERR_ARGUMENT);
    CHECK(pager == NULL);
    ps_pager_destroy(NULL);
    CHECK(ps_pager_send_first(t.pager, t.seen[RAM], 0, &err) == PS_OK);
    ps_pager_cancel(t.pager);
    CHECK(ps_pager_run(t.pager, &err) == PS_ERR_CANCELLED);
    CHECK(ps_pager_run(t.pager, &err) == PS_ERR_ARGUMENT);
    destroy(&t);
}

static void test_histogram(void)
{
    static ps_histogram histogram;

    CHECK(ps_histogram_quantile(&histogram, 500) == 0);
    for (uint64_t v = 1; v <= 1000000; v++) {
        ps_histogram_add(&histogram, v);
    }
    for (uint32_t permille = 1; permille <= 1000; permille += 37) {
        double want = permille * 1000.0;
        double is = (double)ps_histogram_quantile(&histogram, permille);

        CHECK_MSG(is >= want && is <= want * 1.04, "%u: %f", permille, is);
    }
    CHECK(ps_histogram_quantile(&histogram, 1000) == 1000000);
    ps_histogram_add(&histogram, UINT64_MAX);
    CHECK(ps_counter_get(&histogram.max) == UINT64_MAX);
    CHECK(ps_histogram_quantile(&histogram, 1000) == UINT64_MAX);
}

static void test_wakeups(void)
{
    uint64_t same = 0, other = 0, from = now_ns();
    cpu_set_t before, after;
    ps_error err;

    pthread_getaffinity_np(pthread_self(), sizeof(before), &before);
    CHECK(ps_measure_wakeups(&same, &other, &err) == PS_OK);
    pthread_getaffinity_np(pthread_self(), sizeof(after), &after);
    CHECK(CPU_EQUAL(&before, &after));
    CHECK(same > 0);
    fprintf(stderr, "wake-up: same CPU %llu ns, other %llu ns (%.1f ms)\n",
            (unsigned long long)same, (unsigned long long)other,
            (double)(now_ns() - from) / 1e6);
}

/* Not a test: what a fault costs here, one at a time. */
static void show_latency(bool zstd)
{
    struct setup setup = usual();
    struct test t;
    ps_pager_stats stats;
    uint64_t from = now_ns(), n = 0;

    setup.tiny.zstd = zstd;
    setup.options.cache_bytes = 64 << 20;
    begin(&t, &setup);
    for (uint64_t p = 0; p < RAM_PAGES; p++) {
        uint64_t page = p * 2654435761u % RAM_PAGES;

        if (page_of(&t, RAM, page).page_class == PS_CLASS_DATA) {
            fault(&t, RAM, page);
            n++;
        }
    }
    stats = stats_of(&t);
    fprintf(stderr,
            "%s: request to write p50 %.1f us, p99 %.1f us, max %.1f us; "
            "pager CPU %.1f us, round trip %.1f us a fault\n",
            zstd ? "zstd" : "raw", (double)stats.latency_p50 / 1e3,
            (double)stats.latency_p99 / 1e3, (double)stats.latency_max / 1e3,
            (double)stats.cpu_ns / 1e3 / (double)n,
            (double)(now_ns() - from) / 1e3 / (double)n);
    ps_pager_finish(t.pager);
    end_well(&t);
}

#define RUN(test) (running = #test, test)

int main(void)
{
    for (int zstd = 0; zstd < 2; zstd++) {
        RUN(test_on_demand(zstd, true, 16));
        RUN(test_on_demand(zstd, false, 1));
        RUN(test_on_demand(zstd, true, 512));
        RUN(test_background(zstd, 16, false));
        RUN(test_background(zstd, 1, false));
        RUN(test_background(zstd, 512, true));
        RUN(test_prefetch(zstd));
        RUN(test_virtual(zstd, false));
        RUN(test_virtual(zstd, true));
        RUN(test_damaged(zstd));
        RUN(test_finish_before_run(zstd, 1));
        RUN(test_finish_before_run(zstd, 16));
        RUN(test_finish_before_run(zstd, 512));
        RUN(test_huge(zstd, false, UINT64_MAX));
        RUN(test_huge(zstd, true, 1 << 20));
    }
    RUN(test_faults_in_background());
    RUN(test_order());
    RUN(test_trace());
    RUN(test_split_messages());
    RUN(test_long_request());
    RUN(test_preempt(false));
    RUN(test_preempt(true));
    RUN(test_preempt_overtakes());
    RUN(test_hostile());
    RUN(test_absent());
    RUN(test_closed());
    RUN(test_cancel());
    RUN(test_rate());
    RUN(test_quiet());
    RUN(test_in_flight(false));
    RUN(test_in_flight(true));
    RUN(test_received());
    RUN(test_first(true, false));
    RUN(test_first(false, false));
    RUN(test_first(true, true));
    RUN(test_all_requested());
    RUN(test_nothing_to_do());
    RUN(test_flood());
    RUN(test_arguments());
    RUN(test_histogram());
    RUN(test_wakeups());
    RUN(show_latency(false));
    RUN(show_latency(true));
    return check_done();
}
