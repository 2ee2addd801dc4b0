/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Any registers and any memory: spaces are found, or not, in bounded time,
 * and the order has every used page once. The input: a byte for the
 * architecture, six registers, then words of memory, each group with the
 * page (2 bytes), the index of its first word (2 bytes), their count (1 byte)
 * and the words (8 bytes each); after its count a group may say 0x8000 in the
 * index: then one word fills them all.
 */
#include "spaces.h"

#define LOW_PAGES 512u
#define HIGH_PAGES 300u /* the last leaf is not full */
#define HIGH_ADDRESS (UINT64_C(1) << 32)
#define LEAVES 2u
#define PAGES (LEAVES * PS_LEAF_PAGES)
#define MAX_READS 100000u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const ps_guest_range ranges[] = {
    {0, 0, LOW_PAGES},
    {HIGH_ADDRESS, LOW_PAGES, HIGH_PAGES},
};
static uint64_t memory[PAGES][512];
static bool written[PAGES];
static uint64_t used[PAGES / 64];
static uint64_t reads;

static int read_memory(void *opaque, uint64_t address, size_t length, void *out,
                       ps_error *err)
{
    uint64_t within = address % PS_PAGE_SIZE;
    uint64_t global = ps_guest_global(opaque, address - within);

    (void)err;
    if (global == PS_NOWHERE || within + length > PS_PAGE_SIZE ||
        !ps_bit_test(used, global) || ++reads > MAX_READS) {
        abort();
    }
    memcpy(out, (uint8_t *)memory[global] + within, length);
    return PS_OK;
}

static void fill(const uint8_t *data, size_t size)
{
    for (uint64_t i = 0; i < PAGES; i++) {
        if (written[i]) {
            memset(memory[i], 0, PS_PAGE_SIZE);
            written[i] = false;
        }
    }
    memset(used, 0, sizeof(used));
    while (size >= 13) {
        uint16_t page, index;
        uint8_t count = data[4];
        bool same;

        memcpy(&page, data, 2);
        memcpy(&index, data + 2, 2);
        same = index & 0x8000;
        page %= LOW_PAGES + HIGH_PAGES;
        written[page] = true;
        data += 5;
        size -= 5;
        for (size_t i = 0; i < count * (same ? 2u : 1u) && size >= 8; i++) {
            memcpy(&memory[page][(index + i) % 512], data, 8);
            if (!same) {
                data += 8;
                size -= 8;
            }
        }
        if (same && size >= 8) {
            data += 8;
            size -= 8;
        }
    }
    for (uint64_t i = 0; i < PAGES; i++) {
        for (size_t k = 0; written[i] && k < 512; k++) {
            if (memory[i][k]) {
                ps_bit_set(used, i);
                break;
            }
        }
    }
}

static void check(const ps_spaces *spaces)
{
    uint64_t seen[PAGES / 64] = {0}, count = 0, runs = 0;

    for (uint64_t i = 0; i < PAGES / 64; i++) {
        count += (uint64_t)__builtin_popcountll(used[i]);
    }
    if (spaces->order_count != count || spaces->run_count > spaces->max_runs) {
        abort();
    }
    for (uint64_t i = 0; i < count; i++) {
        uint32_t global = spaces->order[i];

        if (global >= PAGES || !ps_bit_test(used, global) ||
            ps_bit_test(seen, global)) {
            abort();
        }
        ps_bit_set(seen, global);
    }
    for (uint64_t s = 0; s < spaces->space_count; s++) {
        const ps_space *space = &spaces->spaces[s];
        uint64_t next = 0;

        if (space->first_run != runs ||
            space->pages != space->exclusive + space->shared) {
            abort();
        }
        for (uint64_t i = 0; i < space->run_count; i++, runs++) {
            const ps_virtual_run *run = &spaces->runs[runs];
            uint32_t last = run->first + run->pages - 1u;

            if (run->pages == 0 || run->address < next ||
                run->first / PS_LEAF_PAGES != last / PS_LEAF_PAGES ||
                last >= PAGES || !ps_bit_test(used, run->first) ||
                !ps_bit_test(used, last)) {
                abort();
            }
            next = run->address + run->pages * PS_PAGE_SIZE;
        }
    }
    if (runs != spaces->run_count ||
        spaces->leaf_refs[spaces->leaves] != runs) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ps_guest_memory guest = {
        .read = read_memory,
        .opaque = &guest,
        .ranges = ranges,
        .range_count = 2,
        .used = used,
        .leaves = LEAVES,
    };
    ps_cpu_paging cpus[2] = {{0}};
    ps_spaces *spaces;
    ps_error err;

    if (size < 49) {
        return 0;
    }
    cpus[0].architecture = cpus[1].architecture = data[0] & 3;
    memcpy(cpus[0].registers, data + 1, 48);
    /* The second one is in another table. */
    memcpy(cpus[1].registers, data + 1, 48);
    cpus[1].registers[1] += PS_PAGE_SIZE;
    fill(data + 49, size - 49);
    reads = 0;
    if (ps_spaces_find(cpus, data[0] & 4 ? 2 : 1, &guest, &spaces, &err)) {
        abort();
    }
    check(spaces);
    ps_spaces_destroy(spaces);
    return 0;
}
