/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Address spaces, runs, the reverse index and the order, in made guests. */
#include "check.h"
#include "made_guest.h"

#define USER UINT64_C(0x00007f0000000000)
#define KERNEL UINT64_C(0xffffc00000000000)
#define DIRECT UINT64_C(0xffff888000000000)
#define TEXT UINT64_C(0xffffffff80000000)
#define ARM_DIRECT UINT64_C(0xffff000000000000)

/* Data begins behind the tables. */
#define DATA 1024u

/* The kernel half of x86-64: all RAM, and two pages of an image. */
static void map_kernel(made_guest *guest, uint64_t root, uint32_t levels,
                       uint64_t direct)
{
    for (uint64_t i = 0; i < MADE_PAGES; i += PS_LEAF_PAGES) {
        uint64_t address = ps_guest_address(&guest->memory, i);

        made_map(guest, root, levels, direct + address, address, 1, false);
    }
    made_map(guest, root, levels, TEXT, PAGE(DATA), 0, false);
    made_map(guest, root, levels, TEXT + PAGE(1), PAGE(DATA + 1), 0, false);
    made_fill(guest, PAGE(DATA), 2);
}

static uint64_t copy_kernel(made_guest *guest, uint64_t from)
{
    uint64_t root = made_table(guest);

    memcpy(made_page(guest, root) + 256, made_page(guest, from) + 256, 2048);
    return root;
}

static ps_spaces *find(made_guest *guest, const ps_cpu_paging *cpus,
                       size_t count)
{
    ps_spaces *spaces = NULL;
    ps_error err = {0};

    made_finish(guest);
    CHECK_MSG(ps_spaces_find(cpus, count, &guest->memory, &spaces, &err) ==
                  PS_OK,
              "%s", err.message);
    return spaces;
}

static const ps_space *space_of(const ps_spaces *spaces, uint64_t root)
{
    for (uint64_t i = 0; i < spaces->space_count; i++) {
        if (spaces->spaces[i].root == root &&
            spaces->spaces[i].kind == PS_SPACE_USER) {
            return &spaces->spaces[i];
        }
    }
    return NULL;
}

/* What must hold of everything that is found. */
static void check_all(const made_guest *guest, const ps_spaces *spaces)
{
    uint64_t seen[MADE_PAGES / 64] = {0}, used = 0, sum = 0;

    for (uint64_t i = 0; i < MADE_PAGES / 64; i++) {
        used += (uint64_t)__builtin_popcountll(guest->used[i]);
    }
    CHECK(spaces->order_count == used);
    for (uint64_t i = 0; i < spaces->order_count; i++) {
        CHECK(ps_bit_test(guest->used, spaces->order[i]));
        CHECK(!ps_bit_test(seen, spaces->order[i]));
        ps_bit_set(seen, spaces->order[i]);
    }
    for (size_t i = 0; i < PS_SOURCES; i++) {
        sum += spaces->stats.sources[i];
    }
    CHECK(sum == used);
    sum = 0;
    for (uint64_t s = 0; s < spaces->space_count; s++) {
        const ps_space *space = &spaces->spaces[s];
        uint64_t next = 0;

        CHECK(space->first_run == sum);
        sum += space->run_count;
        CHECK(space->pages == space->exclusive + space->shared);
        for (uint64_t i = space->first_run; i < sum; i++) {
            const ps_virtual_run *run = &spaces->runs[i];

            CHECK(run->address % PS_PAGE_SIZE == 0 && run->address >= next);
            next = run->address + PAGE(run->pages);
            CHECK(run->pages > 0 &&
                  run->first / PS_LEAF_PAGES ==
                      (run->first + run->pages - 1u) / PS_LEAF_PAGES);
            CHECK(ps_bit_test(guest->used, run->first) &&
                  ps_bit_test(guest->used, run->first + run->pages - 1u));
            CHECK(ps_spaces_of_run(spaces, i) == s);
            CHECK(ps_spaces_run_at(spaces, s, run->address) == i);
            CHECK(ps_spaces_run_at(spaces, s, next - 1) == i);
        }
    }
    CHECK(sum == spaces->run_count);
    CHECK(spaces->leaf_refs[spaces->leaves] == spaces->run_count);
    for (uint64_t leaf = 0; leaf < spaces->leaves; leaf++) {
        for (uint64_t i = spaces->leaf_refs[leaf];
             i < spaces->leaf_refs[leaf + 1]; i++) {
            const ps_run_ref *ref = &spaces->refs[i];

            CHECK(ref->first / PS_LEAF_PAGES == leaf);
            CHECK(spaces->runs[ref->run].first == ref->first);
            CHECK(i == spaces->leaf_refs[leaf] || ref->first >= ref[-1].first);
        }
    }
}

static void expect_run(const ps_spaces *spaces, uint64_t i, uint64_t address,
                       uint64_t first, uint32_t pages)
{
    CHECK(i < spaces->run_count);
    CHECK_MSG(spaces->runs[i].address == address &&
                  spaces->runs[i].first == first &&
                  spaces->runs[i].pages == pages,
              "run %lu: %#lx %u %u", i, spaces->runs[i].address,
              spaces->runs[i].first, spaces->runs[i].pages);
}

/* Two processes, a dead one, a copy of one, the kernel's own table. */
static void test_x86_64(uint32_t levels)
{
    uint64_t direct = levels == 5 ? UINT64_C(0xff11000000000000) : DIRECT;
    made_guest guest;
    uint64_t kernel, a, b, dead, copy;
    const ps_space *space;
    ps_cpu_paging cpus[2];
    ps_spaces *spaces;

    made_init(&guest, PS_ARCH_X86_64);
    kernel = made_table(&guest);
    map_kernel(&guest, kernel, levels, direct);
    a = copy_kernel(&guest, kernel);
    b = copy_kernel(&guest, kernel);
    dead = copy_kernel(&guest, kernel);
    made_fill(&guest, PAGE(DATA + 10), 10);
    made_fill(&guest, HIGH_ADDRESS, 10);
    /* a: three pages against the physical order, one in high memory. */
    made_map(&guest, a, levels, USER, PAGE(DATA + 12), 0, true);
    made_map(&guest, a, levels, USER + PAGE(1), PAGE(DATA + 11), 0, true);
    made_map(&guest, a, levels, USER + PAGE(2), PAGE(DATA + 10), 0, true);
    made_map(&guest, a, levels, USER + PAGE(9), HIGH_ADDRESS, 0, true);
    /* b shares one of them, and has one of its own twice. */
    made_map(&guest, b, levels, USER, PAGE(DATA + 13), 0, true);
    made_map(&guest, b, levels, USER + PAGE(4), PAGE(DATA + 13), 0, true);
    made_map(&guest, b, levels, USER + PAGE(5), PAGE(DATA + 11), 0, true);
    /* dead: what it maps is not there, or not for users. */
    made_map(&guest, dead, levels, USER, PAGE(DATA + 100), 0, true);
    made_map(&guest, dead, levels, USER + PAGE(1), PAGE(DATA + 10), 0, false);
    made_map(&guest, dead, levels, USER + PAGE(2), UINT64_C(1) << 40, 0, true);
    copy = made_table(&guest);
    memcpy(made_page(&guest, copy), made_page(&guest, b), PS_PAGE_SIZE);
    /* An accessed bit is no difference. */
    made_page(&guest, b)[511] &= ~UINT64_C(0x20);

    cpus[0] = made_cpu(&guest, levels, kernel, 0);
    cpus[1] = made_cpu(&guest, levels, a | 0x123, 0); /* PCID */
    spaces = find(&guest, cpus, 2);
    check_all(&guest, spaces);
    CHECK(ps_paging_mode_levels(spaces->mode) == levels);
    CHECK(spaces->space_count == 3);
    CHECK(spaces->stats.candidates == 5);
    CHECK(spaces->stats.live == 2);
    CHECK(spaces->stats.dead == 2);
    CHECK(spaces->stats.duplicates == 1);
    CHECK(spaces->stats.pairs == 0);
    CHECK(spaces->stats.damaged == 0);
    space = space_of(spaces, a);
    CHECK(space && space->pages == 4 && space->exclusive == 3 &&
          space->shared == 1 && space->run_count == 4);
    expect_run(spaces, space->first_run, USER, DATA + 12, 1);
    expect_run(spaces, space->first_run + 3, USER + PAGE(9), LOW_PAGES, 1);
    space = space_of(spaces, b);
    CHECK(space && space->pages == 2 && space->exclusive == 1 &&
          space->run_count == 3);
    space = &spaces->spaces[2];
    CHECK(space->kind == PS_SPACE_KERNEL && space->pages == 2 &&
          space->run_count == 1);
    expect_run(spaces, space->first_run, TEXT, DATA, 2);
    CHECK(spaces->direct_known && spaces->direct_delta == direct);
    CHECK(spaces->stats.direct_map == spaces->stats.used);
    /* The order: a, b's own page, the kernel's, the rest. */
    CHECK(spaces->stats.sources[PS_SOURCE_USER] == 5);
    CHECK(spaces->stats.sources[PS_SOURCE_KERNEL] == 2);
    CHECK(spaces->order[0] == DATA + 12 && spaces->order[1] == DATA + 11 &&
          spaces->order[2] == DATA + 10 && spaces->order[3] == LOW_PAGES &&
          spaces->order[4] == DATA + 13 && spaces->order[5] == DATA &&
          spaces->order[6] == DATA + 1 && spaces->order[7] == 2);
    ps_spaces_destroy(spaces);
    made_deinit(&guest);
}

/* A pair of tables; the CPU is in user mode, so in the odd one. */
static void test_kpti(void)
{
    made_guest guest;
    uint64_t roots[2], i, *user;
    ps_cpu_paging cpu;
    ps_spaces *spaces;

    made_init(&guest, PS_ARCH_X86_64);
    for (i = 0; i < 2; i++) {
        roots[i] = made_table(&guest);
        CHECK(roots[i] % 8192 == 0);
        made_table(&guest);
    }
    map_kernel(&guest, roots[0], 4, DIRECT);
    memcpy(made_page(&guest, roots[1]) + 256, made_page(&guest, roots[0]) + 256,
           2048);
    made_fill(&guest, PAGE(DATA + 10), 10);
    for (i = 0; i < 2; i++) {
        made_map(&guest, roots[i], 4, USER, PAGE(DATA + 10 + i), 0, true);
        user = made_page(&guest, roots[i] + 4096);
        memcpy(user, made_page(&guest, roots[i]), 2048);
        /* The kernel's copy may not be executed. */
        made_page(&guest, roots[i])[USER >> 39] |= UINT64_C(1) << 63;
        user[511] = made_page(&guest, roots[i])[511];
    }
    cpu = made_cpu(&guest, 4, roots[1] + 4096, 0);
    spaces = find(&guest, &cpu, 1);
    check_all(&guest, spaces);
    CHECK(spaces->space_count == 3);
    CHECK(spaces->stats.live == 2 && spaces->stats.pairs == 2);
    CHECK(spaces->stats.candidates == 2);
    CHECK(space_of(spaces, roots[0]) && space_of(spaces, roots[1]));
    CHECK(spaces->spaces[2].root == roots[1]);
    CHECK(spaces->direct_known);
    ps_spaces_destroy(spaces);
    made_deinit(&guest);
}

/* Holes and zero pages, leaves, large pages, memory that is not RAM. */
static void test_runs(void)
{
    made_guest guest;
    uint64_t root, i;
    ps_cpu_paging cpu;
    ps_spaces *spaces;

    made_init(&guest, PS_ARCH_X86_64);
    root = made_table(&guest);
    /* 8 pages, 2 of them zero, over the end of a leaf; the last one zero. */
    for (i = 0; i < 8; i++) {
        made_map(&guest, root, 4, USER + PAGE(i), PAGE(1536 - 5 + i), 0, true);
    }
    made_fill(&guest, PAGE(1536 - 5), 2);
    made_fill(&guest, PAGE(1536 - 1), 3);
    /* Adjacent in memory, a hole between them in the address space. */
    made_map(&guest, root, 4, USER + PAGE(20), PAGE(1600), 0, true);
    made_map(&guest, root, 4, USER + PAGE(22), PAGE(1602), 0, true);
    made_fill(&guest, PAGE(1600), 3);
    /* Large: two used pages and what is between them; nothing at all. */
    made_map(&guest, root, 4, USER + PAGE(512), HIGH_ADDRESS, 1, true);
    made_fill(&guest, HIGH_ADDRESS + PAGE(3), 1);
    made_fill(&guest, HIGH_ADDRESS + PAGE(511), 1);
    made_map(&guest, root, 4, USER + PAGE(1024), HIGH_ADDRESS + PAGE(512), 1,
             true);
    /* 1 GiB that begins outside RAM, and one that ends there. */
    made_map(&guest, root, 4, USER + (UINT64_C(1) << 30), UINT64_C(3) << 30, 2,
             true);
    made_map(&guest, root, 4, USER + (UINT64_C(2) << 30), HIGH_ADDRESS, 2,
             true);
    cpu = made_cpu(&guest, 4, root, 0);
    spaces = find(&guest, &cpu, 1);
    check_all(&guest, spaces);
    CHECK(spaces->notes & PS_NOTE_NO_KERNEL);
    CHECK(spaces->space_count == 1);
    CHECK(spaces->spaces[0].run_count == 6);
    expect_run(spaces, 0, USER, 1531, 5);
    expect_run(spaces, 1, USER + PAGE(5), 1536, 2);
    expect_run(spaces, 2, USER + PAGE(20), 1600, 1);
    expect_run(spaces, 3, USER + PAGE(22), 1602, 1);
    expect_run(spaces, 4, USER + PAGE(515), LOW_PAGES + 3, 509);
    expect_run(spaces, 5, USER + (UINT64_C(2) << 30) + PAGE(3), LOW_PAGES + 3,
               509);
    CHECK(spaces->runs[4].flags & PS_MAP_LARGE);
    CHECK(spaces->spaces[0].pages == 9);
    ps_spaces_destroy(spaces);
    made_deinit(&guest);
}

/* aarch64: roots are told by their form. */
static void test_aarch64(uint32_t levels)
{
    uint64_t direct = UINT64_MAX << (levels == 4 ? 48 : 39);
    made_guest guest;
    uint64_t empty, kernel, roots[3], i, user, *words;
    ps_cpu_paging cpu;
    ps_spaces *spaces;

    made_init(&guest, PS_ARCH_AARCH64);
    empty = made_table(&guest);
    kernel = made_table(&guest);
    map_kernel(&guest, kernel, levels, direct);
    made_fill(&guest, PAGE(DATA + 10), 100);
    user = levels == 4 ? UINT64_C(0x0000aaaa00000000) : UINT64_C(0x5500000000);
    for (i = 0; i < 3; i++) {
        roots[i] = made_table(&guest);
        made_map(&guest, roots[i], levels, user, PAGE(DATA + 10 + i), 0, true);
        made_map(&guest, roots[i], levels, user + PAGE(5),
                 PAGE(DATA + 20 + 10 * i), 0, true);
        /* A block, the same one in all. */
        made_map(&guest, roots[i], levels, user + PAGE(1024), HIGH_ADDRESS, 1,
                 true);
    }
    made_fill(&guest, HIGH_ADDRESS + PAGE(7), 2);
    /* The last one is damaged: a table that is not one. */
    *made_entry(&guest, roots[2], levels, user + PAGE(2048), 1) =
        UINT64_C(1) << 41 | 3;
    /* What looks like a root, and is the data of somebody. */
    words = made_page(&guest, PAGE(DATA + 50));
    memset(words, 0, PS_PAGE_SIZE);
    words[5] = made_table_entry(&guest, PAGE(DATA + 51));
    cpu = made_cpu(&guest, levels, empty, kernel | UINT64_C(9) << 48 | 1);
    spaces = find(&guest, &cpu, 1);
    check_all(&guest, spaces);
    CHECK_MSG(spaces->space_count == 3, "%lu spaces", spaces->space_count);
    CHECK(spaces->stats.live == 2);
    CHECK(space_of(spaces, roots[0]) && space_of(spaces, roots[1]));
    CHECK(spaces->spaces[0].pages == 4 && spaces->spaces[0].shared == 2);
    CHECK(spaces->spaces[2].kind == PS_SPACE_KERNEL &&
          spaces->spaces[2].pages == 2);
    CHECK(spaces->direct_known && spaces->direct_delta == direct);
    ps_spaces_destroy(spaces);

    /* The one that a CPU is in counts all the same. */
    cpu = made_cpu(&guest, levels, roots[2] | UINT64_C(5) << 48, kernel);
    spaces = find(&guest, &cpu, 1);
    CHECK(spaces->stats.live == 3 && spaces->stats.damaged == 1);
    CHECK(spaces->notes & PS_NOTE_DAMAGED);
    CHECK(space_of(spaces, roots[2]));
    ps_spaces_destroy(spaces);

    /* In user mode TTBR1 may have the trampoline's, two pages below. */
    words = made_page(&guest, HIGH_ADDRESS + PAGE(1024));
    memcpy(words + 2 * PS_TABLE_ENTRIES, made_page(&guest, kernel),
           PS_PAGE_SIZE);
    memset(made_page(&guest, kernel), 0, PS_PAGE_SIZE);
    words[511] = words[2 * PS_TABLE_ENTRIES + 511];
    cpu = made_cpu(&guest, levels, roots[0], HIGH_ADDRESS + PAGE(1024));
    spaces = find(&guest, &cpu, 1);
    CHECK(spaces->direct_known);
    CHECK(spaces->spaces[spaces->space_count - 1].root ==
          HIGH_ADDRESS + PAGE(1026));
    ps_spaces_destroy(spaces);
    made_deinit(&guest);
}

static void test_riscv64(void)
{
    made_guest guest;
    uint64_t root, other;
    ps_cpu_paging cpu;
    ps_spaces *spaces;

    made_init(&guest, PS_ARCH_RISCV64);
    root = made_table(&guest);
    other = made_table(&guest);
    map_kernel(&guest, root, 3, UINT64_C(0xffffffc000000000));
    made_fill(&guest, PAGE(DATA + 10), 2);
    made_map(&guest, root, 3, PAGE(16), PAGE(DATA + 10), 0, true);
    made_map(&guest, other, 3, PAGE(16), PAGE(DATA + 11), 0, true);
    cpu = made_cpu(&guest, 3, root, 0);
    spaces = find(&guest, &cpu, 1);
    check_all(&guest, spaces);
    CHECK(spaces->space_count == 2 && spaces->stats.live == 1);
    CHECK(spaces->notes & PS_NOTE_NO_KERNEL);
    CHECK(spaces->direct_known);
    ps_spaces_destroy(spaces);
    made_deinit(&guest);
}

/* struct page of frame n is at KERNEL + 64 n. */
static uint64_t *page_struct(made_guest *guest, uint64_t vmemmap, uint64_t n)
{
    return made_page(guest, vmemmap + n * 64 / 4096 * 4096) + n % 64 * 8;
}

/* Pages of two files, a tail, slab, a free page: told by struct page. */
static void test_page_structs(void)
{
    const uint64_t vmemmap = PAGE(1280); /* of the first 2048 frames: 32 */
    const uint64_t inode = PAGE(DATA + 100) + 64;
    const uint64_t mapping = DIRECT + inode + 360;
    made_guest guest;
    uint64_t root, i;
    ps_cpu_paging cpu;
    ps_spaces *spaces;
    const uint32_t *files;

    made_init(&guest, PS_ARCH_X86_64);
    root = made_table(&guest);
    map_kernel(&guest, root, 4, DIRECT);
    for (i = 0; i < 32; i++) {
        made_map(&guest, root, 4, KERNEL + PAGE(i), vmemmap + PAGE(31 - i), 0,
                 false);
    }
    /* Backwards, so that only the tables tell. */
#define STRUCT(n)                                                              \
    page_struct(&guest, vmemmap + PAGE(31 - (n) / 64) - PAGE((n) / 64), (n))
    for (i = 0; i < LOW_PAGES; i++) {
        STRUCT(i)[6] = UINT64_C(0x1ffffffff); /* one reference */
    }
    for (i = 0; i < 12; i++) {
        uint64_t frame = DATA + 10 + 2 * i;

        made_fill(&guest, PAGE(frame), 1);
        made_map(&guest, root, 4, USER + PAGE(3 * i), PAGE(frame), 0, true);
        STRUCT(frame)[3] = DIRECT + 0x1001;
        STRUCT(frame)[4] = (USER >> 12) + 3 * i;
    }
    /* Two files, of the same inode page; the pages are backwards. */
    made_fill(&guest, PAGE(DATA + 50), 20);
    for (i = 0; i < 4; i++) {
        STRUCT(DATA + 50 + i)[3] = mapping + 512 * (i & 1);
        STRUCT(DATA + 50 + i)[4] = 9 - i;
    }
    *(made_page(&guest, PAGE(DATA + 100)) + (64 + 360) / 8) = DIRECT + inode;
    *(made_page(&guest, PAGE(DATA + 100)) + (64 + 360 + 512) / 8) =
        DIRECT + inode + 512;
    /* A tail of the first one's last page. */
    STRUCT(DATA + 51 + 0)[1] = 0;
    STRUCT(DATA + 54)[1] = (KERNEL + 64 * (DATA + 53)) | 1;
    /* Slab: something else is at 24. */
    STRUCT(DATA + 60)[3] = DIRECT + PAGE(DATA);
    /* Free: no references. */
    STRUCT(DATA + 61)[6] = UINT32_MAX;
    STRUCT(DATA + 62)[6] = 0xffffff7f;
    cpu = made_cpu(&guest, 4, root, 0);
    spaces = find(&guest, &cpu, 1);
    check_all(&guest, spaces);
    CHECK(spaces->page_structs_known && spaces->page_structs == KERNEL);
    CHECK(spaces->stats.sources[PS_SOURCE_USER] == 12);
    CHECK(spaces->stats.sources[PS_SOURCE_FILE] == 5);
    CHECK(spaces->stats.sources[PS_SOURCE_FREE] == 2);
    CHECK(spaces->stats.files == 2);
    files = spaces->order + 12;
    CHECK(files[0] == DATA + 52 && files[1] == DATA + 50);
    CHECK(files[2] == DATA + 53 && files[3] == DATA + 54 &&
          files[4] == DATA + 51);
    CHECK(spaces->order[spaces->order_count - 1] == DATA + 62);
    ps_spaces_destroy(spaces);

    /* If too few of them agree, files are not known; nothing else changes. */
    for (i = 0; i < 10; i++) {
        STRUCT(DATA + 10 + 2 * i)[4]++;
    }
    spaces = find(&guest, &cpu, 1);
    check_all(&guest, spaces);
    CHECK(!spaces->page_structs_known && (spaces->notes & PS_NOTE_NO_FILES));
    CHECK(spaces->stats.sources[PS_SOURCE_USER] == 12);
    CHECK(spaces->stats.sources[PS_SOURCE_FILE] == 0);
    ps_spaces_destroy(spaces);
#undef STRUCT
    made_deinit(&guest);
}

/* Tables that multiply: the time is bounded, and so are the runs. */
static void test_bounds(void)
{
    made_guest guest;
    uint64_t tables[4];
    ps_cpu_paging cpu;
    ps_spaces *spaces;

    made_init(&guest, PS_ARCH_X86_64);
    for (size_t i = 0; i < 4; i++) {
        tables[i] = made_table(&guest);
    }
    for (size_t i = 0; i < 4; i++) {
        for (size_t k = 0; k < PS_TABLE_ENTRIES; k++) {
            made_page(&guest, tables[i])[k] =
                i < 3 ? made_table_entry(&guest, tables[i + 1])
                      : made_leaf_entry(&guest, PAGE(DATA), 0, true);
        }
    }
    made_fill(&guest, PAGE(DATA), 1);
    cpu = made_cpu(&guest, 4, tables[0], 0);
    spaces = find(&guest, &cpu, 1);
    check_all(&guest, spaces);
    CHECK(spaces->notes & PS_NOTE_BUDGET);
    CHECK(spaces->notes & PS_NOTE_MEMORY);
    CHECK(spaces->stats.runs_dropped > 0);
    CHECK(spaces->run_count <= spaces->max_runs);
    CHECK(guest.reads < 200000);
    ps_spaces_destroy(spaces);
    made_deinit(&guest);
}

static void test_nothing(void)
{
    made_guest guest;
    ps_cpu_paging cpu;
    ps_spaces *spaces;
    ps_error err = {0};

    made_init(&guest, PS_ARCH_X86_64);
    made_fill(&guest, PAGE(DATA), 100);
    spaces = find(&guest, NULL, 0);
    check_all(&guest, spaces);
    CHECK(!spaces->mode && spaces->reason && spaces->space_count == 0);
    CHECK(spaces->order[0] == DATA && spaces->order[99] == DATA + 99);
    ps_spaces_destroy(spaces);
    cpu = made_cpu(&guest, 4, PAGE(DATA), 0); /* nonsense */
    spaces = find(&guest, &cpu, 1);
    check_all(&guest, spaces);
    CHECK(spaces->mode && !spaces->reason && spaces->space_count == 0);
    ps_spaces_destroy(spaces);
    cpu.registers[1] = UINT64_C(1) << 50; /* nowhere */
    spaces = find(&guest, &cpu, 1);
    check_all(&guest, spaces);
    ps_spaces_destroy(spaces);
    cpu.registers[0] = 0;
    spaces = find(&guest, &cpu, 1);
    check_all(&guest, spaces);
    CHECK(!spaces->mode && spaces->reason);
    ps_spaces_destroy(spaces);

    guest.ranges[1].address = PAGE(LOW_PAGES - 1);
    CHECK(ps_spaces_find(&cpu, 1, &guest.memory, &spaces, &err) ==
          PS_ERR_ARGUMENT);
    guest.ranges[1].address = HIGH_ADDRESS;
    guest.ranges[1].pages++;
    CHECK(ps_spaces_find(&cpu, 1, &guest.memory, &spaces, &err) ==
          PS_ERR_ARGUMENT);
    made_deinit(&guest);
}

/* Each read fails once; none of it is lost or forgotten. */
static void test_read_fails(void)
{
    made_guest guest;
    uint64_t root, reads = 1;
    ps_cpu_paging cpu;
    ps_spaces *spaces;
    ps_error err = {0};
    int r;

    made_init(&guest, PS_ARCH_X86_64);
    root = made_table(&guest);
    map_kernel(&guest, root, 4, DIRECT);
    made_map(&guest, root, 4, USER, PAGE(DATA), 0, true);
    made_finish(&guest);
    cpu = made_cpu(&guest, 4, root, 0);
    do {
        guest.reads = 0;
        guest.fail_at = reads++;
        r = ps_spaces_find(&cpu, 1, &guest.memory, &spaces, &err);
        CHECK(r == PS_ERR_IO || r == PS_OK);
        CHECK((spaces != NULL) == (r == PS_OK));
        ps_spaces_destroy(spaces);
    } while (r);
    CHECK(reads > 10);
    made_deinit(&guest);
}

int main(void)
{
    test_x86_64(4);
    test_x86_64(5);
    test_kpti();
    test_runs();
    test_aarch64(3);
    test_aarch64(4);
    test_riscv64();
    test_page_structs();
    test_bounds();
    test_nothing();
    test_read_fails();
    return check_done();
}
