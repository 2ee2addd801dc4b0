/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The formats are those of the Intel SDM (volume 3, chapter 4), the Arm ARM
 * (D8, VMSAv8-64) and the RISC-V privileged specification (chapter 4). All of
 * them that are followed have 512 entries of 8 bytes in a table of 4 KiB.
 */
#include "walk.h"

#define INDEX_BITS 9u
#define BIT(n) (UINT64_C(1) << (n))
/* Bits high .. low, as the manuals write them. */
#define BITS(high, low) ((UINT64_MAX >> (63 - (high))) & (UINT64_MAX << (low)))

/* (entry & mask) == value; with mask 0 it holds for every entry. */
typedef struct bit_test {
    uint64_t mask;
    uint64_t value;
} bit_test;

#define SET(mask) {(mask), (mask)}
#define CLEAR(mask) {(mask), 0}

enum {
    RIGHT_USER, /* in the order of ps_map_flag */
    RIGHT_WRITABLE,
    RIGHT_EXECUTABLE,
    RIGHT_ACCESSED,
    RIGHT_DIRTY,
    RIGHTS,
    TABLE_RIGHTS = RIGHT_EXECUTABLE + 1, /* those that a table restricts */
};
#define ALL_TABLE_RIGHTS ((1u << TABLE_RIGHTS) - 1)

typedef struct entry_format {
    bit_test valid;
    bit_test page;        /* what a valid entry at level 0 has to have */
    bit_test table;       /* what tells a table from a leaf above level 0 */
    uint64_t table_clear; /* bits that no kernel sets in a table entry */
    uint64_t leaf_clear;  /* bits of leaves that are not followed */
    uint64_t address;     /* after the shift to the left by .. */
    uint32_t shift;
    uint64_t large_flags; /* address bits that mean something else in a leaf
                             above level 0 */
    bit_test rights[RIGHTS];
    bit_test table_rights[TABLE_RIGHTS];
} entry_format;

static const entry_format x86_64 = {
    .valid = SET(BIT(0)),
    .table = CLEAR(BIT(7)),
    .address = BITS(51, 12),
    .large_flags = BIT(12), /* PAT */
    .rights[RIGHT_USER] = SET(BIT(2)),
    .rights[RIGHT_WRITABLE] = SET(BIT(1)),
    .rights[RIGHT_EXECUTABLE] = CLEAR(BIT(63)),
    .rights[RIGHT_ACCESSED] = SET(BIT(5)),
    .rights[RIGHT_DIRTY] = SET(BIT(6)),
    .table_rights[RIGHT_USER] = SET(BIT(2)),
    .table_rights[RIGHT_WRITABLE] = SET(BIT(1)),
    .table_rights[RIGHT_EXECUTABLE] = CLEAR(BIT(63)),
};

/*
 * The contiguous hint (bit 52) needs nothing: each of the 16 entries that
 * carry it is complete. Hardware ignores bits 11..2 of a table entry, and
 * kernels leave them 0, but for AF (Linux 6.10 on). A page or block that a
 * user can reach has several of them set (AP[1], SH, nG): so a table of
 * leaves can be told from a table of tables. There is no bit for dirty: a
 * page that is writable has been written, or may be at any time.
 */
static const entry_format aarch64 = {
    .valid = SET(BIT(0)),
    .page = SET(BIT(1)),
    .table = SET(BIT(1)),
    .table_clear = BITS(9, 2) | BIT(11),
    .address = BITS(47, 12),
    .large_flags = BIT(16), /* nT */
    .rights[RIGHT_USER] = SET(BIT(6)),
    .rights[RIGHT_WRITABLE] = CLEAR(BIT(7)),
    .rights[RIGHT_EXECUTABLE] = CLEAR(BIT(54)),
    .rights[RIGHT_ACCESSED] = SET(BIT(10)),
    .rights[RIGHT_DIRTY] = CLEAR(BIT(7)),
    .table_rights[RIGHT_USER] = CLEAR(BIT(61)),
    .table_rights[RIGHT_WRITABLE] = CLEAR(BIT(62)),
    .table_rights[RIGHT_EXECUTABLE] = CLEAR(BIT(60)),
};

/*
 * A leaf has one of R, W and X. Svnapot (bit 63) changes what its address
 * means and is not followed.
 */
static const entry_format riscv64 = {
    .valid = SET(BIT(0)),
    .table = CLEAR(BITS(3, 1)),
    .table_clear = BIT(4) | BIT(6) | BIT(7) | BITS(63, 54),
    .leaf_clear = BIT(63) | BITS(60, 54),
    .address = BITS(55, 12),
    .shift = 2,
    .rights[RIGHT_USER] = SET(BIT(4)),
    .rights[RIGHT_WRITABLE] = SET(BIT(2)),
    .rights[RIGHT_EXECUTABLE] = SET(BIT(3)),
    .rights[RIGHT_ACCESSED] = SET(BIT(6)),
    .rights[RIGHT_DIRTY] = SET(BIT(7)),
};

struct ps_paging_mode {
    const char *name;
    uint32_t number;
    uint32_t levels;
    uint32_t leaf_levels; /* bit n: a leaf may stand at level n */
    const entry_format *format;
};

static const ps_paging_mode x86_64_4 = {"x86-64, 4 levels", 1, 4, 7, &x86_64};
static const ps_paging_mode x86_64_5 = {"x86-64, 5 levels", 2, 5, 7, &x86_64};
static const ps_paging_mode aarch64_3 = {"aarch64, 3 levels", 3, 3, 7,
                                         &aarch64};
static const ps_paging_mode aarch64_4 = {"aarch64, 4 levels", 4, 4, 7,
                                         &aarch64};
static const ps_paging_mode sv39 = {"riscv64, Sv39", 5, 3, 7, &riscv64};
static const ps_paging_mode sv48 = {"riscv64, Sv48", 6, 4, 15, &riscv64};

const char *ps_paging_mode_name(const ps_paging_mode *mode)
{
    return mode->name;
}

uint32_t ps_paging_mode_number(const ps_paging_mode *mode)
{
    return mode->number;
}

uint32_t ps_paging_mode_levels(const ps_paging_mode *mode)
{
    return mode->levels;
}

static inline bool has(uint64_t entry, bit_test test)
{
    return (entry & test.mask) == test.value;
}

static inline uint32_t level_shift(uint32_t level)
{
    return PS_PAGE_BITS + INDEX_BITS * level;
}

/* --------------------------------------------------------------- memory */

const ps_guest_range *ps_guest_range_at(const ps_guest_memory *memory,
                                        uint64_t address, uint64_t *next)
{
    size_t low = 0, high = memory->range_count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const ps_guest_range *range = &memory->ranges[middle];

        if (address < range->address) {
            high = middle;
        } else if ((address - range->address) >> PS_PAGE_BITS < range->pages) {
            return range;
        } else {
            low = middle + 1;
        }
    }
    if (next) {
        *next = low < memory->range_count ? memory->ranges[low].address
                                          : UINT64_MAX;
    }
    return NULL;
}

uint64_t ps_guest_global(const ps_guest_memory *memory, uint64_t address)
{
    const ps_guest_range *range = ps_guest_range_at(memory, address, NULL);

    return range ? range->first + ((address - range->address) >> PS_PAGE_BITS)
                 : PS_NOWHERE;
}

uint64_t ps_guest_address(const ps_guest_memory *memory, uint64_t global)
{
    for (size_t i = 0; i < memory->range_count; i++) {
        const ps_guest_range *range = &memory->ranges[i];

        if (global >= range->first && global - range->first < range->pages) {
            return range->address + ((global - range->first) << PS_PAGE_BITS);
        }
    }
    return PS_NOWHERE;
}

/* ------------------------------------------------------------ registers */

/* The half of a canonical address space below or above the gap. */
static ps_paging_half half_of(const ps_paging_mode *mode, uint64_t root,
                              uint32_t bits, bool upper)
{
    ps_paging_half half = {
        .mode = mode, .root = root, .root_mask = PS_TABLE_ENTRIES - 1};

    if (upper) {
        half.first = UINT64_MAX << bits;
        half.last = UINT64_MAX;
    } else {
        half.last = BIT(bits) - 1;
    }
    return half;
}

static const char *detect_x86_64(const uint64_t *registers, ps_paging *out)
{
    uint64_t cr0 = registers[0], cr4 = registers[2], efer = registers[3];
    /* Without PCID (bits 11..0) and LAM (61, 62). */
    uint64_t root = registers[1] & BITS(51, 12);
    bool five = cr4 & BIT(12); /* LA57 */
    uint32_t bits = five ? 56 : 47;

    if (!(cr0 & BIT(31))) {
        return "paging is off";
    }
    if (!(cr4 & BIT(5)) || !(efer & BIT(10))) { /* PAE, LMA */
        return "the CPU is in a 32-bit paging mode";
    }
    out->mode = five ? &x86_64_5 : &x86_64_4;
    out->user = half_of(out->mode, root, bits, false);
    out->kernel = half_of(out->mode, root, bits, true);
    return NULL;
}

/* TTBR0 or TTBR1. The topmost table has only the entries that it needs. */
static ps_paging_half half_of_ttbr(const ps_paging_mode *mode, uint64_t ttbr,
                                   uint64_t size, bool upper)
{
    uint32_t bits = (uint32_t)(64 - size);
    uint64_t root = ttbr & BITS(47, 1); /* without ASID and CnP */
    ps_paging_half half = half_of(mode, root, bits, upper);

    half.root_mask = (1u << (bits - level_shift(mode->levels - 1))) - 1;
    return half;
}

static const ps_paging_mode *aarch64_mode(uint64_t size)
{
    uint64_t bits = 64 - size;

    if (bits > 48 || bits <= 30) {
        return NULL;
    }
    return bits > 39 ? &aarch64_4 : &aarch64_3;
}

static const char *detect_aarch64(const uint64_t *registers, ps_paging *out)
{
    uint64_t sctlr = registers[0], tcr = registers[3];
    uint64_t t0sz = tcr & 63, t1sz = tcr >> 16 & 63;
    uint64_t tg0 = tcr >> 14 & 3, tg1 = tcr >> 30 & 3;
    const ps_paging_mode *mode = aarch64_mode(t0sz);

    if (!(sctlr & BIT(0))) {
        return "paging is off";
    }
    if (tcr & BIT(59)) { /* DS */
        return "the CPU uses 52-bit addresses";
    }
    if (tcr & BIT(7)) { /* EPD0 */
        return "walks of TTBR0 are disabled";
    }
    if (tg0 != 0) {
        return "the translation granule is not 4 KiB";
    }
    if (!mode) {
        return "the address size has neither 3 nor 4 levels";
    }
    out->mode = mode;
    out->user = half_of_ttbr(mode, registers[1], t0sz, false);
    mode = aarch64_mode(t1sz);
    if (mode && tg1 == 2 && !(tcr & BIT(23))) { /* EPD1 */
        out->kernel = half_of_ttbr(mode, registers[2], t1sz, true);
    }
    return NULL;
}

static const char *detect_riscv64(const uint64_t *registers, ps_paging *out)
{
    uint64_t satp = registers[0];
    uint64_t root = (satp & BITS(43, 0)) << PS_PAGE_BITS;

    switch (satp >> 60) {
    case 0:
        return "paging is off";
    case 8:
        out->mode = &sv39;
        out->user = half_of(&sv39, root, 38, false);
        out->kernel = half_of(&sv39, root, 38, true);
        return NULL;
    case 9:
        out->mode = &sv48;
        out->user = half_of(&sv48, root, 47, false);
        out->kernel = half_of(&sv48, root, 47, true);
        return NULL;
    default:
        return "the paging mode is neither Sv39 nor Sv48";
    }
}

void ps_paging_detect(const ps_cpu_paging *cpu, ps_paging *out)
{
    memset(out, 0, sizeof(*out));
    switch (cpu->architecture) {
    case PS_ARCH_X86_64:
        out->reason = detect_x86_64(cpu->registers, out);
        break;
    case PS_ARCH_AARCH64:
        out->reason = detect_aarch64(cpu->registers, out);
        break;
    case PS_ARCH_RISCV64:
        out->reason = detect_riscv64(cpu->registers, out);
        break;
    default:
        out->reason = "the architecture is not one whose tables are followed";
    }
}

/* -------------------------------------------------------------- entries */

bool ps_paging_table(const ps_paging_mode *mode, uint32_t level, uint64_t entry,
                     uint64_t *address)
{
    const entry_format *format = mode->format;

    if (level == 0 || !has(entry, format->valid) ||
        !has(entry, format->table) || (entry & format->table_clear)) {
        return false;
    }
    *address = entry << format->shift & format->address;
    return true;
}

static inline uint32_t rights_of(uint64_t entry, const bit_test *tests,
                                 size_t n)
{
    uint32_t rights = 0;

    for (size_t i = 0; i < n; i++) {
        rights |= (uint32_t)has(entry, tests[i]) << i;
    }
    return rights;
}

static bool is_leaf(const ps_paging_mode *mode, uint32_t level, uint64_t entry)
{
    return level == 0 ? has(entry, mode->format->page)
                      : !has(entry, mode->format->table);
}

/* The leaf at walk->next. False: the entry makes no sense. */
static bool take_leaf(ps_walk *walk, uint64_t entry, ps_mapping *out)
{
    const ps_paging_mode *mode = walk->half.mode;
    const entry_format *format = mode->format;
    uint32_t level = walk->level;
    uint64_t size = BIT(level_shift(level));
    uint64_t address = entry << format->shift & format->address;
    uint64_t within = walk->next & (size - 1);

    if (level > 0) {
        address &= ~format->large_flags;
    }
    if (!(mode->leaf_levels >> level & 1) || (entry & format->leaf_clear) ||
        (address & (size - 1))) {
        return false;
    }
    out->address = walk->next;
    out->physical = address + within;
    out->bytes = size - within;
    out->flags = rights_of(entry, format->rights, RIGHTS);
    out->flags &= walk->tables[level].rights | ~ALL_TABLE_RIGHTS;
    if (level > 0) {
        out->flags |= PS_MAP_LARGE;
    }
    return true;
}

/* ------------------------------------------------------------- iterator */

static uint32_t index_at(const ps_walk *walk, uint32_t level)
{
    uint64_t index = walk->next >> level_shift(level);

    if (level == walk->top) { /* it may lie anywhere within a page */
        index &= walk->half.root_mask;
        index += (walk->half.root & (PS_PAGE_SIZE - 1)) / sizeof(uint64_t);
    }
    return (uint32_t)(index & (PS_TABLE_ENTRIES - 1));
}

/* Go on behind the entry at walk->level. */
static void advance(ps_walk *walk)
{
    uint64_t size = BIT(level_shift(walk->level));

    walk->next |= size - 1;
    if (walk->next >= walk->half.last) {
        walk->done = true;
        return;
    }
    walk->next++;
    while (walk->level < walk->top &&
           !(walk->next & (BIT(level_shift(walk->level + 1)) - 1))) {
        walk->level++;
    }
}

static bool is_loop(const ps_walk *walk, uint32_t level, uint64_t address)
{
    for (uint32_t i = level + 1; i <= walk->top; i++) {
        if (walk->tables[i].address == address) {
            return true;
        }
    }
    return false;
}

/* Make the table at `address` that of `level`; *entered false: there is
   nothing to see in it, or nothing that may be seen. */
static int enter(ps_walk *walk, uint32_t level, uint64_t address,
                 uint32_t rights, bool *entered, ps_error *err)
{
    const ps_guest_memory *memory = walk->memory;
    uint64_t global = ps_guest_global(memory, address);
    int r;

    *entered = false;
    if (global == PS_NOWHERE) {
        walk->stats.outside++;
        return PS_OK;
    }
    if (!ps_bit_test(memory->used, global)) {
        return PS_OK;
    }
    if (is_loop(walk, level, address)) {
        walk->stats.loops++;
        return PS_OK;
    }
    if (walk->marks && level < walk->top) {
        if (ps_bit_test(walk->marks, global)) {
            walk->stats.known++;
            if (walk->once) {
                return PS_OK;
            }
        } else if (walk->trail) {
            walk->trail[walk->trail_count++] = (uint32_t)global;
        }
        ps_bit_set(walk->marks, global);
    }
    if (*walk->budget == 0) {
        walk->stats.exhausted = true;
        walk->done = true;
        return PS_OK;
    }
    --*walk->budget;
    walk->stats.tables++;
    r = memory->read(memory->opaque, address, PS_PAGE_SIZE,
                     walk->tables[level].entries, err);
    if (r) {
        return r;
    }
    walk->tables[level].address = address;
    walk->tables[level].rights = rights;
    walk->level = level;
    *entered = true;
    return PS_OK;
}

int ps_walk_init(ps_walk *walk, const ps_paging_half *half, ps_error *err)
{
    bool entered;
    int r;

    memset(&walk->stats, 0, sizeof(walk->stats));
    walk->trail_count = 0;
    walk->half = *half;
    walk->next = half->first;
    walk->top = half->mode->levels - 1;
    walk->done = false;
    r = enter(walk, walk->top, half->root & ~(uint64_t)(PS_PAGE_SIZE - 1),
              ALL_TABLE_RIGHTS, &entered, err);
    walk->done = !entered;
    return r;
}

int ps_walk_next(ps_walk *walk, ps_mapping *out, ps_error *err)
{
    const ps_paging_mode *mode = walk->half.mode;
    const entry_format *format = mode->format;

    out->bytes = 0;
    while (!walk->done) {
        uint32_t level = walk->level;
        uint64_t entry = walk->tables[level].entries[index_at(walk, level)];
        uint64_t address;
        bool entered = false;

        if (!has(entry, format->valid)) {
            /* nothing here */
        } else if (is_leaf(mode, level, entry)) {
            if (!take_leaf(walk, entry, out)) {
                walk->stats.damaged++;
                out->bytes = 0;
            } else if ((out->flags & walk->required) == walk->required) {
                advance(walk);
                return PS_OK;
            }
            out->bytes = 0;
        } else if (ps_paging_table(mode, level, entry, &address)) {
            uint32_t rights =
                walk->tables[level].rights &
                rights_of(entry, format->table_rights, TABLE_RIGHTS);
            uint32_t required = walk->required & ALL_TABLE_RIGHTS;

            if ((rights & required) == required) {
                int r = enter(walk, level - 1, address, rights, &entered, err);

                if (r) {
                    return r;
                }
            }
        } else {
            walk->stats.damaged++;
        }
        if (walk->strict && ps_walk_nonsense(walk)) {
            walk->done = true;
        }
        if (!entered && !walk->done) {
            advance(walk);
        }
    }
    return PS_OK;
}
