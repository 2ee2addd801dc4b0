/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libpagesaver: the C core of qemu_pagesaver.
 *
 * The one interface of the core, read by the compiler and by cffi alike: it
 * has no preprocessor lines and needs <stdint.h>, <stddef.h>, <stdbool.h>.
 *
 * Conventions: a fallible function returns a ps_code (0 is success) and, when
 * it fails, fills the ps_error given as its last parameter (never NULL).
 * _create/_destroy own heap memory; destroy accepts NULL. Pages are 4096
 * bytes. Offsets and lengths are bytes, times are nanoseconds, unless a name
 * says otherwise. Nothing here is thread-safe except where a comment says so.
 * FORMAT.md (qemu_pagesaver/image/) is the specification of the file.
 */

enum ps_code {
    PS_OK = 0,
    PS_ERR_NOMEM = 1,       /* out of memory */
    PS_ERR_IO = 2,          /* a system call failed: os_errno says how */
    PS_ERR_NOT_OURS = 3,    /* no snapshot / no QEMU stream at all */
    PS_ERR_TRUNCATED = 4,   /* input ends too early */
    PS_ERR_DAMAGED = 5,     /* checksum, bound or reference is wrong */
    PS_ERR_VERSION = 6,     /* newer format version */
    PS_ERR_FEATURE = 7,     /* unknown incompatible feature */
    PS_ERR_UNSUPPORTED = 8, /* valid stream, but nothing we can honour */
    PS_ERR_PEER = 9,        /* QEMU sent nonsense on the return path */
    PS_ERR_CLOSED = 10,     /* QEMU closed the connection too early */
    PS_ERR_CANCELLED = 11,  /* ps_*_cancel() was called */
    PS_ERR_ARGUMENT = 12,   /* a bug of the caller */
};

typedef struct ps_error {
    int32_t code;      /* a ps_code */
    int32_t os_errno;  /* errno where code is PS_ERR_IO, else 0 */
    uint64_t offset;   /* where in the input or file; UINT64_MAX: nowhere */
    char message[256]; /* what is wrong, one clause, no full stop */
} ps_error;

/* The version of this interface; changes with every incompatible change. */
uint32_t ps_abi_version(void);

/* XXH3 of a byte range, for tests and tools. */
uint64_t ps_xxh3_64(const uint8_t *data, size_t length);

/* ------------------------------------------------------------------ page */

enum ps_page_class {
    PS_CLASS_ABSENT = 0, /* never sent, not part of the snapshot */
    PS_CLASS_ZERO = 1,
    PS_CLASS_FILL = 2,  /* a repeated unit of 1, 2, 4 .. 64 bytes */
    PS_CLASS_DATA = 3,  /* a reference to a canonical page */
    PS_CLASS_LEAF = 15, /* top map only: a reference to a leaf */
};

typedef struct ps_page_info {
    uint32_t page_class;    /* ZERO, FILL or DATA */
    uint32_t unit_log2;     /* FILL: log2 of the smallest unit, 0..6 */
    uint64_t signature_low; /* DATA: XXH3-128 of the 4096 bytes */
    uint64_t signature_high;
} ps_page_info;

/* Classify one page of 4096 bytes in one pass. */
void ps_page_classify(const uint8_t *page, ps_page_info *out);

/* ---------------------------------------------------------------- parser */

typedef struct ps_parser ps_parser;

enum ps_event_type {
    PS_EVENT_NONE = 0,          /* all input consumed: push more */
    PS_EVENT_HEADER = 1,        /* value = stream version */
    PS_EVENT_CONFIGURATION = 2, /* data = the raw section, 0x07 included */
    PS_EVENT_SECTION = 3,       /* a RAM section starts: value = section type
                                   (1 START, 2 PART, 3 END), section_id, name,
                                   instance and version where START tells them */
    PS_EVENT_BLOCK = 4,      /* of the RAM block list: block (its index from 0),
                                name, length, page_size (0: not told), address
                                (UINT64_MAX: not told) */
    PS_EVENT_BLOCKS_END = 5, /* value = total RAM bytes */
    PS_EVENT_ZERO = 6,       /* block, page_offset */
    PS_EVENT_PAGE = 7,       /* block, page_offset, data (4096 bytes) */
    PS_EVENT_COMMAND = 8,    /* value = command, data = its payload */
    PS_EVENT_RAM_END = 9,    /* the END section of RAM is complete */
    PS_EVENT_DEVICES = 10,   /* data = all device sections, byte for byte */
    PS_EVENT_DESCRIPTION = 11, /* data = the JSON text */
    PS_EVENT_END = 12,         /* the stream is complete */
};

/* data and name point into the input or into the parser and are valid until
   the next call. name is not NUL-terminated. */
typedef struct ps_event {
    uint32_t type;
    uint32_t block;
    uint64_t offset; /* of the event's first byte in the stream */
    uint64_t value;
    uint64_t page_offset; /* within the RAM block */
    uint64_t length;
    uint64_t page_size;
    uint64_t address;
    uint32_t section_id;
    uint32_t instance;
    uint32_t version;
    uint32_t name_length;
    const char *name;
    const uint8_t *data;
    size_t data_length;
} ps_event;

typedef struct ps_stream_info {
    uint32_t stream_version;
    uint32_t ram_section_id;
    uint32_t ram_instance;
    uint32_t ram_version;
    uint8_t footers;           /* sections end with 0x7e + id */
    uint8_t configuration;     /* there is a configuration section */
    uint8_t description;       /* the JSON description follows the EOF mark */
    uint8_t postcopy;          /* ADVISE was seen */
    uint32_t target_page_bits; /* always 12 here */
} ps_stream_info;

int ps_parser_create(ps_parser **out, ps_error *err);
void ps_parser_destroy(ps_parser *parser);
/* Consume bytes of [in, in + length) until one event is complete or all is
   consumed (event->type is PS_EVENT_NONE); *used says how many. After an
   error every further call returns the same error. */
int ps_parser_push(ps_parser *parser, const uint8_t *in, size_t length,
                   size_t *used, ps_event *event, ps_error *err);
/* No more input: yields DEVICES, DESCRIPTION (if any) and END, one a call. */
int ps_parser_finish(ps_parser *parser, ps_event *event, ps_error *err);
void ps_parser_info(const ps_parser *parser, ps_stream_info *out);

/* ------------------------------------------------------------ RAM blocks */

typedef struct ps_ram_block {
    char name[256]; /* NUL-terminated */
    uint64_t length;
    uint64_t page_size;  /* 0: not told */
    uint64_t address;    /* UINT64_MAX: not told */
    uint64_t first_leaf; /* its first entry in the top map */
    uint64_t pages_zero;
    uint64_t pages_fill;
    uint64_t pages_data;
    uint64_t pages_absent;
} ps_ram_block;

/* ----------------------------------------------------------------- saver */

/*
 * First pass: stream in, page map in memory, unique pages in a spool file.
 * Second pass: the snapshot, in locality order, into an open file.
 */
typedef struct ps_saver ps_saver;

typedef struct ps_saver_options {
    int32_t spool_fd;         /* an open, empty, unlinked regular file: pages;
                                 stays the caller's */
    int32_t units_fd;         /* another one, for fill units */
    uint32_t pages_per_block; /* power of two, 1..512 */
    int32_t zstd_level;       /* INT32_MIN: blocks are not compressed */
    uint32_t threads;         /* of the second pass, 1..64 */
} ps_saver_options;

typedef struct ps_saver_stats {
    uint64_t bytes_in;     /* of the stream */
    uint64_t ram_bytes;    /* of all RAM blocks */
    uint64_t pages_seen;   /* zero + non-zero records in the stream */
    uint64_t pages_resent; /* of these, sent before */
    uint64_t pages_zero;   /* the four classes, by the last that counts */
    uint64_t pages_fill;
    uint64_t pages_data;   /* canonical pages */
    uint64_t pages_shared; /* references beyond the first */
    uint64_t spool_bytes;
    uint64_t memory_bytes; /* tables, an upper bound */
    uint64_t blocks_total; /* second pass */
    uint64_t blocks_written;
    uint64_t bytes_out;
} ps_saver_stats;

int ps_saver_create(const ps_saver_options *options, ps_saver **out,
                    ps_error *err);
void ps_saver_destroy(ps_saver *saver);
/* Feed stream bytes / read them from a descriptor until its end of file. */
int ps_saver_feed(ps_saver *saver, const uint8_t *in, size_t length,
                  ps_error *err);
int ps_saver_drain(ps_saver *saver, int fd, ps_error *err);
/* The stream is over: fails unless it was whole and every page of every RAM
   block was sent. */
int ps_saver_end(ps_saver *saver, ps_error *err);
void ps_saver_stream_info(const ps_saver *saver, ps_stream_info *out);
/* RAM blocks as the stream listed them; counts of pages are 0. */
uint32_t ps_saver_block_count(const ps_saver *saver);
int ps_saver_ram_block(const ps_saver *saver, uint32_t index, ps_ram_block *out,
                       ps_error *err);
/* The bytes of a section kept so far (PS_SECTION_CONFIGURATION, _DEVICES,
   _DESCRIPTION); valid until it is set or the saver destroyed. */
int ps_saver_section(ps_saver *saver, uint32_t type, const uint8_t **data,
                     size_t *length, ps_error *err);
/* Set PS_SECTION_META, _DEVICES or _CONFIGURATION (copied). */
int ps_saver_set_section(ps_saver *saver, uint32_t type, const uint8_t *data,
                         size_t length, ps_error *err);
enum ps_architecture {
    PS_ARCH_NONE = 0,
    PS_ARCH_X86_64 = 1,
    PS_ARCH_AARCH64 = 2,
    PS_ARCH_RISCV64 = 3,
};

/*
 * What says how a CPU translates addresses.
 * x86-64: CR0, CR3, CR4, EFER. aarch64: SCTLR_EL1, TTBR0_EL1, TTBR1_EL1,
 * TCR_EL1. riscv64: SATP. The rest is 0.
 */
typedef struct ps_cpu_paging {
    uint32_t architecture; /* a ps_architecture */
    uint32_t reserved;
    uint64_t registers[6];
} ps_cpu_paging;

/* A part of guest-physical memory, and where it lies in RAM blocks. */
typedef struct ps_physical_range {
    uint64_t address; /* guest-physical */
    uint64_t page;    /* first page, within its RAM block */
    uint64_t pages;
    uint32_t block;
    uint32_t reserved;
} ps_physical_range;

typedef struct ps_locality {
    char mode[32];  /* of paging, empty: none that is followed */
    char note[512]; /* why not, or what was left out; else empty */
    uint64_t spaces;
    uint64_t runs;
    uint64_t candidates; /* pages that look like a topmost table */
    uint64_t live;       /* of these */
    uint64_t dead;
    uint64_t duplicates;
    uint64_t pairs;       /* live ones with a KPTI sibling */
    uint64_t files;       /* with pages in the page cache that nobody maps */
    uint64_t from_user;   /* pages of the locality order, by what placed them */
    uint64_t from_files;  /* page cache, by file */
    uint64_t from_kernel; /* vmalloc, image, modules, struct page */
    uint64_t from_rest;   /* nothing but the direct map */
    uint64_t from_free;   /* memory that the guest has freed */
    uint64_t duration;    /* ns */
} ps_locality;

/*
 * Between the passes: find the guest's address spaces and put the pages into
 * locality order, for the second pass to follow. What the guest's memory says
 * is no reason to fail. Ranges ascend and do not overlap.
 */
int ps_saver_locate(ps_saver *saver, const ps_cpu_paging *cpus,
                    size_t cpu_count, const ps_physical_range *ranges,
                    size_t range_count, ps_locality *out, ps_error *err);
/* Second pass: write a whole snapshot at offset 0 of an empty file. Does not
   fsync. uuid and parent are 16 bytes each. */
int ps_saver_write(ps_saver *saver, int fd, const uint8_t *uuid,
                   const uint8_t *parent, ps_error *err);
/* From any thread. A cancelled call returns PS_ERR_CANCELLED soon. */
void ps_saver_cancel(ps_saver *saver);
void ps_saver_get_stats(const ps_saver *saver, ps_saver_stats *out);

/* ----------------------------------------------------------------- image */

enum ps_section_type {
    PS_SECTION_META = 1,
    PS_SECTION_STREAM = 2,
    PS_SECTION_CONFIGURATION = 3,
    PS_SECTION_DEVICES = 4,
    PS_SECTION_DESCRIPTION = 5,
    PS_SECTION_RAM_BLOCKS = 6,
    PS_SECTION_TOP_MAP = 7,
    PS_SECTION_LEAVES = 8,
    PS_SECTION_FILL_UNITS = 9,
    PS_SECTION_BLOCK_INDEX = 10,
    PS_SECTION_SIGNATURES = 11,
    PS_SECTION_OWNERS = 12,
    PS_SECTION_SPACES = 13,
    PS_SECTION_VIRTUAL_RUNS = 14,
    PS_SECTION_RUN_INDEX = 15,
};

typedef struct ps_image ps_image;

typedef struct ps_image_info {
    uint32_t format_version;
    uint32_t pages_per_block;
    uint64_t incompatible_features;
    uint64_t compatible_features;
    uint8_t uuid[16];
    uint8_t parent[16];
    uint64_t file_bytes;
    uint64_t index_bytes; /* everything but locality blocks and header */
    uint32_t ram_blocks;
    uint32_t reserved;
    uint64_t leaves; /* entries of the top map */
    uint64_t canonical_pages;
    uint64_t locality_blocks;
    uint64_t pages_zero;
    uint64_t pages_fill;
    uint64_t pages_data; /* references to canonical pages, all */
    uint64_t pages_absent;
    uint64_t memory_bytes; /* held by this reader right now */
    ps_stream_info stream;
} ps_image_info;

/* A run of pages of one class. */
typedef struct ps_run {
    uint64_t first; /* page within the block */
    uint64_t count;
    uint32_t page_class;
    uint32_t shared; /* DATA: 1 where the page is not its canonical's owner */
} ps_run;

/* Open a snapshot. fd stays the caller's and must stay open. Reads the
   header, trailer, section table and RAM block list only; everything else is
   read and checked when it is first used, in chunks of 4096 bytes. */
int ps_image_open(int fd, ps_image **out, ps_error *err);
void ps_image_destroy(ps_image *image);
void ps_image_get_info(const ps_image *image, ps_image_info *out);
int ps_image_ram_block(const ps_image *image, uint32_t index, ps_ram_block *out,
                       ps_error *err);
/* Length of a section (0 where it is absent); read a checked part of it. */
uint64_t ps_image_section_length(const ps_image *image, uint32_t type);
int ps_image_read_section(ps_image *image, uint32_t type, uint64_t offset,
                          uint8_t *buffer, size_t length, ps_error *err);
/* Page map entries (FORMAT.md) of count pages of one RAM block. */
int ps_image_entries(ps_image *image, uint32_t block, uint64_t first,
                     uint64_t count, uint64_t *out, ps_error *err);
/* Content of count pages, 4096 bytes each; absent pages are an error. */
int ps_image_read_pages(ps_image *image, uint32_t block, uint64_t first,
                        uint64_t count, uint8_t *out, ps_error *err);
/* Runs of equal class from page first on, at most capacity of them;
 *next is the page after the last run. */
int ps_image_runs(ps_image *image, uint32_t block, uint64_t first, ps_run *runs,
                  size_t capacity, size_t *count, uint64_t *next,
                  ps_error *err);

/* An address space of the guest. */
typedef struct ps_space_info {
    uint64_t root; /* guest-physical address of its top table */
    uint32_t kind; /* 1 user, 2 kernel */
    uint32_t mode; /* a ps_paging_mode */
    uint64_t first_run;
    uint64_t run_count;
    uint64_t pages;        /* mapped, and in a RAM block */
    uint64_t pages_shared; /* of these, mapped by another space as well */
} ps_space_info;

/* Pages that lie one after the other, guest-virtual and guest-physical. */
typedef struct ps_run_info {
    uint64_t address; /* guest-virtual */
    uint64_t page;    /* the first, within its RAM block */
    uint32_t block;
    uint32_t pages;
} ps_run_info;

/* Where an address space maps a page. */
typedef struct ps_page_mapping {
    uint64_t address; /* guest-virtual */
    uint64_t run;     /* in which virtual run */
    uint32_t space;
    uint32_t index; /* of the page in the run */
} ps_page_mapping;

/* How many there are; 0 and 0 in files that do not tell. */
uint64_t ps_image_space_count(const ps_image *image);
uint64_t ps_image_run_count(const ps_image *image);
int ps_image_space(ps_image *image, uint64_t index, ps_space_info *out,
                   ps_error *err);
int ps_image_virtual_run(ps_image *image, uint64_t index, ps_run_info *out,
                         ps_error *err);
/* All mappings of a page, capacity of them at most. */
int ps_image_mappings(ps_image *image, uint32_t block, uint64_t page,
                      ps_page_mapping *out, size_t capacity, size_t *count,
                      ps_error *err);

/* Long work, with progress and cancellation from any thread. */
typedef struct ps_job {
    uint64_t done;
    uint64_t total;
    int32_t cancel;
    int32_t reserved;
} ps_job;

/* Check everything. Errors found are stored (capacity at most), *count says
   how many there were in all. Returns PS_OK when the check could be done,
   damaged or not. */
int ps_image_check(ps_image *image, ps_job *job, ps_error *errors,
                   size_t capacity, size_t *count, ps_error *err);
/* Write the snapshot as an ordinary QEMU migration stream. */
int ps_image_export(ps_image *image, int fd, ps_job *job, ps_error *err);

typedef struct ps_difference {
    uint32_t block_a; /* index of the RAM block in each image */
    uint32_t block_b;
    uint64_t first; /* a run of pages that differ */
    uint64_t count;
} ps_difference;

/* Compare one RAM block of equal length in two images by content. */
int ps_image_compare(ps_image *a, uint32_t block_a, ps_image *b,
                     uint32_t block_b, ps_job *job, ps_difference *out,
                     size_t capacity, size_t *count, uint64_t *pages,
                     ps_error *err);

/* ----------------------------------------------------------------- pager */

/*
 * The source of a postcopy migration, from the moment when the destination
 * listens. Everything before that (header, configuration, advise, RAM block
 * list, discards) is prepared by the caller, who hands over the connected
 * socket, the bytes still to be sent (the PACKAGED command) and the bytes of
 * the return path already read.
 */
typedef struct ps_pager ps_pager;

enum ps_prefetch {
    PS_PREFETCH_NONE = 0,
    PS_PREFETCH_PHYSICAL = 1, /* neighbours in RAM */
    PS_PREFETCH_VIRTUAL = 2,  /* in guest-virtual memory; what no address space
                                 maps, in the file */
};

/* Where the neighbours of a fault were looked for. */
enum ps_prefetch_kind {
    PS_KIND_VIRTUAL = 0,
    PS_KIND_FILE = 1,
    PS_KIND_PHYSICAL = 2,
};

enum ps_pager_state {
    PS_PAGER_NEW = 0,
    PS_PAGER_SERVING = 1,   /* answers faults, loads in the background */
    PS_PAGER_FINISHING = 2, /* loads the rest at full speed */
    PS_PAGER_CLOSING = 3,   /* END sent, waits for SHUT */
    PS_PAGER_DONE = 4,      /* QEMU confirmed */
    PS_PAGER_FAILED = 5,
};

typedef struct ps_pager_options {
    int32_t fd;               /* connected stream socket; stays the caller's */
    int32_t preempt_fd;       /* second channel of postcopy-preempt, or -1 */
    uint32_t prefetch;        /* a ps_prefetch */
    uint32_t prefetch_window; /* pages after the requested, at most */
    int32_t trace_fd;         /* a file to which faults are written
                                 (qemu_pagesaver/TRACE.md), or -1 */
    uint64_t background_rate; /* bytes/s; 0: off; UINT64_MAX: no bound */
    uint64_t background_delay_ns; /* quiet time after a fault before it goes
                                     on; grows from 64 KiB to 4 MiB chunks */
    uint64_t in_flight_bytes; /* not yet read by QEMU, beyond requested pages */
    uint64_t cache_bytes;     /* decoded blocks, at least one block */
} ps_pager_options;

/* A RAM block as the destination has it, in the image's order. */
typedef struct ps_pager_block {
    uint64_t page_size; /* of the backing memory: 4096, 2 MiB, .. */
    uint64_t length;    /* must equal the image's */
} ps_pager_block;

/* What one kind of prefetch did. A window is right when the guest came to the
   page behind it. */
typedef struct ps_prefetch_stats {
    uint64_t windows;
    uint64_t windows_right;
    uint64_t pages;
    uint64_t pages_right; /* of the right windows */
} ps_prefetch_stats;

typedef struct ps_pager_stats {
    uint32_t state; /* a ps_pager_state */
    uint32_t reserved;
    uint64_t faults;          /* requests of QEMU */
    uint64_t faults_late;     /* of these: all of it on its way already */
    uint64_t pages_requested; /* sent, by cause */
    uint64_t pages_prefetched;
    uint64_t pages_background;
    uint64_t pages_zero_sent; /* of pages_requested: zero pages */
    uint64_t pages_total;     /* that need an update, at the start */
    uint64_t pages_left;
    uint64_t pages_avoided; /* zero over fresh memory, never sent */
    uint64_t bytes_sent;
    uint64_t storage_reads;
    uint64_t storage_bytes;
    uint64_t blocks_decoded;
    uint64_t latency_p50; /* request read to page written, ns */
    uint64_t latency_p99;
    uint64_t latency_max;
    uint64_t first_fault_at; /* CLOCK_MONOTONIC ns, 0: none yet */
    uint64_t last_fault_at;
    uint64_t cpu_ns; /* of the pager's thread; of all when it has ended */
    ps_prefetch_stats prefetch[3]; /* by ps_prefetch_kind */
} ps_pager_stats;

int ps_pager_create(ps_image *image, const ps_pager_options *options,
                    const ps_pager_block *blocks, size_t block_count,
                    ps_pager **out, ps_error *err);
void ps_pager_destroy(ps_pager *pager);
/* Before run: bytes to send first; bytes of the return path read already. */
int ps_pager_send_first(ps_pager *pager, const uint8_t *data, size_t length,
                        ps_error *err);
int ps_pager_received_first(ps_pager *pager, const uint8_t *data, size_t length,
                            ps_error *err);
/* Before run, in recovery: pages QEMU has, a little-endian bitmap. */
int ps_pager_set_received(ps_pager *pager, uint32_t block,
                          const uint8_t *bitmap, size_t length, ps_error *err);
/* Serve until everything is loaded and QEMU has said so, or until an error.
   Returns PS_ERR_CANCELLED after ps_pager_cancel(). The image is used by
   this thread alone while it runs. */
int ps_pager_run(ps_pager *pager, ps_error *err);
/* From any thread, while it runs or before. */
void ps_pager_finish(ps_pager *pager);
void ps_pager_cancel(ps_pager *pager);
void ps_pager_set_background(ps_pager *pager, uint64_t rate);
void ps_pager_get_stats(ps_pager *pager, ps_pager_stats *out);
/* The kernel thread id of ps_pager_run(), 0 before. */
int32_t ps_pager_thread(const ps_pager *pager);

/* Median nanoseconds to wake a thread on the same / on another CPU; 0 for
   what cannot be measured here (one CPU only). Takes a few milliseconds. */
int ps_measure_wakeups(uint64_t *same_cpu, uint64_t *other_cpu, ps_error *err);
