/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The snapshot as the rest of the core reads it: page entries, locality
 * blocks and canonical pages of an open ps_image.
 *
 * Three names for a page. Its *place* is (RAM block, page within it). Its
 * *global page number* is 512 * first_leaf of the RAM block + page: dense
 * enough for a bitmap, 32 bits. Its *canonical number* says which content it
 * has: canonical page c is slot (c & block_mask) of locality block
 * (c >> block_shift).
 *
 * Everything here loads what it needs on first use, checks it against its
 * checksum and its bounds, and fails with PS_ERR_DAMAGED, PS_ERR_TRUNCATED or
 * PS_ERR_IO. Numbers that the caller makes up and that are out of range are
 * PS_ERR_ARGUMENT, never a crash. One thread at a time per image, except for
 * ps_decoder_read(), which touches no image.
 */
#ifndef PS_IMAGE_H
#define PS_IMAGE_H

#include "common.h"
#include "format.h"

#define PS_SECTION_TYPES 16u /* ps_section_type, 0 unused */

/*
 * One section. Its bytes live in reserved address space at the offset they
 * have in the section; a chunk is read with pread, checked and marked loaded
 * when it is first used. A file that is cut under us is an error, not SIGBUS.
 */
typedef struct ps_section {
    uint64_t offset;
    uint64_t length;
    uint64_t sums_offset;
    uint64_t sums_checksum;
    uint64_t chunks_loaded;
    uint32_t type;
    uint32_t record_size;
    uint8_t *bytes;   /* reserved; NULL until first used */
    uint64_t *loaded; /* one bit for each chunk; NULL until first used */
    uint64_t *sums;   /* one for each chunk; NULL until first used */
} ps_section;

/* A RAM block, for conversions between places and global page numbers. */
typedef struct ps_image_ram {
    uint64_t first_page; /* global number of its page 0 */
    uint64_t pages;
    uint64_t page_size; /* of the backing at the save; 0: not known */
    const char *name;   /* NUL-terminated, owned by the image */
} ps_image_ram;

struct ps_image {
    int fd;
    uint64_t file_length;
    uint64_t blocks_end; /* locality blocks end before this */
    uint64_t table_offset;
    uint64_t table_length;
    dev_t device; /* of the file: two images of one file are equal */
    ino_t inode;
    uint32_t pages_per_block;
    uint32_t block_shift;     /* log2(pages_per_block) */
    uint64_t block_mask;      /* pages_per_block - 1 */
    uint64_t canonical_pages; /* canonical numbers are below this */
    uint64_t locality_blocks; /* block numbers are below this */
    uint64_t leaves;          /* entries of the top map */
    uint64_t stored_leaves;   /* leaves that have entries of their own */
    uint32_t ram_count;
    ps_image_ram *ram;        /* ram_count of them, ascending */
    ps_ram_block *ram_blocks; /* what ps_image_ram_block() hands out */
    ps_section sections[PS_SECTION_TYPES]; /* by type */
    ps_section other[PS_MAX_SECTIONS];     /* of unknown, optional types */
    uint32_t other_count;
    ps_format_header header;
    ps_format_stream stream;
    struct ps_image_cache *cache; /* of ps_image_read_pages() */
};

/* ------------------------------------------------------------- sections */

static inline bool ps_section_chunk_loaded(const ps_section *section,
                                           uint64_t chunk)
{
    return section->loaded &&
           (section->loaded[chunk >> 6] >> (chunk & 63) & 1) != 0;
}

const char *ps_section_name(uint32_t type);

/* Load and check chunks first .. last, which must be within the section. */
int ps_section_load(ps_image *image, ps_section *section, uint64_t first,
                    uint64_t last, ps_error *err);

/*
 * Point *out at length bytes of a section from offset on, loaded and checked.
 * Valid as long as the image. Out of range is PS_ERR_ARGUMENT.
 */
int ps_section_bytes(ps_image *image, uint32_t type, uint64_t offset,
                     size_t length, const uint8_t **out, ps_error *err);

/* A range of the file, to see that no two overlap. */
typedef struct ps_part {
    uint64_t offset;
    uint64_t length;
} ps_part;

static inline int ps_part_order(const void *a, const void *b)
{
    const ps_part *x = a, *y = b;

    return (x->offset > y->offset) - (x->offset < y->offset);
}

static inline bool ps_all_zero(const void *data, size_t length)
{
    const uint8_t *bytes = data;

    return length == 0 ||
           (bytes[0] == 0 && memcmp(bytes, bytes + 1, length - 1) == 0);
}

static inline size_t ps_chunk_length(const ps_section *section, uint64_t chunk)
{
    uint64_t left = section->length - (chunk << PS_CHUNK_BITS);

    return left < PS_CHUNK_SIZE ? (size_t)left : PS_CHUNK_SIZE;
}

/* ---------------------------------------------------------- page entries */

/* What ps_image_entry() does when the entry is not loaded yet. */
int ps_image_entry_slow(ps_image *image, uint64_t global, uint64_t *out,
                        ps_error *err);

/*
 * Entry of a page by its global number: class absent, zero, fill or data,
 * never leaf. The entry is within bounds: a data entry's value is below
 * canonical_pages, a fill entry's unit lies within FILL_UNITS. Of a number
 * between two RAM blocks (after the end of one in its last leaf) the entry
 * has no meaning.
 */
static inline int ps_image_entry(ps_image *image, uint64_t global,
                                 uint64_t *out, ps_error *err)
{
    const ps_section *top = &image->sections[PS_SECTION_TOP_MAP];
    const ps_section *leaves = &image->sections[PS_SECTION_LEAVES];
    uint64_t leaf = global >> PS_LEAF_BITS;
    uint64_t entry;

    if (leaf >= image->leaves ||
        !ps_section_chunk_loaded(top, leaf >> (PS_CHUNK_BITS - 3))) {
        return ps_image_entry_slow(image, global, out, err);
    }
    entry = ((const uint64_t *)(const void *)top->bytes)[leaf];
    if (ps_entry_class(entry) == PS_CLASS_LEAF) {
        leaf = ps_entry_value(entry);
        if (!ps_section_chunk_loaded(leaves, leaf)) { /* a leaf is a chunk */
            return ps_image_entry_slow(image, global, out, err);
        }
        entry = ((const uint64_t *)(const void *)
                     leaves->bytes)[leaf << PS_LEAF_BITS |
                                    (global & (PS_LEAF_PAGES - 1))];
    }
    *out = entry;
    return PS_OK;
}

/*
 * What the top map says of pages 512 * leaf .. + 511, to skip 2 MiB at a time:
 * class absent, zero, fill (it holds for all of them) or leaf (look at each).
 */
int ps_image_top_entry(ps_image *image, uint64_t leaf, uint64_t *out,
                       ps_error *err);
/* The 512 entries of a leaf, by the value of a top entry of class leaf. */
int ps_image_leaf(ps_image *image, uint64_t leaf, const uint64_t **out,
                  ps_error *err);

/* Global number of a page; the caller has checked block and page. */
static inline uint64_t ps_image_global(const ps_image *image, uint32_t block,
                                       uint64_t page)
{
    return image->ram[block].first_page + page;
}

/* Place of a global number; false: there is no such page. */
bool ps_image_place(const ps_image *image, uint64_t global, uint32_t *block,
                    uint64_t *page);
/* Index of a RAM block by its name (not NUL-terminated); -1: none. */
int32_t ps_image_find_ram(const ps_image *image, const char *name,
                          size_t length);

/* The unit of a page of class zero or fill: 1 to 64 bytes. */
int ps_image_fill_unit(ps_image *image, uint64_t entry, uint8_t *unit,
                       size_t *length, ps_error *err);
/* 4096 bytes of a page of class zero or fill. */
int ps_image_expand(ps_image *image, uint64_t entry, uint8_t *page,
                    ps_error *err);

/* ------------------------------------- canonical pages, locality blocks */

/* Global number of the page that owns a canonical page: a page of a RAM
   block. (That this page's entry refers back is for ps_image_check().) */
int ps_image_owner(ps_image *image, uint64_t canonical, uint64_t *global,
                   ps_error *err);
int ps_image_signature(ps_image *image, uint64_t canonical,
                       ps_format_signature *out, ps_error *err);

/* A record of the block index, within bounds. */
typedef struct ps_block_info {
    uint64_t number;
    uint64_t offset; /* of the stored bytes in the file */
    uint64_t checksum;
    uint32_t stored; /* their length */
    uint32_t form;   /* a ps_block_form */
    uint64_t first;  /* canonical number of slot 0 */
    uint32_t pages;  /* pages_per_block, fewer in the last block */
} ps_block_info;

int ps_image_block(ps_image *image, uint64_t number, ps_block_info *out,
                   ps_error *err);

/* A reusable decoder: zstd context and a buffer for the stored bytes. One for
   each thread that decodes. */
typedef struct ps_decoder {
    void *zstd; /* a ZSTD_DCtx */
    uint8_t *stored;
    size_t capacity;
} ps_decoder;

int ps_decoder_init(ps_decoder *decoder, const ps_image *image, ps_error *err);
void ps_decoder_deinit(ps_decoder *decoder);
/*
 * Read, check and decode a whole locality block into out, which has room for
 * info->pages pages. Uses nothing but its arguments, so that other threads
 * can do it while the image's own thread goes on. The block's checksum is
 * right when this succeeds.
 */
int ps_decoder_read(ps_decoder *decoder, int fd, const ps_block_info *info,
                    uint8_t *out, ps_error *err);
/* The same when the stored bytes are in memory already (read ahead, or for
   several blocks at once): info->stored bytes. */
int ps_decoder_decode(ps_decoder *decoder, const ps_block_info *info,
                      const uint8_t *stored, uint8_t *out, ps_error *err);

/*
 * One page of a block that is stored as it is (info->form is PS_BLOCK_RAW),
 * without the rest of the block: one pread, checked against the page's
 * signature. PS_ERR_ARGUMENT for a compressed block.
 */
int ps_image_read_raw_page(ps_image *image, const ps_block_info *info,
                           uint64_t canonical, uint8_t *page, ps_error *err);

/* -------------------------------------------------------- address spaces */

/* A virtual run by its number; within bounds. */
int ps_image_run(ps_image *image, uint64_t number, ps_format_run *out,
                 ps_error *err);
/* Mappings of a page by its global number. */
int ps_image_find_mappings(ps_image *image, uint64_t global,
                           ps_page_mapping *out, size_t capacity, size_t *count,
                           ps_error *err);

/* ----------------------------------------------------------------- cache */

/*
 * The page's content by its entry, through a block cache of the image's own;
 * *page is valid until the next call. Not for the pager, which chooses the
 * size of its cache.
 */
int ps_image_page(ps_image *image, uint64_t entry, const uint8_t **page,
                  ps_error *err);

#endif
