/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "predictor.h"

/* A record is given up for now after so many others; it may still be right
   later, until it is overwritten. */
#define PATIENCE 64u
/* Who walks comes to the end of his window within so many faults, others'
   included. */
#define SOON 32u
/* How fast the share of right windows follows what happens. */
#define WEIGHT (1.0 / 16)
/* At first: some trust, so that a first walk finds its neighbours. */
#define FIRST_RIGHT 0.15
/* A window that was right grows from there on. */
#define SMALLEST 4u
#define LONGEST_STRIDE 128
#define NOWHERE UINT64_MAX

static uint64_t mix(uint64_t line, uint64_t at)
{
    uint64_t hash = (line + 1) * UINT64_C(0x9e3779b97f4a7c15) ^ at;

    hash *= UINT64_C(0xd6e8feb86659fd93);
    return hash ^ hash >> 32;
}

int ps_predictor_init(ps_predictor *predictor, uint32_t largest, ps_error *err)
{
    *predictor = (ps_predictor){.largest = largest};
    predictor->records =
        calloc(PS_PREDICTOR_RECORDS, sizeof(*predictor->records));
    predictor->index = calloc(PS_PREDICTOR_INDEX, sizeof(*predictor->index));
    predictor->lines = calloc(PS_PREDICTOR_LINES, sizeof(*predictor->lines));
    predictor->regions =
        calloc(PS_PREDICTOR_REGIONS, sizeof(*predictor->regions));
    if (!predictor->records || !predictor->index || !predictor->lines ||
        !predictor->regions) {
        ps_predictor_deinit(predictor);
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "no memory");
    }
    for (uint32_t i = 0; i < PS_PREDICTOR_LINES; i++) {
        predictor->lines[i].line = NOWHERE;
    }
    for (uint32_t i = 0; i < PS_PREDICTOR_REGIONS; i++) {
        predictor->regions[i].line = NOWHERE;
    }
    return PS_OK;
}

void ps_predictor_deinit(ps_predictor *predictor)
{
    free(predictor->records);
    free(predictor->index);
    free(predictor->lines);
    free(predictor->regions);
    *predictor = (ps_predictor){0};
}

static struct ps_prediction_line *line_slot(const ps_predictor *predictor,
                                            uint64_t line)
{
    return &predictor->lines[mix(line, 0) & (PS_PREDICTOR_LINES - 1)];
}

/* A line that takes another's slot begins anew. */
static struct ps_prediction_line *find_line(ps_predictor *predictor,
                                            uint64_t line)
{
    struct ps_prediction_line *slot = line_slot(predictor, line);

    if (slot->line != line) {
        *slot = (struct ps_prediction_line){
            .line = line,
            .last = NOWHERE,
            .from = NOWHERE,
            .to = NOWHERE,
            .every = 1,
            .right = FIRST_RIGHT,
        };
    }
    return slot;
}

/* A new region is what its line is. */
static struct ps_prediction_region *find_region(ps_predictor *predictor,
                                                uint64_t line, uint64_t at)
{
    uint64_t number = at >> PS_PREDICTOR_REGION_BITS;
    struct ps_prediction_region *region =
        &predictor->regions[mix(line, number) & (PS_PREDICTOR_REGIONS - 1)];

    if (region->line != line || region->number != number) {
        *region = (struct ps_prediction_region){
            .line = line,
            .number = number,
            .right = find_line(predictor, line)->right,
        };
    }
    return region;
}

/* A window in that region was right, or not. */
static void learn(ps_predictor *predictor, uint64_t line, uint64_t at,
                  bool right)
{
    struct ps_prediction_line *slot = line_slot(predictor, line);
    double target = right ? 1 : 0;

    /* A line that has lost its slot does not take it from its successor. */
    if (slot->line == line) {
        struct ps_prediction_region *region = find_region(predictor, line, at);

        region->right += (target - region->right) * WEIGHT;
        slot->right += (target - slot->right) * WEIGHT;
    }
}

static uint16_t *index_slot(const ps_predictor *predictor, uint64_t line,
                            uint64_t at)
{
    return &predictor->index[mix(line, at) & (PS_PREDICTOR_INDEX - 1)];
}

static struct ps_prediction_record *find_record(const ps_predictor *predictor,
                                                uint64_t line, uint64_t at)
{
    uint16_t slot = *index_slot(predictor, line, at);
    struct ps_prediction_record *record;

    if (slot == 0) {
        return NULL;
    }
    record = &predictor->records[slot - 1];
    return record->line == line && !record->confirmed &&
                   (record->ahead == at || record->behind == at)
               ? record
               : NULL;
}

/* Is the place in the window that was sent last? */
static bool covers(const struct ps_prediction_line *slot, uint64_t at)
{
    return at >= slot->from && at <= slot->to &&
           (at - slot->from) % slot->every == 0;
}

bool ps_predictor_expects(const ps_predictor *predictor, uint64_t line,
                          uint64_t at)
{
    const struct ps_prediction_line *slot = line_slot(predictor, line);

    return find_record(predictor, line, at) ||
           (slot->line == line && covers(slot, at));
}

static uint32_t clamp(const ps_predictor *predictor, uint32_t pages)
{
    return pages < predictor->largest ? pages : predictor->largest;
}

/*
 * The window of a place of which nothing is known. A page beside costs about
 * a fifteenth of a fault (qemu-facts: 2.9 us against 45), so that it pays
 * from about that share of right ones on.
 */
static uint32_t first_window(double right)
{
    return right >= 0.4    ? 32
           : right >= 0.2  ? 16
           : right >= 0.1  ? 8
           : right >= 0.06 ? 4
                           : 0;
}

ps_prediction ps_predictor_fault(ps_predictor *predictor, uint64_t line,
                                 uint64_t at,
                                 const struct ps_prediction_record **confirmed)
{
    struct ps_prediction_line *slot = find_line(predictor, line);
    struct ps_prediction_record *record = find_record(predictor, line, at);
    int64_t delta = slot->last == NOWHERE ? 0 : (int64_t)(at - slot->last);
    ps_prediction prediction = {.stride = 1};

    *confirmed = record;
    if (record) {
        uint32_t twice = 2 * record->pages;

        record->confirmed = true;
        learn(predictor, line, record->at, true);
        prediction.confirms = true;
        prediction.soon = predictor->next - record->number <= SOON;
        prediction.stride =
            record->ahead == at ? record->stride : -record->stride;
        prediction.pages =
            clamp(predictor, twice < SMALLEST ? SMALLEST : twice);
    } else if (covers(slot, at)) {
        prediction.covered = true;
        prediction.by = slot->record;
    } else if (delta == slot->delta && (delta > 1 || delta < -1) &&
               delta <= LONGEST_STRIDE && delta >= -LONGEST_STRIDE) {
        prediction.stride = delta;
        prediction.pages = clamp(predictor, SMALLEST);
    } else {
        prediction.pages = clamp(
            predictor, first_window(find_region(predictor, line, at)->right));
    }
    slot->delta = delta;
    slot->last = at;
    return prediction;
}

/* A record that has waited for long without being confirmed. */
static void give_up(ps_predictor *predictor, uint64_t number)
{
    struct ps_prediction_record *record =
        &predictor->records[number % PS_PREDICTOR_RECORDS];

    if (!record->confirmed) {
        learn(predictor, record->line, record->at, false);
    }
}

uint64_t ps_predictor_window(ps_predictor *predictor, uint64_t line,
                             uint64_t at, const ps_prediction *prediction,
                             uint64_t ahead, uint32_t kind)
{
    struct ps_prediction_line *slot = find_line(predictor, line);
    uint64_t number = predictor->next++;
    uint32_t place = (uint32_t)(number % PS_PREDICTOR_RECORDS);
    struct ps_prediction_record *record = &predictor->records[place];

    *record = (struct ps_prediction_record){
        .line = line,
        .at = at,
        .ahead = ahead,
        .behind =
            prediction->confirms ? NOWHERE : at - (uint64_t)prediction->stride,
        .number = number,
        .stride = prediction->stride,
        .pages = prediction->pages,
        .kind = kind,
    };
    *index_slot(predictor, line, ahead) = (uint16_t)(place + 1);
    if (record->behind != NOWHERE) {
        *index_slot(predictor, line, record->behind) = (uint16_t)(place + 1);
    }
    if (prediction->pages > 0) {
        bool forward = prediction->stride > 0;

        slot->record = number;
        slot->every =
            (uint64_t)(forward ? prediction->stride : -prediction->stride);
        slot->from = forward ? at : ahead + slot->every;
        slot->to = forward ? ahead - slot->every : at;
    }
    if (number >= PATIENCE) {
        give_up(predictor, number - PATIENCE);
    }
    return number;
}

void ps_predictor_sent(ps_predictor *predictor, uint64_t number, uint32_t pages)
{
    struct ps_prediction_record *record =
        &predictor->records[number % PS_PREDICTOR_RECORDS];

    if (record->number == number) {
        record->sent += pages;
    }
}
