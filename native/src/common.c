/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "common.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>

uint32_t ps_abi_version(void)
{
    return 1;
}

uint64_t ps_xxh3_64(const uint8_t *data, size_t length)
{
    return XXH3_64bits(data, length);
}

int ps_fail(ps_error *err, int code, uint64_t offset, const char *format, ...)
{
    va_list args;

    err->code = code;
    err->os_errno = 0;
    err->offset = offset;
    va_start(args, format);
    vsnprintf(err->message, sizeof(err->message), format, args);
    va_end(args);
    return code;
}

int ps_fail_errno(ps_error *err, uint64_t offset, const char *what)
{
    int saved = errno;

    ps_fail(err, saved == ENOMEM ? PS_ERR_NOMEM : PS_ERR_IO, offset, "%s: %s",
            what, strerror(saved));
    err->os_errno = saved;
    return err->code;
}

int ps_reserve(size_t length, void **out, ps_error *err)
{
    void *memory = mmap(NULL, length ? length : 1, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (memory == MAP_FAILED) {
        return ps_fail_errno(err, PS_NOWHERE, "reserving memory");
    }
    /* Sparse tables: a huge page would make untouched entries cost memory. */
    (void)madvise(memory, length ? length : 1, MADV_NOHUGEPAGE);
    *out = memory;
    return PS_OK;
}

void ps_unreserve(void *memory, size_t length)
{
    if (memory) {
        munmap(memory, length ? length : 1);
    }
}

int ps_pread_all(int fd, void *buffer, size_t length, uint64_t offset,
                 const char *what, ps_error *err)
{
    uint8_t *at = buffer;

    while (length > 0) {
        ssize_t n = pread(fd, at, length, (off_t)offset);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return ps_fail_errno(err, offset, what);
        }
        if (n == 0) {
            return ps_fail(err, PS_ERR_TRUNCATED, offset,
                           "%s: the file ends here", what);
        }
        at += n;
        length -= (size_t)n;
        offset += (uint64_t)n;
    }
    return PS_OK;
}

int ps_pwrite_all(int fd, const void *buffer, size_t length, uint64_t offset,
                  const char *what, ps_error *err)
{
    const uint8_t *at = buffer;

    while (length > 0) {
        ssize_t n = pwrite(fd, at, length, (off_t)offset);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return ps_fail_errno(err, offset, what);
        }
        at += n;
        length -= (size_t)n;
        offset += (uint64_t)n;
    }
    return PS_OK;
}

int ps_write_all(int fd, const void *buffer, size_t length, const char *what,
                 ps_error *err)
{
    const uint8_t *at = buffer;

    while (length > 0) {
        ssize_t n = write(fd, at, length);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return ps_fail_errno(err, PS_NOWHERE, what);
        }
        at += n;
        length -= (size_t)n;
    }
    return PS_OK;
}
