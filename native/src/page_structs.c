/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What Linux knows of its frames: pages of files in the page cache, and free
 * ones. From Linux 4.18 on a struct page has 64 bytes and lies in one virtual
 * array, by frame number (include/linux/mm_types.h, SPARSEMEM_VMEMMAP):
 *
 *      8  of a tail of a compound page: its head's address | 1
 *     24  mapping: bits 0 and 1 are 0 and it is not NULL: the struct
 *         address_space of a file; 1: anonymous memory
 *     32  index: the page's number in the file; of anonymous memory that was
 *         never remapped, virtual address / 4096
 *     48  map count or type, 4 bytes; -1: neither mapped nor of a type
 *     52  references, 4 bytes
 *
 * Where the array begins is random, and is found by what it has to say: a
 * writable user page is most often anonymous, so its struct page has a number
 * that we know. One page of kernel memory that has it where that frame's
 * struct page would be gives a beginning, and it is right if it holds for
 * other pages too. If none does, neither is known, and nothing is lost.
 *
 * A page without references is free, in the buddy allocator (whose blocks'
 * first pages have a type for it) or on a CPU's list, unless it is a tail or
 * of another type. What is left in it was freed with it.
 *
 * Slab pages of some kernels have a pointer at 24 as well. An address_space
 * begins with the address of its inode, which it is a part of: so `mapping`
 * is believed only when that points a little below itself.
 */
#include "spaces.h"

#define STRUCT_PAGE 64u
#define TAIL_HEAD 8u
#define MAPPING 24u
#define INDEX 32u
#define COUNTS 48u
#define MAPPING_KIND 3u
#define MAPPING_ANON 1u
#define MAX_INODE 2048u
#define NO_TYPE UINT32_MAX
#define TYPE_BUDDY 0xffffff7fu     /* 4.18 to 6.10 */
#define TYPE_BUDDY_HIGH_BYTE 0xf0u /* 6.12 on */

#define SEEDS 16u
#define MIN_MATCHES 4u
/* A kernel maps its struct pages once: a search that needs more is led on. */
#define READS_PER_PAGE SEEDS
#define VALIDATIONS 64u
/* Of the samples, at least one in this many has to match. */
#define MATCH_SHARE 8u

typedef struct page_struct {
    uint64_t mapping;
    uint64_t index;
    bool is_free;
} page_struct;

typedef struct reader {
    const ps_spaces *spaces;
    const ps_guest_memory *memory;
    uint64_t kernel; /* index of the kernel's space */
    uint64_t reads;  /* that the search may still make */
    uint32_t validations;
    uint64_t address; /* of the page that is in `page`; 1: none */
    uint8_t page[PS_PAGE_SIZE];
} reader;

/* 8 bytes of kernel memory; false: nothing is mapped there, or a zero page. */
static int read_word(reader *r, uint64_t address, uint64_t *word, bool *known,
                     ps_error *err)
{
    const ps_guest_memory *memory = r->memory;
    const ps_spaces *spaces = r->spaces;
    const ps_space *kernel = &spaces->spaces[r->kernel];
    uint64_t page = address & ~(uint64_t)(PS_PAGE_SIZE - 1);
    uint64_t within = address - page;

    *known = false;
    if (within > PS_PAGE_SIZE - sizeof(*word)) {
        return PS_OK;
    }
    if (page != r->address) {
        uint64_t i = ps_spaces_run_at(spaces, r->kernel, page);
        uint64_t global = PS_NOWHERE;
        int result;

        if (i < kernel->first_run + kernel->run_count &&
            spaces->runs[i].address <= page) {
            global = spaces->runs[i].first +
                     ((page - spaces->runs[i].address) >> PS_PAGE_BITS);
        } else if (spaces->direct_known) {
            global = ps_guest_global(memory, page - spaces->direct_delta);
        }
        if (global == PS_NOWHERE || !ps_bit_test(memory->used, global)) {
            return PS_OK;
        }
        r->address = 1;
        result = memory->read(memory->opaque, ps_guest_address(memory, global),
                              PS_PAGE_SIZE, r->page, err);
        if (result) {
            return result;
        }
        r->address = page;
    }
    memcpy(word, r->page + within, sizeof(*word));
    *known = true;
    return PS_OK;
}

/* type in the low half, references in the high one. */
static bool is_free(uint64_t counts)
{
    uint32_t type = (uint32_t)counts;

    return counts >> 32 == 0 && (type == NO_TYPE || type == TYPE_BUDDY ||
                                 type >> 24 == TYPE_BUDDY_HIGH_BYTE);
}

/* Of a frame, mapping and index of its head if it is a tail; all 0 where
   nothing is known. */
static int read_page_struct(reader *r, uint64_t base, uint64_t frame,
                            page_struct *out, ps_error *err)
{
    uint64_t address = base + frame * STRUCT_PAGE;
    uint64_t head, counts, tail = 0;
    bool known;
    int result;

    memset(out, 0, sizeof(*out));
    result = read_word(r, address + TAIL_HEAD, &head, &known, err);
    if (result || !known) {
        return result;
    }
    if (head & 1) {
        tail = (address - (head - 1)) / STRUCT_PAGE;
        address = head - 1;
        if (address % STRUCT_PAGE || tail >= (UINT64_C(1) << 18)) {
            return PS_OK;
        }
    }
    result = read_word(r, address + MAPPING, &out->mapping, &known, err);
    if (result || !known) {
        return result;
    }
    result = read_word(r, address + INDEX, &out->index, &known, err);
    if (result) {
        return result;
    }
    out->index += tail;
    result = read_word(r, address + COUNTS, &counts, &known, err);
    out->is_free = known && !(head & 1) && is_free(counts);
    return result;
}

static int validate(reader *r, uint64_t base, const ps_sample *samples,
                    size_t count, bool *valid, ps_error *err)
{
    size_t matches = 0;

    for (size_t i = 0; i < count; i++) {
        page_struct page;
        int result = read_page_struct(r, base, samples[i].frame, &page, err);

        if (result) {
            return result;
        }
        matches += page.index == samples[i].page &&
                   (page.mapping & MAPPING_KIND) == MAPPING_ANON;
    }
    *valid = matches >= MIN_MATCHES && matches * MATCH_SHARE >= count;
    return PS_OK;
}

/* All kernel pages that could have the sample's struct page. */
static int try_seed(reader *r, const ps_sample *samples, size_t count,
                    const ps_sample *seed, uint64_t *base, bool *found,
                    ps_error *err)
{
    const ps_guest_memory *memory = r->memory;
    const ps_space *kernel = &r->spaces->spaces[r->kernel];
    uint64_t within = seed->frame * STRUCT_PAGE % PS_PAGE_SIZE;
    uint64_t below = seed->frame * STRUCT_PAGE - within;

    for (uint64_t i = 0; i < kernel->run_count && !*found; i++) {
        const ps_virtual_run *run = &r->spaces->runs[kernel->first_run + i];

        for (uint64_t p = 0; p < run->pages && !*found; p++) {
            uint64_t global = run->first + p;
            uint64_t words[2]; /* mapping, index */
            int result;

            if (!ps_bit_test(memory->used, global)) {
                continue;
            }
            if (r->reads == 0 || r->validations == 0) {
                return PS_OK;
            }
            r->reads--;
            result = memory->read(memory->opaque,
                                  ps_guest_address(memory, global) + within +
                                      MAPPING,
                                  sizeof(words), words, err);
            if (result) {
                return result;
            }
            if (words[1] != seed->page ||
                (words[0] & MAPPING_KIND) != MAPPING_ANON) {
                continue;
            }
            *base = run->address + (p << PS_PAGE_BITS) - below;
            r->validations--;
            result = validate(r, *base, samples, count, found, err);
            if (result) {
                return result;
            }
        }
    }
    return PS_OK;
}

static int find_page_structs(reader *r, const ps_sample *samples, size_t count,
                             uint64_t *base, bool *found, ps_error *err)
{
    size_t step = count / SEEDS ? count / SEEDS : 1;

    *found = false;
    for (size_t i = step / 2; i < count && !*found; i += step) {
        int result = try_seed(r, samples, count, &samples[i], base, found, err);

        if (result) {
            return result;
        }
    }
    return PS_OK;
}

static int file_page_order(const void *a, const void *b)
{
    const ps_file_page *x = a, *y = b;

    if (x->mapping != y->mapping) {
        return x->mapping < y->mapping ? -1 : 1;
    }
    if (x->index != y->index) {
        return x->index < y->index ? -1 : 1;
    }
    return (x->global > y->global) - (x->global < y->global);
}

/* Used pages, not placed yet, that are free or may belong to a file. */
static int collect(reader *r, uint64_t base, const uint64_t *placed,
                   uint64_t limit, ps_file_page *pages, uint64_t *count,
                   uint64_t *free_pages, ps_error *err)
{
    const ps_guest_memory *memory = r->memory;

    for (size_t i = 0; i < memory->range_count; i++) {
        const ps_guest_range *range = &memory->ranges[i];

        for (uint64_t p = 0; p < range->pages; p++) {
            uint64_t global = range->first + p;
            uint64_t frame = (range->address >> PS_PAGE_BITS) + p;
            page_struct page;
            int result;

            if (!ps_bit_test(memory->used, global) ||
                ps_bit_test(placed, global)) {
                continue;
            }
            result = read_page_struct(r, base, frame, &page, err);
            if (result) {
                return result;
            }
            if (page.is_free) {
                ps_bit_set(free_pages, global);
                continue;
            }
            if (page.mapping == 0 || page.mapping & MAPPING_KIND ||
                page.index > UINT32_MAX || *count == limit) {
                continue;
            }
            pages[(*count)++] = (ps_file_page){
                page.mapping, (uint32_t)page.index, (uint32_t)global};
        }
    }
    return PS_OK;
}

/* Keep the groups whose mapping is an address_space. */
static int keep_files(reader *r, ps_spaces *spaces, ps_file_page *pages,
                      uint64_t *count, ps_error *err)
{
    uint64_t kept = 0, last = 0;
    bool good = false;

    for (uint64_t i = 0; i < *count; i++) {
        uint64_t mapping = pages[i].mapping;

        if (mapping != last) {
            uint64_t inode;
            bool known;
            int result = read_word(r, mapping, &inode, &known, err);

            if (result) {
                return result;
            }
            good = known && inode < mapping && mapping - inode < MAX_INODE &&
                   inode % sizeof(uint64_t) == 0;
            spaces->stats.files += good;
            last = mapping;
        }
        if (good) {
            pages[kept++] = pages[i];
        }
    }
    *count = kept;
    return PS_OK;
}

int ps_page_structs_read(ps_spaces *spaces, const ps_guest_memory *memory,
                         const ps_sample *samples, size_t sample_count,
                         const uint64_t *placed, uint64_t limit,
                         ps_file_page **out, uint64_t *count,
                         uint64_t *free_pages, ps_error *err)
{
    PS_AUTOFREE reader *r = NULL;
    uint64_t left = 0, base;
    bool found = false;
    int result = PS_OK;

    *out = NULL;
    *count = 0;
    if (!spaces->mode) {
        return PS_OK;
    }
    r = calloc(1, sizeof(*r));
    if (!r) {
        return ps_fail_errno(err, PS_NOWHERE, "pages of files");
    }
    r->spaces = spaces;
    r->memory = memory;
    r->address = 1;
    r->reads = READS_PER_PAGE * spaces->stats.used;
    r->validations = VALIDATIONS;
    if (spaces->space_count) {
        r->kernel = spaces->space_count - 1;
        if (spaces->spaces[r->kernel].kind == PS_SPACE_KERNEL) {
            result =
                find_page_structs(r, samples, sample_count, &base, &found, err);
        }
    }
    if (result || !found) {
        spaces->notes |= PS_NOTE_NO_FILES;
        return result;
    }
    spaces->page_structs_known = true;
    spaces->page_structs = base;
    for (uint64_t i = 0; i < spaces->leaves * PS_LEAF_PAGES / 64; i++) {
        left += (uint64_t)__builtin_popcountll(memory->used[i] & ~placed[i]);
    }
    limit = limit < left ? limit : left;
    *out = malloc((limit ? limit : 1) * sizeof(**out));
    if (!*out) {
        return ps_fail_errno(err, PS_NOWHERE, "pages of files");
    }
    result = collect(r, base, placed, limit, *out, count, free_pages, err);
    if (result) {
        return result;
    }
    qsort(*out, *count, sizeof(**out), file_page_order);
    return keep_files(r, spaces, *out, count, err);
}
