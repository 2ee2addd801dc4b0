/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * CHECK for the C tests: counts, says file and line, and goes on. assert()
 * vanishes in release builds and stops at the first failure.
 *
 *     int main(void)
 *     {
 *         CHECK(1 + 1 == 2);
 *         CHECK_MSG(x == y, "x is %d", x);
 *         return check_done();
 *     }
 */
#ifndef PS_TESTS_CHECK_H
#define PS_TESTS_CHECK_H

#include <stdio.h>

static unsigned long check_count;
static unsigned long check_failures;

/* After this many failures only the count goes on. */
#define CHECK_SHOWN 50ul

#define CHECK_MSG(condition, ...)                                              \
    ((void)(check_count++,                                                     \
            (condition)                                                        \
                ? 0                                                            \
                : (check_failures++ < CHECK_SHOWN                              \
                       ? (fprintf(stderr, "%s:%d: CHECK(%s) failed: ",         \
                                  __FILE__, __LINE__, #condition),             \
                          fprintf(stderr, __VA_ARGS__), fputc('\n', stderr))   \
                       : 0)))

#define CHECK(condition) CHECK_MSG(condition, "%s", __func__)

/* The exit status of main(). */
static inline int check_done(void)
{
    fprintf(stderr, "%lu checks, %lu failed\n", check_count, check_failures);
    return check_failures != 0;
}

#endif
