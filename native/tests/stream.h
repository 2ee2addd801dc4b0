/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* QEMU migration streams made by hand, for tests. */
#ifndef PS_TESTS_STREAM_H
#define PS_TESTS_STREAM_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

typedef struct stream {
    uint8_t *data;
    size_t length;
    size_t capacity;
    bool footers;
} stream;

#define RAM_ID 2u
#define DEVICE_ID 7u

static inline void put(stream *s, const void *data, size_t length)
{
    if (s->length + length > s->capacity) {
        s->capacity = 2 * (s->length + length) + 4096;
        s->data = realloc(s->data, s->capacity);
        if (!s->data) {
            abort();
        }
    }
    memcpy(s->data + s->length, data, length);
    s->length += length;
}

static inline void put_u8(stream *s, unsigned value)
{
    uint8_t byte = (uint8_t)value;

    put(s, &byte, 1);
}

static inline void put_u16(stream *s, unsigned value)
{
    put_u8(s, value >> 8);
    put_u8(s, value);
}

static inline void put_u32(stream *s, uint32_t value)
{
    uint8_t bytes[4];

    ps_put_be32(bytes, value);
    put(s, bytes, 4);
}

static inline void put_u64(stream *s, uint64_t value)
{
    uint8_t bytes[8];

    ps_put_be64(bytes, value);
    put(s, bytes, 8);
}

static inline void put_name(stream *s, const char *name)
{
    put_u8(s, (unsigned)strlen(name));
    put(s, name, strlen(name));
}

static inline void put_header(stream *s)
{
    put(s, "QEVM", 4);
    put_u32(s, 3);
}

static inline void put_machine(stream *s)
{
    put_u8(s, QEMU_VM_CONFIGURATION);
    put_u32(s, 7);
    put(s, "pc-test", 7);
}

static inline void put_subsection(stream *s, const char *name)
{
    put_u8(s, QEMU_VM_SUBSECTION);
    put_name(s, name);
    put_u32(s, 1);
}

static inline void put_capability(stream *s, const char *name)
{
    put_subsection(s, "configuration/capabilities");
    put_u32(s, 1);
    put_name(s, name);
}

static inline void put_section(stream *s, unsigned type, uint32_t id,
                               const char *name, uint32_t version)
{
    put_u8(s, type);
    put_u32(s, id);
    if (name) {
        put_name(s, name);
        put_u32(s, 0);
        put_u32(s, version);
    }
}

static inline void put_footer(stream *s, uint32_t id)
{
    if (s->footers) {
        put_u8(s, QEMU_VM_SECTION_FOOTER);
        put_u32(s, id);
    }
}

static inline void put_ram_start(stream *s)
{
    put_section(s, QEMU_VM_SECTION_START, RAM_ID, "ram", 4);
}

static inline void put_ram_part(stream *s)
{
    put_section(s, QEMU_VM_SECTION_PART, RAM_ID, NULL, 0);
}

static inline void put_total(stream *s, uint64_t bytes)
{
    put_u64(s, bytes | RAM_SAVE_FLAG_MEM_SIZE);
}

static inline void put_block(stream *s, const char *name, uint64_t bytes)
{
    put_name(s, name);
    put_u64(s, bytes);
}

static inline void put_eos(stream *s)
{
    put_u64(s, RAM_SAVE_FLAG_EOS);
    put_footer(s, RAM_ID);
}

/* name NULL: continue the block of the page before. */
static inline void put_zero(stream *s, const char *name, uint64_t offset)
{
    put_u64(s,
            offset | RAM_SAVE_FLAG_ZERO | (name ? 0 : RAM_SAVE_FLAG_CONTINUE));
    if (name) {
        put_name(s, name);
    }
    put_u8(s, 0);
}

static inline void put_page(stream *s, const char *name, uint64_t offset,
                            const uint8_t *page)
{
    put_u64(s,
            offset | RAM_SAVE_FLAG_PAGE | (name ? 0 : RAM_SAVE_FLAG_CONTINUE));
    if (name) {
        put_name(s, name);
    }
    put(s, page, PS_PAGE_SIZE);
}

static inline void put_command(stream *s, unsigned command, const void *data,
                               unsigned length)
{
    put_u8(s, QEMU_VM_COMMAND);
    put_u16(s, command);
    put_u16(s, length);
    put(s, data, length);
}

static inline void put_ram_end(stream *s)
{
    put_section(s, QEMU_VM_SECTION_END, RAM_ID, NULL, 0);
    put_eos(s);
}

static inline void put_device(stream *s, const char *name, const void *data,
                              size_t length)
{
    put_section(s, QEMU_VM_SECTION_FULL, DEVICE_ID, name, 1);
    put(s, data, length);
    put_footer(s, DEVICE_ID);
}

static inline void put_description(stream *s, const char *json)
{
    put_u8(s, QEMU_VM_VMDESCRIPTION);
    put_u32(s, (uint32_t)strlen(json));
    put(s, json, strlen(json));
}

/* A page of data that is its number's and nobody else's. */
static inline void make_page(uint8_t *page, uint64_t number)
{
    uint64_t x = number * UINT64_C(0x9e3779b97f4a7c15) + 1;

    for (size_t i = 0; i < PS_PAGE_SIZE; i += 8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        memcpy(page + i, &x, 8);
    }
}

/* A whole small stream: two blocks of 4 and 2 pages, one device. */
static inline void put_whole(stream *s)
{
    uint8_t page[PS_PAGE_SIZE];
    const uint8_t device[] = {1, 0, 0x7e, 0, 0, 2, 0, 0};

    put_header(s);
    put_machine(s);
    put_ram_start(s);
    put_total(s, 6 * PS_PAGE_SIZE);
    put_block(s, "pc.ram", 4 * PS_PAGE_SIZE);
    put_block(s, "pc.bios", 2 * PS_PAGE_SIZE);
    put_eos(s);
    put_ram_part(s);
    make_page(page, 1);
    put_page(s, "pc.ram", 0, page);
    put_zero(s, NULL, 0x1000);
    make_page(page, 2);
    put_page(s, NULL, 0x2000, page);
    put_eos(s);
    put_command(s, 11, "", 0);
    put_ram_part(s);
    make_page(page, 1);
    put_page(s, "pc.ram", 0x3000, page);
    put_zero(s, "pc.bios", 0);
    memset(page, 0xff, sizeof(page));
    put_page(s, NULL, 0x1000, page);
    put_eos(s);
    put_ram_end(s);
    put_device(s, "timer", device, sizeof(device));
    put_u8(s, QEMU_VM_EOF);
    put_description(s, "{\"devices\": []}");
}

static inline void stream_free(stream *s)
{
    free(s->data);
    memset(s, 0, sizeof(*s));
}

#endif
