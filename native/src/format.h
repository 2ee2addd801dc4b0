/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The .psnap file as it lies on disk: FORMAT.md in C. Field order, names and
 * sizes follow its tables; the file is little-endian and so are all hosts that
 * we build for (common.h asserts it).
 */
#ifndef PS_FORMAT_H
#define PS_FORMAT_H

#include "common.h"

#define PS_FORMAT_VERSION 1u
#define PS_HEADER_MAGIC "\x89PSNAP\r\n"
#define PS_TRAILER_MAGIC "PSNAPEND"
#define PS_MAGIC_LENGTH 8u

#define PS_HEADER_LENGTH 4096u
#define PS_TRAILER_LENGTH 128u
#define PS_MAX_SECTIONS 64u
#define PS_CHUNK_SIZE ((size_t)4096)
#define PS_CHUNK_BITS 12
#define PS_PART_ALIGNMENT 8u
#define PS_BLOCK_ALIGNMENT 4096u /* of blocks that are stored as they are */
#define PS_MAX_CONFIGURATION_BYTES (UINT64_C(1) << 20)
/* Entries of the top map, so that a global page number has 32 bits. */
#define PS_MAX_LEAVES (UINT64_C(1) << 23)
#define PS_MAX_CANONICAL_PAGES (UINT64_C(1) << 32)
#define PS_LEAF_BITS 9
#define PS_MAX_SPACES (UINT64_C(1) << 20)
#define PS_MAX_RUNS ((UINT64_C(1) << 32) - 1) /* numbers have 32 bits */

#define PS_INCOMPATIBLE_KNOWN UINT64_C(0)

#define PS_PACKED __attribute__((packed))

/* Offset 0. */
typedef struct ps_format_header {
    uint8_t magic[8];
    uint32_t version;
    uint32_t header_length;
    uint64_t incompatible;
    uint64_t compatible;
    uint8_t uuid[16];
    uint8_t parent[16];
    uint32_t pages_per_block;
    uint8_t reserved[4020];
    uint64_t checksum; /* XXH3-64 of the bytes before it */
} PS_PACKED ps_format_header;

_Static_assert(sizeof(ps_format_header) == PS_HEADER_LENGTH, "header");
_Static_assert(offsetof(ps_format_header, version) == 8, "header");
_Static_assert(offsetof(ps_format_header, incompatible) == 16, "header");
_Static_assert(offsetof(ps_format_header, uuid) == 32, "header");
_Static_assert(offsetof(ps_format_header, parent) == 48, "header");
_Static_assert(offsetof(ps_format_header, pages_per_block) == 64, "header");
_Static_assert(offsetof(ps_format_header, reserved) == 68, "header");
_Static_assert(offsetof(ps_format_header, checksum) == 4088, "header");

/* The last 128 bytes. */
typedef struct ps_format_trailer {
    uint64_t table_offset;
    uint64_t table_length;
    uint64_t table_checksum; /* XXH3-64 of the section table */
    uint64_t file_length;
    uint8_t uuid[16];
    uint8_t reserved[64];
    uint64_t checksum; /* XXH3-64 of the bytes before it */
    uint8_t magic[8];
} PS_PACKED ps_format_trailer;

_Static_assert(sizeof(ps_format_trailer) == PS_TRAILER_LENGTH, "trailer");
_Static_assert(offsetof(ps_format_trailer, file_length) == 24, "trailer");
_Static_assert(offsetof(ps_format_trailer, uuid) == 32, "trailer");
_Static_assert(offsetof(ps_format_trailer, reserved) == 48, "trailer");
_Static_assert(offsetof(ps_format_trailer, checksum) == 112, "trailer");
_Static_assert(offsetof(ps_format_trailer, magic) == 120, "trailer");

enum {
    PS_SECTION_FLAG_REQUIRED = 1u << 0, /* unknown type: refuse the file */
    PS_SECTION_FLAGS_KNOWN = PS_SECTION_FLAG_REQUIRED,
};

typedef struct ps_format_section {
    uint32_t type; /* a ps_section_type */
    uint32_t flags;
    uint64_t offset;
    uint64_t length;
    uint64_t sums_offset;
    uint64_t sums_checksum; /* XXH3-64 of the checksum array */
    uint32_t record_size;
    uint32_t reserved;
} PS_PACKED ps_format_section;

_Static_assert(sizeof(ps_format_section) == 48, "section");
_Static_assert(offsetof(ps_format_section, offset) == 8, "section");
_Static_assert(offsetof(ps_format_section, sums_offset) == 24, "section");
_Static_assert(offsetof(ps_format_section, sums_checksum) == 32, "section");
_Static_assert(offsetof(ps_format_section, record_size) == 40, "section");

enum {
    PS_STREAM_FOOTERS = 1u << 0,
    PS_STREAM_CONFIGURATION = 1u << 1,
    PS_STREAM_DESCRIPTION = 1u << 2,
    PS_STREAM_FLAGS_KNOWN = 7u,
};

/* The one record of PS_SECTION_STREAM. */
typedef struct ps_format_stream {
    uint32_t stream_version;
    uint32_t ram_section_id;
    uint32_t ram_instance;
    uint32_t ram_version;
    uint32_t flags;
    uint32_t page_bits;
    uint8_t reserved[16];
} PS_PACKED ps_format_stream;

_Static_assert(sizeof(ps_format_stream) == 40, "stream");
_Static_assert(offsetof(ps_format_stream, flags) == 16, "stream");
_Static_assert(offsetof(ps_format_stream, reserved) == 24, "stream");

/* PS_SECTION_RAM_BLOCKS. */
typedef struct ps_format_ram_block {
    uint8_t name_length; /* 1..255 */
    char name[255];      /* padded with 0, not NUL-terminated at 255 */
    uint64_t length;
    uint64_t page_size; /* 0: not known */
    uint64_t address;   /* UINT64_MAX: not known */
    uint64_t first_leaf;
    uint64_t pages_zero;
    uint64_t pages_fill;
    uint64_t pages_data;
    uint64_t pages_absent;
} PS_PACKED ps_format_ram_block;

_Static_assert(sizeof(ps_format_ram_block) == 320, "RAM block");
_Static_assert(offsetof(ps_format_ram_block, length) == 256, "RAM block");
_Static_assert(offsetof(ps_format_ram_block, first_leaf) == 280, "RAM block");
_Static_assert(offsetof(ps_format_ram_block, pages_absent) == 312, "RAM block");

enum ps_block_form {
    PS_BLOCK_RAW = 0,  /* as they are */
    PS_BLOCK_ZSTD = 1, /* one zstd frame */
};

/* PS_SECTION_BLOCK_INDEX: one for each locality block. */
typedef struct ps_format_block {
    uint64_t offset;
    uint32_t length;   /* of the stored bytes */
    uint32_t form;     /* a ps_block_form */
    uint64_t checksum; /* XXH3-64 of the stored bytes */
} PS_PACKED ps_format_block;

_Static_assert(sizeof(ps_format_block) == 24, "locality block");
_Static_assert(offsetof(ps_format_block, checksum) == 16, "locality block");

/* PS_SECTION_SIGNATURES. */
typedef struct ps_format_signature {
    uint64_t low;
    uint64_t high;
} PS_PACKED ps_format_signature;

_Static_assert(sizeof(ps_format_signature) == 16, "signature");

/* PS_SECTION_OWNERS: global page numbers. */
typedef uint32_t ps_format_owner;

enum ps_space_kind {
    PS_SPACE_USER = 1,
    PS_SPACE_KERNEL = 2, /* the one that all share, without its direct map */
};

/* PS_SECTION_SPACES. */
typedef struct ps_format_space {
    uint64_t root; /* guest-physical address of its top table */
    uint32_t kind; /* a ps_space_kind */
    uint32_t mode; /* a ps_paging_mode */
    uint64_t first_run;
    uint64_t run_count;
    uint64_t pages;        /* mapped, and in a RAM block */
    uint64_t pages_shared; /* of these, mapped by another space as well */
    uint8_t reserved[16];
} PS_PACKED ps_format_space;

_Static_assert(sizeof(ps_format_space) == 64, "space");
_Static_assert(offsetof(ps_format_space, first_run) == 16, "space");
_Static_assert(offsetof(ps_format_space, reserved) == 48, "space");

/* PS_SECTION_VIRTUAL_RUNS. */
typedef struct ps_format_run {
    uint64_t address; /* guest-virtual */
    uint32_t first;   /* global page number */
    uint16_t pages;   /* 1..512, all in one leaf */
    uint16_t reserved;
} PS_PACKED ps_format_run;

_Static_assert(sizeof(ps_format_run) == 16, "virtual run");

/* PS_SECTION_RUN_INDEX. */
typedef struct ps_format_run_index {
    uint32_t first; /* global page number */
    uint32_t run;
    uint32_t space;
    uint16_t pages;
    uint16_t reserved;
} PS_PACKED ps_format_run_index;

_Static_assert(sizeof(ps_format_run_index) == 16, "run index");

/*
 * Page entries (top map and leaves): class in bits 0-3, log2 of the fill unit
 * in bits 4-7, value in bits 16-63.
 */
#define PS_ENTRY_VALUE_SHIFT 16
#define PS_ENTRY_RESERVED UINT64_C(0xff00)
#define PS_ENTRY_MAX_VALUE ((UINT64_C(1) << 48) - 1)
#define PS_FILL_INLINE_LOG2 2u /* units of 1, 2 and 4 bytes are the value */
#define PS_FILL_MAX_LOG2 6u
#define PS_FILL_GRAIN 8u /* the value times this is the offset of others */

static inline uint32_t ps_entry_class(uint64_t entry)
{
    return (uint32_t)(entry & 0xf);
}

static inline uint32_t ps_entry_unit_log2(uint64_t entry)
{
    return (uint32_t)(entry >> 4) & 0xf;
}

static inline uint64_t ps_entry_value(uint64_t entry)
{
    return entry >> PS_ENTRY_VALUE_SHIFT;
}

static inline uint64_t ps_entry_make(uint32_t page_class, uint32_t unit_log2,
                                     uint64_t value)
{
    return (uint64_t)page_class | (uint64_t)unit_log2 << 4 |
           value << PS_ENTRY_VALUE_SHIFT;
}

/* Chunks, and so checksums, of a section of that length. */
static inline uint64_t ps_chunks_of(uint64_t length)
{
    return (length >> PS_CHUNK_BITS) + ((length & (PS_CHUNK_SIZE - 1)) != 0);
}

/* Entries in the top map of a RAM block of that many pages. */
static inline uint64_t ps_leaves_of(uint64_t pages)
{
    return (pages + PS_LEAF_PAGES - 1) >> PS_LEAF_BITS;
}

#endif
