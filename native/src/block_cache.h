/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Decoded locality blocks, least recently used out first. Memory is reserved
 * at once and touched as blocks come in.
 */
#ifndef PS_BLOCK_CACHE_H
#define PS_BLOCK_CACHE_H

#include "image.h"

typedef struct ps_block_cache {
    ps_image *image;
    ps_decoder decoder;
    uint8_t *memory;
    size_t memory_length;
    size_t slot_length; /* bytes of a whole block */
    uint32_t slots;
    uint32_t slots_used;
    uint32_t recent; /* ends of the list by use */
    uint32_t oldest;
    uint32_t bucket_mask;
    uint32_t *buckets;
    struct ps_cache_slot *slot;
    /* For statistics: what the last ps_block_cache_load() cost. */
    uint64_t reads;
    uint64_t bytes;
    uint64_t decoded;
} ps_block_cache;

int ps_block_cache_init(ps_block_cache *cache, ps_image *image, uint64_t bytes,
                        ps_error *err);
void ps_block_cache_deinit(ps_block_cache *cache);
/* The pages of a block that is in the cache, or NULL. */
const uint8_t *ps_block_cache_find(ps_block_cache *cache, uint64_t number);
/* Read, check and decode a block that is not in the cache. The pages are
   valid until the next load. */
int ps_block_cache_load(ps_block_cache *cache, const ps_block_info *info,
                        const uint8_t **pages, ps_error *err);
/* Bytes that it holds right now. */
uint64_t ps_block_cache_memory(const ps_block_cache *cache);

#endif
