/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Inside the pager: what its parts share. pager.c receives and decides,
 * pager_send.c puts pages on their way, pager_prefetch.c and
 * pager_background.c choose pages that nobody has asked for.
 */
#ifndef PS_PAGER_H
#define PS_PAGER_H

#include <stdatomic.h>
#include <time.h>

#include "block_cache.h"
#include "histogram.h"
#include "image.h"
#include "predictor.h"
#include "read_ahead.h"
#include "return_path.h"
#include "trace.h"

#define KIB(n) ((uint64_t)(n) << 10)
#define MIB(n) ((uint64_t)(n) << 20)
#define MS(n) ((uint64_t)(n) * 1000000)

/* Pages of one send() at most: 186 us of QEMU's time at 2.9 us a page. */
#define BATCH_PAGES 64u
/* offset and flags, counted name, content. */
#define ENTRY_BYTES (8u + 256u + PS_PAGE_SIZE)
/* And the frame of the section around them. */
#define BATCH_BYTES (BATCH_PAGES * ENTRY_BYTES + 64u)
/* QEMU has as many requests under way as it has threads that can fault. */
#define REQUESTS 1024u
#define WINDOWS 4u
#define PENDING 1024u
/* More is a second background, not a neighbourhood. */
#define PS_MAX_WINDOW 256u
/* criu's ramp: lazy-pages grows its chunk while nobody faults. */
#define CHUNK_MIN KIB(64)
#define CHUNK_MAX MIB(4)
#define FIRST_IN_FLIGHT MIB(1)

#define NONE UINT32_MAX

enum cause {
    CAUSE_REQUESTED,
    CAUSE_PREFETCHED,
    CAUSE_BACKGROUND,
};

/* A RAM block as the destination has it. */
struct ram {
    uint64_t first; /* global number of its page 0 */
    uint64_t pages;
    uint64_t host_pages; /* target pages in a host page */
    const char *name;
    uint8_t name_length;
};

/* What a host page is made of. */
struct host_page {
    bool needs_update; /* some target page is fill or data */
    bool present;      /* some target page is not absent */
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

/* Pages that are to follow a requested one, nearest first. */
struct window {
    uint64_t record; /* of the predictor */
    uint32_t kind;   /* a ps_prefetch_kind */
    bool proven;     /* the guest has come where it began */
    bool urgent;     /* a batch of it goes before all else */
    uint32_t count;
    uint32_t next;
    uint32_t pages[PS_MAX_WINDOW]; /* global */
};

struct pending {
    uint64_t asked_at;
    uint32_t global;
};

/* What follows faults: pager_prefetch.c. */
struct prefetch {
    ps_predictor predictor;
    struct pending pending[PENDING]; /* faults not looked at yet */
    uint32_t pending_head;
    uint32_t pending_count;
    struct window windows[WINDOWS];
    uint32_t top; /* the newest */
    uint32_t count;
    uint64_t space;       /* in which the fault before was */
    bool spaces_unusable; /* damaged, or the file has none */
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
    struct {
        _Atomic uint64_t windows, windows_right, pages, pages_right;
    } prefetch[PS_PREFETCH_KINDS];
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

    struct prefetch prefetch;
    struct background background;
    ps_trace trace;
    uint64_t closing_at;
    uint64_t began;
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

static inline uint64_t now_ns(void)
{
    return ps_clock_ns(CLOCK_MONOTONIC);
}

static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline void wake_by(ps_pager *pager, uint64_t when)
{
    if (!pager->wake_at || when < pager->wake_at) {
        pager->wake_at = when;
    }
}

static inline uint32_t get_state(const ps_pager *pager)
{
    return atomic_load_explicit(&pager->state, memory_order_relaxed);
}

static inline void set_state(ps_pager *pager, uint32_t state)
{
    atomic_store_explicit(&pager->state, state, memory_order_relaxed);
}

static inline bool cancelled(const ps_pager *pager)
{
    return atomic_load_explicit(&pager->cancel, memory_order_relaxed);
}

static inline bool is_sent(const ps_pager *pager, uint64_t global)
{
    return pager->sent[global >> 6] >> (global & 63) & 1;
}

static inline void mark_sent(ps_pager *pager, uint64_t global, uint64_t count)
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

static inline bool entry_needs_update(uint64_t entry)
{
    return ps_entry_class(entry) >= PS_CLASS_FILL;
}

static inline bool transfer_active(const struct channel *channel)
{
    return channel->transfer.page < channel->transfer.end;
}

static inline bool finishing(const ps_pager *pager)
{
    return get_state(pager) == PS_PAGER_FINISHING;
}

/* pager_send.c */

int pager_look_at_host_page(ps_pager *pager, const struct ram *ram,
                            uint64_t page, struct host_page *out,
                            ps_error *err);
void pager_account(ps_pager *pager, const struct ram *ram, bool needs_update);
void pager_put_byte(struct channel *channel, uint8_t byte);
void pager_put_be64(struct channel *channel, uint64_t v);
void pager_begin_section(ps_pager *pager, struct channel *channel,
                         uint8_t type);
void pager_end_section(ps_pager *pager, struct channel *channel);
int pager_undeliverable(ps_pager *pager, uint32_t block, uint64_t page,
                        ps_error *err);
const uint8_t *pager_block_at_hand(ps_pager *pager, uint64_t number);
int pager_needs_storage(ps_pager *pager, uint64_t global, bool *yes,
                        ps_error *err);
void pager_start_transfer(ps_pager *pager, struct channel *channel,
                          uint32_t block, uint64_t page, bool needs_update,
                          enum cause cause, uint64_t asked_at);
int pager_go_on(ps_pager *pager, struct channel *channel, uint64_t *pages,
                bool single, ps_error *err);
void pager_submit(ps_pager *pager, struct channel *channel);
int pager_flush(ps_pager *pager, struct channel *channel, bool *done,
                ps_error *err);
void pager_set_bound(ps_pager *pager, uint64_t bound);
void pager_set_usual_bound(ps_pager *pager);
uint64_t pager_room(ps_pager *pager);
uint64_t pager_in_flight(const struct channel *channel);
int pager_wanted(ps_pager *pager, uint64_t global, uint32_t *block,
                 uint64_t *page, bool *yes, ps_error *err);

/* pager_prefetch.c */

int pager_init_prefetch(ps_pager *pager, ps_error *err);
void pager_deinit_prefetch(ps_pager *pager);
/* The page was asked for and is with the socket. */
void pager_plan_prefetch(ps_pager *pager, uint64_t global, uint64_t asked_at);
/* It was asked for, and nothing is to follow it. */
void pager_trace(ps_pager *pager, uint64_t global, uint64_t asked_at,
                 uint8_t flags);
/* Nothing is sent any more. */
void pager_end_prefetch(ps_pager *pager);
bool pager_prefetch_pending(const ps_pager *pager);
/* Look at a fault that nobody has looked at yet. */
int pager_plan_window(ps_pager *pager, ps_error *err);
/* Is the newest window one whose first pages go before anything else? */
bool pager_prefetch_urgent(const ps_pager *pager);
/* One batch, of so many pages at most. */
int pager_send_prefetch(ps_pager *pager, uint64_t pages, ps_error *err);

/* pager_background.c */

bool pager_background_due(ps_pager *pager);
int pager_send_background(ps_pager *pager, uint64_t pages, ps_error *err);
uint64_t pager_background_pages(const ps_pager *pager, uint64_t pages);
int pager_init_background(ps_pager *pager, ps_error *err);

/* pager.c */

int pager_closed(ps_pager *pager, ps_error *err);
int pager_receive(ps_pager *pager, ps_error *err);

#endif
