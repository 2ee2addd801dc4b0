/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Workloads of the locality benchmark (tests/bench/locality.py), and what ages
 * the guest's memory before they start. Static; runs as root in the guest.
 *
 *   walker churn SEED ROUNDS      processes come and go, memory out of order
 *   walker drop ROOT              most of a file tree leaves the page cache
 *   walker hold NAME SEED KEEP%   has all memory, frees most of it out of order
 *   walker heap NAME MB           "walk", "random CELL"
 *   walker pair NAME MB CHUNK     two processes in turn: "walk"
 *   walker tree NAME ROOT         reads files: "read"
 *   walker share PID...           how much memory is physically adjacent
 *   walker share-files ROOT       the same of the page cache of files
 *
 * NAME stands for two FIFOs, NAME.in and NAME.out. Each says "ready PID.." when
 * its memory is prepared, then answers one line with one line, for ever.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <ftw.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <stdnoreturn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    PAGE = 4096,
    WORDS = PAGE / 8,
    LINE = 8, /* words of a cache line */
    CHURNERS = 8,
    CHURN_MIN_MB = 40,
    CHURN_MAX_MB = 140,
    BLOCK_MAX = 8,      /* pages that are allocated at a time */
    DOUBLE = 4,         /* one of so many frees takes two pages */
    RESERVE = 64 << 20, /* what `hold` leaves to everybody else */
    KEPT_FILE = 4,      /* one of so many stays in the page cache */
    FILES = 65536,
    READ = 65536,
    PAGEMAP_BATCH = 512,
};

#define PRESENT (1ULL << 63)
#define FRAME ((1ULL << 55) - 1)

static uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9;
    x ^= x >> 27;
    x *= 0x94d049bb133111eb;
    return x ^ x >> 31;
}

static uint64_t next(uint64_t *state)
{
    return mix(*state += 0x9e3779b97f4a7c15);
}

static uint64_t number(const char *text)
{
    char *end;
    uint64_t value = strtoull(text, &end, 0);

    if (end == text || *end) {
        errx(2, "no number: %s", text);
    }
    return value;
}

/* ---------------------------------------------------------------- content */

/* Letters a to p, so that compression makes half of it: any word by formula. */
static uint64_t word_at(uint64_t page, uint64_t word)
{
    return (mix(page * WORDS + word + 1) & 0x0f0f0f0f0f0f0f0f) +
           0x6161616161616161;
}

static void fill(uint64_t *at, uint64_t page)
{
    for (uint64_t i = 0; i < WORDS; i++) {
        at[i] = word_at(page, i);
    }
}

static bool is_right(const volatile uint64_t *at, uint64_t page)
{
    bool right = true;

    for (uint64_t i = 0; i < WORDS; i += LINE) {
        right &= at[i] == word_at(page, i);
    }
    return right;
}

static void *map_pages(uint64_t bytes, int flags)
{
    void *at =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);

    if (at == MAP_FAILED) {
        err(1, "mmap of %" PRIu64, bytes);
    }
    /* The benchmark switches huge pages off; not here, to see it if it fails.
     */
    return at;
}

/* ----------------------------------------------------------- first touches */

/* Times of touches in buckets of a sixteenth of a power of two. */
struct touches {
    uint64_t pages, wrong, ticks, max;
    uint32_t buckets[64 * 16];
};

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* The guest's clock may cost a system call, the counter does not. */
static uint64_t ticks(void)
{
#ifdef __x86_64__
    return __builtin_ia32_rdtsc();
#else
    return now_ns();
#endif
}

static unsigned bucket_of(uint64_t value)
{
    unsigned top = 63 - (unsigned)__builtin_clzll(value | 16);

    return (top - 4) * 16 + (unsigned)(value >> (top - 4));
}

static uint64_t bucket_start(unsigned bucket)
{
    return bucket < 32 ? bucket
                       : (uint64_t)(bucket % 16 + 16) << (bucket / 16 - 1);
}

static void touch(struct touches *touches, const uint64_t *at, uint64_t page)
{
    uint64_t before = ticks(), spent;

    (void)*(const volatile uint64_t *)at;
    spent = ticks() - before;
    touches->ticks += spent;
    if (spent > touches->max) {
        touches->max = spent;
    }
    touches->buckets[bucket_of(spent)]++;
    touches->pages++;
    touches->wrong += !is_right(at, page);
}

static uint64_t quantile(const struct touches *touches, uint64_t percent)
{
    uint64_t left = touches->pages * percent / 100;

    for (unsigned i = 0; i < 64 * 16; i++) {
        if (touches->buckets[i] > left) {
            return bucket_start(i);
        }
        left -= touches->buckets[i];
    }
    return touches->max;
}

static void add_touches(struct touches *sum, const struct touches *more)
{
    sum->pages += more->pages;
    sum->wrong += more->wrong;
    sum->ticks += more->ticks;
    sum->max = more->max > sum->max ? more->max : sum->max;
    for (unsigned i = 0; i < 64 * 16; i++) {
        sum->buckets[i] += more->buckets[i];
    }
}

/* -------------------------------------------------------------- the FIFOs */

struct line {
    char text[512];
};

static FILE *open_fifo(const char *name, const char *suffix, const char *mode)
{
    char path[256];
    FILE *file;

    snprintf(path, sizeof(path), "%s.%s", name, suffix);
    file = fopen(path, mode);
    if (!file) {
        err(1, "%s", path);
    }
    return file;
}

static void say(const char *name, const char *text)
{
    FILE *file = open_fifo(name, "out", "w");

    fprintf(file, "%s\n", text);
    fclose(file);
}

static void hear(const char *name, struct line *line)
{
    FILE *file = open_fifo(name, "in", "r");

    if (!fgets(line->text, sizeof(line->text), file)) {
        line->text[0] = '\0';
    }
    fclose(file);
    line->text[strcspn(line->text, "\n")] = '\0';
}

static void say_touches(const char *name, const struct touches *touches,
                        uint64_t ns, uint64_t elapsed)
{
    double tick = elapsed ? (double)ns / (double)elapsed : 0;
    struct line line;

    snprintf(line.text, sizeof(line.text),
             "pages=%" PRIu64 " wrong=%" PRIu64 " ns=%" PRIu64
             " p50=%.0f p99=%.0f max=%.0f",
             touches->pages, touches->wrong, ns,
             (double)quantile(touches, 50) * tick,
             (double)quantile(touches, 99) * tick, (double)touches->max * tick);
    say(name, line.text);
}

/* ------------------------------------------------------------------ aging */

/* Allocates by small blocks, frees some out of order, ends when it has enough.
 */
static void churn_one(uint64_t seed)
{
    uint64_t state = seed, have = 0, count = 0;
    uint64_t wanted =
        (CHURN_MIN_MB + next(&state) % (CHURN_MAX_MB - CHURN_MIN_MB)) * 256;
    struct block {
        uint64_t *at;
        uint64_t pages;
    } *blocks = calloc(2 * wanted, sizeof(*blocks));

    if (!blocks) {
        err(1, "calloc");
    }
    while (have < wanted && count < 2 * wanted) {
        struct block *block = &blocks[count++];

        block->pages = 1 + next(&state) % BLOCK_MAX;
        block->at = map_pages(block->pages * PAGE, MAP_PRIVATE);
        for (uint64_t i = 0; i < block->pages; i++) {
            fill(block->at + i * WORDS, next(&state));
        }
        have += block->pages;
        if (next(&state) % 3 == 0) {
            struct block *old = &blocks[next(&state) % count];

            if (old->at) {
                munmap(old->at, old->pages * PAGE);
                have -= old->pages;
                old->at = NULL;
            }
        }
    }
    free(blocks);
}

static int churn(uint64_t seed, uint64_t rounds)
{
    for (uint64_t round = 0; round < rounds; round++) {
        for (uint64_t i = 0; i < CHURNERS; i++) {
            pid_t pid = fork();

            if (pid < 0) {
                err(1, "fork");
            }
            if (pid == 0) {
                churn_one(mix(seed + round * CHURNERS + i));
                _exit(0);
            }
        }
        for (int i = 0; i < CHURNERS; i++) {
            wait(NULL);
        }
    }
    return 0;
}

static void shuffle(uint32_t *order, uint64_t count, uint64_t seed)
{
    for (uint64_t i = 0; i < count; i++) {
        order[i] = (uint32_t)i;
    }
    for (uint64_t i = count; i > 1; i--) {
        uint64_t other = next(&seed) % i;
        uint32_t kept = order[i - 1];

        order[i - 1] = order[other];
        order[other] = kept;
    }
}

static int hold(const char *name, uint64_t seed, uint64_t keep)
{
    struct sysinfo info;
    uint64_t bytes, pages, wanted;
    unsigned char *freed;
    uint32_t *order;
    uint64_t *memory;
    struct line line;

    sysinfo(&info);
    bytes = (uint64_t)info.freeram * info.mem_unit;
    if (bytes < 4 * (uint64_t)RESERVE) {
        errx(1, "only %" PRIu64 " bytes are free", bytes);
    }
    pages = (bytes - RESERVE) / PAGE;
    wanted = pages - pages * keep / 100;
    order = map_pages(pages * sizeof(*order), MAP_PRIVATE);
    memory = map_pages(pages * PAGE, MAP_PRIVATE);
    for (uint64_t i = 0; i < pages; i++) {
        fill(memory + i * WORDS, seed + i);
    }
    shuffle(order, pages, seed);
    freed = calloc(pages, 1);
    if (!freed) {
        err(1, "calloc");
    }
    for (uint64_t i = 0; wanted > 0; i++) {
        uint64_t run = next(&seed) % DOUBLE ? 1 : 2;

        for (uint64_t at = order[i]; run > 0 && at < pages && wanted > 0;
             at++, run--) {
            if (!freed[at]) {
                freed[at] = 1;
                wanted--;
                if (madvise(memory + at * WORDS, PAGE, MADV_DONTNEED)) {
                    err(1, "madvise");
                }
            }
        }
    }
    say(name, "ready");
    hear(name, &line);
    say(name, "ended");
    return 0;
}

/* ------------------------------------------------------------------ files */

static char *files[FILES];
static unsigned file_count;

static int add_file(const char *path, const struct stat *found, int type,
                    struct FTW *where)
{
    (void)where;
    if (type == FTW_F && S_ISREG(found->st_mode) && found->st_size > 0 &&
        file_count < FILES) {
        files[file_count++] = strdup(path);
    }
    return 0;
}

static void find_files(const char *root)
{
    if (nftw(root, add_file, 64, FTW_PHYS)) {
        err(1, "%s", root);
    }
}

struct contents {
    uint64_t bytes, sum;
};

static struct contents read_files(void)
{
    static uint64_t buffer[READ / 8];
    struct contents found = {0};

    for (unsigned i = 0; i < file_count; i++) {
        int fd = open(files[i], O_RDONLY);
        ssize_t got;

        if (fd < 0) {
            err(1, "%s", files[i]);
        }
        while ((got = read(fd, buffer, READ)) > 0) {
            for (ssize_t j = 0; j < got / 8; j += LINE) {
                found.sum = found.sum * 31 + buffer[j];
            }
            found.bytes += (uint64_t)got;
        }
        close(fd);
    }
    return found;
}

static int drop(const char *root)
{
    find_files(root);
    read_files();
    for (unsigned i = 0; i < file_count; i++) {
        int fd = i % KEPT_FILE ? open(files[i], O_RDONLY) : -1;

        if (fd >= 0) {
            posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
            close(fd);
        }
    }
    return 0;
}

static noreturn void tree(const char *name, const char *root)
{
    struct contents first, again;
    struct line line;

    find_files(root);
    first = read_files();
    snprintf(line.text, sizeof(line.text), "ready %d", getpid());
    for (say(name, line.text);; say(name, line.text)) {
        uint64_t start, ns;

        hear(name, &line);
        start = now_ns();
        again = read_files();
        ns = now_ns() - start;
        snprintf(line.text, sizeof(line.text),
                 "pages=%" PRIu64 " wrong=%d ns=%" PRIu64, again.bytes / PAGE,
                 again.bytes != first.bytes || again.sum != first.sum, ns);
    }
}

/* ------------------------------------------------------------------ heaps */

static uint64_t *make_heap(uint64_t pages, uint64_t first)
{
    uint64_t *heap = map_pages(pages * PAGE, MAP_PRIVATE);

    for (uint64_t i = 0; i < pages; i++) {
        fill(heap + i * WORDS, first + i);
    }
    return heap;
}

/* One page of each cell of CELL pages, the cells in random order. */
static void touch_random(struct touches *touches, const uint64_t *heap,
                         uint64_t pages, uint64_t cell)
{
    static uint32_t order[8192];
    uint64_t cells = pages / (cell ? cell : 1), state = 1;

    if (cells == 0 || cells > 8192) {
        errx(1, "%" PRIu64 " cells", cells);
    }
    shuffle(order, cells, 7);
    for (uint64_t i = 0; i < cells; i++) {
        uint64_t page = order[i] * cell + next(&state) % cell;

        touch(touches, heap + page * WORDS, page);
    }
}

static noreturn void heap(const char *name, uint64_t megabytes)
{
    static struct touches touches;
    uint64_t pages = megabytes * 256, *memory = make_heap(pages, 0);
    struct line line;

    snprintf(line.text, sizeof(line.text), "ready %d", getpid());
    for (say(name, line.text);;) {
        uint64_t start, from, cell;

        hear(name, &line);
        memset(&touches, 0, sizeof(touches));
        start = now_ns();
        from = ticks();
        if (sscanf(line.text, "random %" SCNu64, &cell) == 1) {
            touch_random(&touches, memory, pages, cell);
        } else {
            for (uint64_t i = 0; i < pages; i++) {
                touch(&touches, memory + i * WORDS, i);
            }
        }
        from = ticks() - from;
        say_touches(name, &touches, now_ns() - start, from);
    }
}

struct turn {
    int in, out;
    pid_t pid;
};

/* Walks its next CHUNK pages whenever it is told to. */
static void take_turns(int in, int out, struct touches *touches, uint64_t pages,
                       uint64_t first, uint64_t chunk)
{
    uint64_t *memory = make_heap(pages, first), at = 0;
    char byte = 0;

    if (write(out, &byte, 1) != 1) {
        _exit(1);
    }
    while (read(in, &byte, 1) == 1) {
        for (uint64_t i = 0; i < chunk; i++, at = (at + 1) % pages) {
            touch(touches, memory + at * WORDS, first + at);
        }
        if (write(out, &byte, 1) != 1) {
            _exit(1);
        }
    }
    _exit(0);
}

static struct turn start_turn(struct touches *touches, uint64_t pages,
                              uint64_t first, uint64_t chunk)
{
    int in[2], out[2];
    struct turn turn;

    if (pipe(in) || pipe(out)) {
        err(1, "pipe");
    }
    turn.pid = fork();
    if (turn.pid < 0) {
        err(1, "fork");
    }
    if (turn.pid == 0) {
        take_turns(in[0], out[1], touches, pages, first, chunk);
    }
    turn.in = out[0];
    turn.out = in[1];
    return turn;
}

static noreturn void pair(const char *name, uint64_t megabytes, uint64_t chunk)
{
    uint64_t pages = megabytes * 256 / chunk * chunk;
    struct touches *touches = map_pages(2 * sizeof(struct touches), MAP_SHARED);
    static struct touches sum;
    struct turn turns[2];
    struct line line;
    char byte = 0;

    for (unsigned i = 0; i < 2; i++) {
        turns[i] = start_turn(&touches[i], pages, (i + 1) << 20, chunk);
    }
    for (unsigned i = 0; i < 2; i++) {
        if (read(turns[i].in, &byte, 1) != 1) {
            errx(1, "a process of the pair ended");
        }
    }
    snprintf(line.text, sizeof(line.text), "ready %d %d", turns[0].pid,
             turns[1].pid);
    for (say(name, line.text);;) {
        uint64_t start, from;

        hear(name, &line);
        memset(touches, 0, 2 * sizeof(*touches));
        start = now_ns();
        from = ticks();
        for (uint64_t i = 0; i < 2 * pages / chunk; i++) {
            if (write(turns[i % 2].out, &byte, 1) != 1 ||
                read(turns[i % 2].in, &byte, 1) != 1) {
                errx(1, "a process of the pair ended");
            }
        }
        from = ticks() - from;
        memset(&sum, 0, sizeof(sum));
        add_touches(&sum, &touches[0]);
        add_touches(&sum, &touches[1]);
        say_touches(name, &sum, now_ns() - start, from);
    }
}

/* -------------------------------------------------------------- adjacency */

struct share {
    uint64_t pages, pairs, adjacent;
};

static void add_range(struct share *share, int pagemap, uint64_t first,
                      uint64_t end)
{
    uint64_t entries[PAGEMAP_BATCH], last = 0;

    for (uint64_t page = first; page < end;) {
        uint64_t count =
            end - page < PAGEMAP_BATCH ? end - page : PAGEMAP_BATCH;
        ssize_t got = pread(pagemap, entries, count * 8, (off_t)(page * 8));

        if (got < 8) {
            return;
        }
        for (uint64_t i = 0; i < (uint64_t)got / 8; i++, page++) {
            uint64_t frame = entries[i] & FRAME;
            bool is = entries[i] & PRESENT && frame;

            share->pages += is;
            if (is && last) {
                share->pairs++;
                share->adjacent += frame == last + 1 || frame == last - 1;
            }
            last = is ? frame : 0;
        }
    }
}

static void print_share(const struct share *share, uint64_t of)
{
    printf("pages=%" PRIu64 " of=%" PRIu64 " pairs=%" PRIu64
           " adjacent=%" PRIu64 "\n",
           share->pages, of, share->pairs, share->adjacent);
}

/* Private anonymous memory that can be written: what a process calls its heap.
 */
static void add_process(struct share *share, const char *pid)
{
    char path[64], line[512], rights[8];
    uint64_t start, end, inode;
    FILE *maps;
    int pagemap;

    snprintf(path, sizeof(path), "/proc/%s/maps", pid);
    maps = fopen(path, "r");
    snprintf(path, sizeof(path), "/proc/%s/pagemap", pid);
    pagemap = open(path, O_RDONLY);
    if (!maps || pagemap < 0) {
        err(1, "%s", path);
    }
    while (fgets(line, sizeof(line), maps)) {
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %7s %*x %*s %" SCNu64, &start,
                   &end, rights, &inode) == 4 &&
            strcmp(rights, "rw-p") == 0 && inode == 0) {
            add_range(share, pagemap, start / PAGE, end / PAGE);
        }
    }
    fclose(maps);
    close(pagemap);
}

/* Pages of files that the page cache has, each file mapped for a moment. */
static int share_files(const char *root)
{
    int pagemap = open("/proc/self/pagemap", O_RDONLY);
    struct share share = {0};
    uint64_t all = 0;

    find_files(root);
    for (unsigned i = 0; i < file_count; i++) {
        int fd = open(files[i], O_RDONLY);
        struct stat found;
        unsigned char *cached;
        volatile char *at;
        uint64_t pages;

        if (fd < 0 || fstat(fd, &found)) {
            err(1, "%s", files[i]);
        }
        pages = ((uint64_t)found.st_size + PAGE - 1) / PAGE;
        at = mmap(NULL, pages * PAGE, PROT_READ, MAP_SHARED, fd, 0);
        cached = calloc(pages, 1);
        if (at == MAP_FAILED || !cached ||
            mincore((void *)at, pages * PAGE, cached)) {
            err(1, "%s", files[i]);
        }
        for (uint64_t page = 0; page < pages; page++) {
            if (cached[page] & 1) {
                (void)at[page * PAGE];
            }
        }
        all += pages;
        add_range(&share, pagemap, (uintptr_t)at / PAGE,
                  (uintptr_t)at / PAGE + pages);
        free(cached);
        munmap((void *)at, pages * PAGE);
        close(fd);
    }
    print_share(&share, all);
    return 0;
}

static int share_processes(char **pids)
{
    struct share share = {0};

    for (; *pids; pids++) {
        add_process(&share, *pids);
    }
    print_share(&share, share.pages);
    return 0;
}

int main(int count, char **words)
{
    const char *verb = count > 2 ? words[1] : "";

    if (!strcmp(verb, "churn") && count == 4) {
        return churn(number(words[2]), number(words[3]));
    }
    if (!strcmp(verb, "drop") && count == 3) {
        return drop(words[2]);
    }
    if (!strcmp(verb, "hold") && count == 5) {
        return hold(words[2], number(words[3]), number(words[4]));
    }
    if (!strcmp(verb, "heap") && count == 4) {
        heap(words[2], number(words[3]));
    }
    if (!strcmp(verb, "pair") && count == 5) {
        pair(words[2], number(words[3]), number(words[4]));
    }
    if (!strcmp(verb, "tree") && count == 4) {
        tree(words[2], words[3]);
    }
    if (!strcmp(verb, "share")) {
        return share_processes(words + 2);
    }
    if (!strcmp(verb, "share-files") && count == 3) {
        return share_files(words[2]);
    }
    errx(2, "walker: see tests/guests/redis/walker.c");
}
