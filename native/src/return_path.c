/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "return_path.h"

/* Shortest and longest data of each type. */
static const struct {
    uint16_t min;
    uint16_t max;
    const char *name;
} rp_types[] = {
    [PS_RP_SHUT] = {4, 4, "SHUT"},
    [PS_RP_PONG] = {4, 4, "PONG"},
    [PS_RP_REQ_PAGES_ID] = {14, PS_RP_MAX_DATA, "REQ_PAGES_ID"},
    [PS_RP_REQ_PAGES] = {12, 12, "REQ_PAGES"},
    [PS_RP_RECV_BITMAP] = {2, 256, "RECV_BITMAP"},
    [PS_RP_RESUME_ACK] = {4, 4, "RESUME_ACK"},
    [PS_RP_SWITCHOVER_ACK] = {0, 0, "SWITCHOVER_ACK"},
};

/* The header is there: is it one that QEMU sends? */
static int check_header(const ps_return_path *rp, uint32_t *length,
                        ps_error *err)
{
    uint16_t type = ps_get_be16(rp->bytes);
    uint16_t data = ps_get_be16(rp->bytes + 2);

    if (type == 0 || type >= sizeof(rp_types) / sizeof(rp_types[0])) {
        return ps_fail(err, PS_ERR_PEER, rp->offset,
                       "QEMU sent an unknown message of type %u on the "
                       "return path",
                       type);
    }
    if (data < rp_types[type].min || data > rp_types[type].max) {
        return ps_fail(err, PS_ERR_PEER, rp->offset,
                       "QEMU sent a %s message of length %u on the return path",
                       rp_types[type].name, data);
    }
    *length = data;
    return PS_OK;
}

/* A counted name that must end where the message ends. */
static int take_name(const ps_return_path *rp, uint32_t at, uint32_t length,
                     ps_rp_message *message, ps_error *err)
{
    const uint8_t *data = rp->bytes + PS_RP_HEADER;

    if (data[at] == 0 || at + 1 + data[at] != length) {
        return ps_fail(err, PS_ERR_PEER, rp->offset,
                       "QEMU sent a %s message of length %u with a name of "
                       "length %u on the return path",
                       rp_types[message->type].name, length, data[at]);
    }
    message->name_length = data[at];
    message->name = (const char *)data + at + 1;
    return PS_OK;
}

static int decode(const ps_return_path *rp, uint32_t length,
                  ps_rp_message *message, ps_error *err)
{
    const uint8_t *data = rp->bytes + PS_RP_HEADER;

    memset(message, 0, sizeof(*message));
    message->type = ps_get_be16(rp->bytes);
    switch (message->type) {
    case PS_RP_SHUT:
    case PS_RP_PONG:
    case PS_RP_RESUME_ACK:
        message->value = ps_get_be32(data);
        return PS_OK;
    case PS_RP_REQ_PAGES_ID:
    case PS_RP_REQ_PAGES:
        message->start = ps_get_be64(data);
        message->length = ps_get_be32(data + 8);
        return message->type == PS_RP_REQ_PAGES
                   ? PS_OK
                   : take_name(rp, 12, length, message, err);
    case PS_RP_RECV_BITMAP:
        return take_name(rp, 0, length, message, err);
    default:
        return PS_OK;
    }
}

/* Append to what is kept until there are want bytes. */
static bool gather(ps_return_path *rp, uint32_t want, const uint8_t *in,
                   size_t length, size_t *used)
{
    size_t n = want > rp->have ? want - rp->have : 0;

    if (n > length - *used) {
        n = length - *used;
    }
    memcpy(rp->bytes + rp->have, in + *used, n);
    rp->have += (uint32_t)n;
    *used += n;
    return rp->have >= want;
}

int ps_return_path_push(ps_return_path *rp, const uint8_t *in, size_t length,
                        size_t *used, ps_rp_message *message, bool *whole,
                        ps_error *err)
{
    uint32_t data = 0;
    int r;

    *used = 0;
    *whole = false;
    if (length == 0 || !gather(rp, PS_RP_HEADER, in, length, used)) {
        return PS_OK;
    }
    r = check_header(rp, &data, err);
    if (r) {
        return r;
    }
    if (!gather(rp, PS_RP_HEADER + data, in, length, used)) {
        return PS_OK;
    }
    r = decode(rp, data, message, err);
    if (r) {
        return r;
    }
    rp->offset += rp->have;
    rp->have = 0;
    *whole = true;
    return PS_OK;
}
