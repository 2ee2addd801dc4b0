/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Any bytes on the return path of a running pager. The first byte chooses
 * how it runs; QEMU hangs up after the rest. Whatever it said, the pager ends
 * soon, with one of the few errors that this can be.
 */
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../tests/tiny_image.h"
#include "image.h"

#define LONGEST_INPUT 32768u

enum {
    MODE_PREEMPT = 1,
    MODE_PREFETCH = 2,
    MODE_BACKGROUND = 4,
    MODE_HUGE = 8,
    MODE_EARLY = 16, /* the bytes came before it ran */
    MODE_FINISH = 32,
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static tiny_page page_of(uint32_t block, uint64_t page)
{
    switch ((page + block) % 4) {
    case 0:
        return (tiny_page){PS_CLASS_ZERO, 0};
    case 1:
        return (tiny_page){PS_CLASS_FILL, (uint32_t)page};
    case 2:
        return (tiny_page){PS_CLASS_DATA, (uint32_t)(page / 16)};
    default:
        return page == 7 ? (tiny_page){PS_CLASS_ABSENT, 0}
                         : (tiny_page){PS_CLASS_DATA, (uint32_t)page + 100};
    }
}

static tiny_image tiny = {.pages_per_block = 4,
                          .zstd = true,
                          .footers = true,
                          .blocks = 2,
                          .name = {"pc.ram", "b"},
                          .pages = {128, 8},
                          .page = page_of};
static ps_image *image;

static void *drain(void *opaque)
{
    int fd = *(int *)opaque;
    static _Thread_local uint8_t sink[65536];

    while (read(fd, sink, sizeof(sink)) > 0) {
    }
    return NULL;
}

static void run(int *fds, int *preempt, const uint8_t *data, size_t size,
                uint8_t mode)
{
    ps_pager_options options = {
        .fd = fds[0],
        .preempt_fd = preempt[0],
        .trace_fd = -1,
        .prefetch =
            mode & MODE_PREFETCH ? PS_PREFETCH_PHYSICAL : PS_PREFETCH_NONE,
        .prefetch_window = 3,
        .background_rate = mode & MODE_BACKGROUND ? UINT64_MAX : 0,
        .in_flight_bytes = 65536,
        .cache_bytes = 1,
    };
    ps_pager_block blocks[2] = {
        {mode & MODE_HUGE ? 65536 : 4096, 128 * PS_PAGE_SIZE},
        {4096, 8 * PS_PAGE_SIZE},
    };
    ps_pager *pager;
    ps_error err = {0};
    int r;

    if (ps_pager_create(image, &options, blocks, 2, &pager, &err)) {
        abort();
    }
    if (mode & MODE_EARLY) {
        (void)ps_pager_received_first(pager, data, size, &err);
    } else if (size && send(fds[1], data, size, 0) != (ssize_t)size) {
        abort();
    }
    shutdown(fds[1], SHUT_WR);
    if (mode & MODE_FINISH) {
        ps_pager_finish(pager);
    }
    r = ps_pager_run(pager, &err);
    if (r != PS_OK && r != PS_ERR_PEER && r != PS_ERR_CLOSED &&
        r != PS_ERR_DAMAGED) {
        abort();
    }
    if (r != err.code || (r && !err.message[0])) {
        abort();
    }
    ps_pager_destroy(pager);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int fds[2], preempt[2] = {-1, -1};
    pthread_t readers[2];
    uint8_t mode;
    ps_error err;

    if (size == 0) {
        return 0;
    }
    if (!image) {
        tiny_make(&tiny);
        if (ps_image_open(tiny.fd, &image, &err)) {
            abort();
        }
    }
    mode = data[0];
    size = size - 1 > LONGEST_INPUT ? LONGEST_INPUT : size - 1;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) ||
        pthread_create(&readers[0], NULL, drain, &fds[1])) {
        abort();
    }
    if (mode & MODE_PREEMPT) {
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, preempt) ||
            pthread_create(&readers[1], NULL, drain, &preempt[1])) {
            abort();
        }
    }
    run(fds, preempt, data + 1, size, mode);
    close(fds[0]);
    pthread_join(readers[0], NULL);
    close(fds[1]);
    if (mode & MODE_PREEMPT) {
        close(preempt[0]);
        pthread_join(readers[1], NULL);
        close(preempt[1]);
    }
    return 0;
}
