/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Loading what nobody has asked for, forward through the file. */
#include "pager.h"

/* A batch stops before a further block is decoded once it has that many. */
#define DECODE_PAGES 16u
/* Work between two looks at the socket when nothing is found to send. */
#define COLLECT_LEAVES 4u
#define WALK_STEPS 2048u
#define WALK_BLOCKS 128u
/* The rate lets so much time be saved up, and waits for so many pages. */
#define RATE_BURST MS(50)
#define RATE_PAGES 4u

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
            r = pager_wanted(pager, global, &block, &page, yes, err);
        }
    }
    return r;
}

/* Ask for the blocks that come next; a bounded look. */
static int fill_read_ahead(ps_pager *pager, ps_error *err)
{
    struct background *background = &pager->background;
    uint32_t room = ps_read_ahead_room(pager->ahead);
    uint32_t looks = WALK_BLOCKS;
    int r = PS_OK;

    while (!r && room > 0 && looks-- > 0 &&
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

/* Go to the next locality block; false: there is none, or none was found in a
   bounded look. */
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
                r = pager_wanted(pager, *global, &block, &page, found, err);
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
            r = pager_wanted(pager, *global, &block, &page, found, err);
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
                if (background->next_block >= pager->image->locality_blocks) {
                    background->phase = PHASE_SWEEP;
                }
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
            r = pager_wanted(pager, *global, &block, &page, found, err);
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

/* One batch of at most that many pages. */
int pager_send_background(ps_pager *pager, uint64_t pages, ps_error *err)
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
        r = pager_needs_storage(pager, global, &storage, err);
        if (r) {
            return r;
        }
        if (storage && had >= DECODE_PAGES) {
            break;
        }
        if (!ps_image_place(pager->image, global, &block, &page)) {
            break; /* cannot be: pager_wanted() found its place */
        }
        ram = &pager->ram[block];
        page &= ~(ram->host_pages - 1);
        if (!begun) {
            pager_begin_section(pager, channel, QEMU_VM_SECTION_PART);
            begun = true;
        }
        pager_start_transfer(pager, channel, block, page, true,
                             CAUSE_BACKGROUND, 0);
        r = pager_go_on(pager, channel, &pages, false, err);
        if (r) {
            return r;
        }
        had += was - pages;
    }
    if (begun) {
        pager_submit(pager, channel);
    }
    return PS_OK;
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
bool pager_background_due(ps_pager *pager)
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
uint64_t pager_background_pages(const ps_pager *pager, uint64_t pages)
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

/* Room for the lists of shared pages; touched as they fill. */
int pager_init_background(ps_pager *pager, ps_error *err)
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
