/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The walker over made tables, in every mode, and over bad ones. */
#include "check.h"
#include "made_guest.h"

static ps_walk walk;
static uint64_t budget;

/* All mappings of a half; at most `room` are kept. */
static size_t all(made_guest *guest, const ps_paging_half *half,
                  uint32_t required, ps_mapping *out, size_t room)
{
    size_t count = 0;
    ps_error err = {0};

    made_finish(guest);
    walk.memory = &guest->memory;
    walk.budget = &budget;
    walk.required = required;
    CHECK(ps_walk_init(&walk, half, &err) == PS_OK);
    for (;;) {
        ps_mapping mapping;

        CHECK(ps_walk_next(&walk, &mapping, &err) == PS_OK);
        if (mapping.bytes == 0) {
            return count;
        }
        if (count < room) {
            out[count] = mapping;
        }
        count++;
    }
}

static ps_paging detect(const made_guest *guest, uint32_t levels, uint64_t root,
                        uint64_t kernel)
{
    ps_cpu_paging cpu = made_cpu(guest, levels, root, kernel);
    ps_paging paging;

    ps_paging_detect(&cpu, &paging);
    CHECK_MSG(paging.mode != NULL, "%s", paging.reason);
    CHECK(ps_paging_mode_levels(paging.mode) == levels);
    return paging;
}

static void expect(const ps_mapping *mapping, uint64_t address,
                   uint64_t physical, uint64_t bytes, uint32_t flags)
{
    CHECK_MSG(mapping->address == address, "address %#lx", mapping->address);
    CHECK_MSG(mapping->physical == physical, "at %#lx", mapping->physical);
    CHECK_MSG(mapping->bytes == bytes, "bytes %#lx", mapping->bytes);
    CHECK_MSG(mapping->flags == flags, "flags %#x", mapping->flags);
}

/* One page of each size, at both ends of both halves. */
static void test_mode(uint32_t architecture, uint32_t levels, bool apart)
{
    const uint32_t all_flags =
        PS_MAP_WRITABLE | PS_MAP_EXECUTABLE | PS_MAP_ACCESSED | PS_MAP_DIRTY;
    const uint32_t user = all_flags | PS_MAP_USER;
    const uint32_t other = architecture == PS_ARCH_AARCH64
                               ? all_flags & ~PS_MAP_EXECUTABLE
                               : all_flags;
    made_guest guest;
    uint64_t root, kernel;
    ps_mapping got[8];
    ps_paging paging;

    made_init(&guest, architecture);
    budget = 1000;
    root = made_table(&guest);
    kernel = apart ? made_table(&guest) : root;
    paging = detect(&guest, levels, root, kernel);
    CHECK(paging.user.first == 0);
    CHECK(paging.kernel.last == UINT64_MAX);
    CHECK(paging.kernel.first == ~paging.user.last);
    made_map(&guest, root, levels, 0, PAGE(100), 0, true);
    made_map(&guest, root, levels, PAGE(1), HIGH_ADDRESS, 0, true);
    made_map(&guest, root, levels, PAGE(3), UINT64_C(1) << 36, 0, true);
    made_map(&guest, root, levels, PAGE(512), PAGE(512), 1, true);
    made_map(&guest, root, levels, UINT64_C(1) << 30, 0, 2, true);
    made_map(&guest, root, levels, paging.user.last - 4095, PAGE(101), 0,
             false);
    made_map(&guest, kernel, levels, paging.kernel.first, PAGE(102), 0, false);
    made_map(&guest, kernel, levels, UINT64_MAX - 4095, PAGE(103), 0, false);
    CHECK(all(&guest, &paging.user, 0, got, 8) == 6);
    expect(&got[0], 0, PAGE(100), 4096, user);
    expect(&got[1], PAGE(1), HIGH_ADDRESS, 4096, user);
    expect(&got[2], PAGE(3), UINT64_C(1) << 36, 4096, user);
    expect(&got[3], PAGE(512), PAGE(512), PAGE(512), user | PS_MAP_LARGE);
    expect(&got[4], UINT64_C(1) << 30, 0, UINT64_C(1) << 30,
           user | PS_MAP_LARGE);
    expect(&got[5], paging.user.last - 4095, PAGE(101), 4096, other);
    CHECK(walk.stats.damaged == 0 && walk.stats.outside == 0);
    CHECK(all(&guest, &paging.user, PS_MAP_USER, got, 8) == 5);
    CHECK(all(&guest, &paging.kernel, 0, got, 8) == 2);
    expect(&got[0], paging.kernel.first, PAGE(102), 4096, other);
    expect(&got[1], UINT64_MAX - 4095, PAGE(103), 4096, other);
    made_deinit(&guest);
}

static void test_x86_64_rights(void)
{
    made_guest guest;
    ps_mapping got[4];
    ps_paging paging;
    uint64_t root;

    made_init(&guest, PS_ARCH_X86_64);
    budget = 1000;
    root = made_table(&guest);
    paging = detect(&guest, 4, root, root);
    made_map(&guest, root, 4, 0, PAGE(100), 0, true);
    /* The table above forbids what the page allows. */
    *made_entry(&guest, root, 4, 0, 1) &= ~UINT64_C(2);
    *made_entry(&guest, root, 4, 0, 2) |= UINT64_C(1) << 63;
    CHECK(all(&guest, &paging.user, 0, got, 4) == 1);
    CHECK(got[0].flags == (PS_MAP_USER | PS_MAP_ACCESSED | PS_MAP_DIRTY));
    *made_entry(&guest, root, 4, 0, 3) &= ~UINT64_C(4);
    CHECK(all(&guest, &paging.user, PS_MAP_USER, got, 4) == 0);
    CHECK(all(&guest, &paging.user, 0, got, 4) == 1);
    CHECK(!(got[0].flags & PS_MAP_USER));
    /* PAT, bit 12 of a large page. */
    made_map(&guest, root, 4, PAGE(512), PAGE(512) | 0x1000, 1, true);
    CHECK(all(&guest, &paging.user, 0, got, 4) == 2);
    CHECK(got[1].physical == PAGE(512));
    made_deinit(&guest);
}

/* PCID and LAM bits are none of the address. */
static void test_registers(void)
{
    made_guest guest;
    ps_cpu_paging cpu;
    ps_paging paging;

    made_init(&guest, PS_ARCH_X86_64);
    cpu = made_cpu(&guest, 4, 0x5000, 0);
    cpu.registers[1] |= UINT64_C(3) << 61 | 0xfff;
    ps_paging_detect(&cpu, &paging);
    CHECK(paging.user.root == 0x5000);
    cpu.registers[0] = 1;
    ps_paging_detect(&cpu, &paging);
    CHECK(!paging.mode && paging.reason);
    cpu = made_cpu(&guest, 4, 0x5000, 0);
    cpu.registers[3] = 0;
    ps_paging_detect(&cpu, &paging);
    CHECK(!paging.mode && paging.reason);

    guest.architecture = PS_ARCH_AARCH64;
    for (uint64_t granule = 1; granule < 4; granule++) {
        cpu = made_cpu(&guest, 4, 0x5000, 0x6000);
        cpu.registers[3] |= granule << 14;
        ps_paging_detect(&cpu, &paging);
        CHECK(!paging.mode && paging.reason);
    }
    cpu = made_cpu(&guest, 4, 0x5000, 0x6000);
    cpu.registers[1] |= UINT64_C(7) << 48 | 1; /* ASID, CnP */
    ps_paging_detect(&cpu, &paging);
    CHECK(paging.user.root == 0x5000 && paging.kernel.root == 0x6000);
    cpu.registers[3] |= UINT64_C(1) << 59; /* DS */
    ps_paging_detect(&cpu, &paging);
    CHECK(!paging.mode && paging.reason);
    cpu = made_cpu(&guest, 4, 0x5000, 0x6000);
    cpu.registers[0] = 0;
    ps_paging_detect(&cpu, &paging);
    CHECK(!paging.mode && paging.reason);
    for (uint64_t size = 0; size < 64; size++) {
        cpu = made_cpu(&guest, 4, 0x5000, 0x6000);
        cpu.registers[3] = size | size << 16 | UINT64_C(2) << 30;
        ps_paging_detect(&cpu, &paging);
        CHECK((paging.mode != NULL) == (size >= 16 && size <= 33));
    }

    guest.architecture = PS_ARCH_RISCV64;
    for (uint64_t mode = 0; mode < 16; mode++) {
        cpu = made_cpu(&guest, 4, 0x5000, 0);
        cpu.registers[0] = mode << 60 | 5 | UINT64_C(9) << 44; /* ASID */
        ps_paging_detect(&cpu, &paging);
        CHECK((paging.mode != NULL) == (mode == 8 || mode == 9));
        CHECK(!paging.mode || paging.user.root == 0x5000);
    }
    cpu = (ps_cpu_paging){0};
    ps_paging_detect(&cpu, &paging);
    CHECK(!paging.mode && paging.reason);
    made_deinit(&guest);
}

/* T0SZ 24: four levels, and a topmost table of two entries, in mid-page. */
static void test_small_root(void)
{
    made_guest guest;
    ps_mapping got[4];
    ps_cpu_paging cpu;
    ps_paging paging;
    uint64_t root, *words;

    made_init(&guest, PS_ARCH_AARCH64);
    budget = 1000;
    root = made_table(&guest);
    made_map(&guest, root, 4, 0, PAGE(100), 0, true);
    made_map(&guest, root, 4, UINT64_C(1) << 39, PAGE(101), 0, true);
    words = made_page(&guest, root);
    words[62] = words[0];
    words[63] = words[1];
    words[0] = words[1] = 0;
    words[64] = made_leaf_entry(&guest, 0, 0, true);
    cpu = made_cpu(&guest, 4, root + 62 * 8, 0);
    cpu.registers[3] = 24 | 24 << 16;
    ps_paging_detect(&cpu, &paging);
    CHECK(paging.mode && paging.user.last == (UINT64_C(1) << 40) - 1);
    CHECK(all(&guest, &paging.user, 0, got, 4) == 2);
    CHECK(got[0].address == 0 && got[0].physical == PAGE(100));
    CHECK(got[1].address == UINT64_C(1) << 39 && got[1].physical == PAGE(101));
    made_deinit(&guest);
}

static void test_damage(void)
{
    made_guest guest;
    ps_mapping got[4];
    ps_paging paging;
    uint64_t root;

    made_init(&guest, PS_ARCH_X86_64);
    budget = 100000;
    root = made_table(&guest);
    paging = detect(&guest, 4, root, root);
    made_map(&guest, root, 4, 0, PAGE(100), 0, true);
    /* A table outside RAM, itself as its own table, one that is all zero. */
    *made_entry(&guest, root, 4, UINT64_C(1) << 39, 3) =
        made_table_entry(&guest, UINT64_C(1) << 40);
    *made_entry(&guest, root, 4, UINT64_C(2) << 39, 3) =
        made_table_entry(&guest, root);
    *made_entry(&guest, root, 4, UINT64_C(3) << 39, 3) =
        made_table_entry(&guest, PAGE(200));
    /* A leaf where none may be, a large page that is not aligned. */
    *made_entry(&guest, root, 4, UINT64_C(4) << 39, 3) = PAGE(100) | 0xe7;
    *made_entry(&guest, root, 4, PAGE(512), 1) = PAGE(513 + 16) | 0xe7;
    CHECK(all(&guest, &paging.user, 0, got, 4) == 1);
    CHECK(walk.stats.outside == 1);
    CHECK(walk.stats.loops == 1);
    CHECK(walk.stats.damaged == 2);
    CHECK(walk.stats.tables == 4);
    CHECK(!walk.stats.exhausted);
    /* The root itself is nowhere. */
    paging.user.root = UINT64_C(1) << 40;
    CHECK(all(&guest, &paging.user, 0, got, 4) == 0);
    CHECK(walk.stats.outside == 1);
    made_deinit(&guest);
}

/* Three tables that refer to each other with all their entries: 512 to the
   power of three tables, if it were not for the budget and the marks. */
static void test_explosion(void)
{
    made_guest guest;
    ps_paging paging;
    ps_mapping got[1];
    uint64_t tables[4], marks[MADE_PAGES / 64] = {0};

    made_init(&guest, PS_ARCH_X86_64);
    for (size_t i = 0; i < 4; i++) {
        tables[i] = made_table(&guest);
    }
    for (size_t i = 0; i < 4; i++) {
        for (size_t k = 0; k < PS_TABLE_ENTRIES; k++) {
            made_page(&guest, tables[i])[k] =
                i < 3 ? made_table_entry(&guest, tables[i + 1])
                      : made_leaf_entry(&guest, PAGE(100), 0, true);
        }
    }
    paging = detect(&guest, 4, tables[0], tables[0]);
    budget = 1000;
    CHECK(all(&guest, &paging.user, 0, got, 1) == (1000 - 4) * 512);
    CHECK(walk.stats.exhausted && budget == 0);
    CHECK(guest.reads == 1000);
    budget = 1000;
    walk.marks = marks;
    walk.once = true;
    CHECK(all(&guest, &paging.user, 0, got, 1) == 512);
    CHECK(!walk.stats.exhausted && walk.stats.tables == 4);
    walk.marks = NULL;
    walk.once = false;
    made_deinit(&guest);
}

static void test_read_fails(void)
{
    made_guest guest;
    ps_mapping mapping;
    ps_paging paging;
    ps_error err = {0};
    uint64_t root;

    made_init(&guest, PS_ARCH_X86_64);
    root = made_table(&guest);
    made_map(&guest, root, 4, 0, PAGE(100), 0, true);
    made_finish(&guest);
    paging = detect(&guest, 4, root, root);
    budget = 100;
    walk.memory = &guest.memory;
    guest.fail_at = 1;
    CHECK(ps_walk_init(&walk, &paging.user, &err) == PS_ERR_IO);
    guest.fail_at = guest.reads + 3;
    CHECK(ps_walk_init(&walk, &paging.user, &err) == PS_OK);
    CHECK(ps_walk_next(&walk, &mapping, &err) == PS_ERR_IO);
    made_deinit(&guest);
}

int main(void)
{
    test_mode(PS_ARCH_X86_64, 4, false);
    test_mode(PS_ARCH_X86_64, 5, false);
    test_mode(PS_ARCH_AARCH64, 3, true);
    test_mode(PS_ARCH_AARCH64, 4, true);
    test_mode(PS_ARCH_RISCV64, 3, false);
    test_mode(PS_ARCH_RISCV64, 4, false);
    test_x86_64_rights();
    test_registers();
    test_small_root();
    test_damage();
    test_explosion();
    test_read_fails();
    return check_done();
}
