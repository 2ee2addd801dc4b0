/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Locality blocks decoded ahead of the one who sends them, in the order in
 * which he asked for them. A thread of its own decodes; when it is not fast
 * enough, or cannot be started, the asking thread does its share in
 * ps_read_ahead_take(). One thread asks and takes.
 */
#ifndef PS_READ_AHEAD_H
#define PS_READ_AHEAD_H

#include "image.h"

typedef struct ps_read_ahead ps_read_ahead;

int ps_read_ahead_create(const ps_image *image, ps_read_ahead **out,
                         ps_error *err);
/* Returns the processor time that its thread has taken, ns. */
uint64_t ps_read_ahead_destroy(ps_read_ahead *ahead);
/* Blocks that may be asked for now; 0 until a good part has been taken, so
   that the thread is woken for many at once. */
uint32_t ps_read_ahead_room(const ps_read_ahead *ahead);
void ps_read_ahead_ask(ps_read_ahead *ahead, const ps_block_info *info);
/*
 * The block asked for longest ago; false: there is none. *pages is NULL where
 * it cannot be read (whoever reads it again learns why), else valid until the
 * next call.
 */
bool ps_read_ahead_take(ps_read_ahead *ahead, ps_block_info *info,
                        const uint8_t **pages);
#endif
