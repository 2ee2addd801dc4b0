/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is found in a snapshot: a development program, not a test.
 *
 *     dump_spaces FILE ARCHITECTURE CPU... -- RANGE...
 *
 * CPU is up to six registers (ps_cpu_paging) with commas between them, RANGE
 * is ADDRESS:GLOBAL:PAGES; all numbers as strtoull() takes them. -l before
 * FILE lists the runs; -f lists frames of each space, one a line.
 */
#include <fcntl.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "image.h"
#include "spaces.h"

#define MAX_CPUS 64
#define MAX_RANGES 16

typedef struct source {
    const ps_guest_memory *memory;
    uint8_t *pages; /* by global number */
    uint64_t reads;
} source;

static void die(const char *what, const ps_error *err)
{
    fprintf(stderr, "dump_spaces: %s: %s\n", what, err ? err->message : "");
    exit(1);
}

static double seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static int read_memory(void *opaque, uint64_t address, size_t length, void *out,
                       ps_error *err)
{
    source *s = opaque;
    uint64_t page = address & ~(uint64_t)(PS_PAGE_SIZE - 1);
    uint64_t global = ps_guest_global(s->memory, page);

    if (global == PS_NOWHERE || address - page + length > PS_PAGE_SIZE) {
        return ps_fail(err, PS_ERR_ARGUMENT, address, "read outside a page");
    }
    s->reads++;
    memcpy(out, s->pages + global * PS_PAGE_SIZE + (address - page), length);
    return PS_OK;
}

/* All pages that are not zero, and a bit for each. */
static void load(ps_image *image, uint64_t *used, uint8_t *pages)
{
    ps_error err;

    for (uint64_t leaf = 0; leaf < image->leaves; leaf++) {
        for (uint64_t i = leaf * PS_LEAF_PAGES; i < (leaf + 1) * PS_LEAF_PAGES;
             i++) {
            const uint8_t *page;
            uint64_t entry;

            if (ps_image_entry(image, i, &entry, &err)) {
                die("page map", &err);
            }
            if (ps_entry_class(entry) != PS_CLASS_DATA &&
                ps_entry_class(entry) != PS_CLASS_FILL) {
                continue;
            }
            ps_bit_set(used, i);
            if (ps_entry_class(entry) == PS_CLASS_FILL) {
                if (ps_image_expand(image, entry, pages + i * PS_PAGE_SIZE,
                                    &err)) {
                    die("page", &err);
                }
            } else if (ps_image_page(image, entry, &page, &err)) {
                die("page", &err);
            } else {
                memcpy(pages + i * PS_PAGE_SIZE, page, PS_PAGE_SIZE);
            }
        }
    }
}

static void print_runs(const ps_spaces *spaces, const ps_guest_memory *memory,
                       const ps_space *space, bool frames)
{
    for (uint64_t i = 0; i < space->run_count; i++) {
        const ps_virtual_run *run = &spaces->runs[space->first_run + i];

        if (!frames) {
            printf("  %016lx %8x %3u %2x\n", run->address, run->first,
                   run->pages, run->flags);
            continue;
        }
        for (uint32_t p = 0; p < run->pages; p++) {
            if (ps_bit_test(memory->used, run->first + p)) {
                printf("frame %lx %lx %lx\n", space->root,
                       run->address + ((uint64_t)p << PS_PAGE_BITS),
                       ps_guest_address(memory, run->first + p) >>
                           PS_PAGE_BITS);
            }
        }
    }
}

static void print(const ps_spaces *spaces, const ps_guest_memory *memory,
                  bool list, bool frames)
{
    static const char *const names[PS_SOURCES] = {"user", "file", "kernel",
                                                  "rest", "free"};
    const ps_spaces_stats *s = &spaces->stats;

    printf("mode: %s\n",
           spaces->mode ? ps_paging_mode_name(spaces->mode) : spaces->reason);
    for (uint64_t i = 0; i < spaces->space_count; i++) {
        const ps_space *space = &spaces->spaces[i];

        printf("space %12lx %s runs %7lu pages %7lu exclusive %7lu shared "
               "%6lu\n",
               space->root, space->kind == PS_SPACE_USER ? "user  " : "kernel",
               space->run_count, space->pages, space->exclusive, space->shared);
        if (list || frames) {
            print_runs(spaces, memory, space, frames);
        }
    }
    printf("used %lu, candidates %lu, live %lu, dead %lu, duplicates %lu, "
           "pairs %lu, tables %lu, damaged %lu, runs %lu, dropped %lu\n",
           s->used, s->candidates, s->live, s->dead, s->duplicates, s->pairs,
           s->tables, s->damaged, spaces->run_count, s->runs_dropped);
    printf("direct map: %s %lx, %lu used pages; struct page at %lx; %lu "
           "files\n",
           spaces->direct_known ? "known" : "unknown", spaces->direct_delta,
           s->direct_map, spaces->page_structs, s->files);
    for (uint32_t note = 1; note <= PS_NOTE_NO_DIRECT; note *= 2) {
        if (spaces->notes & note) {
            printf("note: %s\n", ps_spaces_note_text(note));
        }
    }
    for (uint32_t i = 0; i < PS_SOURCES; i++) {
        printf("%-6s %8lu  %5.2f %%\n", names[i], s->sources[i],
               100.0 * (double)s->sources[i] / (double)(s->used ? s->used : 1));
    }
}

int main(int argc, char **argv)
{
    bool list = false, frames = false;
    ps_cpu_paging cpus[MAX_CPUS] = {{0}};
    ps_guest_range ranges[MAX_RANGES];
    ps_guest_memory memory = {.read = read_memory, .ranges = ranges};
    source s = {.memory = &memory};
    size_t cpu_count = 0;
    ps_spaces *spaces;
    ps_image *image;
    uint64_t *used;
    double start;
    ps_error err;
    int option, fd, at;

    while ((option = getopt(argc, argv, "+lf")) != -1) {
        list |= option == 'l';
        frames |= option == 'f';
    }
    if (argc - optind < 3) {
        fprintf(stderr, "usage: dump_spaces [-lf] FILE ARCHITECTURE CPU... -- "
                        "ADDRESS:GLOBAL:PAGES...\n");
        return 2;
    }
    for (at = optind + 2; at < argc && strcmp(argv[at], "--") != 0; at++) {
        char *text = argv[at];

        if (cpu_count == MAX_CPUS) {
            die("too many CPUs", NULL);
        }
        cpus[cpu_count].architecture =
            (uint32_t)strtoul(argv[optind + 1], NULL, 0);
        for (size_t i = 0; i < 6 && *text; i++) {
            cpus[cpu_count].registers[i] = strtoull(text, &text, 0);
            text += *text == ',';
        }
        cpu_count++;
    }
    for (at++; at < argc && memory.range_count < MAX_RANGES; at++) {
        ps_guest_range *range = &ranges[memory.range_count++];
        char *text = argv[at];

        range->address = strtoull(text, &text, 0);
        text += *text == ':';
        range->first = strtoull(text, &text, 0);
        text += *text == ':';
        range->pages = strtoull(text, &text, 0);
    }
    fd = open(argv[optind], O_RDONLY | O_CLOEXEC);
    if (fd < 0 || ps_image_open(fd, &image, &err)) {
        die(argv[optind], fd < 0 ? NULL : &err);
    }
    memory.leaves = image->leaves;
    memory.opaque = &s;
    used = calloc(image->leaves * PS_LEAF_PAGES / 64, sizeof(*used));
    if (!used || ps_reserve(image->leaves * PS_LEAF_PAGES * PS_PAGE_SIZE,
                            (void **)&s.pages, &err)) {
        die("memory", NULL);
    }
    memory.used = used;
    load(image, used, s.pages);
    start = seconds();
    if (ps_spaces_find(cpus, cpu_count, &memory, &spaces, &err)) {
        die("spaces", &err);
    }
    start = seconds() - start;
    print(spaces, &memory, list, frames);
    printf("%.1f ms, %lu reads\n", start * 1e3, s.reads);
    ps_spaces_destroy(spaces);
    ps_image_destroy(image);
    return 0;
}
