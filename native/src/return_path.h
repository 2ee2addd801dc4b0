/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the destination of a migration says: the messages of QEMU's return
 * path (migration/migration.h: enum mig_rp_message_type). No I/O; bytes in
 * any split. Every length is compared with what its type allows before a
 * byte of the message is kept.
 */
#ifndef PS_RETURN_PATH_H
#define PS_RETURN_PATH_H

#include "common.h"

enum ps_rp_type {
    PS_RP_SHUT = 1,         /* value: 0 is success */
    PS_RP_PONG = 2,         /* value: of the PING */
    PS_RP_REQ_PAGES_ID = 3, /* start, length, name */
    PS_RP_REQ_PAGES = 4,    /* start, length: the block named last */
    PS_RP_RECV_BITMAP = 5,  /* name; a bitmap follows outside messages */
    PS_RP_RESUME_ACK = 6,   /* value */
    PS_RP_SWITCHOVER_ACK = 7,
};

#define PS_RP_HEADER 4u
#define PS_RP_MAX_DATA (8u + 4u + 1u + 255u)

typedef struct ps_rp_message {
    uint16_t type;
    uint32_t value;
    uint64_t start;
    uint32_t length;
    uint32_t name_length;
    const char *name; /* not NUL-terminated; valid until the next call */
} ps_rp_message;

typedef struct ps_return_path {
    uint64_t offset; /* of the message under way, since the start */
    uint32_t have;
    uint8_t bytes[PS_RP_HEADER + PS_RP_MAX_DATA];
} ps_return_path;

/*
 * Consume bytes of [in, in + length) until one message is complete (*whole is
 * true) or all is consumed. PS_ERR_PEER for what no QEMU sends.
 */
int ps_return_path_push(ps_return_path *rp, const uint8_t *in, size_t length,
                        size_t *used, ps_rp_message *message, bool *whole,
                        ps_error *err);

#endif
