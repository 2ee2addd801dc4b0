/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The stream parser over anything. The input is parsed whole and again in
 * parts whose sizes come from the input itself; both must give the same
 * events, the same figures and the same error.
 */
#include "common.h"

#include <stdio.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "fuzz_parser: %s\n", what);
        abort();
    }
}

/* A running hash of all that an event says; reads every byte it points to. */
static uint64_t digest(uint64_t hash, const ps_event *e)
{
    uint64_t fields[] = {hash,
                         e->type,
                         e->block,
                         e->offset,
                         e->value,
                         e->page_offset,
                         e->length,
                         e->page_size,
                         e->address,
                         e->section_id,
                         e->name_length,
                         e->data_length,
                         ps_xxh3_64((const uint8_t *)e->name, e->name_length),
                         ps_xxh3_64(e->data, e->data_length)};

    return ps_xxh3_64((const uint8_t *)fields, sizeof(fields));
}

typedef struct result {
    uint64_t hash;
    int code;
    uint64_t error_offset;
} result;

static int push(ps_parser *parser, const uint8_t *data, size_t size,
                result *out, ps_error *err)
{
    uint8_t *copy = malloc(size ? size : 1);
    ps_event event = {0};
    size_t at = 0;
    int code;

    require(copy != NULL, "out of memory");
    memcpy(copy, data, size);
    do {
        size_t used = 0;

        code = ps_parser_push(parser, copy + at, size - at, &used, &event, err);
        require(used <= size - at, "used more than there was");
        at += used;
        if (code == PS_OK && event.type != PS_EVENT_NONE) {
            out->hash = digest(out->hash, &event);
        }
    } while (code == PS_OK && event.type != PS_EVENT_NONE);
    require(code != PS_OK || at == size, "input left over");
    free(copy);
    return code;
}

static result parse(const uint8_t *data, size_t size, bool split)
{
    result out = {0};
    ps_parser *parser;
    ps_stream_info info;
    ps_event event = {0};
    ps_error err = {0};
    uint32_t random = (uint32_t)size;
    size_t at = 0;
    int code = ps_parser_create(&parser, &err);

    require(code == PS_OK, "create");
    while (code == PS_OK && at < size) {
        size_t part = size - at;

        if (split) {
            random = random * 1103515245u + 12345u + data[at];
            part = 1 + (random >> 16) % (random & 0x300 ? 40 : 6000);
            part = part < size - at ? part : size - at;
        }
        code = push(parser, data + at, part, &out, &err);
        at += part;
    }
    while (code == PS_OK && event.type != PS_EVENT_END) {
        code = ps_parser_finish(parser, &event, &err);
        if (code == PS_OK) {
            out.hash = digest(out.hash, &event);
        }
    }
    if (code != PS_OK) {
        require(err.code == code, "the error's code");
        require(memchr(err.message, 0, sizeof(err.message)) != NULL &&
                    err.message[0] != 0,
                "the error's message");
        out.error_offset = err.offset;
    }
    out.code = code;
    ps_parser_info(parser, &info);
    out.hash ^= ps_xxh3_64((const uint8_t *)&info, sizeof(info));
    ps_parser_destroy(parser);
    return out;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    result whole = parse(data, size, false);
    result parts = parse(data, size, true);

    require(whole.code == parts.code, "the code depends on the split");
    require(whole.hash == parts.hash, "the events depend on the split");
    require(whole.error_offset == parts.error_offset,
            "the error's offset depends on the split");
    return 0;
}
