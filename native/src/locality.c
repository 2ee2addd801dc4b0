/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What follows from the runs: which pages are shared, where a page is mapped,
   and the order of all pages. */
#include "spaces.h"

uint64_t ps_spaces_of_run(const ps_spaces *spaces, uint64_t run)
{
    uint64_t low = 0, high = spaces->space_count;

    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2;

        if (spaces->spaces[middle].first_run <= run) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

uint64_t ps_spaces_run_at(const ps_spaces *spaces, uint64_t space,
                          uint64_t address)
{
    const ps_space *s = &spaces->spaces[space];
    uint64_t low = s->first_run, high = s->first_run + s->run_count;

    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        const ps_virtual_run *run = &spaces->runs[middle];

        if (run->address + ((uint64_t)run->pages << PS_PAGE_BITS) - 1 <
            address) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* -------------------------------------------------------------- sharing */

/* One page of a leaf while its runs are looked at, in the order of spaces. */
typedef struct leaf_page {
    uint32_t owner; /* the first user space that maps it + 1 */
    uint32_t last;  /* the last space + 1 */
    bool shared;
} leaf_page;

static void count_page(ps_spaces *spaces, uint32_t number, leaf_page *page)
{
    ps_space *space = &spaces->spaces[number];

    if (page->last == number + 1) {
        return; /* mapped twice */
    }
    page->last = number + 1;
    space->pages++;
    if (page->owner == 0) {
        space->exclusive++;
        if (space->kind == PS_SPACE_USER) {
            page->owner = number + 1;
        }
        return;
    }
    space->shared++;
    if (space->kind == PS_SPACE_USER && !page->shared) {
        page->shared = true;
        spaces->spaces[page->owner - 1].exclusive--;
        spaces->spaces[page->owner - 1].shared++;
    }
}

static void count_leaf(ps_spaces *spaces, const ps_guest_memory *memory,
                       const ps_run_ref *refs, uint64_t count)
{
    leaf_page pages[PS_LEAF_PAGES] = {{0, 0, false}};

    for (uint64_t i = 0; i < count; i++) {
        const ps_virtual_run *run = &spaces->runs[refs[i].run];
        uint32_t space = (uint32_t)ps_spaces_of_run(spaces, refs[i].run);

        for (uint32_t p = 0; p < run->pages; p++) {
            if (ps_bit_test(memory->used, run->first + p)) {
                count_page(spaces, space,
                           &pages[(run->first + p) % PS_LEAF_PAGES]);
            }
        }
    }
}

static int ref_order(const void *a, const void *b)
{
    const ps_run_ref *x = a, *y = b;

    if (x->first != y->first) {
        return x->first < y->first ? -1 : 1;
    }
    return (x->run > y->run) - (x->run < y->run);
}

/* Sorted by leaf in linear time; within a leaf they are few. */
int ps_spaces_index(ps_spaces *spaces, const ps_guest_memory *memory,
                    ps_error *err)
{
    uint64_t *at = calloc(spaces->leaves + 1, sizeof(*at));
    ps_run_ref *refs =
        malloc((spaces->run_count ? spaces->run_count : 1) * sizeof(*refs));

    spaces->leaf_refs = at;
    spaces->refs = refs;
    if (!at || !refs) {
        return ps_fail_errno(err, PS_NOWHERE, "index of mappings");
    }
    for (uint64_t i = 0; i < spaces->run_count; i++) {
        at[spaces->runs[i].first / PS_LEAF_PAGES]++;
    }
    for (uint64_t i = 0, sum = 0; i <= spaces->leaves; i++) {
        uint64_t count = at[i];

        at[i] = sum;
        sum += count;
    }
    for (uint64_t i = 0; i < spaces->run_count; i++) {
        uint32_t first = spaces->runs[i].first;

        refs[at[first / PS_LEAF_PAGES]++] = (ps_run_ref){first, (uint32_t)i};
    }
    /* at[i] is now where leaf i ends. */
    memmove(at + 1, at, spaces->leaves * sizeof(*at));
    at[0] = 0;
    for (uint64_t i = 0; i < spaces->leaves; i++) {
        uint64_t count = at[i + 1] - at[i];

        if (count) {
            count_leaf(spaces, memory, refs + at[i], count);
            qsort(refs + at[i], count, sizeof(*refs), ref_order);
        }
    }
    return PS_OK;
}

/* ---------------------------------------------------------------- order */

typedef struct placer {
    ps_spaces *spaces;
    const ps_guest_memory *memory;
    uint64_t *placed; /* a bit for each page */
    uint64_t *free_pages;
} placer;

static void place(placer *p, uint64_t global, uint32_t source)
{
    if (ps_bit_test(p->memory->used, global) &&
        !ps_bit_test(p->placed, global)) {
        ps_bit_set(p->placed, global);
        p->spaces->order[p->spaces->order_count++] = (uint32_t)global;
        p->spaces->stats.sources[source]++;
    }
}

static void place_space(placer *p, const ps_space *space, uint32_t source)
{
    const ps_virtual_run *run = &p->spaces->runs[space->first_run];

    for (uint64_t i = 0; i < space->run_count; i++, run++) {
        for (uint32_t k = 0; k < run->pages; k++) {
            place(p, run->first + k, source);
        }
    }
}

/* Those with most memory of their own first; then by root. */
static int space_order(const void *a, const void *b)
{
    const ps_space *x = *(ps_space *const *)a, *y = *(ps_space *const *)b;

    if (x->exclusive != y->exclusive) {
        return x->exclusive > y->exclusive ? -1 : 1;
    }
    return (x->root > y->root) - (x->root < y->root);
}

static int place_users(placer *p, ps_error *err)
{
    ps_spaces *spaces = p->spaces;
    PS_AUTOFREE ps_space **by_size =
        malloc((spaces->space_count + 1) * sizeof(*by_size));
    size_t count = 0;

    if (!by_size) {
        return ps_fail_errno(err, PS_NOWHERE, "order of pages");
    }
    for (uint64_t i = 0; i < spaces->space_count; i++) {
        if (spaces->spaces[i].kind == PS_SPACE_USER) {
            by_size[count++] = &spaces->spaces[i];
        }
    }
    qsort(by_size, count, sizeof(*by_size), space_order);
    for (size_t i = 0; i < count; i++) {
        place_space(p, by_size[i], PS_SOURCE_USER);
    }
    return PS_OK;
}

/* What is left of 64 bytes for each used page: a file's page takes 16, and
   while they are sorted 16 more. */
static uint64_t file_page_limit(const ps_spaces *spaces)
{
    uint64_t have = 64 * spaces->stats.used + (UINT64_C(4) << 20);
    uint64_t take =
        spaces->run_count * (sizeof(ps_virtual_run) + sizeof(ps_run_ref)) +
        spaces->stats.used * sizeof(uint32_t);

    return take < have ? (have - take) / (2 * sizeof(ps_file_page)) : 0;
}

static int place_files(placer *p, const ps_sample *samples, size_t sample_count,
                       ps_error *err)
{
    PS_AUTOFREE ps_file_page *files = NULL;
    uint64_t count = 0;
    int r;

    r = ps_page_structs_read(p->spaces, p->memory, samples, sample_count,
                             p->placed, file_page_limit(p->spaces), &files,
                             &count, p->free_pages, err);
    for (uint64_t i = 0; !r && i < count; i++) {
        place(p, files[i].global, PS_SOURCE_FILE);
    }
    return r;
}

/* What is left of 64 pages. */
static void place_word(placer *p, uint64_t word, uint64_t mask, uint32_t source)
{
    uint64_t left = p->memory->used[word] & ~p->placed[word] & mask;

    for (; left; left &= left - 1) {
        place(p, word * 64 + (uint64_t)__builtin_ctzll(left), source);
    }
}

static void place_rest(placer *p)
{
    const ps_spaces *spaces = p->spaces;
    uint64_t words = spaces->leaves * PS_LEAF_PAGES / 64;

    if (spaces->space_count) {
        const ps_space *last = &spaces->spaces[spaces->space_count - 1];

        if (last->kind == PS_SPACE_KERNEL) {
            place_space(p, last, PS_SOURCE_KERNEL);
        }
    }
    for (uint64_t i = 0; i < words; i++) {
        place_word(p, i, ~p->free_pages[i], PS_SOURCE_REST);
    }
    for (uint64_t i = 0; i < words; i++) {
        place_word(p, i, p->free_pages[i], PS_SOURCE_FREE);
    }
}

int ps_spaces_order(ps_spaces *spaces, const ps_guest_memory *memory,
                    const ps_sample *samples, size_t sample_count,
                    ps_error *err)
{
    placer p = {spaces, memory, NULL, NULL};
    uint64_t words = spaces->leaves * PS_LEAF_PAGES / 64 + 1;
    int r;

    spaces->order = malloc((spaces->stats.used + 1) * sizeof(uint32_t));
    p.placed = calloc(words, sizeof(uint64_t));
    p.free_pages = calloc(words, sizeof(uint64_t));
    if (!spaces->order || !p.placed || !p.free_pages) {
        free(p.placed);
        free(p.free_pages);
        return ps_fail_errno(err, PS_NOWHERE, "order of pages");
    }
    r = place_users(&p, err);
    r = r ? r : place_files(&p, samples, sample_count, err);
    if (!r) {
        place_rest(&p);
    }
    free(p.placed);
    free(p.free_pages);
    return r;
}
