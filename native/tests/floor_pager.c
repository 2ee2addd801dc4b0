/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The floor of the benchmark: a pager that is an array of pages in memory and
 * nothing else. It answers requests, one page each, and does no more; with
 * PUSH 1 it also sends all that is not zero, in batches, once the devices are
 * loaded (the PONG of the PING in the package), and ends the migration.
 *
 *     floor_pager SOCKET FLATFILE SECTION-ID FOOTERS PUSH OFFSET:LENGTH:NAME ..
 *
 * SOCKET is the number of an inherited descriptor, or the path of a unix
 * socket, on which the handshake is done: QEMU has had, or is being sent by
 * the parent, everything up to and including PACKAGED. FLATFILE has the bytes
 * of every RAM block; block NAME has LENGTH bytes at OFFSET. FOOTERS is 1
 * when sections end with footers. When QEMU hangs up it prints one JSON object:
 * faults, the latencies of request to write, and the time of it all, in
 * nanoseconds.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define MAX_BLOCKS 64
#define MAX_SAMPLES (1u << 20)
#define BATCH 64u

struct block {
    char name[256];
    uint64_t offset;
    uint64_t length;
    uint8_t *sent; /* one byte for each page */
};

static struct block blocks[MAX_BLOCKS];
static size_t block_count;
static uint8_t *memory;
static uint64_t memory_length;
static unsigned long long samples[MAX_SAMPLES];
static size_t faults, late, sample_count;

static void die(const char *what)
{
    fprintf(stderr, "floor_pager: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static uint64_t get_be(const uint8_t *p, int bytes)
{
    uint64_t v = 0;

    for (int i = 0; i < bytes; i++) {
        v = v << 8 | p[i];
    }
    return v;
}

static void put_be(uint8_t *p, uint64_t v, int bytes)
{
    for (int i = bytes - 1; i >= 0; i--, v >>= 8) {
        p[i] = (uint8_t)v;
    }
}

static int open_socket(const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd;

    if (name[0] >= '0' && name[0] <= '9') {
        return atoi(name);
    }
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    strncpy(address.sun_path, name, sizeof(address.sun_path) - 1);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address))) {
        die(name);
    }
    return fd;
}

static void load(const char *path)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &st)) {
        die(path);
    }
    memory_length = (uint64_t)st.st_size;
    memory =
        mmap(NULL, memory_length, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
    if (memory == MAP_FAILED) {
        die(path);
    }
    close(fd);
}

static void add_block(const char *text)
{
    struct block *block = &blocks[block_count++];
    unsigned long long offset, length;

    if (block_count > MAX_BLOCKS ||
        sscanf(text, "%llu:%llu:%255s", &offset, &length, block->name) != 3 ||
        length % PAGE || offset > memory_length ||
        length > memory_length - offset) {
        die(text);
    }
    block->offset = offset;
    block->length = length;
    block->sent = calloc(length / PAGE + 1, 1);
}

/* One section with one page, in one system call. */
static void send_page(int fd, uint32_t id, bool footers, struct block *block,
                      uint64_t start)
{
    uint8_t head[5 + 8 + 256], tail[8 + 5];
    size_t name = strlen(block->name);
    struct iovec iov[3] = {
        {head, 5 + 8 + 1 + name},
        {memory + block->offset + start, PAGE},
        {tail, footers ? 13 : 8},
    };
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = 3};

    head[0] = 0x02; /* QEMU_VM_SECTION_PART */
    put_be(head + 1, id, 4);
    put_be(head + 5, start | 0x08, 8); /* RAM_SAVE_FLAG_PAGE */
    head[13] = (uint8_t)name;
    memcpy(head + 14, block->name, name);
    put_be(tail, 0x10, 8); /* RAM_SAVE_FLAG_EOS */
    tail[8] = 0x7e;        /* QEMU_VM_SECTION_FOOTER */
    put_be(tail + 9, id, 4);
    if (sendmsg(fd, &message, MSG_NOSIGNAL) !=
        (ssize_t)(iov[0].iov_len + iov[1].iov_len + iov[2].iov_len)) {
        die("writing to QEMU");
    }
}

/* The next pages that are not zero, in one section and one system call. */
static bool push(int fd, uint32_t id, bool footers)
{
    static uint8_t heads[BATCH][8 + 1 + 255];
    static size_t block_at, page;
    uint8_t head[5], tail[8 + 5];
    struct iovec iov[2 * BATCH + 2] = {{head, sizeof(head)}};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = 1};
    size_t count = 0, total = 0;

    for (; block_at < block_count; block_at++, page = 0) {
        struct block *block = &blocks[block_at];
        size_t name = strlen(block->name);

        for (; page < block->length / PAGE && count < BATCH; page++) {
            uint8_t *bytes = memory + block->offset + page * PAGE;

            if (block->sent[page]) {
                continue;
            }
            block->sent[page] = 1;
            put_be(heads[count], page * PAGE | 0x08, 8);
            heads[count][8] = (uint8_t)name;
            memcpy(heads[count] + 9, block->name, name);
            iov[message.msg_iovlen++] = (struct iovec){heads[count], 9 + name};
            iov[message.msg_iovlen++] = (struct iovec){bytes, PAGE};
            count++;
        }
        if (count == BATCH) {
            break;
        }
    }
    if (count == 0) {
        return false;
    }
    head[0] = 0x02;
    put_be(head + 1, id, 4);
    put_be(tail, 0x10, 8);
    tail[8] = 0x7e;
    put_be(tail + 9, id, 4);
    iov[message.msg_iovlen++] = (struct iovec){tail, footers ? 13 : 8};
    for (size_t i = 0; i < message.msg_iovlen; i++) {
        total += iov[i].iov_len;
    }
    if (sendmsg(fd, &message, MSG_NOSIGNAL) != (ssize_t)total) {
        die("writing to QEMU");
    }
    return true;
}

/* RAM's END section and the end of the stream. */
static void end(int fd, uint32_t id, bool footers)
{
    uint8_t bytes[5 + 8 + 5 + 1] = {0x03};
    size_t length = footers ? sizeof(bytes) : sizeof(bytes) - 5;

    put_be(bytes + 1, id, 4);
    put_be(bytes + 5, 0x10, 8);
    bytes[13] = 0x7e;
    put_be(bytes + 14, id, 4);
    bytes[length - 1] = 0;
    if (send(fd, bytes, length, MSG_NOSIGNAL) != (ssize_t)length) {
        die("writing to QEMU");
    }
}

/* Zero pages count as sent: only a request may bring one. */
static void skip_zero(void)
{
    static const uint8_t zero[PAGE];

    for (size_t i = 0; i < block_count; i++) {
        for (size_t page = 0; page < blocks[i].length / PAGE; page++) {
            if (memcmp(memory + blocks[i].offset + page * PAGE, zero, PAGE) ==
                0) {
                blocks[i].sent[page] = 2;
            }
        }
    }
}

static struct block *find(const uint8_t *name, size_t length)
{
    for (size_t i = 0; i < block_count; i++) {
        if (strlen(blocks[i].name) == length &&
            memcmp(blocks[i].name, name, length) == 0) {
            return &blocks[i];
        }
    }
    die("unknown RAM block");
    return NULL;
}

static void serve(int fd, uint32_t id, bool footers, bool all)
{
    uint8_t in[8192];
    size_t have = 0;
    struct block *block = NULL;
    bool pushing = false;

    for (;;) {
        ssize_t n =
            recv(fd, in + have, sizeof(in) - have, pushing ? MSG_DONTWAIT : 0);
        uint64_t asked = now_ns();
        size_t at = 0, length;

        if (pushing && n < 0 && errno == EAGAIN) {
            pushing = push(fd, id, footers);
            if (!pushing) {
                end(fd, id, footers);
            }
            continue;
        }
        if (n <= 0) {
            return;
        }
        have += (size_t)n;
        for (; have - at >= 4 &&
               have - at >= (length = (size_t)get_be(in + at + 2, 2)) + 4;
             at += length + 4) {
            const uint8_t *data = in + at + 4;
            uint64_t type = get_be(in + at, 2), start;

            if (type == 1) {
                return;
            }
            pushing = pushing || (all && type == 2);
            if ((type != 3 || length < 14) && (type != 4 || length != 12)) {
                continue;
            }
            if (type == 3) {
                block = find(data + 13, data[12]);
            }
            start = get_be(data, 8);
            if (!block || !block->sent || start % PAGE ||
                start >= block->length) {
                die("request out of range");
            }
            faults++;
            if (block->sent[start / PAGE] == 1) {
                late++;
                continue;
            }
            block->sent[start / PAGE] = 1;
            send_page(fd, id, footers, block, start);
            if (sample_count < MAX_SAMPLES) {
                samples[sample_count++] = now_ns() - asked;
            }
        }
        have -= at;
        memmove(in, in + at, have);
    }
}

static int compare(const void *a, const void *b)
{
    const unsigned long long *x = a, *y = b;

    return (*x > *y) - (*x < *y);
}

int main(int argc, char **argv)
{
    uint64_t began;
    size_t n;
    int fd, flags;
    bool all;

    if (argc < 7) {
        die("see the comment in my source");
    }
    load(argv[2]);
    all = atoi(argv[5]) == 1;
    for (int i = 6; i < argc; i++) {
        add_block(argv[i]);
    }
    if (all) {
        skip_zero();
    }
    fd = open_socket(argv[1]);
    flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags & ~O_NONBLOCK)) {
        die("socket");
    }
    fprintf(stderr, "ready\n"); /* the array is loaded */
    began = now_ns();
    serve(fd, (uint32_t)strtoul(argv[3], NULL, 10), atoi(argv[4]) == 1, all);
    began = now_ns() - began;
    qsort(samples, sample_count, sizeof(samples[0]), compare);
    n = sample_count;
    printf("{\"faults\": %zu, \"faults-late\": %zu, \"p50-ns\": %llu, "
           "\"p99-ns\": %llu, \"max-ns\": %llu, \"all-ns\": %llu}\n",
           faults, late, n ? samples[n / 2] : 0, n ? samples[n * 99 / 100] : 0,
           n ? samples[n - 1] : 0, (unsigned long long)began);
    return 0;
}
