/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What every part of the core uses: errors, bytes, scope-based clean-up. */
#ifndef PS_COMMON_H
#define PS_COMMON_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>

#include "pagesaver.h"

#define PS_PAGE_SIZE ((size_t)4096)
#define PS_PAGE_BITS 12
#define PS_LEAF_PAGES 512u
#define PS_NOWHERE UINT64_MAX

/* Limits that FORMAT.md states; the parser and the reader share them. */
#define PS_MAX_RAM_BYTES (UINT64_C(1) << 44)
#define PS_MAX_RAM_BLOCKS 1024u
#define PS_MAX_DEVICE_BYTES (UINT64_C(64) << 20)
#define PS_MAX_DESCRIPTION_BYTES (UINT64_C(64) << 20)
#define PS_MAX_META_BYTES (UINT64_C(16) << 20)
#define PS_MAX_PAGES_PER_BLOCK 512u
#define PS_PREFETCH_KINDS 3u

/* Fill err and return its code, so that `return ps_fail(..)` reads well. */
int ps_fail(ps_error *err, int code, uint64_t offset, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* The same for a failed system call; reads errno. */
int ps_fail_errno(ps_error *err, uint64_t offset, const char *what);

static inline uint16_t ps_get_be16(const uint8_t *p)
{
    uint16_t v;

    memcpy(&v, p, sizeof(v));
    return __builtin_bswap16(v);
}

static inline uint32_t ps_get_be32(const uint8_t *p)
{
    uint32_t v;

    memcpy(&v, p, sizeof(v));
    return __builtin_bswap32(v);
}

static inline uint64_t ps_get_be64(const uint8_t *p)
{
    uint64_t v;

    memcpy(&v, p, sizeof(v));
    return __builtin_bswap64(v);
}

static inline void ps_put_be32(uint8_t *p, uint32_t v)
{
    v = __builtin_bswap32(v);
    memcpy(p, &v, sizeof(v));
}

static inline void ps_put_be64(uint8_t *p, uint64_t v)
{
    v = __builtin_bswap64(v);
    memcpy(p, &v, sizeof(v));
}

/* The file is little-endian and so is every host that we build for. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "a big-endian host needs byte swapping in the image code");

/* Address space without memory: pages cost only when they are touched. */
int ps_reserve(size_t length, void **out, ps_error *err);
void ps_unreserve(void *memory, size_t length);

/* Whole reads and writes; restart on EINTR; short means truncated. */
int ps_pread_all(int fd, void *buffer, size_t length, uint64_t offset,
                 const char *what, ps_error *err);
int ps_pwrite_all(int fd, const void *buffer, size_t length, uint64_t offset,
                  const char *what, ps_error *err);
int ps_write_all(int fd, const void *buffer, size_t length, const char *what,
                 ps_error *err);

/* Nanoseconds of a clock; 0 where there is no such clock. */
static inline uint64_t ps_clock_ns(clockid_t clock)
{
    struct timespec ts;

    if (clock_gettime(clock, &ts)) {
        return 0;
    }
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static inline void ps_freep(void *p)
{
    free(*(void **)p);
}
#define PS_AUTOFREE __attribute__((cleanup(ps_freep)))

/* QEMU's stream: migration/qemu-file and savevm.c name these alike. */
enum {
    QEMU_VM_EOF = 0x00,
    QEMU_VM_SECTION_START = 0x01,
    QEMU_VM_SECTION_PART = 0x02,
    QEMU_VM_SECTION_END = 0x03,
    QEMU_VM_SECTION_FULL = 0x04,
    QEMU_VM_SUBSECTION = 0x05,
    QEMU_VM_VMDESCRIPTION = 0x06,
    QEMU_VM_CONFIGURATION = 0x07,
    QEMU_VM_COMMAND = 0x08,
    QEMU_VM_SECTION_FOOTER = 0x7e,
};
enum {
    RAM_SAVE_FLAG_FULL = 0x01,
    RAM_SAVE_FLAG_ZERO = 0x02,
    RAM_SAVE_FLAG_MEM_SIZE = 0x04,
    RAM_SAVE_FLAG_PAGE = 0x08,
    RAM_SAVE_FLAG_EOS = 0x10,
    RAM_SAVE_FLAG_CONTINUE = 0x20,
    RAM_SAVE_FLAG_XBZRLE = 0x40,
    RAM_SAVE_FLAG_HOOK = 0x80,
    RAM_SAVE_FLAG_COMPRESS_PAGE = 0x100,
    RAM_SAVE_FLAG_MULTIFD_FLUSH = 0x200,
};

#endif
