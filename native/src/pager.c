/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The pager: the source of a postcopy migration, from the moment when the
 * destination listens. One thread, one epoll loop.
 *
 * Order of what is sent: requested pages, then what is left of the prefetch
 * windows (newest first), then the background. Whoever sends less urgent
 * pages looks for new requests before every batch (but for the first ones of
 * a window that proves right: pager_prefetch_urgent()) and keeps what QEMU has
 * not read yet below a bound, so that a requested page waits behind few others.
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
#include <pthread.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "pager.h"

#define RECEIVE_BYTES 4096u
#define MAX_FIRST_BYTES (MIB(17) + KIB(64))
/* See send_end() and finish_preempt(). */
#define QUIET_BEFORE_END MS(200)
#define QUIET_BEFORE_EOS MS(500)

enum {
    MIG_CMD_PING = 2,
    MIG_CMD_POSTCOPY_RUN = 5,
};

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
            int r = pager_look_at_host_page(pager, ram, page, &host, err);

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

/* ---------------------------------------------------------- return path */

int pager_closed(ps_pager *pager, ps_error *err)
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
        pager_trace(pager, ram->first + (message->start >> PS_PAGE_BITS),
                    pager->now, PS_TRACE_ZERO);
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
int pager_receive(ps_pager *pager, ps_error *err)
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
        return pager_closed(pager, err);
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

/* ------------------------------------------------------ requested pages */

/* Take the oldest request as far as its next host page that was not sent. */
static int answer_request(ps_pager *pager, struct channel *channel,
                          ps_error *err)
{
    struct request *request = &pager->requests[pager->request_head];
    const struct ram *ram = &pager->ram[request->block];
    uint64_t page = request->page;
    uint64_t pages = BATCH_PAGES;
    struct host_page host;
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
            pager_trace(pager, ram->first + page - ram->host_pages,
                        request->asked_at, PS_TRACE_LATE);
        }
        return PS_OK;
    }
    r = pager_look_at_host_page(pager, ram, page, &host, err);
    if (r) {
        return pager_undeliverable(pager, request->block, page, err);
    }
    if (!host.present) {
        ps_fail(err, PS_ERR_DAMAGED, PS_NOWHERE,
                "QEMU asked for it, but the snapshot does not have it");
        return pager_undeliverable(pager, request->block, page, err);
    }
    request->answered = true;
    pager_begin_section(pager, channel, QEMU_VM_SECTION_PART);
    pager_start_transfer(pager, channel, request->block, page,
                         host.needs_update, CAUSE_REQUESTED, request->asked_at);
    r = pager_go_on(pager, channel, &pages, ram->host_pages == 1, err);
    if (r) {
        return r;
    }
    pager_submit(pager, channel);
    if (ram->host_pages == 1) {
        pager_plan_prefetch(pager, ram->first + page, request->asked_at);
    } else {
        pager_trace(pager, ram->first + page, request->asked_at, 0);
    }
    return PS_OK;
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
    pager_begin_section(pager, channel, QEMU_VM_SECTION_END);
    pager_end_section(pager, channel);
    pager_put_byte(channel, QEMU_VM_EOF);
    pager_submit(pager, channel);
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
    pager_put_be64(channel, RAM_SAVE_FLAG_EOS);
    pager_submit(pager, channel);
    pager->preempt_over = true;
}

/* ------------------------------------------------------------------ loop */

static int pump_preempt(ps_pager *pager, ps_error *err)
{
    struct channel *channel = &pager->preempt;
    uint64_t pages = BATCH_PAGES;

    for (;;) {
        bool done;
        int r = pager_flush(pager, channel, &done, err);

        if (r || !done) {
            return r;
        }
        if (transfer_active(channel)) {
            r = pager_go_on(pager, channel, &pages, false, err);
            pager_submit(pager, channel);
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
    int r = pager_receive(pager, err);

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
    return pager_prefetch_pending(pager) || pager_background_due(pager);
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
    r = pager_plan_window(pager, err);
    if (!r && !pager_prefetch_urgent(pager)) {
        r = look_for_requests(pager, more, err);
    }
    if (r || *more || !something_to_send(pager)) {
        return r;
    }
    if (pager->prefetch.pending_count > 0) {
        *more = true; /* the next one */
        return PS_OK;
    }
    if (pager_prefetch_pending(pager)) {
        pages = pager_room(pager);
        *more = pages > 0;
        return pages ? pager_send_prefetch(pager, pages, err) : PS_OK;
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
    pages = pager_room(pager);
    if (pages) {
        *more = true;
        r = pager_send_background(pager, pager_background_pages(pager, pages),
                                  err);
    }
    return r;
}

static int pump_main(ps_pager *pager, ps_error *err)
{
    struct channel *channel = &pager->main;

    for (;;) {
        uint64_t pages = BATCH_PAGES;
        bool done, more;
        int r = pager_flush(pager, channel, &done, err);

        if (r || !done) {
            return r;
        }
        if (pager->first && pager->first_sent_at == 0) {
            pager->first_sent_at = now_ns();
            pager_set_usual_bound(pager);
        }
        if (transfer_active(channel)) {
            r = look_for_requests(pager, &more, err);
            if (!r) {
                r = pager_go_on(pager, channel, &pages, false, err);
            }
            pager_submit(pager, channel);
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
            pager_in_flight(channel) > pager->bound - pager->bound / 4) {
            /* Writable, but no emptier: not a unix socket. */
            pager->poll_drain = true;
        }
        channel->blocked = false;
        channel->drain = false;
    }
    if (channel == &pager->main) {
        return event->events & ~(uint32_t)EPOLLOUT ? pager_receive(pager, err)
                                                   : PS_OK;
    }
    if (event->events & (EPOLLHUP | EPOLLERR | EPOLLRDHUP)) {
        if (get_state(pager) < PS_PAGER_CLOSING) {
            return pager_closed(pager, err);
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

static void take_commands(ps_pager *pager)
{
    if (atomic_load(&pager->finish) && get_state(pager) == PS_PAGER_SERVING) {
        ps_error ignored;

        set_state(pager, PS_PAGER_FINISHING);
        pager_set_usual_bound(pager);
        /* Without it everything is loaded as well. */
        (void)ps_read_ahead_create(pager->image, &pager->ahead, &ignored);
    }
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
        take_commands(pager);
        r = parse_received(pager, err);
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
    pager->began = pager->now;
    background->quiet_until = pager->now + pager->options.background_delay_ns;
    background->tokens_at = pager->now;
    pager->in = pager->early;
    pager->in_length = pager->early_length;
    if (pager->first) {
        pager_set_bound(pager, FIRST_IN_FLIGHT);
        pager->main.out = pager->first;
        pager->main.out_length = pager->first_length;
    } else {
        pager_set_usual_bound(pager);
    }
    return PS_OK;
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
    atomic_store(&pager->cpu_start, ps_clock_ns(CLOCK_THREAD_CPUTIME_ID));
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
    pager_end_prefetch(pager);
    ps_trace_flush(&pager->trace);
    helper = ps_read_ahead_destroy(pager->ahead);
    pager->ahead = NULL;
    atomic_store(&pager->cpu_total, ps_clock_ns(CLOCK_THREAD_CPUTIME_ID) -
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
    } else if (options->prefetch > PS_PREFETCH_VIRTUAL) {
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
        r = pager_init_background(pager, err);
    }
    if (!r) {
        r = pager_init_prefetch(pager, err);
    }
    if (!r) {
        r = ps_trace_init(&pager->trace, pager->options.trace_fd,
                          image->header.uuid, err);
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
    pager->trace.fd = -1;
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
    pager_deinit_prefetch(pager);
    ps_trace_deinit(&pager->trace);
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
        r = pager_look_at_host_page(pager, ram, page, &host, err);
        if (r) {
            return r;
        }
        mark_sent(pager, ram->first + page, ram->host_pages);
        if (host.present) {
            pager_account(pager, ram, host.needs_update);
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
    uint64_t now = clock ? ps_clock_ns((clockid_t)clock) : 0;
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
    for (uint32_t i = 0; i < PS_PREFETCH_KINDS; i++) {
        out->prefetch[i] = (ps_prefetch_stats){
            .windows = ps_counter_get(&stats->prefetch[i].windows),
            .windows_right = ps_counter_get(&stats->prefetch[i].windows_right),
            .pages = ps_counter_get(&stats->prefetch[i].pages),
            .pages_right = ps_counter_get(&stats->prefetch[i].pages_right),
        };
    }
}
