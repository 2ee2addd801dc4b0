/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * x86-64. Linux (and others) give each process a topmost table of its own
 * whose upper 256 entries, the kernel half, are copies of one another. The
 * table in CR3 shows what they are; every used page with the same upper half
 * is a candidate. With page-table isolation (KPTI) a process has two tables
 * side by side, and a CPU in user mode has the odd one in CR3, which maps
 * next to nothing of the kernel: then its sibling is the model. The odd ones
 * do not match it, so that a pair counts once.
 *
 * Which candidates are live: Linux clears the user half of a topmost table
 * entry by entry when a process ends (free_pgtables), and leaves the kernel
 * half in the page, which is free then. So a dead one maps nothing; nor do
 * the kernel's own (init_mm, poking_mm, the trampoline's, EFI's). A live one
 * maps at least one used page for user mode. One whose tables all belong to
 * another space is a copy of it.
 *
 * aarch64. There is no kernel half to match (TTBR1 is apart), so a candidate
 * is told by its form: a used page that has only table descriptors, of used
 * pages in RAM. It is a live root if its whole tree is in order, with
 * nothing but tables down to where leaves may be, and ends in used pages, all
 * of them for user mode: a descriptor of a table has no attributes set, one of
 * a user page has several (walk.c), so a tree has exactly one depth at which it
 * is in order. A table of a lower level, taken for a root, has leaves where
 * tables should be. As a last check no root may be a table of another one.
 * Dead ones are all zero here, since they had no kernel half.
 *
 * riscv64. The current tables only.
 */
#include "spaces.h"

#define HALF_ENTRIES (PS_TABLE_ENTRIES / 2)
#define HALF_BYTES (HALF_ENTRIES * sizeof(uint64_t))
/*
 * Entries in which a kernel half may differ: KPTI's LDT slot, self-references
 * of other kernels, top-level entries that old ones fill in when they fault.
 * In guests with Linux 6.1, 4 and 5 levels, with and without KPTI, all 114
 * candidates had the same half bit for bit.
 */
#define MAX_DIFFERENCES 4u
#define X86_ACCESSED_DIRTY UINT64_C(0x60)
#define X86_NX (UINT64_C(1) << 63)
#define KPTI_SIBLING UINT64_C(0x1000)

#define MAX_SPACES 65536u
/* What a guest without much in it may still cost. */
#define SPARE_TABLES UINT64_C(1024)
#define SPARE_RUNS UINT64_C(65536)
/* To see that as many leaves have no used page takes as long as one table. */
#define EMPTY_LEAVES 16u

typedef struct root {
    uint64_t address;
    bool current; /* a CPU is in it */
} root;

typedef struct finder {
    const ps_cpu_paging *cpus;
    size_t cpu_count;
    const ps_guest_memory *memory;
    ps_spaces *out;
    uint32_t architecture;
    ps_paging paging;             /* of the CPU that is the model */
    uint64_t model[HALF_ENTRIES]; /* x86-64: the kernel half */
    size_t model_count;           /* entries of it that are not 0 */
    size_t last;                  /* the last one of them */
    uint64_t page[PS_TABLE_ENTRIES];

    root *roots;
    size_t root_count;
    size_t root_capacity;
    size_t space_capacity;

    uint64_t *tables; /* a bit for each page: a table of a live space */
    uint32_t *trail;  /* the bits that the last walk has set */
    uint64_t budget;
    uint64_t empty_leaves;
    ps_walk walk;

    /* The run that grows: its pages, and those with zero pages at its end. */
    ps_virtual_run open;
    uint32_t reach;
    uint64_t pages; /* used ones of this space so far */

    ps_sample samples[PS_MAX_SAMPLES];
    size_t sample_count;
    uint64_t sample_step;
    uint64_t sample_seen;
} finder;

/* ----------------------------------------------------------------- runs */

/* The open run is complete; zero pages at its end are not part of it. */
static void close_run(finder *f)
{
    ps_spaces *out = f->out;

    if (f->open.pages == 0) {
        return;
    }
    if (out->run_count < out->max_runs) {
        out->runs[out->run_count++] = f->open;
    } else {
        out->stats.runs_dropped++;
        out->notes |= PS_NOTE_MEMORY;
    }
    f->open.pages = 0;
}

static void sample(finder *f, uint64_t address, uint64_t physical)
{
    if (f->sample_seen++ % f->sample_step) {
        return;
    }
    if (f->sample_count == PS_MAX_SAMPLES) { /* every second one, from now on */
        for (size_t i = 0; i < PS_MAX_SAMPLES / 2; i++) {
            f->samples[i] = f->samples[2 * i];
        }
        f->sample_count = PS_MAX_SAMPLES / 2;
        f->sample_step *= 2;
    }
    f->samples[f->sample_count++] =
        (ps_sample){physical >> PS_PAGE_BITS, address >> PS_PAGE_BITS};
}

static void add_page(finder *f, uint64_t address, uint64_t global,
                     uint32_t flags)
{
    ps_virtual_run *run = &f->open;
    bool used = ps_bit_test(f->memory->used, global);

    if (run->pages && global == run->first + (uint64_t)f->reach &&
        global % PS_LEAF_PAGES != 0 &&
        address == run->address + ((uint64_t)f->reach << PS_PAGE_BITS)) {
        f->reach++;
    } else {
        close_run(f);
        if (!used) {
            return;
        }
        run->address = address;
        run->first = (uint32_t)global;
        run->flags = 0;
        f->reach = 1;
    }
    run->flags |= (uint16_t)flags;
    if (used) {
        run->pages = (uint16_t)f->reach;
        f->pages++;
    }
}

static bool is_empty_leaf(const ps_guest_memory *memory, uint64_t leaf)
{
    const uint64_t *words = &memory->used[leaf * PS_LEAF_PAGES / 64];

    for (size_t i = 0; i < PS_LEAF_PAGES / 64; i++) {
        if (words[i]) {
            return false;
        }
    }
    return true;
}

/* The part of a mapping that is RAM, leaf by leaf: a large one costs as much
   of the budget as the tables that it saves would have, in terms of time. */
static void add_mapping(finder *f, const ps_mapping *mapping)
{
    const ps_guest_memory *memory = f->memory;
    uint64_t done = 0;

    while (done < mapping->bytes) {
        uint64_t physical = mapping->physical + done, next, global, end;
        const ps_guest_range *range =
            ps_guest_range_at(memory, physical, &next);

        if (!range) {
            if (next - physical >= mapping->bytes - done) {
                return;
            }
            done += next - physical;
            continue;
        }
        if (physical == range->address) {
            close_run(f); /* the page before it is elsewhere */
        }
        global = range->first + ((physical - range->address) >> PS_PAGE_BITS);
        end = (global | (PS_LEAF_PAGES - 1)) + 1;
        if (end > range->first + range->pages) {
            end = range->first + range->pages;
        }
        if (mapping->flags & PS_MAP_LARGE) {
            bool empty = is_empty_leaf(memory, global / PS_LEAF_PAGES);

            if (f->budget == 0) {
                f->walk.stats.exhausted = true;
                return;
            }
            f->budget -= !empty || f->empty_leaves++ % EMPTY_LEAVES == 0;
            if (empty) {
                done += (end - global) << PS_PAGE_BITS;
                continue;
            }
        }
        for (; global < end && done < mapping->bytes; global++) {
            add_page(f, mapping->address + done, global, mapping->flags);
            done += PS_PAGE_SIZE;
        }
    }
    if ((mapping->flags & (PS_MAP_USER | PS_MAP_WRITABLE)) ==
        (PS_MAP_USER | PS_MAP_WRITABLE)) {
        sample(f, mapping->address, mapping->physical);
    }
}

/* How add_runs() walks. */
enum {
    WALK_USER = 1,   /* only what user mode may reach */
    WALK_STRICT = 2, /* end where it cannot be a user's table */
    WALK_ONCE = 4,   /* no table that was walked before */
};

/*
 * Walk a half and append its runs. A page that user mode may execute and not
 * read is a user's all the same (aarch64 has them).
 */
static int add_runs(finder *f, const ps_paging_half *half, uint32_t how,
                    bool *alien, ps_error *err)
{
    ps_walk *walk = &f->walk;
    bool apart = f->architecture == PS_ARCH_AARCH64;
    uint32_t user = PS_MAP_USER | (apart ? PS_MAP_EXECUTABLE : 0);
    int r;

    *alien = false;
    walk->memory = f->memory;
    walk->budget = &f->budget;
    walk->marks = f->tables;
    walk->trail = f->trail;
    walk->once = how & WALK_ONCE;
    walk->strict = how & WALK_STRICT;
    walk->required = how & WALK_USER && !apart ? PS_MAP_USER : 0;
    f->open.pages = 0;
    f->pages = 0;
    r = ps_walk_init(walk, half, err);
    while (!r && !*alien) {
        ps_mapping mapping;

        r = ps_walk_next(walk, &mapping, err);
        if (r || mapping.bytes == 0) {
            break;
        }
        if (!(how & WALK_USER) || mapping.flags & user) {
            add_mapping(f, &mapping);
        } else if (how & WALK_STRICT) {
            *alien = true;
        }
    }
    close_run(f);
    f->out->stats.tables += walk->stats.tables;
    if (walk->stats.exhausted) {
        f->out->notes |= PS_NOTE_BUDGET;
    }
    return r;
}

/* --------------------------------------------------------------- models */

static int read_table(finder *f, uint64_t address, size_t offset, size_t length,
                      void *out, bool *known, ps_error *err)
{
    uint64_t global = ps_guest_global(f->memory, address);

    *known = global != PS_NOWHERE && ps_bit_test(f->memory->used, global);
    return *known ? f->memory->read(f->memory->opaque, address + offset, length,
                                    out, err)
                  : PS_OK;
}

/* May these be entries of a topmost table? How many refer to a table, which
   may be all zero; 0 if any of them could not. */
static size_t count_tables(const finder *f, const ps_paging_mode *mode,
                           const uint64_t *entries, size_t count)
{
    uint32_t top = ps_paging_mode_levels(mode) - 1;
    size_t tables = 0;

    for (size_t i = 0; i < count; i++) {
        uint64_t address;

        if (entries[i] == 0) {
            continue;
        }
        if (!ps_paging_table(mode, top, entries[i], &address) ||
            ps_guest_global(f->memory, address) == PS_NOWHERE) {
            return 0;
        }
        tables++;
    }
    return tables;
}

static size_t count_equal(const uint64_t *a, const uint64_t *b,
                          size_t *different)
{
    size_t equal = 0;

    *different = 0;
    for (size_t i = 0; i < HALF_ENTRIES; i++) {
        if ((a[i] ^ b[i]) & ~X86_ACCESSED_DIRTY) {
            ++*different;
        } else {
            equal += a[i] != 0;
        }
    }
    return equal;
}

/* The kernel half under a CR3, and the table that it is from. */
static int kernel_half(finder *f, uint64_t cr3, uint64_t *from, uint64_t *half,
                       size_t *count, ps_error *err)
{
    const ps_paging_mode *mode = f->paging.mode;
    uint64_t other[HALF_ENTRIES];
    size_t more, different;
    bool known;
    int r;

    *count = 0;
    *from = cr3;
    r = read_table(f, cr3, HALF_BYTES, HALF_BYTES, half, &known, err);
    if (r || !known) {
        return r;
    }
    *count = count_tables(f, mode, half, HALF_ENTRIES);
    if (*count == 0 || !(cr3 & KPTI_SIBLING)) {
        return PS_OK;
    }
    r = read_table(f, cr3 ^ KPTI_SIBLING, HALF_BYTES, HALF_BYTES, other, &known,
                   err);
    if (r || !known) {
        return r;
    }
    more = count_tables(f, mode, other, HALF_ENTRIES);
    if (more > *count && count_equal(half, other, &different) > 0) {
        *from = cr3 ^ KPTI_SIBLING;
        *count = more;
        memcpy(half, other, HALF_BYTES);
    }
    return PS_OK;
}

/*
 * aarch64, KPTI: in user mode TTBR1 has the trampoline's table, one or two
 * pages below the kernel's in its image (arch/arm64/kernel/vmlinux.lds.S).
 */
static int kernel_ttbr(finder *f, ps_error *err)
{
    ps_paging_half *kernel = &f->paging.kernel;
    uint64_t at = kernel->root;
    size_t most = 0;

    for (uint64_t i = 0; kernel->mode && i < 3; i++) {
        uint64_t address = at + i * PS_PAGE_SIZE;
        size_t count;
        bool known;
        int r = read_table(f, address & ~(uint64_t)(PS_PAGE_SIZE - 1), 0,
                           PS_PAGE_SIZE, f->page, &known, err);

        if (r) {
            return r;
        }
        count = known ? count_tables(f, kernel->mode, f->page, PS_TABLE_ENTRIES)
                      : 0;
        if (count > most) {
            most = count;
            kernel->root = address;
        }
        if (kernel->root_mask != PS_TABLE_ENTRIES - 1) {
            break;
        }
    }
    return PS_OK;
}

static int add_root(finder *f, uint64_t address, bool current, ps_error *err)
{
    root *roots;

    if (f->root_count == MAX_SPACES) {
        f->out->notes |= PS_NOTE_MEMORY;
        return PS_OK;
    }
    if (f->root_count == f->root_capacity) {
        f->root_capacity = f->root_capacity ? 2 * f->root_capacity : 64;
        roots = realloc(f->roots, f->root_capacity * sizeof(*roots));
        if (!roots) {
            return ps_fail_errno(err, PS_NOWHERE, "address spaces");
        }
        f->roots = roots;
    }
    f->roots[f->root_count++] = (root){address, current};
    return PS_OK;
}

/*
 * Choose the CPU that is the model of the others: one whose paging is
 * followed, on x86-64 the one with the most complete kernel half. Its own
 * table and those of the others are candidates.
 */
static int choose_model(finder *f, ps_error *err)
{
    f->last = HALF_ENTRIES - 1;
    if (f->cpu_count == 0) {
        f->out->reason = "the CPU's registers are not known";
    }
    for (size_t i = 0; i < f->cpu_count; i++) {
        uint64_t half[HALF_ENTRIES];
        ps_paging paging;
        size_t count;
        int r;

        ps_paging_detect(&f->cpus[i], &paging);
        if (!paging.mode) {
            f->out->reason = f->out->reason ? f->out->reason : paging.reason;
            continue;
        }
        if (f->paging.mode && paging.mode != f->paging.mode) {
            continue;
        }
        if (!f->paging.mode) {
            f->paging = paging;
            f->architecture = f->cpus[i].architecture;
        }
        if (f->cpus[i].architecture == PS_ARCH_X86_64) {
            uint64_t from;

            r = kernel_half(f, paging.user.root, &from, half, &count, err);
            if (!r && count > f->model_count) {
                f->model_count = count;
                f->paging.kernel.root = from;
                memcpy(f->model, half, sizeof(half));
            }
            paging.user.root = from;
        } else {
            r = PS_OK;
        }
        if (!r) {
            r = add_root(f, paging.user.root, true, err);
        }
        if (r) {
            return r;
        }
    }
    f->out->mode = f->paging.mode;
    if (f->paging.mode) {
        f->out->reason = NULL;
    }
    return PS_OK;
}

/* ----------------------------------------------------------- candidates */

/* A page fails by the last entry of its half in nearly all cases: that is the
   kernel's image, and the same in every table. */
static int matches_kernel_half(finder *f, uint64_t address, bool *match,
                               ps_error *err)
{
    const ps_guest_memory *memory = f->memory;
    uint64_t offset = HALF_BYTES + f->last * sizeof(uint64_t), entry;
    size_t different, equal;
    int r;

    *match = false;
    r = memory->read(memory->opaque, address + offset, sizeof(entry), &entry,
                     err);
    if (r || (entry ^ f->model[f->last]) & ~X86_ACCESSED_DIRTY) {
        return r;
    }
    r = memory->read(memory->opaque, address + HALF_BYTES, HALF_BYTES, f->page,
                     err);
    if (r) {
        return r;
    }
    equal = count_equal(f->page, f->model, &different);
    *match = different <= MAX_DIFFERENCES && 4 * equal >= 3 * f->model_count;
    return PS_OK;
}

/* A page of nothing but table descriptors; most fail by their first bytes. */
static int looks_like_root(finder *f, uint64_t address, bool *match,
                           ps_error *err)
{
    const ps_guest_memory *memory = f->memory;
    const ps_paging_mode *mode = f->paging.mode;
    size_t look = 64 / sizeof(uint64_t), tables;
    int r;

    *match = false;
    r = memory->read(memory->opaque, address, 64, f->page, err);
    if (r) {
        return r;
    }
    tables = count_tables(f, mode, f->page, look);
    if (tables == 0) {
        for (size_t i = 0; i < look; i++) {
            if (f->page[i]) {
                return PS_OK;
            }
        }
    }
    r = memory->read(memory->opaque, address + 64, PS_PAGE_SIZE - 64,
                     f->page + look, err);
    *match = !r && count_tables(f, mode, f->page, PS_TABLE_ENTRIES) > 0;
    return r;
}

/* All used pages that have an address. */
static int scan(finder *f, ps_error *err)
{
    const ps_guest_memory *memory = f->memory;

    for (size_t i = 0; i < memory->range_count; i++) {
        const ps_guest_range *range = &memory->ranges[i];

        for (uint64_t p = 0; p < range->pages; p++) {
            uint64_t address = range->address + (p << PS_PAGE_BITS);
            bool match;
            int r;

            if (!ps_bit_test(memory->used, range->first + p)) {
                continue;
            }
            r = f->architecture == PS_ARCH_X86_64
                    ? matches_kernel_half(f, address, &match, err)
                    : looks_like_root(f, address, &match, err);
            if (!r && match) {
                f->out->stats.candidates++;
                r = add_root(f, address, false, err);
            }
            if (r) {
                return r;
            }
        }
    }
    return PS_OK;
}

static int find_candidates(finder *f, ps_error *err)
{
    bool whole = f->paging.user.root_mask == PS_TABLE_ENTRIES - 1;

    if (f->architecture == PS_ARCH_X86_64 && f->model_count) {
        while (f->model[f->last] == 0) {
            f->last--;
        }
        return scan(f, err);
    }
    if (f->architecture == PS_ARCH_AARCH64 && whole) {
        return scan(f, err);
    }
    f->out->notes |= PS_NOTE_NO_KERNEL;
    return PS_OK;
}

/* --------------------------------------------------------------- spaces */

/* Those of CPUs first where an address is there twice. */
static int root_order(const void *a, const void *b)
{
    const root *x = a, *y = b;

    if (x->address != y->address) {
        return x->address < y->address ? -1 : 1;
    }
    return y->current - x->current;
}

static int add_space(finder *f, uint64_t address, uint32_t kind, ps_error *err)
{
    ps_spaces *out = f->out;

    if (out->space_count == f->space_capacity) {
        size_t capacity = f->space_capacity ? 2 * f->space_capacity : 64;
        ps_space *spaces = realloc(out->spaces, capacity * sizeof(*spaces));

        if (!spaces) {
            return ps_fail_errno(err, PS_NOWHERE, "address spaces");
        }
        out->spaces = spaces;
        f->space_capacity = capacity;
    }
    out->spaces[out->space_count++] =
        (ps_space){.root = address, .kind = kind, .first_run = out->run_count};
    return PS_OK;
}

/* As if it had never been walked. */
static void drop_last_space(finder *f)
{
    ps_spaces *out = f->out;

    out->run_count = out->spaces[--out->space_count].first_run;
    for (size_t i = 0; i < f->walk.trail_count; i++) {
        ps_bit_clear(f->tables, f->trail[i]);
    }
}

/* Does root + 4096 have the user half of a KPTI pair? The kernel's copy of
   an entry forbids execution, the user's does not. */
static int has_sibling(finder *f, uint64_t address, bool *pair, ps_error *err)
{
    uint64_t user[HALF_ENTRIES];
    size_t same = 0;
    bool known;
    int r;

    *pair = false;
    if (address & KPTI_SIBLING) {
        return PS_OK;
    }
    r = read_table(f, address, 0, HALF_BYTES, f->page, &known, err);
    if (!r && known) {
        r = read_table(f, address ^ KPTI_SIBLING, 0, HALF_BYTES, user, &known,
                       err);
    }
    if (r || !known) {
        return r;
    }
    for (size_t i = 0; i < HALF_ENTRIES; i++) {
        if ((f->page[i] ^ user[i]) & ~(X86_ACCESSED_DIRTY | X86_NX)) {
            return PS_OK;
        }
        same += f->page[i] != 0;
    }
    *pair = same > 0;
    return PS_OK;
}

/* Walk a candidate; keep it if it is live. */
static int try_root(finder *f, const root *candidate, ps_error *err)
{
    const ps_walk_stats *stats = &f->walk.stats;
    ps_spaces_stats *total = &f->out->stats;
    ps_paging_half half = f->paging.user;
    bool strict = f->architecture == PS_ARCH_AARCH64 && !candidate->current;
    uint64_t nonsense;
    bool alien = false;
    int r = add_space(f, candidate->address, PS_SPACE_USER, err);

    half.root = candidate->address;
    if (!r) {
        r = add_runs(f, &half, WALK_USER | (strict ? WALK_STRICT : 0), &alien,
                     err);
    }
    if (r) {
        return r;
    }
    nonsense = ps_walk_nonsense(&f->walk);
    if (f->pages == 0 || alien || nonsense > (strict ? 0 : f->pages)) {
        total->dead++;
        drop_last_space(f);
        return PS_OK;
    }
    if (stats->tables > 1 && stats->known == stats->tables - 1) {
        total->duplicates++;
        drop_last_space(f);
        return PS_OK;
    }
    total->live++;
    total->damaged += nonsense;
    if (nonsense) {
        f->out->notes |= PS_NOTE_DAMAGED;
    }
    if (f->architecture == PS_ARCH_X86_64) {
        bool pair;

        r = has_sibling(f, candidate->address, &pair, err);
        total->pairs += !r && pair;
    }
    f->out->spaces[f->out->space_count - 1].run_count =
        f->out->run_count - f->out->spaces[f->out->space_count - 1].first_run;
    return r;
}

/* A root that is a table of another space is none. */
static void drop_inner_roots(finder *f)
{
    ps_spaces *out = f->out;
    uint64_t spaces = 0, runs = 0;

    for (uint64_t i = 0; i < out->space_count; i++) {
        ps_space space = out->spaces[i];

        if (ps_bit_test(f->tables, ps_guest_global(f->memory, space.root))) {
            out->stats.live--;
            out->stats.dead++;
            continue;
        }
        memmove(&out->runs[runs], &out->runs[space.first_run],
                space.run_count * sizeof(ps_virtual_run));
        space.first_run = runs;
        runs += space.run_count;
        out->spaces[spaces++] = space;
    }
    out->space_count = spaces;
    out->run_count = runs;
}

static int find_user_spaces(finder *f, ps_error *err)
{
    uint64_t last = PS_NOWHERE;

    qsort(f->roots, f->root_count, sizeof(*f->roots), root_order);
    for (size_t i = 0; i < f->root_count; i++) {
        int r;

        if (f->roots[i].address == last) {
            continue;
        }
        last = f->roots[i].address;
        r = try_root(f, &f->roots[i], err);
        if (r) {
            return r;
        }
    }
    drop_inner_roots(f);
    return PS_OK;
}

/* --------------------------------------------------------------- kernel */

static uint64_t delta_of(const ps_guest_memory *memory,
                         const ps_virtual_run *run)
{
    return run->address - ps_guest_address(memory, run->first);
}

static uint64_t count_used(const ps_guest_memory *memory,
                           const ps_virtual_run *run)
{
    uint64_t count = 0;

    for (uint64_t i = 0; i < run->pages; i++) {
        count += ps_bit_test(memory->used, run->first + i);
    }
    return count;
}

/*
 * The direct map has one distance between virtual and physical addresses for
 * nearly all RAM, and everything else that the kernel maps is less than
 * that: a majority vote (Boyer and Moore), weighted by pages, finds the
 * distance and a count confirms it. It holds no order but the physical one,
 * so that its runs are left out.
 */
static void drop_direct_map(finder *f)
{
    ps_spaces *out = f->out;
    const ps_space *kernel = &out->spaces[out->space_count - 1];
    uint64_t votes = 0, pages = 0, kept = kernel->first_run;
    uint64_t delta = 0;

    for (uint64_t i = kernel->first_run; i < out->run_count; i++) {
        uint64_t count = count_used(f->memory, &out->runs[i]);
        uint64_t own = delta_of(f->memory, &out->runs[i]);

        if (own == delta || votes == 0) {
            delta = own;
            votes += count;
        } else if (count > votes) {
            delta = own;
            votes = count - votes;
        } else {
            votes -= count;
        }
    }
    for (uint64_t i = kernel->first_run; i < out->run_count; i++) {
        if (delta_of(f->memory, &out->runs[i]) == delta) {
            pages += count_used(f->memory, &out->runs[i]);
        }
    }
    if (pages == 0 || pages < out->stats.used / 2) {
        out->notes |= PS_NOTE_NO_DIRECT;
        return;
    }
    for (uint64_t i = kernel->first_run; i < out->run_count; i++) {
        if (delta_of(f->memory, &out->runs[i]) != delta) {
            out->runs[kept++] = out->runs[i];
        }
    }
    out->run_count = kept;
    out->direct_known = true;
    out->direct_delta = delta;
    out->stats.direct_map = pages;
}

static int find_kernel_space(finder *f, ps_error *err)
{
    const ps_paging_half *kernel = &f->paging.kernel;
    ps_space *space;
    bool alien;
    int r;

    if (!kernel->mode) {
        return PS_OK;
    }
    r = add_space(f, kernel->root, PS_SPACE_KERNEL, err);
    if (!r) {
        /* Each table once: KASAN maps its shadow through one table for all. */
        r = add_runs(f, kernel, WALK_ONCE, &alien, err);
    }
    if (r) {
        return r;
    }
    drop_direct_map(f);
    space = &f->out->spaces[f->out->space_count - 1];
    space->run_count = f->out->run_count - space->first_run;
    if (space->run_count == 0 && !f->out->direct_known) {
        drop_last_space(f);
    }
    return PS_OK;
}

/* ------------------------------------------------------------------ all */

static int check_memory(const ps_guest_memory *memory, ps_error *err)
{
    uint64_t end = 0, pages = memory->leaves * PS_LEAF_PAGES;

    if (memory->leaves > (UINT64_C(1) << 23)) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE, "too many leaves");
    }
    for (size_t i = 0; i < memory->range_count; i++) {
        const ps_guest_range *range = &memory->ranges[i];

        if (range->address % PS_PAGE_SIZE || range->address < end ||
            range->pages > pages || range->first > pages - range->pages ||
            range->address > UINT64_MAX - (range->pages << PS_PAGE_BITS)) {
            return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                           "range %zu of guest memory is wrong", i);
        }
        end = range->address + (range->pages << PS_PAGE_BITS);
    }
    return PS_OK;
}

static size_t trail_bytes(const ps_spaces *out)
{
    return out->stats.used * sizeof(uint32_t);
}

static void release_tables(finder *f)
{
    free(f->tables);
    f->tables = NULL;
    ps_unreserve(f->trail, trail_bytes(f->out));
    f->trail = NULL;
}

static int find(finder *f, ps_error *err)
{
    ps_spaces *out = f->out;
    int r;

    for (uint64_t i = 0; i < f->memory->leaves * PS_LEAF_PAGES / 64; i++) {
        out->stats.used += (uint64_t)__builtin_popcountll(f->memory->used[i]);
    }
    out->leaves = f->memory->leaves;
    out->max_runs = 2 * out->stats.used + SPARE_RUNS;
    if (out->max_runs > UINT32_MAX) {
        out->max_runs = UINT32_MAX;
    }
    out->runs_bytes = out->max_runs * sizeof(ps_virtual_run);
    f->budget = 2 * (out->stats.used + out->leaves) + SPARE_TABLES;
    f->sample_step = 1;
    f->tables = calloc(out->leaves * PS_LEAF_PAGES / 64 + 1, sizeof(uint64_t));
    if (!f->tables) {
        return ps_fail_errno(err, PS_NOWHERE, "address spaces");
    }
    r = ps_reserve(out->runs_bytes, (void **)&out->runs, err);
    r = r ? r : ps_reserve(trail_bytes(out), (void **)&f->trail, err);
    if (!r) {
        r = choose_model(f, err);
    }
    if (!r && out->mode) {
        r = f->architecture == PS_ARCH_AARCH64 ? kernel_ttbr(f, err) : PS_OK;
        r = r ? r : find_candidates(f, err);
        r = r ? r : find_user_spaces(f, err);
        r = r ? r : find_kernel_space(f, err);
    }
    release_tables(f);
    r = r ? r : ps_spaces_index(out, f->memory, err);
    return r ? r
             : ps_spaces_order(out, f->memory, f->samples, f->sample_count,
                               err);
}

int ps_spaces_find(const ps_cpu_paging *cpus, size_t cpu_count,
                   const ps_guest_memory *memory, ps_spaces **out,
                   ps_error *err)
{
    finder *f;
    int r = check_memory(memory, err);

    *out = NULL;
    if (r) {
        return r;
    }
    f = calloc(1, sizeof(*f));
    *out = calloc(1, sizeof(**out));
    if (!f || !*out) {
        free(f);
        free(*out);
        return ps_fail_errno(err, PS_NOWHERE, "address spaces");
    }
    f->cpus = cpus;
    f->cpu_count = cpu_count;
    f->memory = memory;
    f->out = *out;
    r = find(f, err);
    free(f->roots);
    release_tables(f);
    free(f);
    if (r) {
        ps_spaces_destroy(*out);
        *out = NULL;
    }
    return r;
}

uint64_t ps_spaces_memory(const ps_spaces *spaces)
{
    return sizeof(*spaces) + spaces->space_count * sizeof(*spaces->spaces) +
           spaces->run_count * (sizeof(*spaces->runs) + sizeof(*spaces->refs)) +
           (spaces->leaves + 1) * sizeof(*spaces->leaf_refs) +
           spaces->order_count * sizeof(*spaces->order);
}

void ps_spaces_destroy(ps_spaces *spaces)
{
    if (!spaces) {
        return;
    }
    ps_unreserve(spaces->runs, spaces->runs_bytes);
    free(spaces->spaces);
    free(spaces->refs);
    free(spaces->leaf_refs);
    free(spaces->order);
    free(spaces);
}

const char *ps_spaces_note_text(uint32_t note)
{
    switch (note) {
    case PS_NOTE_BUDGET:
        return "page tables refer to each other more often than is followed";
    case PS_NOTE_MEMORY:
        return "there are more mappings than are kept";
    case PS_NOTE_DAMAGED:
        return "parts of page tables make no sense and were left out";
    case PS_NOTE_NO_KERNEL:
        return "only the address spaces that CPUs were in are known";
    case PS_NOTE_NO_FILES:
        return "pages of files could not be told from others";
    case PS_NOTE_NO_DIRECT:
        return "the kernel's map of all memory was not recognised";
    default:
        return "";
    }
}
