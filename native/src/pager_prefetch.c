/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Pages that will be touched next. */
#include "pager.h"

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

void pager_plan_prefetch(ps_pager *pager, const struct ram *ram, uint64_t page,
                         uint64_t entry)
{
    if (pager->options.prefetch == PS_PREFETCH_PHYSICAL &&
        pager->options.prefetch_window > 0 && ram->host_pages == 1 &&
        ps_entry_class(entry) == PS_CLASS_DATA) {
        push_window(pager, ps_entry_value(entry) >> pager->image->block_shift,
                    ram->first + page);
    }
}

/* -------------------------------------------------------------- prefetch */

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
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
            r = pager_wanted(pager, global, &block, &page, &yes, err);
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
int pager_send_prefetch(ps_pager *pager, uint64_t pages, ps_error *err)
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

        r = pager_wanted(pager, global, &block, &page, &yes, err);
        if (r || !yes) {
            continue;
        }
        if (!begun) {
            pager_begin_section(pager, channel, QEMU_VM_SECTION_PART);
            begun = true;
        }
        pager_start_transfer(pager, channel, block, page, true,
                             CAUSE_PREFETCHED, 0);
        r = pager_go_on(pager, channel, &pages, !window->whole, err);
    }
    if (r) {
        return r;
    }
    if (window->next == window->count) {
        pop_window(pager);
    }
    if (begun) {
        pager_submit(pager, channel);
    }
    return PS_OK;
}
