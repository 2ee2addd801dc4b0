/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "read_ahead.h"

#include <pthread.h>

/* Decoded blocks lie in the processor's cache until they are sent. */
#define AHEAD_BYTES ((size_t)4 << 20)
#define MIN_DEPTH 4u
#define MAX_DEPTH 64u

struct slot {
    ps_block_info info;
    uint8_t *pages;
    bool done;
    bool failed;
};

/* Blocks are numbered from 0; taken <= claimed <= asked <= taken + depth. */
struct ps_read_ahead {
    int fd;
    uint32_t depth;
    struct slot slots[MAX_DEPTH];
    uint8_t *memory;
    size_t memory_length;
    ps_decoder own; /* of the asking thread */
    ps_decoder thread_decoder;

    pthread_mutex_t lock;
    pthread_cond_t work; /* something to claim, or quit */
    pthread_cond_t done;
    uint64_t asked;
    uint64_t claimed;
    uint64_t taken;
    bool quit;

    bool running;
    pthread_t thread;
    uint64_t cpu_ns; /* when it has ended */
};

static struct slot *slot_of(ps_read_ahead *ahead, uint64_t number)
{
    return &ahead->slots[number % ahead->depth];
}

/* Decode the next block that nobody has begun. Called, and returns, with the
   lock held. */
static void work_once(ps_read_ahead *ahead, ps_decoder *decoder)
{
    struct slot *slot = slot_of(ahead, ahead->claimed++);
    ps_error error;
    int r;

    pthread_mutex_unlock(&ahead->lock);
    r = ps_decoder_read(decoder, ahead->fd, &slot->info, slot->pages, &error);
    pthread_mutex_lock(&ahead->lock);
    slot->failed = r != PS_OK;
    slot->done = true;
}

static void *run(void *opaque)
{
    ps_read_ahead *ahead = opaque;

    pthread_mutex_lock(&ahead->lock);
    while (!ahead->quit) {
        if (ahead->claimed < ahead->asked) {
            work_once(ahead, &ahead->thread_decoder);
            pthread_cond_signal(&ahead->done);
            continue;
        }
        pthread_cond_wait(&ahead->work, &ahead->lock);
    }
    pthread_mutex_unlock(&ahead->lock);
    ahead->cpu_ns = ps_clock_ns(CLOCK_THREAD_CPUTIME_ID);
    return NULL;
}

static int init(ps_read_ahead *ahead, const ps_image *image, ps_error *err)
{
    size_t length = image->pages_per_block * PS_PAGE_SIZE;
    void *memory;
    int r;

    ahead->fd = image->fd;
    ahead->depth = (uint32_t)(AHEAD_BYTES / length);
    if (ahead->depth < MIN_DEPTH) {
        ahead->depth = MIN_DEPTH;
    } else if (ahead->depth > MAX_DEPTH) {
        ahead->depth = MAX_DEPTH;
    }
    ahead->memory_length = ahead->depth * length;
    r = ps_reserve(ahead->memory_length, &memory, err);
    if (r) {
        return r;
    }
    ahead->memory = memory;
    for (uint32_t i = 0; i < ahead->depth; i++) {
        ahead->slots[i].pages = ahead->memory + i * length;
    }
    r = ps_decoder_init(&ahead->own, image, err);
    return r ? r : ps_decoder_init(&ahead->thread_decoder, image, err);
}

int ps_read_ahead_create(const ps_image *image, ps_read_ahead **out,
                         ps_error *err)
{
    ps_read_ahead *ahead = calloc(1, sizeof(*ahead));
    int r;

    *out = NULL;
    if (!ahead) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE, "no memory");
    }
    pthread_mutex_init(&ahead->lock, NULL);
    pthread_cond_init(&ahead->work, NULL);
    pthread_cond_init(&ahead->done, NULL);
    r = init(ahead, image, err);
    if (r) {
        ps_read_ahead_destroy(ahead);
        return r;
    }
    ahead->running = pthread_create(&ahead->thread, NULL, run, ahead) == 0;
    *out = ahead;
    return PS_OK;
}

uint64_t ps_read_ahead_destroy(ps_read_ahead *ahead)
{
    uint64_t cpu_ns;

    if (!ahead) {
        return 0;
    }
    if (ahead->running) {
        pthread_mutex_lock(&ahead->lock);
        ahead->quit = true;
        pthread_cond_signal(&ahead->work);
        pthread_mutex_unlock(&ahead->lock);
        pthread_join(ahead->thread, NULL);
    }
    pthread_mutex_destroy(&ahead->lock);
    pthread_cond_destroy(&ahead->work);
    pthread_cond_destroy(&ahead->done);
    ps_decoder_deinit(&ahead->own);
    ps_decoder_deinit(&ahead->thread_decoder);
    ps_unreserve(ahead->memory, ahead->memory_length);
    cpu_ns = ahead->cpu_ns;
    free(ahead);
    return cpu_ns;
}

uint32_t ps_read_ahead_room(const ps_read_ahead *ahead)
{
    uint64_t under_way = ahead->asked - ahead->taken;

    return under_way > ahead->depth / 2
               ? 0
               /* The one taken last is still in use. */
               : ahead->depth - 1 - (uint32_t)under_way;
}

void ps_read_ahead_ask(ps_read_ahead *ahead, const ps_block_info *info)
{
    struct slot *slot;

    pthread_mutex_lock(&ahead->lock);
    slot = slot_of(ahead, ahead->asked);
    slot->info = *info;
    slot->done = false;
    slot->failed = false;
    if (ahead->asked++ == ahead->claimed) {
        pthread_cond_signal(&ahead->work);
    }
    pthread_mutex_unlock(&ahead->lock);
}

bool ps_read_ahead_take(ps_read_ahead *ahead, ps_block_info *info,
                        const uint8_t **pages)
{
    struct slot *slot;

    pthread_mutex_lock(&ahead->lock);
    if (ahead->taken == ahead->asked) {
        pthread_mutex_unlock(&ahead->lock);
        return false;
    }
    slot = slot_of(ahead, ahead->taken);
    while (!slot->done) {
        if (ahead->claimed < ahead->asked) {
            work_once(ahead, &ahead->own);
        } else {
            pthread_cond_wait(&ahead->done, &ahead->lock);
        }
    }
    ahead->taken++;
    pthread_mutex_unlock(&ahead->lock);
    *info = slot->info;
    *pages = slot->failed ? NULL : slot->pages;
    return true;
}
