/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A main() for fuzz targets without libFuzzer, so that any compiler can run
 * them as a regression test:
 *
 *     fuzz_X FILE|DIRECTORY...             each file once
 *     fuzz_X -runs=N [-seed=S] FILE|DIR... and N mutations of them, always
 *                                          the same ones for a seed
 *
 * An input that crashes is left in `crash-<number>.bin`, in the directory
 * that -artifacts=DIR names (by default none is written).
 */
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define LONGEST_INPUT ((size_t)1 << 20)

typedef struct seed {
    char *name;
    uint8_t *data;
    size_t size;
} seed;

static seed *seeds;
static size_t seed_count;
static unsigned long long current; /* 0: a file of the corpus */
static const char *artifacts;
static const uint8_t *input;
static size_t input_size;

static void die(const char *what, const char *name)
{
    fprintf(stderr, "%s: %s: %s\n", what, name, strerror(errno));
    exit(2);
}

static void add_file(const char *name)
{
    seed *s;
    FILE *f = fopen(name, "rb");

    seeds = realloc(seeds, (seed_count + 1) * sizeof(*seeds));
    if (!f || !seeds) {
        die("reading", name);
    }
    s = &seeds[seed_count++];
    s->name = strdup(name);
    s->data = malloc(LONGEST_INPUT);
    if (!s->name || !s->data) {
        die("reading", name);
    }
    s->size = fread(s->data, 1, LONGEST_INPUT, f);
    fclose(f);
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

/* A directory's files in the order of their names, not of the disk. */
static void add_path(const char *path)
{
    struct dirent **entries = NULL;
    struct stat st;
    int count;

    if (stat(path, &st) < 0) {
        die("reading", path);
    }
    if (!S_ISDIR(st.st_mode)) {
        add_file(path);
        return;
    }
    count = scandir(path, &entries, NULL, by_name);
    if (count < 0) {
        die("reading", path);
    }
    for (int i = 0; i < count; i++) {
        char name[4096];

        snprintf(name, sizeof(name), "%s/%s", path, entries[i]->d_name);
        if (stat(name, &st) == 0 && S_ISREG(st.st_mode)) {
            add_file(name);
        }
        free(entries[i]);
    }
    free(entries);
}

static uint64_t state;

static uint64_t next_random(void)
{
    state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t x = state;

    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

/* Below bound, small values far more often: headers matter most. */
static size_t position(size_t bound)
{
    uint64_t r = next_random();

    return (size_t)((r >> 8) % (r & 1 && bound > 256 ? 256 : bound));
}

static size_t mutate_once(uint8_t *data, size_t size)
{
    static const uint8_t values[] = {
        0, 1, 2, 3, 4, 5, 6, 7, 8, 0x10, 0x20, 0x7e, 0x7f, 0x80, 0xfe, 0xff};
    size_t at = size ? position(size) : 0;
    size_t n = 1 + next_random() % 16;

    if (size == 0) {
        data[0] = (uint8_t)next_random();
        return 1;
    }
    switch (next_random() % 8) {
    case 0:
    case 1: /* a bit */
        data[at] ^= (uint8_t)(1u << (next_random() % 8));
        return size;
    case 2: /* a byte */
        data[at] = values[next_random() % sizeof(values)];
        return size;
    case 3: /* some bytes alike */
        n = n < size - at ? n : size - at;
        memset(data + at, values[next_random() % sizeof(values)], n);
        return size;
    case 4: /* cut */
        return at;
    case 5: /* leave out */
        n = n < size - at ? n : size - at;
        memmove(data + at, data + at + n, size - at - n);
        return size - n;
    case 6: /* twice */
        n = n < size - at ? n : size - at;
        if (size + n > LONGEST_INPUT) {
            return size;
        }
        memmove(data + at + n, data + at, size - at);
        return size + n;
    default: /* from another seed */
    {
        const seed *other = &seeds[next_random() % seed_count];
        size_t from = other->size ? position(other->size) : 0;

        n = next_random() % 5000;
        n = n < other->size - from ? n : other->size - from;
        n = n < size - at ? n : size - at;
        memcpy(data + at, other->data + from, n);
        return size;
    }
    }
}

static void run(const uint8_t *data, size_t size)
{
    /* A copy of the exact size, so that reading past it is seen. */
    uint8_t *copy = malloc(size ? size : 1);

    if (!copy) {
        die("running", "out of memory");
    }
    memcpy(copy, data, size);
    input = data;
    input_size = size;
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

static void save_crash(int number)
{
    char name[4096];
    FILE *f;

    fprintf(stderr, "input %llu died of signal %d\n", current, number);
    if (artifacts) {
        snprintf(name, sizeof(name), "%s/crash-%llu.bin", artifacts, current);
        f = fopen(name, "wb");
        if (f) {
            fwrite(input, 1, input_size, f);
            fclose(f);
            fprintf(stderr, "written to %s\n", name);
        }
    }
    signal(number, SIG_DFL);
    raise(number);
}

int main(int argc, char **argv)
{
    unsigned long long runs = 0;
    uint8_t *data = malloc(LONGEST_INPUT);

    state = 1;
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "-runs=", 6) == 0) {
            runs = strtoull(argv[i] + 6, NULL, 10);
        } else if (strncmp(argv[i], "-seed=", 6) == 0) {
            state = strtoull(argv[i] + 6, NULL, 10);
        } else if (strncmp(argv[i], "-artifacts=", 11) == 0) {
            artifacts = argv[i] + 11;
        } else {
            add_path(argv[i]);
        }
    }
    if (seed_count == 0 || !data) {
        fprintf(stderr,
                "usage: %s [-runs=N] [-seed=S] [-artifacts=DIR] "
                "FILE|DIRECTORY...\n",
                argv[0]);
        return 2;
    }
    signal(SIGABRT, save_crash);
    signal(SIGSEGV, save_crash);
    for (size_t i = 0; i < seed_count; i++) {
        run(seeds[i].data, seeds[i].size);
    }
    for (current = 1; current <= runs; current++) {
        const seed *s = &seeds[next_random() % seed_count];
        size_t size = s->size;
        unsigned times = 1 + next_random() % 4;

        memcpy(data, s->data, size);
        for (unsigned i = 0; i < times; i++) {
            size = mutate_once(data, size);
        }
        run(data, size);
    }
    fprintf(stderr, "%zu files, %llu mutations\n", seed_count, runs);
    for (size_t i = 0; i < seed_count; i++) {
        free(seeds[i].name);
        free(seeds[i].data);
    }
    free(seeds);
    free(data);
    return 0;
}
