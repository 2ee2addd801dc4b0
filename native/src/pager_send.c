/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Pages on their way: entries, batches, and what QEMU has not read yet. */
#include <errno.h>
#include <linux/sockios.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "pager.h"

/* Enough to keep QEMU busy while we are scheduled, 0.4 ms of its time. */
#define FINISH_IN_FLIGHT KIB(512)

/* ---------------------------------------------------------- what a page is */

int pager_look_at_host_page(ps_pager *pager, const struct ram *ram,
                            uint64_t page, struct host_page *out, ps_error *err)
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

void pager_account(ps_pager *pager, const struct ram *ram, bool needs_update)
{
    ps_counter_sub(needs_update ? &pager->stats.left : &pager->stats.avoided,
                   ram->host_pages);
}

/* A page that nobody asked for: is it to be sent? Its RAM block and page. */
int pager_wanted(ps_pager *pager, uint64_t global, uint32_t *block,
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

/* ------------------------------------------------- a page into a channel */

static void put(struct channel *channel, const void *bytes, size_t length)
{
    memcpy(channel->buffer + channel->built, bytes, length);
    channel->built += length;
}

void pager_put_byte(struct channel *channel, uint8_t byte)
{
    channel->buffer[channel->built++] = byte;
}

static void put_be32(struct channel *channel, uint32_t v)
{
    ps_put_be32(channel->buffer + channel->built, v);
    channel->built += 4;
}

void pager_put_be64(struct channel *channel, uint64_t v)
{
    ps_put_be64(channel->buffer + channel->built, v);
    channel->built += 8;
}

void pager_begin_section(ps_pager *pager, struct channel *channel, uint8_t type)
{
    /* QEMU keeps the last block of each channel for CONTINUE; naming it
       anew costs a few bytes and assumes less. */
    channel->last_block = NONE;
    if (channel->framed) {
        pager_put_byte(channel, type);
        put_be32(channel, pager->section_id);
        channel->section = true;
    }
}

void pager_end_section(ps_pager *pager, struct channel *channel)
{
    if (channel->section) {
        pager_put_be64(channel, RAM_SAVE_FLAG_EOS);
        if (pager->footers) {
            pager_put_byte(channel, QEMU_VM_SECTION_FOOTER);
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
    pager_put_be64(channel, page << PS_PAGE_BITS | flags);
    if (channel->last_block != block) {
        pager_put_byte(channel, ram->name_length);
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
const uint8_t *pager_block_at_hand(ps_pager *pager, uint64_t number)
{
    const struct background *background = &pager->background;

    return background->pages && background->block.number == number
               ? background->pages
               : ps_block_cache_find(&pager->cache, number);
}

/* Would sending this page read or decode a block? */
int pager_needs_storage(ps_pager *pager, uint64_t global, bool *yes,
                        ps_error *err)
{
    uint64_t entry;
    int r = ps_image_entry(pager->image, global, &entry, err);

    *yes = !r && ps_entry_class(entry) == PS_CLASS_DATA &&
           !pager_block_at_hand(pager, ps_entry_value(entry) >>
                                           pager->image->block_shift);
    return r;
}

/* Content of a canonical page, checked. single: a page of a block that is
   stored as it is comes without the rest of the block. */
static int read_canonical(ps_pager *pager, uint64_t canonical, bool single,
                          uint8_t *out, ps_error *err)
{
    ps_image *image = pager->image;
    uint64_t number = canonical >> image->block_shift;
    const uint8_t *pages = pager_block_at_hand(pager, number);
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
int pager_undeliverable(ps_pager *pager, uint32_t block, uint64_t page,
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
        return pager_undeliverable(pager, block, page, err);
    }
    if (!entry_needs_update(entry)) {
        /* Zero; or absent from a host page of which there is another part. */
        put_entry(pager, channel, block, page, RAM_SAVE_FLAG_ZERO);
        pager_put_byte(channel, 0);
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
        return pager_undeliverable(pager, block, page, err);
    }
    channel->built += PS_PAGE_SIZE;
    return PS_OK;
}

/* From here on these pages are on their way and are never sent again. */
void pager_start_transfer(ps_pager *pager, struct channel *channel,
                          uint32_t block, uint64_t page, bool needs_update,
                          enum cause cause, uint64_t asked_at)
{
    const struct ram *ram = &pager->ram[block];

    mark_sent(pager, ram->first + page, ram->host_pages);
    pager_account(pager, ram, needs_update);
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

/* Append the next pages of the host page under way, *pages at most; *pages is
   what is left of that. */
int pager_go_on(ps_pager *pager, struct channel *channel, uint64_t *pages,
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
void pager_submit(ps_pager *pager, struct channel *channel)
{
    if (!transfer_active(channel)) {
        pager_end_section(pager, channel);
    }
    channel->out = channel->buffer;
    channel->out_length = channel->built;
    channel->out_at = 0;
    channel->built = 0;
}

/* --------------------------------------------------------------- writing */

/* Write what is submitted; *done when nothing of it is left. */
int pager_flush(ps_pager *pager, struct channel *channel, bool *done,
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
            r = pager_receive(pager, err);
            return r ? r : pager_closed(pager, err);
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
uint64_t pager_in_flight(const struct channel *channel)
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
void pager_set_bound(ps_pager *pager, uint64_t bound)
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
void pager_set_usual_bound(ps_pager *pager)
{
    uint64_t bound = pager->options.in_flight_bytes;

    if (get_state(pager) == PS_PAGER_FINISHING && bound < FINISH_IN_FLIGHT) {
        bound = FINISH_IN_FLIGHT;
    }
    pager_set_bound(pager, bound);
}

/* Pages that may be sent without being asked for, now; 0: wait. */
uint64_t pager_room(ps_pager *pager)
{
    uint64_t used = pager_in_flight(&pager->main);
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
