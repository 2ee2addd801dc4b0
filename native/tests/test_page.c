/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Classification of a page: every unit, and everything that is nearly one. */
#include "check.h"
#include "stream.h"

#include <time.h>
#include <xxhash.h>

static void fill(uint8_t *page, const uint8_t *unit, size_t size)
{
    for (size_t i = 0; i < PS_PAGE_SIZE; i += size) {
        memcpy(page + i, unit, size);
    }
}

static void expect_data(const uint8_t *page)
{
    XXH128_hash_t hash = XXH3_128bits(page, PS_PAGE_SIZE);
    ps_page_info info;

    ps_page_classify(page, &info);
    CHECK(info.page_class == PS_CLASS_DATA);
    CHECK(info.unit_log2 == 0);
    CHECK(info.signature_low == hash.low64);
    CHECK(info.signature_high == hash.high64);
}

static void test_zero(void)
{
    uint8_t page[PS_PAGE_SIZE] = {0};
    ps_page_info info;

    ps_page_classify(page, &info);
    CHECK(info.page_class == PS_CLASS_ZERO);
    for (size_t i = 0; i < PS_PAGE_SIZE; i++) {
        page[i] = 1;
        expect_data(page);
        page[i] = 0;
    }
}

static void test_fills(void)
{
    uint8_t page[PS_PAGE_SIZE];
    uint8_t unit[64];
    ps_page_info info;

    for (uint32_t log2 = 0; log2 <= 6; log2++) {
        size_t size = (size_t)1 << log2;

        for (size_t i = 0; i < size; i++) {
            unit[i] = (uint8_t)(i + 1);
        }
        fill(page, unit, size);
        ps_page_classify(page, &info);
        CHECK(info.page_class == PS_CLASS_FILL);
        CHECK_MSG(info.unit_log2 == log2, "%u, not %u", info.unit_log2, log2);
        /* Only the last byte of the unit tells its size. */
        memset(unit, 0, size);
        unit[size - 1] = 0x80;
        fill(page, unit, size);
        ps_page_classify(page, &info);
        CHECK(info.page_class == PS_CLASS_FILL && info.unit_log2 == log2);
        for (size_t i = 0; i < PS_PAGE_SIZE; i++) {
            page[i] ^= 1;
            expect_data(page);
            page[i] ^= 1;
        }
    }
    /* A period of 128 bytes is none of ours. */
    for (size_t i = 0; i < PS_PAGE_SIZE; i++) {
        page[i] = (uint8_t)(i % 128);
    }
    expect_data(page);
}

static void test_unaligned(void)
{
    uint8_t buffer[PS_PAGE_SIZE + 64];

    for (size_t i = 0; i < 64; i++) {
        make_page(buffer + i, i);
        expect_data(buffer + i);
    }
}

static double seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Printed, never asserted. */
static void speed(const char *name, const uint8_t *pages, size_t count)
{
    uint64_t sum = 0;
    double start = seconds();
    double took;

    for (unsigned round = 0; round < 64; round++) {
        for (size_t i = 0; i < count; i++) {
            ps_page_info info;

            ps_page_classify(pages + i * PS_PAGE_SIZE, &info);
            sum += info.signature_low;
        }
    }
    took = seconds() - start;
    printf("classify %s: %.1f GB/s (%u)\n", name,
           64.0 * (double)(count * PS_PAGE_SIZE) / took / 1e9,
           (unsigned)(sum & 1));
}

int main(void)
{
    enum {
        COUNT = 1024
    };
    uint8_t *pages = calloc(COUNT, PS_PAGE_SIZE);

    test_zero();
    test_fills();
    test_unaligned();
    speed("zero", pages, COUNT);
    for (size_t i = 0; i < COUNT; i++) {
        make_page(pages + i * PS_PAGE_SIZE, i);
    }
    speed("data", pages, COUNT);
    free(pages);
    return check_done();
}
