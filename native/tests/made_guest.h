/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A guest whose memory and page tables a test makes: RAM in two ranges, with
 * a hole between them, and functions that map as a kernel would.
 */
#ifndef PS_TESTS_MADE_GUEST_H
#define PS_TESTS_MADE_GUEST_H

#include <stdio.h>

#include "spaces.h"

#define LOW_PAGES 2048u /* at 0, global 0 on */
#define HIGH_PAGES 2048u
#define HIGH_ADDRESS (UINT64_C(1) << 32) /* global LOW_PAGES on */
#define MADE_PAGES (LOW_PAGES + HIGH_PAGES)
#define PAGE(n) ((uint64_t)(n) << PS_PAGE_BITS)

typedef struct made_guest {
    uint32_t architecture;
    uint64_t (*entries)[PS_TABLE_ENTRIES]; /* of all pages */
    uint64_t used[MADE_PAGES / 64];
    ps_guest_range ranges[2];
    ps_guest_memory memory;
    uint64_t next_table; /* where new tables are taken from */
    uint64_t reads;
    uint64_t fail_at; /* this read fails, from 1 on */
} made_guest;

static inline int made_read(void *opaque, uint64_t address, size_t length,
                            void *out, ps_error *err)
{
    made_guest *guest = opaque;
    uint64_t within = address % PS_PAGE_SIZE;
    uint64_t global = ps_guest_global(&guest->memory, address - within);

    if (global == PS_NOWHERE || within + length > PS_PAGE_SIZE ||
        !ps_bit_test(guest->used, global)) {
        fprintf(stderr, "a read that is not allowed: %#lx\n", address);
        abort();
    }
    if (++guest->reads == guest->fail_at) {
        return ps_fail(err, PS_ERR_IO, address, "made to fail");
    }
    memcpy(out, (uint8_t *)guest->entries[global] + within, length);
    return PS_OK;
}

static inline void made_init(made_guest *guest, uint32_t architecture)
{
    memset(guest, 0, sizeof(*guest));
    guest->architecture = architecture;
    guest->entries = calloc(MADE_PAGES, PS_PAGE_SIZE);
    if (!guest->entries) {
        abort();
    }
    guest->ranges[0] = (ps_guest_range){0, 0, LOW_PAGES};
    guest->ranges[1] = (ps_guest_range){HIGH_ADDRESS, LOW_PAGES, HIGH_PAGES};
    guest->memory = (ps_guest_memory){
        .read = made_read,
        .opaque = guest,
        .ranges = guest->ranges,
        .range_count = 2,
        .used = guest->used,
        .leaves = MADE_PAGES / PS_LEAF_PAGES,
    };
    guest->next_table = PAGE(2); /* even: room for a KPTI pair */
}

static inline void made_deinit(made_guest *guest)
{
    free(guest->entries);
}

/* The 512 words of a page. */
static inline uint64_t *made_page(made_guest *guest, uint64_t address)
{
    uint64_t global = ps_guest_global(&guest->memory, address);

    if (global == PS_NOWHERE) {
        abort();
    }
    return guest->entries[global];
}

/* Make pages used that are to be data. */
static inline void made_fill(made_guest *guest, uint64_t address, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        memset(made_page(guest, address + PAGE(i)), 0xa5, PS_PAGE_SIZE);
    }
}

static inline uint64_t made_table(made_guest *guest)
{
    uint64_t address = guest->next_table;

    guest->next_table += PS_PAGE_SIZE;
    return address;
}

static inline uint64_t made_table_entry(const made_guest *guest,
                                        uint64_t address)
{
    switch (guest->architecture) {
    case PS_ARCH_X86_64:
        return address | 0x67; /* P RW US A D */
    case PS_ARCH_AARCH64:
        return address | 3;
    default:
        return address >> 2 | 1;
    }
}

static inline uint64_t made_leaf_entry(const made_guest *guest,
                                       uint64_t address, uint32_t level,
                                       bool user)
{
    switch (guest->architecture) {
    case PS_ARCH_X86_64:
        return address | (user ? 0x67 : 0x63) | (level ? 0x80 : 0);
    case PS_ARCH_AARCH64: /* AF SH, and nG AP[1], or UXN */
        return address | (user ? 0xf40 : 0x0040000000000700) | (level ? 1 : 3);
    default:
        return address >> 2 | (user ? 0xdf : 0xcf);
    }
}

/* Where the entry of a virtual address at a level is; tables are made. */
static inline uint64_t *made_entry(made_guest *guest, uint64_t root,
                                   uint32_t levels, uint64_t address,
                                   uint32_t level)
{
    uint64_t table = root;

    for (uint32_t i = levels - 1;; i--) {
        uint64_t *entry =
            &made_page(guest, table)[address >> (12 + 9 * i) & 511];

        if (i == level) {
            return entry;
        }
        if (*entry == 0) {
            *entry = made_table_entry(guest, made_table(guest));
        }
        table = guest->architecture == PS_ARCH_RISCV64
                    ? (*entry & ~UINT64_C(0x3ff)) << 2
                    : *entry & UINT64_C(0x0000fffffffff000);
    }
}

static inline void made_map(made_guest *guest, uint64_t root, uint32_t levels,
                            uint64_t address, uint64_t physical, uint32_t level,
                            bool user)
{
    *made_entry(guest, root, levels, address, level) =
        made_leaf_entry(guest, physical, level, user);
}

/* Which pages are used: call it when all is made. */
static inline void made_finish(made_guest *guest)
{
    memset(guest->used, 0, sizeof(guest->used));
    for (uint64_t i = 0; i < MADE_PAGES; i++) {
        for (size_t k = 0; k < PS_TABLE_ENTRIES; k++) {
            if (guest->entries[i][k]) {
                ps_bit_set(guest->used, i);
                break;
            }
        }
    }
}

/* Registers of a CPU that is in a table. */
static inline ps_cpu_paging made_cpu(const made_guest *guest, uint32_t levels,
                                     uint64_t root, uint64_t kernel)
{
    ps_cpu_paging cpu = {.architecture = guest->architecture};
    uint64_t size = levels == 4 ? 16 : 25;

    switch (guest->architecture) {
    case PS_ARCH_X86_64:
        cpu.registers[0] = UINT64_C(0x80000001);
        cpu.registers[1] = root;
        cpu.registers[2] = levels == 5 ? 0x1020 : 0x20;
        cpu.registers[3] = 0x500;
        break;
    case PS_ARCH_AARCH64:
        cpu.registers[0] = 1;
        cpu.registers[1] = root;
        cpu.registers[2] = kernel;
        cpu.registers[3] = size | size << 16 | UINT64_C(2) << 30;
        break;
    default:
        cpu.registers[0] = (levels == 4 ? UINT64_C(9) : UINT64_C(8)) << 60 |
                           root >> PS_PAGE_BITS;
    }
    return cpu;
}

#endif
