/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The predictor against guests that walk in known ways. */
#include "predictor.h"

#include "check.h"

#define LARGEST 64u

/* One fault of a guest that touches `at`; returns what was predicted. The
   window has no holes and nothing of it was there before. */
static ps_prediction fault(ps_predictor *predictor, uint64_t line, uint64_t at)
{
    const struct ps_prediction_record *right;
    ps_prediction p = ps_predictor_fault(predictor, line, at, &right);

    CHECK(p.confirms == (right != NULL));
    CHECK(p.pages <= predictor->largest);
    if (!p.covered) {
        uint64_t ahead = at + (uint64_t)(p.stride * (int64_t)(p.pages + 1));
        uint64_t number =
            ps_predictor_window(predictor, line, at, &p, ahead, 0);

        ps_predictor_sent(predictor, number, p.pages);
    }
    return p;
}

static ps_predictor made(uint32_t largest)
{
    ps_predictor predictor;
    ps_error err = {0};

    CHECK(ps_predictor_init(&predictor, largest, &err) == PS_OK);
    return predictor;
}

/* Touches every stride-th place, faults where nothing was sent. */
static uint32_t walk(ps_predictor *predictor, int64_t stride, uint32_t touches)
{
    int64_t at = INT64_C(1) << 40, there = at, window = 0, by = 1;
    uint32_t faults = 0;

    for (uint32_t i = 0; i < touches; i++, at += stride) {
        int64_t steps = (at - there) / by;

        if (i > 0 && (at - there) % by == 0 && steps > 0 && steps <= window) {
            continue;
        }
        faults++;
        ps_prediction p = fault(predictor, 7, (uint64_t)at);
        there = at;
        by = p.stride;
        window = p.pages;
    }
    return faults;
}

static void test_walks(void)
{
    static const int64_t strides[] = {1, -1, 3, -5, 40};

    for (size_t i = 0; i < sizeof(strides) / sizeof(strides[0]); i++) {
        ps_predictor predictor = made(LARGEST);
        uint32_t faults = walk(&predictor, strides[i], 4000);

        /* 64 pages a window, once it has grown. A small stride is found by
           windows that are full. */
        uint32_t full = strides[i] == 3 ? 3 : 1;

        CHECK_MSG(faults < 4000 * full / LARGEST + 20, "stride %lld: %u faults",
                  (long long)strides[i], faults);
        ps_predictor_deinit(&predictor);
    }
}

/* Places that have nothing to do with each other: soon nothing is sent. */
static void test_random(void)
{
    ps_predictor predictor = made(LARGEST);
    uint64_t x = 88172645463325252u;
    uint32_t pages = 0, late = 0;

    for (uint32_t i = 0; i < 4000; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        uint32_t sent = fault(&predictor, 3, x >> 20).pages;

        pages += sent;
        late += i >= 200 ? sent : 0;
    }
    CHECK_MSG(pages < 1200 && late == 0, "%u pages, %u of them late", pages,
              late);
    /* A walk on the same line is found all the same. */
    fault(&predictor, 3, 1000);
    CHECK(fault(&predictor, 3, 1001).pages == 4);
    CHECK(fault(&predictor, 3, 1006).pages == 8);
    ps_predictor_deinit(&predictor);
}

/* Two walks in turn, on one line and on two. */
static void test_in_turn(void)
{
    for (uint64_t other = 0; other < 2; other++) {
        ps_predictor predictor = made(LARGEST);
        uint64_t a = 1000, b = 900000;
        uint32_t faults = 0;

        while (faults < 40) {
            a += fault(&predictor, 5, a).pages + 1;
            b += fault(&predictor, 5 + other, b).pages + 1;
            faults += 2;
        }
        CHECK_MSG(a - 1000 > 20 / 2 * LARGEST, "%llu",
                  (unsigned long long)a - 1000);
        CHECK(b - 900000 > 20 / 2 * LARGEST);
        ps_predictor_deinit(&predictor);
    }
}

static void test_covered(void)
{
    ps_predictor predictor = made(LARGEST);
    ps_prediction p = fault(&predictor, 1, 100);

    CHECK(p.pages == 8 && p.stride == 1 && !p.confirms);
    CHECK(ps_predictor_expects(&predictor, 1, 105));
    CHECK(ps_predictor_expects(&predictor, 1, 109));
    CHECK(ps_predictor_expects(&predictor, 1, 99));
    CHECK(!ps_predictor_expects(&predictor, 1, 110));
    CHECK(!ps_predictor_expects(&predictor, 2, 109));
    p = fault(&predictor, 1, 103); /* it overtook the window */
    CHECK(p.covered && p.pages == 0);
    p = fault(&predictor, 1, 109);
    CHECK(p.confirms && p.pages == 16);
    ps_predictor_deinit(&predictor);
}

static void test_bounds(void)
{
    ps_predictor predictor = made(0);

    CHECK(fault(&predictor, 1, 0).pages == 0);
    CHECK(fault(&predictor, 1, 1).pages == 0);
    CHECK(fault(&predictor, 1, UINT64_MAX).pages == 0);
    ps_predictor_deinit(&predictor);
    predictor = made(LARGEST);
    for (uint64_t line = 0; line < 3000; line++) {
        fault(&predictor, line, UINT64_MAX);
        fault(&predictor, line, 0);
        fault(&predictor, line, UINT64_MAX - 1);
        fault(&predictor, line, UINT64_C(1) << 63);
    }
    ps_predictor_deinit(&predictor);
    ps_predictor_deinit(&predictor);
}

int main(void)
{
    test_walks();
    test_random();
    test_in_turn();
    test_covered();
    test_bounds();
    return check_done();
}
