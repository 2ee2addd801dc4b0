/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "block_cache.h"

#define NONE UINT32_MAX

struct ps_cache_slot {
    uint64_t number;
    uint32_t newer; /* list by use */
    uint32_t older;
    uint32_t chain; /* next slot of the same bucket */
};

static uint32_t *bucket_of(const ps_block_cache *cache, uint64_t number)
{
    uint64_t hash = number * UINT64_C(0x9e3779b97f4a7c15);

    return &cache->buckets[(uint32_t)(hash >> 32) & cache->bucket_mask];
}

int ps_block_cache_init(ps_block_cache *cache, ps_image *image, uint64_t bytes,
                        ps_error *err)
{
    uint64_t slots;
    uint32_t buckets = 16;
    void *memory;
    int r;

    memset(cache, 0, sizeof(*cache));
    cache->image = image;
    cache->recent = NONE;
    cache->oldest = NONE;
    cache->slot_length = image->pages_per_block * PS_PAGE_SIZE;
    slots = bytes / cache->slot_length;
    if (slots > image->locality_blocks) {
        slots = image->locality_blocks;
    }
    if (slots == 0) {
        slots = 1;
    }
    if (slots > UINT32_C(1) << 24) {
        slots = UINT32_C(1) << 24;
    }
    cache->slots = (uint32_t)slots;
    while (buckets < cache->slots) {
        buckets *= 2;
    }
    cache->bucket_mask = buckets - 1;
    cache->buckets = malloc(buckets * sizeof(*cache->buckets));
    cache->slot = malloc(cache->slots * sizeof(*cache->slot));
    if (!cache->buckets || !cache->slot) {
        ps_block_cache_deinit(cache);
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE,
                       "no memory for the block cache");
    }
    memset(cache->buckets, 0xff, buckets * sizeof(*cache->buckets));
    cache->memory_length = cache->slots * cache->slot_length;
    r = ps_reserve(cache->memory_length, &memory, err);
    if (!r) {
        cache->memory = memory;
        r = ps_decoder_init(&cache->decoder, image, err);
    }
    if (r) {
        ps_block_cache_deinit(cache);
    }
    return r;
}

void ps_block_cache_deinit(ps_block_cache *cache)
{
    if (cache->image) {
        ps_decoder_deinit(&cache->decoder);
    }
    ps_unreserve(cache->memory, cache->memory_length);
    free(cache->buckets);
    free(cache->slot);
    memset(cache, 0, sizeof(*cache));
}

static void unlink_slot(ps_block_cache *cache, uint32_t i)
{
    struct ps_cache_slot *slot = &cache->slot[i];

    if (slot->newer == NONE) {
        cache->recent = slot->older;
    } else {
        cache->slot[slot->newer].older = slot->older;
    }
    if (slot->older == NONE) {
        cache->oldest = slot->newer;
    } else {
        cache->slot[slot->older].newer = slot->newer;
    }
}

static void link_oldest(ps_block_cache *cache, uint32_t i)
{
    cache->slot[i].older = NONE;
    cache->slot[i].newer = cache->oldest;
    if (cache->oldest == NONE) {
        cache->recent = i;
    } else {
        cache->slot[cache->oldest].older = i;
    }
    cache->oldest = i;
}

static void link_recent(ps_block_cache *cache, uint32_t i)
{
    cache->slot[i].newer = NONE;
    cache->slot[i].older = cache->recent;
    if (cache->recent == NONE) {
        cache->oldest = i;
    } else {
        cache->slot[cache->recent].newer = i;
    }
    cache->recent = i;
}

const uint8_t *ps_block_cache_find(ps_block_cache *cache, uint64_t number)
{
    for (uint32_t i = *bucket_of(cache, number); i != NONE;
         i = cache->slot[i].chain) {
        if (cache->slot[i].number == number) {
            if (cache->recent != i) {
                unlink_slot(cache, i);
                link_recent(cache, i);
            }
            return cache->memory + i * cache->slot_length;
        }
    }
    return NULL;
}

static void forget(ps_block_cache *cache, uint32_t i)
{
    uint32_t *at = bucket_of(cache, cache->slot[i].number);

    while (*at != i && *at != NONE) {
        at = &cache->slot[*at].chain;
    }
    if (*at == i) {
        *at = cache->slot[i].chain;
    }
}

int ps_block_cache_load(ps_block_cache *cache, const ps_block_info *info,
                        const uint8_t **pages, ps_error *err)
{
    uint8_t *out;
    uint32_t i, *bucket;
    int r;

    if (cache->slots_used < cache->slots) {
        i = cache->slots_used++;
    } else {
        i = cache->oldest;
        unlink_slot(cache, i);
        forget(cache, i);
    }
    out = cache->memory + i * cache->slot_length;
    cache->reads = 1;
    cache->bytes = info->stored;
    cache->decoded = info->form == PS_BLOCK_ZSTD;
    r = ps_decoder_read(&cache->decoder, cache->image->fd, info, out, err);
    if (r) {
        /* No number that exists: found by nobody, used again first. */
        cache->slot[i].number = UINT64_MAX;
        cache->slot[i].chain = NONE;
        link_oldest(cache, i);
        return r;
    }
    bucket = bucket_of(cache, info->number);
    cache->slot[i].number = info->number;
    cache->slot[i].chain = *bucket;
    *bucket = i;
    link_recent(cache, i);
    *pages = out;
    return PS_OK;
}

uint64_t ps_block_cache_memory(const ps_block_cache *cache)
{
    return (uint64_t)cache->slots * sizeof(*cache->slot) +
           ((uint64_t)cache->bucket_mask + 1) * sizeof(*cache->buckets) +
           cache->slots_used * cache->slot_length + cache->decoder.capacity;
}
