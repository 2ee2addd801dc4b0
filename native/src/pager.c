/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The pager: the source of a postcopy migration, from the moment when the
 * destination listens. One thread, one epoll loop.
 *
 * Order of what is sent: requested pages, then what is left of the prefetch
 * windows (newest first), then the background. Whoever sends less urgent
 * pages looks for new requests before every batch and keeps what QEMU has not
 * read yet below a bound, so that a requested page waits behind few others.
 *
 * Deferred update: a page needs an update while its class is fill or data and
 * its bit in the sent map is not set. Zero pages never do: fresh memory is
 * zero already, so they are sent only in answer to a request. Nothing is sent
 * twice: QEMU's UFFDIO_COPY fails on a page that is there
 * (migration/postcopy-ram.c, qemu_ufd_copy_ioctl) and pauses the migration.
 *
 * What QEMU expects is in migration/ram.c (ram_load_postcopy), savevm.c
 * (qemu_loadvm_state_main, postcopy_ram_listen_thread) and migration.c
 * (source_return_path_thread), read in 7.2 and 10.0.
 */
#include <errno.h>
#include <linux/sockios.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "block_cache.h"
#include "histogram.h"
#include "image.h"
#include "read_ahead.h"
#include "return_path.h"

#define KIB(n) ((uint64_t)(n) << 10)
#define MIB(n) ((uint64_t)(n) << 20)
#define MS(n) ((uint64_t)(n) * 1000000)

/* Pages of one send() at most: 186 us of QEMU's time at 2.9 us a page. */
#define BATCH_PAGES 64u
/* offset and flags, counted name, content. */
#define ENTRY_BYTES (8u + 256u + PS_PAGE_SIZE)
/* And the frame of the section around them. */
#define BATCH_BYTES (BATCH_PAGES * ENTRY_BYTES + 64u)
/* A batch stops before a further block is decoded once it has that many. */
#define DECODE_PAGES 16u
/* QEMU has as many requests under way as it has threads that can fault. */
#define REQUESTS 1024u
#define WINDOWS 4u
#define RECEIVE_BYTES 4096u
/* criu's ramp: lazy-pages grows its chunk while nobody faults. */
#define CHUNK_MIN KIB(64)
#define CHUNK_MAX MIB(4)
/* Enough to keep QEMU busy while we are scheduled, 0.4 ms of its time. */
#define FINISH_IN_FLIGHT KIB(512)
#define FIRST_IN_FLIGHT MIB(1)
/* Work between two looks at the socket when nothing is found to send. */
#define COLLECT_LEAVES 4u
#define WALK_STEPS 2048u
/* The rate lets so much time be saved up, and waits for so many pages. */
#define RATE_BURST MS(50)
#define RATE_PAGES 4u
#define MAX_FIRST_BYTES (MIB(17) + KIB(64))
/* See send_end() and finish_preempt(). */
#define QUIET_BEFORE_END MS(200)
#define QUIET_BEFORE_EOS MS(500)

#define NONE UINT32_MAX

enum cause {
    CAUSE_REQUESTED,
    CAUSE_PREFETCHED,
    CAUSE_BACKGROUND,
};

enum {
    MIG_CMD_PING = 2,
    MIG_CMD_POSTCOPY_RUN = 5,
};

/* A RAM block as the destination has it. */
struct ram {
    uint64_t first; /* global number of its page 0 */
    uint64_t pages;
    uint64_t host_pages; /* target pages in a host page */
    const char *name;
    uint8_t name_length;
};

/* Pages that QEMU waits for; the next host page is at page. */
struct request {
    uint32_t block;
    bool answered; /* some of it was sent for this request */
    uint64_t page;
    uint64_t end;
    uint64_t asked_at;
};

/* A host page under way on a channel: its next target page is page. */
struct transfer {
    uint32_t block;
    enum cause cause;
    uint64_t page;
    uint64_t end;      /* page == end: none */
    uint64_t asked_at; /* 0: not requested */
};

/* One direction of one socket. A batch is built when the one before is
   written completely. */
struct channel {
    int fd;
    bool framed;         /* pages lie in sections (the main channel) */
    bool section;        /* one is open */
    bool blocked;        /* the socket is full */
    bool drain;          /* wait until QEMU has read some of it */
    uint32_t events;     /* what epoll watches */
    uint32_t last_block; /* of the entry before, NONE: name the next */
    uint8_t *buffer;     /* BATCH_BYTES */
    size_t built;
    const uint8_t *out; /* what is being written */
    size_t out_length;
    size_t out_at;
    uint64_t asked_at; /* of the requested page in this batch */
    struct transfer transfer;
};

/* The other pages of a locality block that was asked for, nearest first. */
struct window {
    uint64_t number; /* of the locality block */
    uint64_t centre; /* global number of the requested page */
    bool resolved;
    bool whole; /* worth reading the whole block */
    uint32_t count;
    uint32_t next;
    uint64_t pages[PS_MAX_PAGES_PER_BLOCK]; /* distance << 32 | global */
};

/* A page whose content another page owns, in the list of its block. */
struct shared {
    uint32_t global;
    uint32_t next; /* index + 1; 0: the last */
};

enum phase {
    PHASE_COLLECT, /* shared pages into lists by locality block */
    PHASE_WALK,    /* canonical pages in file order, and who shares them */
    PHASE_SWEEP,   /* everything that is left: fill pages */
    PHASE_DONE,
};

struct background {
    enum phase phase;
    uint64_t leaf; /* COLLECT and SWEEP */
    uint32_t index;
    uint64_t next_block;  /* WALK: the locality block to look at next */
    ps_block_info block;  /* whose pages are looked at; pages 0: none */
    const uint8_t *pages; /* its content where it was read ahead, or NULL */
    uint32_t next_page;   /* of it */
    uint32_t chain;       /* then those who share its pages */
    uint32_t *heads;      /* by locality block: index + 1 of the first */
    size_t heads_length;
    struct shared *shared;
    size_t shared_length;
    uint64_t shared_capacity;
    uint64_t shared_count;
    uint64_t chunk;
    uint64_t turn; /* bytes left of this chunk */
    uint64_t quiet_until;
    double tokens; /* bytes that the rate allows now; may be owed */
    uint64_t tokens_at;
    uint64_t rate;
};

struct counters {
    _Atomic uint64_t faults, faults_late;
    _Atomic uint64_t pages[3]; /* by cause */
    _Atomic uint64_t zero_sent, total, left, avoided, bytes_sent;
    _Atomic uint64_t storage_reads, storage_bytes, blocks_decoded;
    _Atomic uint64_t first_fault_at, last_fault_at;
};

struct ps_pager {
    ps_image *image;
    ps_pager_options options;
    struct ram *ram;
    uint32_t ram_count;
    bool footers;
    uint32_t section_id;
    bool started;

    uint64_t *sent; /* a bit for each global page number */
    size_t sent_length;
    ps_block_cache cache;
    ps_read_ahead *ahead; /* while everything is loaded at full speed */

    struct channel main;
    struct channel preempt;
    struct channel *urgent; /* where requested pages go */
    int epoll_fd;
    bool poll_drain; /* EPOLLOUT says nothing about what QEMU has read */
    bool preempt_over;
    uint64_t bound; /* of bytes in flight, now */

    uint8_t *first; /* bytes to send first */
    size_t first_length;
    bool gate;      /* device state may still be loading: no END yet */
    bool gate_ping; /* the PONG of gate_value opens it */
    uint32_t gate_value;
    uint64_t first_sent_at;

    ps_return_path return_path;
    uint8_t *early; /* bytes of the return path that came before run */
    size_t early_length;
    uint8_t *received;
    const uint8_t *in;
    size_t in_length;
    size_t in_at;
    uint32_t asked_block; /* of the request before, NONE: none */

    struct request requests[REQUESTS];
    uint32_t request_head;
    uint32_t request_count;

    struct window windows[WINDOWS];
    uint32_t window_top;
    uint32_t window_count;

    struct background background;
    uint64_t closing_at;
    uint64_t now;     /* when this turn of the loop began */
    uint64_t wake_at; /* 0: nothing to wake up for */
    bool again;       /* there is more to do */

    /* From other threads. */
    int command_fd;
    _Atomic uint64_t rate;
    _Atomic bool finish;
    _Atomic bool cancel;
    _Atomic uint32_t state;
    _Atomic int32_t thread;
    _Atomic int64_t cpu_clock; /* of the running thread; 0: none */
    _Atomic uint64_t cpu_start;
    _Atomic uint64_t cpu_total;
    struct counters stats;
    ps_histogram latency;
};

static uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static void wake_by(ps_pager *pager, uint64_t when)
{
    if (!pager->wake_at || when < pager->wake_at) {
        pager->wake_at = when;
    }
}

static uint32_t get_state(const ps_pager *pager)
{
    return atomic_load_explicit(&pager->state, memory_order_relaxed);
}

static void set_state(ps_pager *pager, uint32_t state)
{
    atomic_store_explicit(&pager->state, state, memory_order_relaxed);
}

static bool cancelled(const ps_pager *pager)
{
    return atomic_load_explicit(&pager->cancel, memory_order_relaxed);
}

/* ------------------------------------------------------------- sent map */

static bool is_sent(const ps_pager *pager, uint64_t global)
{
    return pager->sent[global >> 6] >> (global & 63) & 1;
}

static void mark_sent(ps_pager *pager, uint64_t global, uint64_t count)
{
    while (count > 0) {
        uint64_t bit = global & 63;
        uint64_t n = min_u64(count, 64 - bit);

        pager->sent[global >> 6] |=
            (n == 64 ? UINT64_MAX : (UINT64_C(1) << n) - 1) << bit;
        global += n;
        count -= n;
    }
}

static bool entry_needs_update(uint64_t entry)
{
    return ps_entry_class(entry) >= PS_CLASS_FILL;
}

/* What a host page is made of. */
struct host_page {
    bool needs_update; /* some target page is fill or data */
    bool present;      /* some target page is not absent */
};

static int look_at_host_page(ps_pager *pager, const struct ram *ram,
                             uint64_t page, struct host_page *out,
                             ps_error *err)
{
    uint64_t global = ram->first + page;
    uint64_t end = global + ram->host_pages;

    *out = (struct host_page){0};
    while (global < end && !out->needs_update) {
        uint64_t leaf = global >> PS_LEAF_BITS;
        uint64_t entry;
        int r;

        /* A host page is a power of two: it has whole leaves or is in one. */
        if ((global & (PS_LEAF_PAGES - 1)) == 0 &&
            end - global >= PS_LEAF_PAGES) {
            r = ps_image_top_entry(pager->image, leaf, &entry, err);
            if (r) {
                return r;
            }
            if (ps_entry_class(entry) != PS_CLASS_LEAF) {
                out->needs_update = entry_needs_update(entry);
                out->present |= ps_entry_class(entry) != PS_CLASS_ABSENT;
                global += PS_LEAF_PAGES;
                continue;
            }
        }
        r = ps_image_entry(pager->image, global, &entry, err);
        if (r) {
            return r;
        }
        out->needs_update = entry_needs_update(entry);
        out->present |= ps_entry_class(entry) != PS_CLASS_ABSENT;
        global++;
    }
    return PS_OK;
}

/* pages_total, pages_left and pages_avoided at the start. */
static int count_pages(ps_pager *pager, ps_error *err)
{
    uint64_t total = 0, avoided = 0;

    for (uint32_t i = 0; i < pager->ram_count; i++) {
        const struct ram *ram = &pager->ram[i];

        if (ram->host_pages == 1) {
            ps_ram_block block;
            int r = ps_image_ram_block(pager->image, i, &block, err);

            if (r) {
                return r;
            }
            total += block.pages_fill + block.pages_data;
            avoided += block.pages_zero;
            continue;
        }
        for (uint64_t page = 0; page < ram->pages; page += ram->host_pages) {
            struct host_page host;
            int r = look_at_host_page(pager, ram, page, &host, err);

            if (r) {
                return r;
            }
            if (host.needs_update) {
                total += ram->host_pages;
            } else if (host.present) {
                avoided += ram->host_pages;
            }
        }
    }
    atomic_store(&pager->stats.total, total);
    atomic_store(&pager->stats.left, total);
    atomic_store(&pager->stats.avoided, avoided);
    return PS_OK;
}

static void account(ps_pager *pager, const struct ram *ram, bool needs_update)
{
    ps_counter_sub(needs_update ? &pager->stats.left : &pager->stats.avoided,
                   ram->host_pages);
}

/* ------------------------------------------------- a page into a channel */

static void put(struct channel *channel, const void *bytes, size_t length)
{
    memcpy(channel->buffer + channel->built, bytes, length);
    channel->built += length;
}

static void put_byte(struct channel *channel, uint8_t byte)
{
    channel->buffer[channel->built++] = byte;
}

static void put_be32(struct channel *channel, uint32_t v)
{
    ps_put_be32(channel->buffer + channel->built, v);
    channel->built += 4;
}

static void put_be64(struct channel *channel, uint64_t v)
{
    ps_put_be64(channel->buffer + channel->built, v);
    channel->built += 8;
}

static void begin_section(ps_pager *pager, struct channel *channel,
                          uint8_t type)
{
    /* QEMU keeps the last block of each channel for CONTINUE; naming it
       anew costs a few bytes and assumes less. */
    channel->last_block = NONE;
    if (channel->framed) {
        put_byte(channel, type);
        put_be32(channel, pager->section_id);
        channel->section = true;
    }
}

static void end_section(ps_pager *pager, struct channel *channel)
{
    if (channel->section) {
        put_be64(channel, RAM_SAVE_FLAG_EOS);
        if (pager->footers) {
            put_byte(channel, QEMU_VM_SECTION_FOOTER);
            put_be32(channel, pager->section_id);
        }
        channel->section = false;
    }
}

static void put_entry(ps_pager *pager, struct channel *channel, uint32_t block,
                      uint64_t page, uint32_t flags)
{
    const struct ram *ram = &pager->ram[block];

    if (channel->last_block == block) {
        flags |= RAM_SAVE_FLAG_CONTINUE;
    }
    put_be64(channel, page << PS_PAGE_BITS | flags);
    if (channel->last_block != block) {
        put_byte(channel, ram->name_length);
        put(channel, ram->name, ram->name_length);
        channel->last_block = block;
    }
}

static int load_block(ps_pager *pager, const ps_block_info *info,
                      const uint8_t **pages, ps_error *err)
{
    int r = ps_block_cache_load(&pager->cache, info, pages, err);

    ps_counter_add(&pager->stats.storage_reads, pager->cache.reads);
    ps_counter_add(&pager->stats.storage_bytes, pager->cache.bytes);
    ps_counter_add(&pager->stats.blocks_decoded, pager->cache.decoded);
    return r;
}

/* The pages of a block that need no storage, or NULL. */
static const uint8_t *block_at_hand(ps_pager *pager, uint64_t number)
{
    const struct background *background = &pager->background;

    return background->pages && background->block.number == number
               ? background->pages
               : ps_block_cache_find(&pager->cache, number);
}

/* Content of a canonical page, checked. single: a page of a block that is
   stored as it is comes without the rest of the block. */
static int read_canonical(ps_pager *pager, uint64_t canonical, bool single,
                          uint8_t *out, ps_error *err)
{
    ps_image *image = pager->image;
    uint64_t number = canonical >> image->block_shift;
    const uint8_t *pages = block_at_hand(pager, number);
    ps_block_info info;
    int r;

    if (!pages) {
        r = ps_image_block(image, number, &info, err);
        if (r) {
            return r;
        }
        if (single && info.form == PS_BLOCK_RAW) {
            ps_counter_add(&pager->stats.storage_reads, 1);
            ps_counter_add(&pager->stats.storage_bytes, PS_PAGE_SIZE);
            return ps_image_read_raw_page(image, &info, canonical, out, err);
        }
        r = load_block(pager, &info, &pages, err);
        if (r) {
            return r;
        }
    }
    memcpy(out, pages + (canonical & image->block_mask) * PS_PAGE_SIZE,
           PS_PAGE_SIZE);
    return PS_OK;
}

/* Say which page could not be delivered; the cause names the block. */
static int undeliverable(ps_pager *pager, uint32_t block, uint64_t page,
                         ps_error *err)
{
    ps_error cause = *err;
    int n = snprintf(
        err->message, sizeof(err->message),
        "page at 0x%llx of %s: ", (unsigned long long)(page << PS_PAGE_BITS),
        pager->ram[block].name);

    if (n > 0 && (size_t)n < sizeof(err->message)) {
        snprintf(err->message + n, sizeof(err->message) - (size_t)n, "%.200s",
                 cause.message);
    }
    return err->code;
}

/* Append one target page to the batch of a channel. */
static int append_page(ps_pager *pager, struct channel *channel, uint32_t block,
                       uint64_t page, enum cause cause, bool single,
                       ps_error *err)
{
    const struct ram *ram = &pager->ram[block];
    uint64_t entry;
    int r = ps_image_entry(pager->image, ram->first + page, &entry, err);

    if (r) {
        return undeliverable(pager, block, page, err);
    }
    if (!entry_needs_update(entry)) {
        /* Zero; or absent from a host page of which there is another part. */
        put_entry(pager, channel, block, page, RAM_SAVE_FLAG_ZERO);
        put_byte(channel, 0);
        if (cause == CAUSE_REQUESTED) {
            ps_counter_add(&pager->stats.zero_sent, 1);
        }
        return PS_OK;
    }
    put_entry(pager, channel, block, page, RAM_SAVE_FLAG_PAGE);
    if (ps_entry_class(entry) == PS_CLASS_FILL) {
        r = ps_image_expand(pager->image, entry,
                            channel->buffer + channel->built, err);
    } else {
        r = read_canonical(pager, ps_entry_value(entry), single,
                           channel->buffer + channel->built, err);
    }
    if (r) {
        return undeliverable(pager, block, page, err);
    }
    channel->built += PS_PAGE_SIZE;
    return PS_OK;
}

/* From here on these pages are on their way and are never sent again. */
static void start_transfer(ps_pager *pager, struct channel *channel,
                           uint32_t block, uint64_t page, bool needs_update,
                           enum cause cause, uint64_t asked_at)
{
    const struct ram *ram = &pager->ram[block];

    mark_sent(pager, ram->first + page, ram->host_pages);
    account(pager, ram, needs_update);
    ps_counter_add(&pager->stats.pages[cause], ram->host_pages);
    if (cause == CAUSE_BACKGROUND) {
        struct background *background = &pager->background;
        uint64_t bytes = ram->host_pages << PS_PAGE_BITS;

        background->turn -= min_u64(background->turn, bytes);
        background->tokens -= (double)bytes;
    }
    channel->transfer = (struct transfer){
        .block = block,
        .cause = cause,
        .page = page,
        .end = page + ram->host_pages,
        .asked_at = asked_at,
    };
}

static bool transfer_active(const struct channel *channel)
{
    return channel->transfer.page < channel->transfer.end;
}

/* Append the next pages of the host page under way, *pages at most; *pages is
   what is left of that. */
static int go_on(ps_pager *pager, struct channel *channel, uint64_t *pages,
                 bool single, ps_error *err)
{
    struct transfer *transfer = &channel->transfer;

    while (transfer->page < transfer->end && *pages > 0) {
        int r = append_page(pager, channel, transfer->block, transfer->page,
                            transfer->cause, single, err);

        if (r) {
            return r;
        }
        transfer->page++;
        (*pages)--;
    }
    if (transfer->page == transfer->end && transfer->asked_at) {
        channel->asked_at = transfer->asked_at;
        transfer->asked_at = 0;
    }
    return PS_OK;
}

/* The batch is built: hand it to the socket. */
static void submit(ps_pager *pager, struct channel *channel)
{
    if (!transfer_active(channel)) {
        end_section(pager, channel);
    }
    channel->out = channel->buffer;
    channel->out_length = channel->built;
    channel->out_at = 0;
    channel->built = 0;
}

/* ---------------------------------------------------------- return path */

static int closed(ps_pager *pager, ps_error *err)
{
    return ps_fail(err, PS_ERR_CLOSED, PS_NOWHERE,
                   get_state(pager) == PS_PAGER_CLOSING
                       ? "QEMU closed the connection before it confirmed the "
                         "end"
                       : "QEMU closed the connection before everything was "
                         "loaded");
}

static int unknown_block(const ps_rp_message *message, ps_error *err)
{
    char name[64] = "";

    for (uint32_t i = 0; i < message->name_length && i < 63; i++) {
        char c = message->name[i];

        name[i] = c >= ' ' && c <= '~' ? c : '?';
    }
    return ps_fail(err, PS_ERR_PEER, PS_NOWHERE,
                   "QEMU asked for a page of the RAM block '%s', which the "
                   "snapshot does not have",
                   name);
}

static int take_request(ps_pager *pager, const ps_rp_message *message,
                        ps_error *err)
{
    struct background *background = &pager->background;
    const struct ram *ram;
    struct request *request;
    uint64_t host_bytes, length;
    int32_t block = (int32_t)pager->asked_block;

    if (message->type == PS_RP_REQ_PAGES_ID) {
        block = ps_image_find_ram(pager->image, message->name,
                                  message->name_length);
        if (block < 0) {
            return unknown_block(message, err);
        }
        pager->asked_block = (uint32_t)block;
    } else if (block < 0) {
        return ps_fail(err, PS_ERR_PEER, PS_NOWHERE,
                       "QEMU asked for a page before it named a RAM block");
    }
    ram = &pager->ram[block];
    length = ram->pages << PS_PAGE_BITS;
    host_bytes = ram->host_pages << PS_PAGE_BITS;
    if (message->length == 0 || message->start >= length ||
        message->length > length - message->start) {
        return ps_fail(err, PS_ERR_PEER, PS_NOWHERE,
                       "QEMU asked for %u bytes at 0x%llx of %s, which has "
                       "0x%llx bytes",
                       message->length, (unsigned long long)message->start,
                       ram->name, (unsigned long long)length);
    }
    if (((message->start | message->length) & (host_bytes - 1)) != 0) {
        return ps_fail(err, PS_ERR_PEER, PS_NOWHERE,
                       "QEMU asked for %u bytes at 0x%llx of %s, which is no "
                       "multiple of its page size %llu",
                       message->length, (unsigned long long)message->start,
                       ram->name, (unsigned long long)host_bytes);
    }
    if (ps_counter_get(&pager->stats.faults) == 0) {
        atomic_store(&pager->stats.first_fault_at, pager->now);
    }
    ps_counter_add(&pager->stats.faults, 1);
    atomic_store_explicit(&pager->stats.last_fault_at, pager->now,
                          memory_order_relaxed);
    background->chunk = CHUNK_MIN;
    background->turn = CHUNK_MIN;
    background->quiet_until = pager->now + pager->options.background_delay_ns;
    if (get_state(pager) == PS_PAGER_CLOSING &&
        (pager->urgent == &pager->main || pager->preempt_over)) {
        /* A zero page, asked for while END was on its way: QEMU reads no
           more, and wakes the waiter when it takes userfaultfd away. */
        return PS_OK;
    }
    request = &pager->requests[(pager->request_head + pager->request_count) %
                               REQUESTS];
    pager->request_count++;
    *request = (struct request){
        .block = (uint32_t)block,
        .page = message->start >> PS_PAGE_BITS,
        .end = (message->start + message->length) >> PS_PAGE_BITS,
        .asked_at = pager->now,
    };
    return PS_OK;
}

static int take_message(ps_pager *pager, const ps_rp_message *message,
                        ps_error *err)
{
    switch (message->type) {
    case PS_RP_SHUT:
        if (message->value != 0) {
            return ps_fail(err, PS_ERR_PEER, PS_NOWHERE,
                           "QEMU ended the migration with error %u",
                           message->value);
        }
        if (get_state(pager) != PS_PAGER_CLOSING || pager->main.out_length) {
            return ps_fail(err, PS_ERR_CLOSED, PS_NOWHERE,
                           "QEMU ended the migration before everything was "
                           "loaded");
        }
        set_state(pager, PS_PAGER_DONE);
        return PS_OK;
    case PS_RP_PONG:
        if (pager->gate_ping && message->value == pager->gate_value) {
            pager->gate = false;
        }
        return PS_OK;
    case PS_RP_REQ_PAGES_ID:
    case PS_RP_REQ_PAGES:
        return take_request(pager, message, err);
    case PS_RP_RECV_BITMAP:
        return ps_fail(err, PS_ERR_PEER, PS_NOWHERE,
                       "QEMU sent a bitmap that nobody asked for");
    default: /* RESUME_ACK, SWITCHOVER_ACK: the handshake's, come late */
        return PS_OK;
    }
}

/* Take messages from what was received, while there is room for requests. */
static int parse_received(ps_pager *pager, ps_error *err)
{
    while (pager->in_at < pager->in_length && pager->request_count < REQUESTS &&
           get_state(pager) != PS_PAGER_DONE) {
        ps_rp_message message;
        size_t used;
        bool whole;
        int r = ps_return_path_push(
            &pager->return_path, pager->in + pager->in_at,
            pager->in_length - pager->in_at, &used, &message, &whole, err);

        pager->in_at += used;
        if (!r && whole) {
            r = take_message(pager, &message, err);
        }
        if (r) {
            return r;
        }
    }
    return PS_OK;
}

/* Look at the return path, once, without waiting. */
static int receive(ps_pager *pager, ps_error *err)
{
    ssize_t n;
    int r = parse_received(pager, err);

    if (r || pager->in_at < pager->in_length ||
        pager->request_count == REQUESTS || get_state(pager) == PS_PAGER_DONE) {
        return r;
    }
    do {
        n = recv(pager->main.fd, pager->received, RECEIVE_BYTES, MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    if (n == 0 || (n < 0 && errno == ECONNRESET)) {
        return closed(pager, err);
    }
    if (n < 0) {
        return errno == EAGAIN || errno == EWOULDBLOCK
                   ? PS_OK
                   : ps_fail_errno(err, PS_NOWHERE, "reading from QEMU");
    }
    pager->now = now_ns();
    pager->in = pager->received;
    pager->in_length = (size_t)n;
    pager->in_at = 0;
    return parse_received(pager, err);
}

/* --------------------------------------------------------------- writing */

/* Write what is submitted; *done when nothing of it is left. */
static int flush(ps_pager *pager, struct channel *channel, bool *done,
                 ps_error *err)
{
    *done = false;
    while (channel->out_at < channel->out_length) {
        ssize_t n = send(channel->fd, channel->out + channel->out_at,
                         channel->out_length - channel->out_at,
                         MSG_DONTWAIT | MSG_NOSIGNAL);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            channel->blocked = true;
            return PS_OK;
        }
        if (n < 0 && (errno == EPIPE || errno == ECONNRESET)) {
            int r;

            if (channel == &pager->preempt &&
                get_state(pager) >= PS_PAGER_CLOSING) {
                pager->preempt_over = true; /* QEMU 8.0 on ends it itself */
                break;
            }
            /* It may have said why. */
            r = receive(pager, err);
            return r ? r : closed(pager, err);
        }
        if (n < 0) {
            return ps_fail_errno(err, PS_NOWHERE, "writing to QEMU");
        }
        channel->out_at += (size_t)n;
        ps_counter_add(&pager->stats.bytes_sent, (uint64_t)n);
    }
    if (channel->asked_at) {
        ps_histogram_add(&pager->latency, now_ns() - channel->asked_at);
        channel->asked_at = 0;
    }
    channel->out_length = 0;
    channel->out_at = 0;
    channel->blocked = false;
    *done = true;
    return PS_OK;
}

/* Not yet read by QEMU (a unix socket), not yet acknowledged (TCP). */
static uint64_t in_flight(const struct channel *channel)
{
    int bytes = 0;

    return ioctl(channel->fd, SIOCOUTQ, &bytes) == 0 && bytes > 0
               ? (uint64_t)bytes
               : 0;
}

/*
 * The kernel calls a unix socket writable when at most a quarter of its send
 * buffer is in use (net/unix/af_unix.c, unix_writable) and doubles the size
 * that it is told: with a buffer of bound, EPOLLOUT means "half of the bound
 * is free", and a requested page always finds room above the bound.
 */
static void set_bound(ps_pager *pager, uint64_t bound)
{
    int size = (int)min_u64(bound, MIB(64));

    pager->bound = bound;
    if (setsockopt(pager->main.fd, SOL_SOCKET, SO_SNDBUFFORCE, &size,
                   sizeof(size))) {
        (void)setsockopt(pager->main.fd, SOL_SOCKET, SO_SNDBUF, &size,
                         sizeof(size));
    }
}

/* What may be in flight in this state. */
static void set_usual_bound(ps_pager *pager)
{
    uint64_t bound = pager->options.in_flight_bytes;

    if (get_state(pager) == PS_PAGER_FINISHING && bound < FINISH_IN_FLIGHT) {
        bound = FINISH_IN_FLIGHT;
    }
    set_bound(pager, bound);
}

/* Pages that may be sent without being asked for, now; 0: wait. */
static uint64_t room(ps_pager *pager)
{
    uint64_t used = in_flight(&pager->main);
    uint64_t left = used < pager->bound ? pager->bound - used : 0;

    if (used > 0 && left < pager->bound / 4) {
        if (pager->poll_drain) {
            wake_by(pager, now_ns() + 100000);
        } else {
            pager->main.drain = true;
        }
        return 0;
    }
    left >>= PS_PAGE_BITS;
    return left == 0 ? 1 : min_u64(left, BATCH_PAGES);
}

/* ------------------------------------------------------ requested pages */

static void push_window(ps_pager *pager, uint64_t number, uint64_t centre)
{
    struct window *window;

    pager->window_top = (pager->window_top + 1) % WINDOWS;
    if (pager->window_count < WINDOWS) {
        pager->window_count++;
    }
    window = &pager->windows[pager->window_top];
    window->number = number;
    window->centre = centre;
    window->resolved = false;
}

static void pop_window(ps_pager *pager)
{
    pager->window_top = (pager->window_top + WINDOWS - 1) % WINDOWS;
    pager->window_count--;
}

static void plan_prefetch(ps_pager *pager, const struct ram *ram, uint64_t page,
                          uint64_t entry)
{
    if (pager->options.prefetch == PS_PREFETCH_PHYSICAL &&
        pager->options.prefetch_window > 0 && ram->host_pages == 1 &&
        ps_entry_class(entry) == PS_CLASS_DATA) {
        push_window(pager, ps_entry_value(entry) >> pager->image->block_shift,
                    ram->first + page);
    }
}

/* Take the oldest request as far as its next host page that was not sent. */
static int answer_request(ps_pager *pager, struct channel *channel,
                          ps_error *err)
{
    struct request *request = &pager->requests[pager->request_head];
    const struct ram *ram = &pager->ram[request->block];
    uint64_t page = request->page;
    uint64_t pages = BATCH_PAGES;
    struct host_page host;
    uint64_t entry;
    int r;

    while (page < request->end && is_sent(pager, ram->first + page)) {
        page += ram->host_pages;
    }
    request->page = page + ram->host_pages;
    if (request->page >= request->end) {
        pager->request_head = (pager->request_head + 1) % REQUESTS;
        pager->request_count--;
    }
    if (page >= request->end) {
        if (!request->answered) {
            ps_counter_add(&pager->stats.faults_late, 1);
        }
        return PS_OK;
    }
    r = look_at_host_page(pager, ram, page, &host, err);
    if (!r) {
        r = ps_image_entry(pager->image, ram->first + page, &entry, err);
    }
    if (r) {
        return undeliverable(pager, request->block, page, err);
    }
    if (!host.present) {
        ps_fail(err, PS_ERR_DAMAGED, PS_NOWHERE,
                "QEMU asked for it, but the snapshot does not have it");
        return undeliverable(pager, request->block, page, err);
    }
    request->answered = true;
    begin_section(pager, channel, QEMU_VM_SECTION_PART);
    start_transfer(pager, channel, request->block, page, host.needs_update,
                   CAUSE_REQUESTED, request->asked_at);
    r = go_on(pager, channel, &pages, ram->host_pages == 1, err);
    if (r) {
        return r;
    }
    submit(pager, channel);
    plan_prefetch(pager, ram, page, entry);
    return PS_OK;
}

/* -------------------------------------------------------------- prefetch */

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* A page that nobody asked for: is it to be sent? Its RAM block and page. */
static int wanted(ps_pager *pager, uint64_t global, uint32_t *block,
                  uint64_t *page, bool *yes, ps_error *err)
{
    uint64_t entry;
    int r;

    *yes = false;
    if (is_sent(pager, global) ||
        !ps_image_place(pager->image, global, block, page)) {
        return PS_OK;
    }
    r = ps_image_entry(pager->image, global, &entry, err);
    *yes = !r && entry_needs_update(entry);
    return r;
}

/* The owners of the block's pages, nearest first in guest-physical order. */
static int resolve_window(ps_pager *pager, struct window *window, ps_error *err)
{
    ps_image *image = pager->image;
    ps_block_info info;
    int r = ps_image_block(image, window->number, &info, err);

    window->resolved = true;
    window->count = 0;
    window->next = 0;
    for (uint32_t i = 0; !r && i < info.pages; i++) {
        uint64_t global, page;
        uint32_t block;
        bool yes;

        r = ps_image_owner(image, info.first + i, &global, err);
        if (!r) {
            r = wanted(pager, global, &block, &page, &yes, err);
        }
        if (!r && yes && pager->ram[block].host_pages == 1) {
            uint64_t distance = global > window->centre
                                    ? global - window->centre
                                    : window->centre - global;

            window->pages[window->count++] = distance << 32 | global;
        }
    }
    if (r) {
        return r;
    }
    qsort(window->pages, window->count, sizeof(window->pages[0]), compare_u64);
    window->count =
        (uint32_t)min_u64(window->count, pager->options.prefetch_window);
    window->whole = window->count * 4 >= info.pages;
    return PS_OK;
}

/* One batch of the newest window. */
static int send_prefetch(ps_pager *pager, uint64_t pages, ps_error *err)
{
    struct window *window = &pager->windows[pager->window_top];
    struct channel *channel = &pager->main;
    bool begun = false;
    int r = PS_OK;

    if (!window->resolved) {
        r = resolve_window(pager, window, err);
    }
    while (!r && pages > 0 && window->next < window->count) {
        uint64_t global = window->pages[window->next++] & UINT32_MAX;
        uint64_t page;
        uint32_t block;
        bool yes;

        r = wanted(pager, global, &block, &page, &yes, err);
        if (r || !yes) {
            continue;
        }
        if (!begun) {
            begin_section(pager, channel, QEMU_VM_SECTION_PART);
            begun = true;
        }
        start_transfer(pager, channel, block, page, true, CAUSE_PREFETCHED, 0);
        r = go_on(pager, channel, &pages, !window->whole, err);
    }
    if (r) {
        return r;
    }
    if (window->next == window->count) {
        pop_window(pager);
    }
    if (begun) {
        submit(pager, channel);
    }
    return PS_OK;
}

/* ------------------------------------------------------------ background */

/* Shared pages into the lists of their blocks, a few leaves at a time. */
static int collect(ps_pager *pager, ps_error *err)
{
    struct background *background = &pager->background;
    ps_image *image = pager->image;

    for (uint32_t step = 0; step < COLLECT_LEAVES; step++) {
        const uint64_t *entries;
        uint64_t top;
        int r;

        if (background->leaf >= image->leaves ||
            background->shared_count >= background->shared_capacity) {
            background->phase = PHASE_WALK;
            background->leaf = 0;
            return PS_OK;
        }
        r = ps_image_top_entry(image, background->leaf, &top, err);
        if (r) {
            return r;
        }
        if (ps_entry_class(top) != PS_CLASS_LEAF) {
            background->leaf++;
            continue;
        }
        r = ps_image_leaf(image, ps_entry_value(top), &entries, err);
        for (uint32_t i = 0; !r && i < PS_LEAF_PAGES; i++) {
            uint64_t global = background->leaf << PS_LEAF_BITS | i;
            uint64_t canonical = ps_entry_value(entries[i]);
            uint64_t owner;
            uint32_t *head;

            if (ps_entry_class(entries[i]) != PS_CLASS_DATA ||
                is_sent(pager, global)) {
                continue;
            }
            r = ps_image_owner(image, canonical, &owner, err);
            if (r || owner == global ||
                background->shared_count == background->shared_capacity) {
                continue;
            }
            head = &background->heads[canonical >> image->block_shift];
            background->shared[background->shared_count++] =
                (struct shared){.global = (uint32_t)global, .next = *head};
            *head = (uint32_t)background->shared_count;
        }
        if (r) {
            return r;
        }
        background->leaf++;
    }
    return PS_OK;
}

/* Is some page of the block, or one that shares its content, to be sent? */
static int block_wanted(ps_pager *pager, const ps_block_info *info, bool *yes,
                        ps_error *err)
{
    const struct background *background = &pager->background;
    int r = PS_OK;

    *yes = background->heads && background->heads[info->number];
    for (uint32_t i = 0; !r && !*yes && i < info->pages; i++) {
        uint64_t global, page;
        uint32_t block;

        r = ps_image_owner(pager->image, info->first + i, &global, err);
        if (!r) {
            r = wanted(pager, global, &block, &page, yes, err);
        }
    }
    return r;
}

/* Ask for the blocks that come next. */
static int fill_read_ahead(ps_pager *pager, ps_error *err)
{
    struct background *background = &pager->background;
    uint32_t room = ps_read_ahead_room(pager->ahead);
    int r = PS_OK;

    while (!r && room > 0 &&
           background->next_block < pager->image->locality_blocks) {
        ps_block_info info;
        bool yes = false;

        r = ps_image_block(pager->image, background->next_block, &info, err);
        if (!r) {
            r = block_wanted(pager, &info, &yes, err);
        }
        background->next_block++;
        if (!r && yes) {
            ps_read_ahead_ask(pager->ahead, &info);
            room--;
        }
    }
    return r;
}

/* Go to the next locality block; false: there is none. */
static int next_block(ps_pager *pager, bool *found, ps_error *err)
{
    struct background *background = &pager->background;
    int r = PS_OK;

    background->pages = NULL;
    background->next_page = 0;
    if (pager->ahead) {
        r = fill_read_ahead(pager, err);
        *found = !r && ps_read_ahead_take(pager->ahead, &background->block,
                                          &background->pages);
        if (*found && background->pages) {
            ps_counter_add(&pager->stats.storage_reads, 1);
            ps_counter_add(&pager->stats.storage_bytes,
                           background->block.stored);
            ps_counter_add(&pager->stats.blocks_decoded,
                           background->block.form == PS_BLOCK_ZSTD);
        }
        return r;
    }
    *found = background->next_block < pager->image->locality_blocks;
    return *found ? ps_image_block(pager->image, background->next_block++,
                                   &background->block, err)
                  : PS_OK;
}

/* Canonical pages in file order: storage is read forward, each block is
   decoded once, for its owners and for those who share its pages. */
static int walk(ps_pager *pager, uint64_t *global, bool *found, ps_error *err)
{
    struct background *background = &pager->background;

    for (uint32_t step = 0; step < WALK_STEPS; step++) {
        uint64_t page;
        uint32_t block;
        bool more;
        int r;

        if (background->next_page < background->block.pages) {
            r = ps_image_owner(pager->image,
                               background->block.first + background->next_page,
                               global, err);
            if (!r) {
                r = wanted(pager, *global, &block, &page, found, err);
            }
            if (r || *found) {
                return r;
            }
            background->next_page++;
            if (background->next_page == background->block.pages &&
                background->heads) {
                background->chain = background->heads[background->block.number];
            }
        } else if (background->chain) {
            const struct shared *shared =
                &background->shared[background->chain - 1];

            *global = shared->global;
            r = wanted(pager, *global, &block, &page, found, err);
            if (r || *found) {
                return r;
            }
            background->chain = shared->next;
        } else {
            r = next_block(pager, &more, err);
            if (r) {
                return r;
            }
            if (!more) {
                background->block.pages = 0;
                background->phase = PHASE_SWEEP;
                return PS_OK;
            }
        }
    }
    return PS_OK;
}

/* The page maps, leaf by leaf; what is uniform costs one look. */
static int sweep(ps_pager *pager, uint64_t *global, bool *found, ps_error *err)
{
    struct background *background = &pager->background;
    ps_image *image = pager->image;

    for (uint32_t step = 0; step < WALK_STEPS; step++) {
        uint64_t entry, page;
        uint32_t block;
        int r;

        if (background->leaf >= image->leaves) {
            background->phase = PHASE_DONE;
            return PS_OK;
        }
        if (background->index == 0) {
            r = ps_image_top_entry(image, background->leaf, &entry, err);
            if (r) {
                return r;
            }
            if (ps_entry_class(entry) != PS_CLASS_LEAF &&
                !entry_needs_update(entry)) {
                background->leaf++;
                continue;
            }
        }
        *global = background->leaf << PS_LEAF_BITS | background->index;
        if ((*global & 63) == 0 && pager->sent[*global >> 6] == UINT64_MAX) {
            background->index += 64;
        } else {
            r = wanted(pager, *global, &block, &page, found, err);
            if (r || *found) {
                return r;
            }
            background->index++;
        }
        if (background->index == PS_LEAF_PAGES) {
            background->index = 0;
            background->leaf++;
        }
    }
    return PS_OK;
}

/* A page to load next, if a bounded look finds one. It stays the next until
   it is sent. */
static int background_next(ps_pager *pager, uint64_t *global, bool *found,
                           ps_error *err)
{
    *found = false;
    switch (pager->background.phase) {
    case PHASE_COLLECT:
        return collect(pager, err);
    case PHASE_WALK:
        return walk(pager, global, found, err);
    case PHASE_SWEEP:
        return sweep(pager, global, found, err);
    default:
        return PS_OK;
    }
}

/* Would sending this page read or decode a block? */
static int needs_storage(ps_pager *pager, uint64_t global, bool *yes,
                         ps_error *err)
{
    uint64_t entry;
    int r = ps_image_entry(pager->image, global, &entry, err);

    *yes = !r && ps_entry_class(entry) == PS_CLASS_DATA &&
           !block_at_hand(pager,
                          ps_entry_value(entry) >> pager->image->block_shift);
    return r;
}

/* One batch of at most that many pages. */
static int send_background(ps_pager *pager, uint64_t pages, ps_error *err)
{
    struct channel *channel = &pager->main;
    uint64_t had = 0;
    bool begun = false;

    while (pages > 0 && !transfer_active(channel)) {
        uint64_t global = 0, page, was = pages;
        const struct ram *ram;
        uint32_t block;
        bool found, storage;
        int r = background_next(pager, &global, &found, err);

        if (r) {
            return r;
        }
        if (!found) {
            if (begun || pager->background.phase == PHASE_DONE) {
                break;
            }
            return PS_OK; /* look for requests first */
        }
        r = needs_storage(pager, global, &storage, err);
        if (r) {
            return r;
        }
        if (storage && had >= DECODE_PAGES) {
            break;
        }
        if (!ps_image_place(pager->image, global, &block, &page)) {
            break; /* cannot be: wanted() found its place */
        }
        ram = &pager->ram[block];
        page &= ~(ram->host_pages - 1);
        if (!begun) {
            begin_section(pager, channel, QEMU_VM_SECTION_PART);
            begun = true;
        }
        start_transfer(pager, channel, block, page, true, CAUSE_BACKGROUND, 0);
        r = go_on(pager, channel, &pages, false, err);
        if (r) {
            return r;
        }
        had += was - pages;
    }
    if (begun) {
        submit(pager, channel);
    }
    return PS_OK;
}

static bool finishing(const ps_pager *pager)
{
    return get_state(pager) == PS_PAGER_FINISHING;
}

/* A token bucket that may be overdrawn by one batch or host page. */
static bool rate_allows(ps_pager *pager, uint64_t rate)
{
    struct background *background = &pager->background;
    double per_ns = (double)rate / 1e9;
    double most = per_ns * (double)RATE_BURST;

    if (rate != background->rate) {
        background->rate = rate;
        background->tokens = 0;
    } else {
        background->tokens +=
            per_ns * (double)(pager->now - background->tokens_at);
    }
    background->tokens_at = pager->now;
    if (most < (double)CHUNK_MIN) {
        most = (double)CHUNK_MIN;
    }
    if (background->tokens > most) {
        background->tokens = most;
    }
    if (background->tokens < (double)PS_PAGE_SIZE) {
        double wait =
            ((double)RATE_PAGES * PS_PAGE_SIZE - background->tokens) / per_ns;

        wake_by(pager,
                pager->now +
                    (wait < (double)RATE_BURST ? (uint64_t)wait : RATE_BURST) +
                    1000);
        return false;
    }
    return true;
}

/* May the background send now? When not, wake_at is set where time helps. */
static bool background_due(ps_pager *pager)
{
    struct background *background = &pager->background;
    uint64_t rate = atomic_load_explicit(&pager->rate, memory_order_relaxed);

    if (finishing(pager) || ps_counter_get(&pager->stats.left) == 0) {
        return true;
    }
    if (rate == 0) {
        return false;
    }
    if (pager->now < background->quiet_until) {
        wake_by(pager, background->quiet_until);
        return false;
    }
    return rate == UINT64_MAX || rate_allows(pager, rate);
}

/* Of that many pages, those which the ramp and the rate allow. */
static uint64_t background_pages(const ps_pager *pager, uint64_t pages)
{
    const struct background *background = &pager->background;
    uint64_t rate = atomic_load_explicit(&pager->rate, memory_order_relaxed);
    uint64_t allowed = background->turn >> PS_PAGE_BITS;

    if (!finishing(pager) && rate != 0 && rate != UINT64_MAX) {
        allowed = background->tokens < (double)background->turn
                      ? (uint64_t)(background->tokens / PS_PAGE_SIZE)
                      : allowed;
    }
    return min_u64(pages, allowed ? allowed : 1);
}

/* ---------------------------------------------------------------- ending */

/*
 * Nothing is left: RAM's END section and the end of the stream. Not while
 * QEMU loads device state: that may touch a zero page, and after END QEMU's
 * listen thread reads no more and waits for the main thread, which would wait
 * for the page. The PONG of a PING between the last device and RUN says when
 * that is over (QEMU's own source sends one, postcopy_start() in migration.c);
 * without one we wait for a while in which nothing is asked for.
 */
static void send_end(ps_pager *pager)
{
    struct channel *channel = &pager->main;

    if (pager->gate) {
        uint64_t last = ps_counter_get(&pager->stats.last_fault_at);

        if (last < pager->first_sent_at) {
            last = pager->first_sent_at;
        }
        if (pager->gate_ping || !pager->first_sent_at) {
            return;
        }
        if (pager->now < last + QUIET_BEFORE_END) {
            wake_by(pager, last + QUIET_BEFORE_END);
            return;
        }
        pager->gate = false;
    }
    begin_section(pager, channel, QEMU_VM_SECTION_END);
    end_section(pager, channel);
    put_byte(channel, QEMU_VM_EOF);
    submit(pager, channel);
    atomic_store(&pager->stats.left, 0);
    set_state(pager, PS_PAGER_CLOSING);
    pager->closing_at = pager->now;
    pager->again = true; /* for finish_preempt() */
}

/*
 * QEMU 8.0 and later shut the preempt channel down themselves, after every
 * page asked for has come (postcopy_ram_incoming_cleanup): until then we
 * answer. 7.2 waits for EOS on it, so it gets one when all is quiet.
 */
static void finish_preempt(ps_pager *pager)
{
    struct channel *channel = &pager->preempt;
    uint64_t last = ps_counter_get(&pager->stats.last_fault_at);

    if (pager->preempt_over || get_state(pager) != PS_PAGER_CLOSING) {
        return;
    }
    if (last < pager->closing_at) {
        last = pager->closing_at;
    }
    if (pager->now < last + QUIET_BEFORE_EOS) {
        wake_by(pager, last + QUIET_BEFORE_EOS);
        return;
    }
    put_be64(channel, RAM_SAVE_FLAG_EOS);
    submit(pager, channel);
    pager->preempt_over = true;
}

/* ------------------------------------------------------------------ loop */

static int pump_preempt(ps_pager *pager, ps_error *err)
{
    struct channel *channel = &pager->preempt;
    uint64_t pages = BATCH_PAGES;

    for (;;) {
        bool done;
        int r = flush(pager, channel, &done, err);

        if (r || !done) {
            return r;
        }
        if (transfer_active(channel)) {
            r = go_on(pager, channel, &pages, false, err);
            submit(pager, channel);
            pages = BATCH_PAGES;
        } else if (pager->request_count > 0) {
            r = answer_request(pager, channel, err);
        } else {
            finish_preempt(pager);
            if (channel->out_length == 0) {
                return PS_OK;
            }
        }
        if (r) {
            return r;
        }
    }
}

/* Requests that have come meanwhile go first; *mine: they are for the main
   channel. */
static int look_for_requests(ps_pager *pager, bool *mine, ps_error *err)
{
    int r = receive(pager, err);

    *mine = false;
    if (r || pager->request_count == 0) {
        return r;
    }
    if (pager->urgent == &pager->preempt) {
        return pump_preempt(pager, err);
    }
    *mine = true;
    return PS_OK;
}

/* Is there anything that could be sent unasked? Costs no system call. */
static bool something_to_send(ps_pager *pager)
{
    if (get_state(pager) >= PS_PAGER_CLOSING || cancelled(pager)) {
        return false;
    }
    return pager->window_count > 0 || background_due(pager);
}

/* Nobody waits for a page. *more: something was sent or will be found. */
static int send_unasked(ps_pager *pager, bool *more, ps_error *err)
{
    struct background *background = &pager->background;
    uint64_t pages;
    int r;

    *more = false;
    if (!something_to_send(pager)) {
        return PS_OK;
    }
    r = look_for_requests(pager, more, err);
    if (r || *more || !something_to_send(pager)) {
        return r;
    }
    if (pager->window_count > 0) {
        pages = room(pager);
        *more = pages > 0;
        return pages ? send_prefetch(pager, pages, err) : PS_OK;
    }
    if (background->phase == PHASE_DONE) {
        send_end(pager);
        *more = pager->main.out_length > 0;
        return PS_OK;
    }
    if (background->turn == 0) {
        /* A chunk is done: look at everything, then take a larger one. */
        background->chunk = min_u64(background->chunk * 2, CHUNK_MAX);
        background->turn = background->chunk;
        pager->again = true;
        return PS_OK;
    }
    pages = room(pager);
    if (pages) {
        *more = true;
        r = send_background(pager, background_pages(pager, pages), err);
    }
    return r;
}

static int pump_main(ps_pager *pager, ps_error *err)
{
    struct channel *channel = &pager->main;

    for (;;) {
        uint64_t pages = BATCH_PAGES;
        bool done, more;
        int r = flush(pager, channel, &done, err);

        if (r || !done) {
            return r;
        }
        if (pager->first && pager->first_sent_at == 0) {
            pager->first_sent_at = now_ns();
            set_usual_bound(pager);
        }
        if (transfer_active(channel)) {
            r = look_for_requests(pager, &more, err);
            if (!r) {
                r = go_on(pager, channel, &pages, false, err);
            }
            submit(pager, channel);
        } else if (pager->request_count > 0 && pager->urgent == channel) {
            r = answer_request(pager, channel, err);
        } else {
            r = send_unasked(pager, &more, err);
            if (!r && !more) {
                return PS_OK;
            }
        }
        if (r) {
            return r;
        }
    }
}

static int watch(ps_pager *pager, struct channel *channel, uint32_t events,
                 ps_error *err)
{
    struct epoll_event event = {.events = events, .data = {.ptr = channel}};

    if (events == channel->events) {
        return PS_OK;
    }
    if (epoll_ctl(pager->epoll_fd, EPOLL_CTL_MOD, channel->fd, &event)) {
        return ps_fail_errno(err, PS_NOWHERE, "epoll");
    }
    channel->events = events;
    return PS_OK;
}

/* Wait with a resolution of microseconds where the kernel offers it. */
static int wait_for_events(ps_pager *pager, struct epoll_event *events,
                           int capacity, uint64_t timeout)
{
    struct timespec ts = {
        .tv_sec = (time_t)(timeout / 1000000000u),
        .tv_nsec = (long)(timeout % 1000000000u),
    };
    int n = epoll_pwait2(pager->epoll_fd, events, capacity,
                         timeout == UINT64_MAX ? NULL : &ts, NULL);

    if (n < 0 && errno == ENOSYS) { /* Linux before 5.11 */
        n = epoll_wait(pager->epoll_fd, events, capacity,
                       timeout == UINT64_MAX
                           ? -1
                           : (int)min_u64((timeout + 999999) / 1000000, 10000));
    }
    return n;
}

static int handle_event(ps_pager *pager, const struct epoll_event *event,
                        ps_error *err)
{
    struct channel *channel = event->data.ptr;

    if (!channel) {
        uint64_t count;

        (void)!read(pager->command_fd, &count, sizeof(count));
        return PS_OK;
    }
    if (event->events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) {
        if (channel->drain && !channel->blocked &&
            in_flight(channel) > pager->bound - pager->bound / 4) {
            /* Writable, but no emptier: not a unix socket. */
            pager->poll_drain = true;
        }
        channel->blocked = false;
        channel->drain = false;
    }
    if (channel == &pager->main) {
        return event->events & ~(uint32_t)EPOLLOUT ? receive(pager, err)
                                                   : PS_OK;
    }
    if (event->events & (EPOLLHUP | EPOLLERR | EPOLLRDHUP)) {
        if (get_state(pager) < PS_PAGER_CLOSING) {
            return closed(pager, err);
        }
        (void)epoll_ctl(pager->epoll_fd, EPOLL_CTL_DEL, channel->fd, NULL);
        channel->events = 0;
        pager->preempt_over = true;
        pager->request_count = 0;
    }
    return PS_OK;
}

static int wait_once(ps_pager *pager, ps_error *err)
{
    struct epoll_event events[3];
    uint64_t timeout = UINT64_MAX;
    uint32_t want = pager->main.blocked || pager->main.drain ? EPOLLOUT : 0;
    int n, r;

    if (pager->in_at == pager->in_length && pager->request_count < REQUESTS) {
        want |= EPOLLIN;
    }
    r = watch(pager, &pager->main, want, err);
    if (!r && pager->preempt.events) {
        /* EPOLLHUP comes unasked; EPOLLRDHUP keeps events from being 0. */
        r = watch(pager, &pager->preempt,
                  EPOLLRDHUP |
                      (pager->preempt.blocked ? (uint32_t)EPOLLOUT : 0),
                  err);
    }
    if (r) {
        return r;
    }
    if (pager->again) {
        timeout = 0;
    } else if (pager->wake_at) {
        uint64_t now = now_ns();

        timeout = pager->wake_at > now ? pager->wake_at - now : 0;
    }
    n = wait_for_events(pager, events, 3, timeout);
    if (n < 0 && errno != EINTR) {
        return ps_fail_errno(err, PS_NOWHERE, "epoll");
    }
    pager->now = now_ns();
    for (int i = 0; i < n; i++) {
        r = handle_event(pager, &events[i], err);
        if (r) {
            return r;
        }
    }
    return PS_OK;
}

static int take_commands(ps_pager *pager, ps_error *err)
{
    if (atomic_load(&pager->finish) && get_state(pager) == PS_PAGER_SERVING) {
        set_state(pager, PS_PAGER_FINISHING);
        set_usual_bound(pager);
        return ps_read_ahead_create(pager->image, &pager->ahead, err);
    }
    return PS_OK;
}

static int serve(ps_pager *pager, ps_error *err)
{
    for (;;) {
        int r;

        if (cancelled(pager)) {
            return ps_fail(err, PS_ERR_CANCELLED, PS_NOWHERE,
                           "the pager was cancelled");
        }
        if (get_state(pager) == PS_PAGER_DONE) {
            return PS_OK;
        }
        pager->again = false;
        pager->wake_at = 0;
        r = take_commands(pager, err);
        if (!r) {
            r = parse_received(pager, err);
        }
        if (!r && pager->urgent == &pager->preempt) {
            r = pump_preempt(pager, err);
        }
        if (!r) {
            r = pump_main(pager, err);
        }
        if (r) {
            return r;
        }
        if (get_state(pager) == PS_PAGER_DONE || cancelled(pager) ||
            (pager->in_at < pager->in_length &&
             pager->request_count < REQUESTS)) {
            continue; /* the last: more was received than there was room for */
        }
        r = wait_once(pager, err);
        if (r) {
            return r;
        }
    }
}

static int add_to_epoll(ps_pager *pager, int fd, struct channel *channel,
                        uint32_t events, ps_error *err)
{
    struct epoll_event event = {.events = events, .data = {.ptr = channel}};

    if (epoll_ctl(pager->epoll_fd, EPOLL_CTL_ADD, fd, &event)) {
        return ps_fail_errno(err, PS_NOWHERE, "epoll");
    }
    if (channel) {
        channel->events = events;
    }
    return PS_OK;
}

static int start(ps_pager *pager, ps_error *err)
{
    struct background *background = &pager->background;
    int r;

    r = add_to_epoll(pager, pager->command_fd, NULL, EPOLLIN, err);
    if (!r) {
        r = add_to_epoll(pager, pager->main.fd, &pager->main, EPOLLIN, err);
    }
    if (!r && pager->preempt.fd >= 0) {
        r = add_to_epoll(pager, pager->preempt.fd, &pager->preempt, EPOLLRDHUP,
                         err);
    }
    if (r) {
        return r;
    }
    pager->now = now_ns();
    background->quiet_until = pager->now + pager->options.background_delay_ns;
    background->tokens_at = pager->now;
    pager->in = pager->early;
    pager->in_length = pager->early_length;
    if (pager->first) {
        set_bound(pager, FIRST_IN_FLIGHT);
        pager->main.out = pager->first;
        pager->main.out_length = pager->first_length;
    } else {
        set_usual_bound(pager);
    }
    return PS_OK;
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec ts;

    if (clock_gettime(clock, &ts)) {
        return 0;
    }
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

int ps_pager_run(ps_pager *pager, ps_error *err)
{
    clockid_t clock = 0;
    uint64_t helper;
    int r;

    if (pager->started) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "a pager runs only once");
    }
    pager->started = true;
    atomic_store(&pager->thread, (int32_t)gettid());
    atomic_store(&pager->cpu_start, clock_ns(CLOCK_THREAD_CPUTIME_ID));
    if (pthread_getcpuclockid(pthread_self(), &clock) == 0) {
        atomic_store(&pager->cpu_clock, (int64_t)clock);
    }
    set_state(pager, PS_PAGER_SERVING);
    r = start(pager, err);
    if (!r) {
        r = serve(pager, err);
    }
    if (r) {
        set_state(pager, PS_PAGER_FAILED);
    }
    helper = ps_read_ahead_destroy(pager->ahead);
    pager->ahead = NULL;
    atomic_store(&pager->cpu_total, clock_ns(CLOCK_THREAD_CPUTIME_ID) -
                                        atomic_load(&pager->cpu_start) +
                                        helper);
    atomic_store(&pager->cpu_clock, 0);
    return r;
}

/* ---------------------------------------------------------- construction */

static int check_options(const ps_pager_options *options, ps_error *err)
{
    const char *wrong = NULL;

    if (options->fd < 0) {
        wrong = "no socket";
    } else if (options->preempt_fd == options->fd) {
        wrong = "both channels are one socket";
    } else if (options->prefetch > PS_PREFETCH_PHYSICAL) {
        wrong = "unknown kind of prefetch";
    } else if (options->in_flight_bytes == 0) {
        wrong = "in_flight_bytes is 0";
    }
    return wrong ? ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE, "pager: %s", wrong)
                 : PS_OK;
}

static int take_blocks(ps_pager *pager, const ps_pager_block *blocks,
                       size_t block_count, ps_error *err)
{
    ps_image *image = pager->image;

    if (block_count != image->ram_count) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "pager: %zu RAM blocks, the snapshot has %u",
                       block_count, image->ram_count);
    }
    pager->ram = calloc(block_count ? block_count : 1, sizeof(*pager->ram));
    if (!pager->ram) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "no memory");
    }
    pager->ram_count = (uint32_t)block_count;
    for (uint32_t i = 0; i < pager->ram_count; i++) {
        const ps_image_ram *from = &image->ram[i];
        uint64_t size = blocks[i].page_size;

        if (blocks[i].length != from->pages << PS_PAGE_BITS ||
            size < PS_PAGE_SIZE || (size & (size - 1)) != 0 ||
            (blocks[i].length & (size - 1)) != 0) {
            return ps_fail(
                err, PS_ERR_ARGUMENT, PS_NOWHERE,
                "pager: RAM block %s of 0x%llx bytes cannot be one "
                "of 0x%llx bytes with pages of %llu",
                from->name, (unsigned long long)from->pages << PS_PAGE_BITS,
                (unsigned long long)blocks[i].length, (unsigned long long)size);
        }
        pager->ram[i] = (struct ram){
            .first = from->first_page,
            .pages = from->pages,
            .host_pages = size >> PS_PAGE_BITS,
            .name = from->name,
            .name_length = (uint8_t)strlen(from->name),
        };
    }
    return PS_OK;
}

/* Room for the lists of shared pages; touched as they fill. */
static int reserve_lists(ps_pager *pager, ps_error *err)
{
    struct background *background = &pager->background;
    ps_image *image = pager->image;
    uint64_t data = 0;
    void *memory;
    int r;

    for (uint32_t i = 0; i < pager->ram_count; i++) {
        data += image->ram_blocks[i].pages_data;
    }
    background->phase = PHASE_WALK;
    if (data <= image->canonical_pages) {
        return PS_OK;
    }
    background->shared_capacity = min_u64(
        min_u64(data - image->canonical_pages, image->leaves << PS_LEAF_BITS),
        UINT32_MAX - 1);
    background->heads_length =
        (size_t)image->locality_blocks * sizeof(*background->heads);
    r = ps_reserve(background->heads_length, &memory, err);
    if (r) {
        return r;
    }
    background->heads = memory;
    background->shared_length =
        (size_t)background->shared_capacity * sizeof(*background->shared);
    r = ps_reserve(background->shared_length, &memory, err);
    if (r) {
        return r;
    }
    background->shared = memory;
    background->phase = PHASE_COLLECT;
    return PS_OK;
}

static int init(ps_pager *pager, const ps_pager_block *blocks,
                size_t block_count, ps_error *err)
{
    ps_image *image = pager->image;
    void *memory;
    int r = take_blocks(pager, blocks, block_count, err);

    if (!r) {
        r = count_pages(pager, err);
    }
    if (!r) {
        r = reserve_lists(pager, err);
    }
    if (!r) {
        pager->sent_length = (size_t)image->leaves * (PS_LEAF_PAGES / 8);
        r = ps_reserve(pager->sent_length, &memory, err);
    }
    if (r) {
        return r;
    }
    pager->sent = memory;
    r = ps_block_cache_init(&pager->cache, image, pager->options.cache_bytes,
                            err);
    if (r) {
        return r;
    }
    pager->main.buffer = malloc(BATCH_BYTES);
    pager->preempt.buffer = malloc(BATCH_BYTES);
    pager->received = malloc(RECEIVE_BYTES);
    if (!pager->main.buffer || !pager->preempt.buffer || !pager->received) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "no memory");
    }
    pager->command_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pager->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (pager->command_fd < 0 || pager->epoll_fd < 0) {
        return ps_fail_errno(err, PS_NOWHERE, "pager");
    }
    return PS_OK;
}

int ps_pager_create(ps_image *image, const ps_pager_options *options,
                    const ps_pager_block *blocks, size_t block_count,
                    ps_pager **out, ps_error *err)
{
    ps_pager *pager;
    int r = check_options(options, err);

    *out = NULL;
    if (r) {
        return r;
    }
    pager = calloc(1, sizeof(*pager));
    if (!pager) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "no memory");
    }
    pager->image = image;
    pager->options = *options;
    pager->footers = image->stream.flags & PS_STREAM_FOOTERS;
    pager->section_id = image->stream.ram_section_id;
    pager->command_fd = -1;
    pager->epoll_fd = -1;
    pager->asked_block = NONE;
    pager->main.fd = options->fd;
    pager->main.framed = true;
    pager->preempt.fd = options->preempt_fd;
    pager->urgent = options->preempt_fd >= 0 ? &pager->preempt : &pager->main;
    pager->background.chunk = CHUNK_MIN;
    pager->background.turn = CHUNK_MIN;
    atomic_store(&pager->rate, options->background_rate);
    r = init(pager, blocks, block_count, err);
    if (r) {
        ps_pager_destroy(pager);
        return r;
    }
    *out = pager;
    return PS_OK;
}

void ps_pager_destroy(ps_pager *pager)
{
    if (!pager) {
        return;
    }
    ps_block_cache_deinit(&pager->cache);
    ps_unreserve(pager->sent, pager->sent_length);
    ps_unreserve(pager->background.heads, pager->background.heads_length);
    ps_unreserve(pager->background.shared, pager->background.shared_length);
    free(pager->main.buffer);
    free(pager->preempt.buffer);
    free(pager->received);
    free(pager->early);
    free(pager->first);
    free(pager->ram);
    if (pager->command_fd >= 0) {
        close(pager->command_fd);
    }
    if (pager->epoll_fd >= 0) {
        close(pager->epoll_fd);
    }
    free(pager);
}

/* Append to a buffer that has at most limit bytes. */
static int append_bytes(uint8_t **buffer, size_t *length, uint64_t limit,
                        const uint8_t *data, size_t more, ps_error *err)
{
    uint8_t *grown;

    if (more > limit - *length) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "pager: more than %llu bytes to start with",
                       (unsigned long long)limit);
    }
    if (more == 0) {
        return PS_OK;
    }
    grown = realloc(*buffer, *length + more);
    if (!grown) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "no memory");
    }
    memcpy(grown + *length, data, more);
    *buffer = grown;
    *length += more;
    return PS_OK;
}

/* Does the package end with PING and RUN? See send_end(). */
static void find_gate(ps_pager *pager)
{
    static const uint8_t run[] = {QEMU_VM_COMMAND, 0, MIG_CMD_POSTCOPY_RUN, 0,
                                  0};
    static const uint8_t ping[] = {QEMU_VM_COMMAND, 0, MIG_CMD_PING, 0, 4};
    size_t tail = sizeof(ping) + 4 + sizeof(run);
    const uint8_t *at;

    pager->gate = true;
    pager->gate_ping = false;
    if (pager->first_length < tail) {
        return;
    }
    at = pager->first + pager->first_length - tail;
    if (memcmp(at, ping, sizeof(ping)) == 0 &&
        memcmp(at + sizeof(ping) + 4, run, sizeof(run)) == 0) {
        pager->gate_ping = true;
        pager->gate_value = ps_get_be32(at + sizeof(ping));
    }
}

int ps_pager_send_first(ps_pager *pager, const uint8_t *data, size_t length,
                        ps_error *err)
{
    int r = append_bytes(&pager->first, &pager->first_length, MAX_FIRST_BYTES,
                         data, length, err);

    if (!r && pager->first) {
        find_gate(pager);
    }
    return r;
}

int ps_pager_received_first(ps_pager *pager, const uint8_t *data, size_t length,
                            ps_error *err)
{
    return append_bytes(&pager->early, &pager->early_length, MIB(16), data,
                        length, err);
}

int ps_pager_set_received(ps_pager *pager, uint32_t block,
                          const uint8_t *bitmap, size_t length, ps_error *err)
{
    const struct ram *ram;

    if (block >= pager->ram_count || pager->started ||
        length < (pager->ram[block].pages + 7) / 8) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "pager: a bitmap of %zu bytes for RAM block %u", length,
                       block);
    }
    ram = &pager->ram[block];
    for (uint64_t page = 0; page < ram->pages; page += ram->host_pages) {
        struct host_page host;
        bool all = true;
        int r;

        if (ram->host_pages == 1 && (page & 7) == 0 && !bitmap[page >> 3]) {
            page += 7;
            continue;
        }
        for (uint64_t i = page; all && i < page + ram->host_pages; i++) {
            all = bitmap[i >> 3] >> (i & 7) & 1;
        }
        if (!all || is_sent(pager, ram->first + page)) {
            continue; /* part of a host page is as good as nothing of it */
        }
        r = look_at_host_page(pager, ram, page, &host, err);
        if (r) {
            return r;
        }
        mark_sent(pager, ram->first + page, ram->host_pages);
        if (host.present) {
            account(pager, ram, host.needs_update);
        }
    }
    return PS_OK;
}

/* ---------------------------------------------------- from other threads */

static void notify(ps_pager *pager)
{
    uint64_t one = 1;

    (void)!write(pager->command_fd, &one, sizeof(one));
}

void ps_pager_finish(ps_pager *pager)
{
    atomic_store(&pager->finish, true);
    notify(pager);
}

void ps_pager_cancel(ps_pager *pager)
{
    atomic_store(&pager->cancel, true);
    notify(pager);
}

void ps_pager_set_background(ps_pager *pager, uint64_t rate)
{
    atomic_store(&pager->rate, rate);
    notify(pager);
}

int32_t ps_pager_thread(const ps_pager *pager)
{
    return atomic_load(&pager->thread);
}

static uint64_t cpu_time(ps_pager *pager)
{
    int64_t clock = atomic_load(&pager->cpu_clock);
    uint64_t now = clock ? clock_ns((clockid_t)clock) : 0;
    uint64_t since = atomic_load(&pager->cpu_start);

    return now > since ? now - since : atomic_load(&pager->cpu_total);
}

void ps_pager_get_stats(ps_pager *pager, ps_pager_stats *out)
{
    struct counters *stats = &pager->stats;

    *out = (ps_pager_stats){
        .state = get_state(pager),
        .faults = ps_counter_get(&stats->faults),
        .faults_late = ps_counter_get(&stats->faults_late),
        .pages_requested = ps_counter_get(&stats->pages[CAUSE_REQUESTED]),
        .pages_prefetched = ps_counter_get(&stats->pages[CAUSE_PREFETCHED]),
        .pages_background = ps_counter_get(&stats->pages[CAUSE_BACKGROUND]),
        .pages_zero_sent = ps_counter_get(&stats->zero_sent),
        .pages_total = ps_counter_get(&stats->total),
        .pages_left = ps_counter_get(&stats->left),
        .pages_avoided = ps_counter_get(&stats->avoided),
        .bytes_sent = ps_counter_get(&stats->bytes_sent),
        .storage_reads = ps_counter_get(&stats->storage_reads),
        .storage_bytes = ps_counter_get(&stats->storage_bytes),
        .blocks_decoded = ps_counter_get(&stats->blocks_decoded),
        .latency_p50 = ps_histogram_quantile(&pager->latency, 500),
        .latency_p99 = ps_histogram_quantile(&pager->latency, 990),
        .latency_max = ps_counter_get(&pager->latency.max),
        .first_fault_at = ps_counter_get(&stats->first_fault_at),
        .last_fault_at = ps_counter_get(&stats->last_fault_at),
        .cpu_ns = cpu_time(pager),
    };
}
