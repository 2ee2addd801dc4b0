/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The stream parser: every split, every truncation, every refusal. */
#include "check.h"
#include "stream.h"

/* What a stream says, as text and a checksum of all its data. */
typedef struct summary {
    char text[2048];
    size_t length;
    uint64_t hash;
} summary;

static void add_hash(summary *out, uint64_t value)
{
    out->hash = (out->hash ^ value) * UINT64_C(0x100000001b3);
}

static void add_event(summary *out, const ps_event *e)
{
    static const char letters[] = ".HCSBLZPcRDJE";

    if (out->length + 1 < sizeof(out->text)) {
        out->text[out->length++] = letters[e->type];
    }
    add_hash(out, e->type);
    add_hash(out, e->offset);
    add_hash(out, e->block);
    add_hash(out, e->value);
    add_hash(out, e->page_offset);
    add_hash(out, e->length);
    add_hash(out, e->page_size);
    add_hash(out, e->address);
    add_hash(out, e->section_id);
    for (uint32_t i = 0; i < e->name_length; i++) {
        add_hash(out, (uint8_t)e->name[i]);
    }
    for (size_t i = 0; i < e->data_length; i++) {
        add_hash(out, e->data[i]);
    }
}

/* Parse in parts: the first of `first` bytes, then of `part` bytes. The
   input is copied part by part, so that reading past one is seen. */
static int parse(const uint8_t *data, size_t length, size_t first, size_t part,
                 summary *out, ps_stream_info *info, ps_error *err)
{
    ps_parser *parser;
    ps_event event;
    size_t done = 0;
    int code = ps_parser_create(&parser, err);

    memset(out, 0, sizeof(*out));
    while (!code && done < length) {
        size_t n = done == 0 && first ? first : part;
        uint8_t *copy;
        size_t at = 0;

        n = n < length - done ? n : length - done;
        copy = malloc(n);
        memcpy(copy, data + done, n);
        do {
            size_t used;

            code =
                ps_parser_push(parser, copy + at, n - at, &used, &event, err);
            CHECK(used <= n - at);
            if (!code && event.type != PS_EVENT_NONE) {
                add_event(out, &event);
            }
            at += used;
        } while (!code && event.type != PS_EVENT_NONE);
        CHECK(code || at == n);
        free(copy);
        done += n;
    }
    while (!code) {
        code = ps_parser_finish(parser, &event, err);
        if (!code) {
            add_event(out, &event);
            if (event.type == PS_EVENT_END) {
                break;
            }
        }
    }
    if (code) {
        ps_error again = {0};
        size_t used;

        CHECK(err->code == code);
        CHECK(strlen(err->message) > 0);
        CHECK(ps_parser_push(parser, data, length, &used, &event, &again) ==
              code);
        CHECK(strcmp(again.message, err->message) == 0);
        CHECK(ps_parser_finish(parser, &event, &again) == code);
    }
    if (info) {
        ps_parser_info(parser, info);
    }
    ps_parser_destroy(parser);
    return code;
}

static int parse_all(const stream *s, summary *out, ps_stream_info *info,
                     ps_error *err)
{
    return parse(s->data, s->length, 0, s->length, out, info, err);
}

static void test_whole(bool footers)
{
    stream s = {.footers = footers};
    ps_stream_info info;
    ps_error err = {0};
    summary out;

    put_whole(&s);
    CHECK_MSG(parse_all(&s, &out, &info, &err) == PS_OK, "%s", err.message);
    CHECK_MSG(strcmp(out.text, "HCSBBLSPZPcSPZPSRDJE") == 0, "%s", out.text);
    CHECK(info.stream_version == 3);
    CHECK(info.ram_section_id == RAM_ID);
    CHECK(info.ram_version == 4);
    CHECK(info.footers == footers);
    CHECK(info.configuration == 1);
    CHECK(info.description == 1);
    CHECK(info.postcopy == 0);
    CHECK(info.target_page_bits == 12);
    stream_free(&s);
}

static void test_contents(void)
{
    stream s = {.footers = true};
    uint8_t page[PS_PAGE_SIZE];
    ps_parser *parser;
    ps_event event;
    ps_error err;
    size_t done = 0;
    unsigned pages = 0;

    put_whole(&s);
    CHECK(ps_parser_create(&parser, &err) == PS_OK);
    do {
        size_t used;

        CHECK(ps_parser_push(parser, s.data + done, s.length - done, &used,
                             &event, &err) == PS_OK);
        done += used;
        switch (event.type) {
        case PS_EVENT_CONFIGURATION:
            CHECK(event.data_length == 12);
            CHECK(memcmp(event.data, s.data + 8, 12) == 0);
            break;
        case PS_EVENT_SECTION:
            CHECK(event.section_id == RAM_ID);
            CHECK(s.data[event.offset] == event.value);
            break;
        case PS_EVENT_BLOCK:
            CHECK(event.length == (event.block ? 0x2000 : 0x4000));
            CHECK(event.page_size == 0);
            CHECK(event.address == UINT64_MAX);
            CHECK(event.name_length == (event.block ? 7 : 6));
            CHECK(memcmp(event.name, event.block ? "pc.bios" : "pc.ram",
                         event.name_length) == 0);
            break;
        case PS_EVENT_BLOCKS_END:
            CHECK(event.value == 0x6000);
            break;
        case PS_EVENT_PAGE:
            make_page(page, pages == 1 ? 2 : 1);
            if (pages == 3) {
                memset(page, 0xff, sizeof(page));
            }
            CHECK(memcmp(event.data, page, sizeof(page)) == 0);
            /* Contiguous data is not copied. */
            CHECK(event.data == s.data + done - PS_PAGE_SIZE);
            pages++;
            break;
        case PS_EVENT_COMMAND:
            CHECK(event.value == 11 && event.data_length == 0);
            break;
        default:
            break;
        }
    } while (event.type != PS_EVENT_NONE);
    CHECK(pages == 4);
    CHECK(ps_parser_finish(parser, &event, &err) == PS_OK);
    CHECK(event.type == PS_EVENT_DEVICES);
    CHECK(event.data_length == 32);
    CHECK(memcmp(event.data, s.data + event.offset, 32) == 0);
    CHECK(ps_parser_finish(parser, &event, &err) == PS_OK);
    CHECK(event.type == PS_EVENT_DESCRIPTION);
    CHECK(event.data_length == 15 && event.data[0] == '{');
    CHECK(memcmp(event.data, s.data + event.offset, 15) == 0);
    CHECK(ps_parser_finish(parser, &event, &err) == PS_OK);
    CHECK(event.type == PS_EVENT_END && event.offset == s.length);
    ps_parser_destroy(parser);
    stream_free(&s);
}

static void test_splits(bool footers)
{
    stream s = {.footers = footers};
    ps_error err = {0};
    summary whole;
    summary out;

    put_whole(&s);
    CHECK(parse_all(&s, &whole, NULL, &err) == PS_OK);
    for (size_t part = 1; part < 64; part++) {
        CHECK(parse(s.data, s.length, 0, part, &out, NULL, &err) == PS_OK);
        CHECK(out.hash == whole.hash);
    }
    for (size_t first = 1; first < s.length; first++) {
        CHECK(parse(s.data, s.length, first, s.length, &out, NULL, &err) ==
              PS_OK);
        CHECK_MSG(out.hash == whole.hash, "split at %zu", first);
    }
    stream_free(&s);
}

static void test_truncations(bool footers)
{
    stream s = {.footers = footers};
    summary out;
    size_t eof;

    put_whole(&s);
    eof = s.length - 15 - 5; /* after the EOF mark */
    for (size_t length = 0; length < s.length; length++) {
        ps_error err = {0};
        uint8_t *copy = malloc(length ? length : 1);
        int code;

        memcpy(copy, s.data, length);
        code = parse(copy, length, 0, length ? length : 1, &out, NULL, &err);
        free(copy);
        if (length == eof && footers) {
            /* A stream without a description, and a whole one. */
            CHECK(code == PS_OK);
        } else if (length > eof - 33 && !footers) {
            CHECK_MSG(code == PS_ERR_TRUNCATED || code == PS_ERR_UNSUPPORTED,
                      "%zu: %d", length, code);
        } else {
            CHECK_MSG(code == PS_ERR_TRUNCATED, "%zu: %d", length, code);
        }
    }
    stream_free(&s);
}

/* Everything that a bit can do: an error or a result, never a crash. */
static void test_flips(void)
{
    stream s = {.footers = true};
    summary out;

    put_whole(&s);
    for (size_t bit = 0; bit < s.length * 8; bit++) {
        ps_error err = {0};
        int code;

        s.data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        code = parse_all(&s, &out, NULL, &err);
        CHECK(code == PS_OK || err.message[0] != 0);
        s.data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    stream_free(&s);
}

/* Parse what there is; expect this failure, with these words in it. */
static void refused(stream *s, int code, const char *words, uint64_t offset)
{
    ps_error err = {0};
    summary out;
    int got;

    got = parse_all(s, &out, NULL, &err);
    CHECK_MSG(got == code, "%s: got %d, %s", words, got, err.message);
    CHECK_MSG(strstr(err.message, words) != NULL, "'%s' lacks '%s'",
              err.message, words);
    if (offset) {
        CHECK_MSG(err.offset == offset, "%s: at %llu, not %llu", words,
                  (unsigned long long)err.offset, (unsigned long long)offset);
    }
    /* The same one byte at a time. */
    got = parse(s->data, s->length, 0, 1, &out, NULL, &err);
    CHECK_MSG(got == code, "%s: got %d byte by byte", words, got);
    stream_free(s);
}

static stream begin(void)
{
    stream s = {.footers = true};

    put_header(&s);
    put_machine(&s);
    return s;
}

static stream begin_list(uint64_t total)
{
    stream s = begin();

    put_ram_start(&s);
    put_total(&s, total);
    return s;
}

static stream begin_ram(void)
{
    stream s = begin_list(0x4000);

    put_block(&s, "pc.ram", 0x4000);
    put_eos(&s);
    put_ram_part(&s);
    return s;
}

static stream begin_tail(void)
{
    stream s = begin_ram();

    put_eos(&s);
    put_ram_end(&s);
    return s;
}

static void test_header_refusals(void)
{
    stream s = {0};

    put(&s, "PK\3\4\0\0\0\0\0\0", 10);
    refused(&s, PS_ERR_NOT_OURS, "no QEMU", 0);
    put(&s, "QX", 2);
    refused(&s, PS_ERR_NOT_OURS, "no QEMU", 0);
    put(&s, "QEVM", 4);
    put_u32(&s, 2);
    refused(&s, PS_ERR_UNSUPPORTED, "version 2", 4);
}

static void test_configuration_refusals(void)
{
    static const char *const capabilities[] = {
        "multifd", "xbzrle",       "compress",       "mapped-ram",
        "x-colo",  "rdma-pin-all", "zero-copy-send", "from-the-future",
    };
    stream s = {0};

    for (size_t i = 0; i < sizeof(capabilities) / sizeof(char *); i++) {
        s = begin();
        put_capability(&s, capabilities[i]);
        put_ram_start(&s);
        refused(&s, PS_ERR_UNSUPPORTED, capabilities[i], 0);
    }
    s = begin();
    put_subsection(&s, "configuration/target-page-bits");
    put_u32(&s, 16);
    refused(&s, PS_ERR_UNSUPPORTED, "2^16", 0);
    s = begin();
    put_subsection(&s, "configuration/unheard-of");
    refused(&s, PS_ERR_UNSUPPORTED, "configuration/unheard-of", 0);
    s = begin();
    put_u8(&s, QEMU_VM_SUBSECTION);
    put_name(&s, "configuration/uuid");
    put_u32(&s, 2);
    refused(&s, PS_ERR_UNSUPPORTED, "version 2", 0);
    s = begin();
    put_u8(&s, QEMU_VM_SUBSECTION);
    put_u8(&s, 0);
    refused(&s, PS_ERR_DAMAGED, "without a name", 0);
    s = begin();
    put_subsection(&s, "configuration/capabilities");
    put_u32(&s, 1u << 30);
    refused(&s, PS_ERR_DAMAGED, "capabilities", 0);
    s = begin();
    put_capability(&s, "");
    refused(&s, PS_ERR_DAMAGED, "without a name", 0);
    put_header(&s);
    put_u8(&s, QEMU_VM_CONFIGURATION);
    put_u32(&s, 0x7fffffff);
    refused(&s, PS_ERR_DAMAGED, "machine name", 0);
    s = begin();
    for (unsigned i = 0; i < 3000; i++) {
        put_subsection(&s, "configuration/uuid");
        put(&s, "0123456789abcdef", 16);
    }
    refused(&s, PS_ERR_UNSUPPORTED, "larger than", 0);
}

static void test_section_refusals(void)
{
    static const char *const iterable[] = {"block", "dirty-bitmap",
                                           "spapr/htab"};
    stream s;

    for (size_t i = 0; i < sizeof(iterable) / sizeof(char *); i++) {
        s = begin();
        put_section(&s, QEMU_VM_SECTION_START, 1, iterable[i], 1);
        refused(&s, PS_ERR_UNSUPPORTED, iterable[i], 20);
    }
    s = begin();
    put_section(&s, QEMU_VM_SECTION_FULL, 1, "virtio-mem-early", 1);
    refused(&s, PS_ERR_UNSUPPORTED, "virtio-mem-early", 20);
    s = begin_ram();
    put_eos(&s);
    put_section(&s, QEMU_VM_SECTION_FULL, 1, "timer", 1);
    refused(&s, PS_ERR_UNSUPPORTED, "timer", 0);
    s = begin_ram();
    put_eos(&s);
    put_ram_start(&s);
    refused(&s, PS_ERR_DAMAGED, "second time", 0);
    s = begin();
    put_section(&s, QEMU_VM_SECTION_START, RAM_ID, "ram", 3);
    refused(&s, PS_ERR_UNSUPPORTED, "version 3", 0);
    s = begin();
    put_section(&s, QEMU_VM_SECTION_START, RAM_ID, "", 4);
    refused(&s, PS_ERR_DAMAGED, "without a name", 0);
    s = begin();
    put_ram_part(&s);
    refused(&s, PS_ERR_DAMAGED, "never started", 0);
    s = begin_ram();
    put_eos(&s);
    put_section(&s, QEMU_VM_SECTION_END, RAM_ID + 1, NULL, 0);
    refused(&s, PS_ERR_DAMAGED, "never started", 0);
    s = begin();
    put_u8(&s, QEMU_VM_EOF);
    refused(&s, PS_ERR_UNSUPPORTED, "no memory", 0);
    s = begin_ram();
    put_eos(&s);
    put_u8(&s, QEMU_VM_EOF);
    refused(&s, PS_ERR_DAMAGED, "before its memory", 0);
    s = begin();
    put_u8(&s, 0x42);
    refused(&s, PS_ERR_DAMAGED, "0x42", 0);
}

static void test_footer_refusals(void)
{
    stream s = begin_ram();

    put_u64(&s, RAM_SAVE_FLAG_EOS);
    put_section(&s, QEMU_VM_SECTION_END, RAM_ID, NULL, 0);
    refused(&s, PS_ERR_DAMAGED, "no footer", 0);
    s = begin_ram();
    put_u64(&s, RAM_SAVE_FLAG_EOS);
    put_footer(&s, RAM_ID + 1);
    refused(&s, PS_ERR_DAMAGED, "names section 3", 0);
    s = begin_list(0x4000);
    put_block(&s, "pc.ram", 0x4000);
    put_u64(&s, RAM_SAVE_FLAG_EOS);
    put_footer(&s, RAM_ID + 1);
    refused(&s, PS_ERR_DAMAGED, "names section 3", 0);
}

static void test_command_refusals(void)
{
    static const struct {
        unsigned command;
        const char *name;
    } bad[] = {
        {4, "POSTCOPY_LISTEN"},      {5, "POSTCOPY_RUN"},
        {6, "POSTCOPY_RAM_DISCARD"}, {7, "PACKAGED"},
        {8, "ENABLE_COLO"},          {9, "POSTCOPY_RESUME"},
        {10, "RECV_BITMAP"},         {0, "command 0"},
        {12, "command 12"},          {65535, "command 65535"},
    };
    stream s;

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        s = begin();
        put_command(&s, bad[i].command, "\0\0\0\0", 4);
        refused(&s, PS_ERR_UNSUPPORTED, bad[i].name, 20);
        s = begin_tail();
        put_command(&s, bad[i].command, "\0\0\0\0", 4);
        put_u8(&s, QEMU_VM_EOF);
        refused(&s, PS_ERR_UNSUPPORTED, bad[i].name, 0);
    }
    s = begin();
    put_command(&s, 2, "ping!", 5);
    refused(&s, PS_ERR_DAMAGED, "PING has 5", 0);
    s = begin();
    put_command(&s, 3, "12345678\0\0\0\0\0\0\x40\0", 16);
    refused(&s, PS_ERR_UNSUPPORTED, "4096", 0);
}

static void test_list_refusals(void)
{
    stream s = begin_list(0);

    refused(&s, PS_ERR_UNSUPPORTED, "no memory", 0);
    s = begin_list(UINT64_C(1) << 45);
    refused(&s, PS_ERR_UNSUPPORTED, "2^44", 0);
    s = begin_list(0x4000);
    put_block(&s, "pc.ram", 0);
    refused(&s, PS_ERR_DAMAGED, "length of 0", 0);
    s = begin_list(0x4000);
    put_block(&s, "pc.ram", 0x1800);
    refused(&s, PS_ERR_DAMAGED, "length of 6144", 0);
    s = begin_list(0x4000);
    put_block(&s, "pc.ram", 0x5000);
    refused(&s, PS_ERR_DAMAGED, "exceeds", 0);
    s = begin_list(0x4000);
    put_block(&s, "pc.ram", UINT64_MAX & ~UINT64_C(0xfff));
    refused(&s, PS_ERR_DAMAGED, "exceeds", 0);
    s = begin_list(0x4000);
    put_block(&s, "pc.ram", 0x2000);
    put_block(&s, "pc.ram", 0x2000);
    refused(&s, PS_ERR_DAMAGED, "listed twice", 0);
    s = begin_list(0x4000);
    put_block(&s, "", 0x2000);
    refused(&s, PS_ERR_DAMAGED, "without a name", 0);
    s = begin_list(0x4000);
    put_block(&s, "pc.ram", 0x2000);
    put_u64(&s, 0x1000); /* a page size, though there is no postcopy */
    refused(&s, PS_ERR_DAMAGED, "not well formed", 0);
    s = begin_list(UINT64_C(2000) << 12);
    for (unsigned i = 0; i < 1025; i++) {
        char name[16];

        snprintf(name, sizeof(name), "block%u", i);
        put_block(&s, name, 0x1000);
    }
    refused(&s, PS_ERR_UNSUPPORTED, "more than 1024", 0);
    s = begin_ram();
    put_total(&s, 0x4000);
    refused(&s, PS_ERR_DAMAGED, "second RAM block list", 0);
    s = begin();
    put_ram_start(&s);
    put_u64(&s, RAM_SAVE_FLAG_EOS);
    refused(&s, PS_ERR_DAMAGED, "no RAM block list", 0);
    s = begin();
    put_ram_start(&s);
    put_zero(&s, "pc.ram", 0);
    refused(&s, PS_ERR_DAMAGED, "before the RAM block list", 0);
}

static void test_page_refusals(void)
{
    static const struct {
        unsigned flag;
        const char *name;
    } bad[] = {
        {0x01, "FULL"},           {0x40, "XBZRLE"},         {0x80, "HOOK"},
        {0x100, "COMPRESS_PAGE"}, {0x200, "MULTIFD_FLUSH"}, {0x48, "XBZRLE"},
        {0x88, "HOOK"},           {0x180, "HOOK"},
    };
    stream s;

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        s = begin_ram();
        put_u64(&s, bad[i].flag);
        refused(&s, PS_ERR_UNSUPPORTED, bad[i].name, s.length - 8);
    }
    s = begin_ram();
    put_u64(&s, 0);
    refused(&s, PS_ERR_DAMAGED, "flags 0x000", 0);
    s = begin_ram();
    put_u64(&s, 0x400);
    refused(&s, PS_ERR_DAMAGED, "flags 0x400", 0);
    s = begin_ram();
    put_u64(&s, RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_PAGE);
    refused(&s, PS_ERR_DAMAGED, "flags 0x00a", 0);
    s = begin_ram();
    put_u64(&s, 0x1000 | RAM_SAVE_FLAG_EOS);
    refused(&s, PS_ERR_DAMAGED, "flags 0x010", 0);
    s = begin_ram();
    put_zero(&s, NULL, 0);
    refused(&s, PS_ERR_DAMAGED, "not named", 0);
    s = begin_ram();
    put_zero(&s, "pc.rom", 0);
    refused(&s, PS_ERR_DAMAGED, "'pc.rom'", 0);
    s = begin_ram();
    put_zero(&s, "", 0);
    refused(&s, PS_ERR_DAMAGED, "without a name", 0);
    s = begin_ram();
    put_zero(&s, "pc.ram", 0x4000);
    refused(&s, PS_ERR_DAMAGED, "a page at 0x4000", 0);
    s = begin_ram();
    put_zero(&s, "pc.ram", UINT64_MAX & ~UINT64_C(0xfff));
    refused(&s, PS_ERR_DAMAGED, "0xfffffffffffff000", 0);
    s = begin_ram();
    put_zero(&s, "pc.ram", 0);
    s.data[s.length - 1] = 0x55;
    refused(&s, PS_ERR_UNSUPPORTED, "0x55", 0);
}

static void test_tail(void)
{
    ps_error err = {0};
    uint8_t *big = calloc(1, 256 << 10);
    summary out;
    stream s = begin_tail();

    refused(&s, PS_ERR_TRUNCATED, "device state", 0);
    /* No device at all. */
    s = begin_tail();
    put_u8(&s, QEMU_VM_EOF);
    CHECK(parse_all(&s, &out, NULL, &err) == PS_OK);
    put_description(&s, "{}");
    CHECK_MSG(parse_all(&s, &out, NULL, &err) == PS_OK, "%s", err.message);
    /* Zeros behind: up to 64 KiB, and nothing else. */
    put(&s, big, 65536);
    CHECK(parse_all(&s, &out, NULL, &err) == PS_OK);
    put_u8(&s, 0);
    CHECK(parse_all(&s, &out, NULL, &err) == PS_ERR_DAMAGED);
    s.data[s.length - 1] = 'x';
    refused(&s, PS_ERR_TRUNCATED, "device state", 0);
    /* A JSON that looks like it holds another. */
    s = begin_tail();
    put_device(&s, "a", "\0\6\0\0\0\2{}", 8);
    put_u8(&s, QEMU_VM_EOF);
    put_description(&s, "{\"a\": {}}");
    CHECK(parse_all(&s, &out, NULL, &err) == PS_OK);
    stream_free(&s);
    s = begin_tail();
    put_u8(&s, 0x55);
    put_footer(&s, 9);
    put_u8(&s, QEMU_VM_EOF);
    refused(&s, PS_ERR_DAMAGED, "0x55", 0);
    /* No footers: only a description tells the end. */
    s = begin_tail();
    stream_free(&s);
    put_header(&s);
    put_ram_start(&s);
    put_total(&s, 0x1000);
    put_block(&s, "pc.ram", 0x1000);
    put_eos(&s);
    put_ram_end(&s);
    put_device(&s, "a", "123", 3);
    put_u8(&s, QEMU_VM_EOF);
    CHECK(parse_all(&s, &out, NULL, &err) == PS_ERR_UNSUPPORTED);
    put_description(&s, "{\"a\": {}}");
    CHECK(parse_all(&s, &out, NULL, &err) == PS_OK);
    CHECK(out.text[1] == 'S'); /* there is no configuration section */
    stream_free(&s);
    /* Larger than anything that is kept. */
    s = begin_tail();
    put_section(&s, QEMU_VM_SECTION_FULL, 9, "big", 1);
    for (unsigned i = 0; i < 520; i++) {
        put(&s, big, 256 << 10);
    }
    CHECK(parse_all(&s, &out, NULL, &err) == PS_ERR_UNSUPPORTED);
    s.length = 65 << 20;
    put_footer(&s, 9);
    put_u8(&s, QEMU_VM_EOF);
    CHECK(parse_all(&s, &out, NULL, &err) == PS_ERR_UNSUPPORTED);
    CHECK(strstr(err.message, "64 MiB") != NULL);
    stream_free(&s);
    free(big);
}

/* What the RAM block list may carry besides. */
static void list_with(bool postcopy, bool shared, uint64_t page_size,
                      bool machine, bool want)
{
    static const char advise[16] = {[14] = 0x10};
    stream s = {.footers = true};
    ps_parser *parser;
    ps_event event;
    ps_error err = {0};
    size_t done = 0;
    unsigned blocks = 0;
    int code;

    put_header(&s);
    if (machine) {
        put_machine(&s);
        put_subsection(&s, "configuration/uuid");
        put(&s, "0123456789abcdef", 16);
        put_subsection(&s, "configuration/target-page-bits");
        put_u32(&s, 12);
        if (shared) {
            put_capability(&s, "x-ignore-shared");
        }
    }
    put_command(&s, 1, "", 0);
    put_command(&s, 2, "\0\0\0\1", 4);
    if (postcopy) {
        put_command(&s, 3, advise, 16);
    }
    put_ram_start(&s);
    put_total(&s, 0x600000);
    for (unsigned i = 0; i < 3; i++) {
        const char *const names[] = {"a", "pc.ram", "z"};

        put_block(&s, names[i], 0x200000);
        if (page_size && i != 1) {
            put_u64(&s, page_size);
        }
        if (shared) {
            put_u64(&s, i * UINT64_C(0x100000000));
        }
    }
    put_eos(&s);
    CHECK(ps_parser_create(&parser, &err) == PS_OK);
    do {
        size_t used;

        code = ps_parser_push(parser, s.data + done, s.length - done, &used,
                              &event, &err);
        done += used;
        if (!code && event.type == PS_EVENT_BLOCK) {
            uint64_t expected = event.block == 1 ? 0 : page_size;

            CHECK(event.block == blocks);
            CHECK_MSG(event.page_size == expected, "%llx",
                      (unsigned long long)event.page_size);
            CHECK(event.address ==
                  (shared ? blocks * UINT64_C(0x100000000) : UINT64_MAX));
            blocks++;
        }
    } while (!code && event.type != PS_EVENT_NONE);
    CHECK_MSG((code == PS_OK) == want, "%d %d %llx: %s", postcopy, shared,
              (unsigned long long)page_size, err.message);
    if (want) {
        ps_stream_info info;

        CHECK(blocks == 3);
        ps_parser_info(parser, &info);
        CHECK(info.postcopy == postcopy);
    }
    ps_parser_destroy(parser);
    stream_free(&s);
}

static void test_lists(void)
{
    list_with(false, false, 0, true, true);
    list_with(true, false, 0, true, true);
    list_with(true, false, 0x200000, true, true);
    list_with(false, true, 0, true, true);
    list_with(true, true, 0, true, true);
    list_with(true, true, 0x200000, true, true);
    list_with(false, true, 0, false, true);      /* no configuration section */
    list_with(true, false, 0x3000, true, false); /* no power of two */
    list_with(false, false, 0x200000, true, false);
    list_with(false, true, 0x200000, true, false);
}

int main(void)
{
    test_whole(true);
    test_whole(false);
    test_contents();
    test_splits(true);
    test_splits(false);
    test_truncations(true);
    test_truncations(false);
    test_flips();
    test_header_refusals();
    test_configuration_refusals();
    test_section_refusals();
    test_footer_refusals();
    test_command_refusals();
    test_list_refusals();
    test_page_refusals();
    test_tail();
    test_lists();
    return check_done();
}
