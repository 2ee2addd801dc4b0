/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Pages that will be touched next: the neighbours of a fault.
 *
 * A faulting page is mapped back to the guest-virtual pages that map it, and
 * the pages around these are translated to pages of RAM; both through the
 * virtual runs of the snapshot. What no address space maps has its
 * neighbours in the file, which is written in locality order. How far to go,
 * and in which direction, is the predictor's.
 *
 * A fault is looked at when its page is with the socket, one fault for each
 * look at the return path. What the snapshot says of address spaces is a
 * hint; where it is damaged, neighbours are those in the file.
 */
#include "pager.h"

/* Mappings of a page that are compared. */
#define MAPPINGS 16u
/* Runs that are passed to take one step of a stride. */
#define RUN_STEPS 160u
/* Pages of zeros between two runs that are passed over. */
#define GAP_PAGES 16u
/* Places that are looked at for each page that is to be sent. */
#define LOOKS 4u
/* What may go before a request is looked for: 93 us of QEMU's time, and 120 us
   of decoding. */
#define URGENT_PAGES 32u
#define URGENT_READS 2u
/* A raw block is read whole for a window of so many pages. */
#define WHOLE 4u

/* Lines of the predictor; address spaces come after these. */
enum {
    LINE_PHYSICAL,
    LINE_FILE,
    LINE_SPACES,
};

/* A place on a line, from which one goes on. */
struct cursor {
    uint32_t kind; /* a ps_prefetch_kind */
    uint64_t line;
    uint64_t at; /* virtual or global page number, or canonical number */
    /* Of a virtual one: */
    uint64_t first_run; /* of the space */
    uint64_t end_run;
    uint64_t number; /* of the run it is in */
    ps_format_run run;
};

static uint64_t since_began(const ps_pager *pager, uint64_t at)
{
    return at > pager->began ? at - pager->began : 0;
}

void pager_trace(ps_pager *pager, uint64_t global, uint64_t asked_at,
                 uint8_t flags)
{
    ps_trace_add(&pager->trace, &(ps_trace_record){
                                    .time = since_began(pager, asked_at),
                                    .address = UINT64_MAX,
                                    .page = (uint32_t)global,
                                    .space = UINT32_MAX,
                                    .kind = PS_TRACE_NONE8,
                                    .flags = flags,
                                });
}

static struct pending take_pending(struct prefetch *prefetch)
{
    struct pending fault = prefetch->pending[prefetch->pending_head];

    prefetch->pending_head = (prefetch->pending_head + 1) % PENDING;
    prefetch->pending_count--;
    return fault;
}

void pager_plan_prefetch(ps_pager *pager, uint64_t global, uint64_t asked_at)
{
    struct prefetch *prefetch = &pager->prefetch;

    if (pager->options.prefetch == PS_PREFETCH_NONE && pager->trace.fd < 0) {
        return;
    }
    if (prefetch->pending_count == PENDING) {
        struct pending oldest = take_pending(prefetch);

        pager_trace(pager, oldest.global, oldest.asked_at, 0);
    }
    prefetch->pending[(prefetch->pending_head + prefetch->pending_count++) %
                      PENDING] = (struct pending){asked_at, (uint32_t)global};
}

bool pager_prefetch_pending(const ps_pager *pager)
{
    return pager->prefetch.pending_count > 0 || pager->prefetch.count > 0;
}

/* ------------------------------------------------------------- neighbours */

/* Of several mappings the one at which a fault was foreseen, else one of the
   space that faulted last, else the first. */
static const ps_page_mapping *
choose(const ps_pager *pager, const ps_page_mapping *mappings, size_t count)
{
    const struct prefetch *prefetch = &pager->prefetch;
    const ps_page_mapping *best = &mappings[0];

    for (size_t i = 0; i < count; i++) {
        if (ps_predictor_expects(&prefetch->predictor,
                                 LINE_SPACES + mappings[i].space,
                                 mappings[i].address >> PS_PAGE_BITS)) {
            return &mappings[i];
        }
        if (mappings[i].space == prefetch->space) {
            best = &mappings[i];
        }
    }
    return best;
}

/* Point the cursor at a mapping of the page; false: there is none. */
static int find_virtual(ps_pager *pager, uint64_t global, struct cursor *cursor,
                        bool *found, ps_error *err)
{
    ps_page_mapping mappings[MAPPINGS];
    const ps_page_mapping *mapping;
    ps_space_info space;
    size_t count;
    int r = ps_image_find_mappings(pager->image, global, mappings, MAPPINGS,
                                   &count, err);

    *found = !r && count > 0;
    if (!*found) {
        return r;
    }
    mapping = choose(pager, mappings, count);
    r = ps_image_space(pager->image, mapping->space, &space, err);
    if (r) {
        return r;
    }
    pager->prefetch.space = mapping->space;
    *cursor = (struct cursor){
        .kind = PS_KIND_VIRTUAL,
        .line = LINE_SPACES + (uint64_t)mapping->space,
        .at = mapping->address >> PS_PAGE_BITS,
        .first_run = space.first_run,
        .end_run = space.first_run + space.run_count,
        .number = mapping->run,
    };
    return ps_image_run(pager->image, mapping->run, &cursor->run, err);
}

static int find_place(ps_pager *pager, uint64_t global, uint64_t entry,
                      struct cursor *cursor, ps_error *err)
{
    struct prefetch *prefetch = &pager->prefetch;

    if (pager->options.prefetch == PS_PREFETCH_VIRTUAL) {
        if (!prefetch->spaces_unusable) {
            bool found;

            if (find_virtual(pager, global, cursor, &found, err)) {
                prefetch->spaces_unusable = true;
            } else if (found) {
                return PS_OK;
            }
        }
        if (ps_entry_class(entry) == PS_CLASS_DATA) {
            *cursor = (struct cursor){.kind = PS_KIND_FILE,
                                      .line = LINE_FILE,
                                      .at = ps_entry_value(entry)};
            return PS_OK;
        }
    }
    *cursor = (struct cursor){
        .kind = PS_KIND_PHYSICAL, .line = LINE_PHYSICAL, .at = global};
    return PS_OK;
}

/*
 * Runs leave pages of zeros out where these are not contiguous, so a short
 * gap is no end: *global is PS_NOWHERE in it. A longer one is a hole.
 */
static int step_virtual(ps_pager *pager, struct cursor *cursor, uint64_t target,
                        uint64_t *global, bool *there, ps_error *err)
{
    bool forward = target > cursor->at;

    for (uint32_t i = 0; i < RUN_STEPS; i++) {
        uint64_t first = cursor->run.address >> PS_PAGE_BITS;
        uint64_t last = first + cursor->run.pages - 1;
        int r;

        if (target >= first && target <= last) {
            *global = cursor->run.first + (target - first);
            *there = true;
            return PS_OK;
        }
        if (forward ? target < first : target > last) {
            *global = PS_NOWHERE;
            *there = (forward ? first - target : target - last) <= GAP_PAGES;
            return PS_OK;
        }
        if (cursor->number ==
            (forward ? cursor->end_run - 1 : cursor->first_run)) {
            return PS_OK;
        }
        cursor->number += forward ? 1 : UINT64_MAX;
        r = ps_image_run(pager->image, cursor->number, &cursor->run, err);
        if (r) {
            return r;
        }
    }
    return PS_OK;
}

/* One stride on; *there is false at the end of what is mapped, or of RAM. */
static int step(ps_pager *pager, struct cursor *cursor, int64_t stride,
                uint64_t *global, bool *there, ps_error *err)
{
    uint64_t target = cursor->at + (uint64_t)stride;
    uint32_t block, other;
    uint64_t page;
    int r = PS_OK;

    *there = false;
    switch (cursor->kind) {
    case PS_KIND_VIRTUAL:
        r = step_virtual(pager, cursor, target, global, there, err);
        break;
    case PS_KIND_FILE:
        if (target < pager->image->canonical_pages) {
            r = ps_image_owner(pager->image, target, global, err);
            *there = !r;
        }
        break;
    default:
        *global = target;
        *there = ps_image_place(pager->image, cursor->at, &block, &page) &&
                 ps_image_place(pager->image, target, &other, &page) &&
                 block == other;
        break;
    }
    cursor->at = target;
    return r;
}

/* ---------------------------------------------------------------- windows */

/* To the place behind a window, where a fault says that it was right: not one
   of zeros, which are not on this line. */
static int pass_zeros(ps_pager *pager, struct cursor *cursor, int64_t stride,
                      ps_error *err)
{
    uint64_t global = PS_NOWHERE;

    for (uint32_t i = 0; i <= GAP_PAGES && global == PS_NOWHERE; i++) {
        bool there;
        int r = step(pager, cursor, stride, &global, &there, err);

        if (r || !there) {
            return r;
        }
    }
    return PS_OK;
}

/* Fill a window with what is to be sent; *ahead is the place where it ends. */
static int fill_window(ps_pager *pager, struct cursor *cursor,
                       const ps_prediction *prediction, struct window *window,
                       ps_error *err)
{
    uint32_t looks = LOOKS * prediction->pages;

    window->kind = cursor->kind;
    window->count = 0;
    window->next = 0;
    while (window->count < prediction->pages && looks-- > 0) {
        uint64_t global, page;
        uint32_t block;
        bool there, yes;
        int r = step(pager, cursor, prediction->stride, &global, &there, err);

        if (r || !there) {
            return r;
        }
        if (global == PS_NOWHERE) {
            continue;
        }
        r = pager_wanted(pager, global, &block, &page, &yes, err);
        if (r) {
            return r;
        }
        if (yes && pager->ram[block].host_pages == 1) {
            window->pages[window->count++] = (uint32_t)global;
        }
    }
    return pass_zeros(pager, cursor, prediction->stride, err);
}

static struct window *push_window(struct prefetch *prefetch)
{
    prefetch->top = (prefetch->top + 1) % WINDOWS;
    if (prefetch->count < WINDOWS) {
        prefetch->count++;
    }
    return &prefetch->windows[prefetch->top];
}

/* A fault inside a window that waits: it is right. The newest from here on;
   false: it does not wait any more. */
static bool trust_window(struct prefetch *prefetch, uint64_t record)
{
    for (uint32_t i = 0; i < prefetch->count; i++) {
        uint32_t at = (prefetch->top + WINDOWS - i) % WINDOWS;

        if (prefetch->windows[at].record == record) {
            struct window window = prefetch->windows[at];

            for (; i > 0; i--) {
                uint32_t above = (at + 1) % WINDOWS;

                prefetch->windows[at] = prefetch->windows[above];
                at = above;
            }
            window.proven = true;
            window.urgent = true;
            prefetch->windows[at] = window;
            return true;
        }
    }
    return false;
}

static void pop_window(struct prefetch *prefetch)
{
    prefetch->top = (prefetch->top + WINDOWS - 1) % WINDOWS;
    prefetch->count--;
}

static void trace_fault(ps_pager *pager, const struct pending *fault,
                        uint64_t entry, const struct cursor *place,
                        const ps_prediction *prediction, uint32_t pages)
{
    bool is_virtual = place && place->kind == PS_KIND_VIRTUAL;

    ps_trace_add(
        &pager->trace,
        &(ps_trace_record){
            .time = since_began(pager, fault->asked_at),
            .address = is_virtual ? place->at << PS_PAGE_BITS : UINT64_MAX,
            .page = fault->global,
            .space =
                is_virtual ? (uint32_t)(place->line - LINE_SPACES) : UINT32_MAX,
            .stride = (int16_t)(prediction ? prediction->stride : 0),
            .window = (uint16_t)pages,
            .kind = place ? (uint8_t)place->kind : PS_TRACE_NONE8,
            .flags = (uint8_t)((entry_needs_update(entry) ? 0 : PS_TRACE_ZERO) |
                               (prediction && prediction->confirms
                                    ? PS_TRACE_CONFIRMS
                                    : 0)),
        });
}

/* Look at one fault: choose what follows it. */
static int plan(ps_pager *pager, const struct pending *fault, ps_error *err)
{
    struct prefetch *prefetch = &pager->prefetch;
    const struct ps_prediction_record *right;
    ps_prediction prediction;
    struct cursor place, cursor;
    struct window *window;
    uint64_t entry;
    int r = ps_image_entry(pager->image, fault->global, &entry, err);

    if (r) {
        return r;
    }
    if (pager->options.prefetch == PS_PREFETCH_NONE) {
        trace_fault(pager, fault, entry, NULL, NULL, 0);
        return PS_OK;
    }
    r = find_place(pager, fault->global, entry, &place, err);
    if (r) {
        return r;
    }
    prediction =
        ps_predictor_fault(&prefetch->predictor, place.line, place.at, &right);
    if (right && right->sent > 0) {
        ps_counter_add(&pager->stats.prefetch[right->kind].windows_right, 1);
        ps_counter_add(&pager->stats.prefetch[right->kind].pages_right,
                       right->sent);
    }
    if (prediction.covered) {
        if (trust_window(prefetch, prediction.by)) {
            trace_fault(pager, fault, entry, &place, &prediction, 0);
            return PS_OK;
        }
        /* That one had to give way, or read no further: again, from here. */
        prediction.pages =
            (uint32_t)min_u64(URGENT_PAGES, prefetch->predictor.largest);
        prediction.confirms = true;
        prediction.soon = true;
    }
    window = push_window(prefetch);
    cursor = place;
    r = fill_window(pager, &cursor, &prediction, window, err);
    if (r && cursor.kind == PS_KIND_VIRTUAL) {
        prefetch->spaces_unusable = true;
        r = PS_OK;
    }
    if (r) {
        pop_window(prefetch);
        return r;
    }
    window->proven = prediction.soon;
    window->urgent = prediction.soon;
    window->record =
        ps_predictor_window(&prefetch->predictor, place.line, place.at,
                            &prediction, cursor.at, place.kind);
    trace_fault(pager, fault, entry, &place, &prediction, window->count);
    if (window->count == 0) {
        pop_window(prefetch);
    } else {
        ps_counter_add(&pager->stats.prefetch[window->kind].windows, 1);
    }
    return PS_OK;
}

/* One batch of the newest window; a further block is decoded for the next. */
static int send_window(ps_pager *pager, struct window *window, uint64_t pages,
                       ps_error *err)
{
    struct channel *channel = &pager->main;
    bool single = window->count < WHOLE;
    uint32_t reads = 0;
    bool begun = false;
    uint32_t sent = 0;

    while (pages > 0 && window->next < window->count) {
        uint64_t global = window->pages[window->next];
        uint64_t page;
        uint32_t block;
        bool yes, storage;
        int r = pager_wanted(pager, global, &block, &page, &yes, err);

        if (!r && yes) {
            r = pager_needs_storage(pager, global, &storage, err);
        }
        if (r) {
            return r;
        }
        if (!yes) {
            window->next++;
            continue;
        }
        reads += storage;
        if (storage && !window->proven) {
            window->next = window->count; /* a guess is worth no reading */
            break;
        }
        if (storage && begun && reads > (window->urgent ? URGENT_READS : 1u)) {
            break; /* look for requests before the next */
        }
        if (!begun) {
            pager_begin_section(pager, channel, QEMU_VM_SECTION_PART);
            begun = true;
        }
        pager_start_transfer(pager, channel, block, page, true,
                             CAUSE_PREFETCHED, 0);
        r = pager_go_on(pager, channel, &pages, single, err);
        if (r) {
            return r;
        }
        window->next++;
        sent++;
    }
    ps_predictor_sent(&pager->prefetch.predictor, window->record, sent);
    ps_counter_add(&pager->stats.prefetch[window->kind].pages, sent);
    if (begun) {
        pager_submit(pager, channel);
    }
    return PS_OK;
}

int pager_plan_window(ps_pager *pager, ps_error *err)
{
    struct pending fault;

    if (pager->prefetch.pending_count == 0) {
        return PS_OK;
    }
    fault = take_pending(&pager->prefetch);
    return plan(pager, &fault, err);
}

/*
 * A guest that walks faults again as soon as it has its page, so there would
 * always be a request that goes first, and no window would ever be sent. What
 * that request is for is the window's first page.
 */
bool pager_prefetch_urgent(const ps_pager *pager)
{
    const struct prefetch *prefetch = &pager->prefetch;
    const struct window *window = &prefetch->windows[prefetch->top];

    return prefetch->count > 0 && window->urgent;
}

int pager_send_prefetch(ps_pager *pager, uint64_t pages, ps_error *err)
{
    struct prefetch *prefetch = &pager->prefetch;
    struct window *window = &prefetch->windows[prefetch->top];
    int r;

    if (prefetch->count == 0) {
        return PS_OK;
    }
    if (window->urgent && pages > URGENT_PAGES) {
        pages = URGENT_PAGES;
    }
    r = send_window(pager, window, pages, err);
    window->urgent = false;
    if (!r && window->next == window->count) {
        pop_window(prefetch);
    }
    return r;
}

int pager_init_prefetch(ps_pager *pager, ps_error *err)
{
    uint32_t largest = pager->options.prefetch_window;
    struct prefetch *prefetch = &pager->prefetch;

    prefetch->space = UINT64_MAX;
    prefetch->spaces_unusable = ps_image_run_count(pager->image) == 0;
    return ps_predictor_init(&prefetch->predictor,
                             largest < PS_MAX_WINDOW ? largest : PS_MAX_WINDOW,
                             err);
}

void pager_end_prefetch(ps_pager *pager)
{
    while (pager->prefetch.pending_count > 0) {
        struct pending fault = take_pending(&pager->prefetch);

        pager_trace(pager, fault.global, fault.asked_at, 0);
    }
}

void pager_deinit_prefetch(ps_pager *pager)
{
    ps_predictor_deinit(&pager->prefetch.predictor);
}
