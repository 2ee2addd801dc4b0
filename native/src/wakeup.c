/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What it costs to wake a thread on the same CPU and on another one. A fault
 * of stock postcopy is four wake-ups, so this says where the pager belongs.
 */
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "common.h"

#define WARM_UP 10
#define ROUNDS 61
#define ENOUGH 15
/* A CPU that is busy with something else must not hold us up. */
#define BUDGET_NS UINT64_C(5000000)
/* Idle long enough between two rounds that the other CPU goes to sleep. */
#define GAP_NS 2000

struct partner {
    int ask;
    int answer;
    int cpu;
};

static int pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    return pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

static bool transfer(int fd, bool out, uint64_t *value)
{
    ssize_t n;

    do {
        n = out ? write(fd, value, sizeof(*value))
                : read(fd, value, sizeof(*value));
    } while (n < 0 && errno == EINTR);
    return n == (ssize_t)sizeof(*value);
}

/* Answer until told to stop, by any number but 1. */
static void *echo(void *opaque)
{
    struct partner *partner = opaque;
    uint64_t value;

    (void)pin(partner->cpu);
    while (transfer(partner->ask, false, &value) && value == 1) {
        if (!transfer(partner->answer, true, &value)) {
            break;
        }
    }
    return NULL;
}

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

struct measurement {
    int here;
    int there;
    uint64_t median; /* one way; 0: could not be measured */
};

/* Runs in a thread of its own, so that the caller's affinity stays. */
static void *measure(void *opaque)
{
    struct measurement *measurement = opaque;
    struct partner partner = {-1, -1, measurement->there};
    uint64_t times[ROUNDS];
    size_t count = 0;
    uint64_t begin, stop = 2, one = 1;
    pthread_t thread;

    if (pin(measurement->here)) {
        return NULL;
    }
    partner.ask = eventfd(0, EFD_CLOEXEC);
    partner.answer = eventfd(0, EFD_CLOEXEC);
    if (partner.ask < 0 || partner.answer < 0 ||
        pthread_create(&thread, NULL, echo, &partner)) {
        goto out;
    }
    begin = ps_clock_ns(CLOCK_MONOTONIC);
    for (int i = 0; i < WARM_UP + ROUNDS; i++) {
        struct timespec gap = {.tv_nsec = GAP_NS};
        uint64_t start, end;

        clock_nanosleep(CLOCK_MONOTONIC, 0, &gap, NULL);
        start = ps_clock_ns(CLOCK_MONOTONIC);
        one = 1;
        if (!transfer(partner.ask, true, &one) ||
            !transfer(partner.answer, false, &one)) {
            break;
        }
        end = ps_clock_ns(CLOCK_MONOTONIC);
        if (i >= WARM_UP) {
            times[count++] = (end - start) / 2;
        }
        if (count >= ENOUGH && end - begin > BUDGET_NS) {
            break;
        }
    }
    transfer(partner.ask, true, &stop);
    pthread_join(thread, NULL);
    if (count > 0) {
        qsort(times, count, sizeof(times[0]), compare_u64);
        measurement->median = times[count / 2] ? times[count / 2] : 1;
    }
out:
    if (partner.ask >= 0) {
        close(partner.ask);
    }
    if (partner.answer >= 0) {
        close(partner.answer);
    }
    return NULL;
}

static int measure_pair(int here, int there, uint64_t *median, ps_error *err)
{
    struct measurement measurement = {here, there, 0};
    pthread_t thread;
    int r = pthread_create(&thread, NULL, measure, &measurement);

    if (r) {
        errno = r;
        return ps_fail_errno(err, PS_NOWHERE, "measuring wake-ups");
    }
    pthread_join(thread, NULL);
    *median = measurement.median;
    return PS_OK;
}

int ps_measure_wakeups(uint64_t *same_cpu, uint64_t *other_cpu, ps_error *err)
{
    cpu_set_t allowed;
    int first = -1, second = -1;
    int r;

    *same_cpu = 0;
    *other_cpu = 0;
    if (sched_getaffinity(0, sizeof(allowed), &allowed)) {
        return ps_fail_errno(err, PS_NOWHERE, "measuring wake-ups");
    }
    for (int cpu = 0; cpu < CPU_SETSIZE && second < 0; cpu++) {
        if (CPU_ISSET((size_t)cpu, &allowed)) {
            second = first < 0 ? -1 : cpu;
            first = first < 0 ? cpu : first;
        }
    }
    if (first < 0) {
        return PS_OK;
    }
    r = measure_pair(first, first, same_cpu, err);
    if (!r && second >= 0) {
        r = measure_pair(first, second, other_cpu, err);
    }
    return r;
}
