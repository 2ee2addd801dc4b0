/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * QEMU's migration stream, as bytes in and events out.
 *
 * A push parser: no I/O, any split of the input. It is a chain of small
 * steps; each asks for an exact number of bytes (`want`) and a function
 * that takes them (`take`), which names the step after it. Bytes come
 * straight from the input where they are contiguous, else from `stash`.
 *
 * The format is that of QEMU's migration/savevm.c (sections, commands,
 * configuration) and migration/ram.c (ram_save_setup, ram_load_precopy).
 * Device sections cannot be told apart without QEMU's own tables, so all
 * that follows the END section of RAM is kept and split when it is over.
 */
#include "common.h"

#define QEMU_VM_FILE_MAGIC 0x5145564du
#define QEMU_VM_FILE_VERSION 3u
#define RAM_VERSION 4u

/* What QEMU sends is far smaller; these only bound what we keep. */
#define MAX_CONFIGURATION ((size_t)64 << 10)
#define MAX_CAPABILITIES 256u
#define MAX_MACHINE_NAME 256u
#define MAX_COMMAND 4096u
/* Zeros after the end, as in a vmstate area of a qcow2 file. */
#define MAX_PADDING ((size_t)64 << 10)
#define MAX_TAIL                                                               \
    ((size_t)(PS_MAX_DEVICE_BYTES + PS_MAX_DESCRIPTION_BYTES) + MAX_PADDING +  \
     64)

#define OFFSET_FLAGS (PS_PAGE_SIZE - 1)

/* migration/savevm.c: enum qemu_vm_cmd */
enum {
    MIG_CMD_OPEN_RETURN_PATH = 1,
    MIG_CMD_PING = 2,
    MIG_CMD_POSTCOPY_ADVISE = 3,
    MIG_CMD_POSTCOPY_LISTEN = 4,
    MIG_CMD_POSTCOPY_RUN = 5,
    MIG_CMD_POSTCOPY_RAM_DISCARD = 6,
    MIG_CMD_PACKAGED = 7,
    MIG_CMD_ENABLE_COLO = 8,
    MIG_CMD_POSTCOPY_RESUME = 9,
    MIG_CMD_RECV_BITMAP = 10,
    MIG_CMD_SWITCHOVER_START = 11,
};

static const struct {
    const char *name;
    bool postcopy; /* the memory is not, or not yet, in the stream */
    int32_t length;
} commands[] = {
    [0] = {NULL, false, 0},
    [MIG_CMD_OPEN_RETURN_PATH] = {"OPEN_RETURN_PATH", false, 0},
    [MIG_CMD_PING] = {"PING", false, 4},
    [MIG_CMD_POSTCOPY_ADVISE] = {"POSTCOPY_ADVISE", false, -1},
    [MIG_CMD_POSTCOPY_LISTEN] = {"POSTCOPY_LISTEN", true, -1},
    [MIG_CMD_POSTCOPY_RUN] = {"POSTCOPY_RUN", true, -1},
    [MIG_CMD_POSTCOPY_RAM_DISCARD] = {"POSTCOPY_RAM_DISCARD", true, -1},
    [MIG_CMD_PACKAGED] = {"PACKAGED", true, -1},
    [MIG_CMD_ENABLE_COLO] = {"ENABLE_COLO", true, -1},
    [MIG_CMD_POSTCOPY_RESUME] = {"POSTCOPY_RESUME", true, -1},
    [MIG_CMD_RECV_BITMAP] = {"RECV_BITMAP", true, -1},
    [MIG_CMD_SWITCHOVER_START] = {"SWITCHOVER_START", false, 0},
};

/* Capabilities that leave the stream as it is. Those that change it, and
   those that we do not know, are refused by name. */
static const char *const harmless_capabilities[] = {
    "auto-converge",  "block",
    "dirty-bitmaps",  "dirty-limit",
    "events",         "late-block-activate",
    "postcopy-ram",   "background-snapshot",
    "release-ram",    "pause-before-switchover",
    "return-path",    "postcopy-blocktime",
    "switchover-ack", "postcopy-preempt",
    "validate-uuid",  "x-ignore-shared",
    "zero-blocks",
};

typedef struct ps_listed_block {
    uint64_t length;
    uint8_t name_length;
    char name[255];
} ps_listed_block;

typedef int ps_take_fn(ps_parser *p, const uint8_t *bytes, ps_event *event,
                       ps_error *err);

struct ps_parser {
    ps_take_fn *take;  /* NULL: everything goes to the tail */
    size_t want;       /* bytes of the step */
    size_t have;       /* of these, in the stash */
    const char *where; /* what a truncated stream was in */
    uint64_t position; /* of the step's first byte in the stream */
    uint64_t item;     /* of the event's first byte */
    ps_error error;    /* code 0: none yet */
    ps_stream_info info;

    uint8_t *raw; /* the configuration section, then the tail */
    size_t raw_length;
    size_t raw_capacity;
    uint32_t capabilities_left;
    bool ignore_shared;

    uint8_t section_type;
    uint32_t section_id;
    uint32_t name_length;
    char name[256];
    uint16_t command;

    bool ram_started;
    bool listed; /* the RAM block list is complete */
    bool footers_known;
    uint64_t ram_total;
    uint64_t ram_listed;
    ps_listed_block *blocks;
    uint32_t block_count;
    uint32_t block_capacity;
    uint64_t extra[2]; /* page size and address of the block, if told */
    uint32_t extras;
    uint64_t entry; /* the page entry being read */
    uint32_t block; /* CONTINUE means this one */
    bool block_known;

    /* After the last byte: what was found in the tail. */
    uint64_t tail_at;
    size_t devices_length;
    size_t description_at;
    size_t description_length;
    uint32_t finished; /* events given by ps_parser_finish() */

    uint8_t stash[PS_PAGE_SIZE];
};

_Static_assert(MAX_COMMAND <= PS_PAGE_SIZE, "a command fits the stash");

static ps_take_fn take_section_type, take_entry, take_footer, take_footer_mark,
    take_configuration_next, take_block_look, take_block_name,
    take_ram_section_end;

static void expect(ps_parser *p, size_t want, ps_take_fn *take,
                   const char *where)
{
    p->want = want;
    p->take = take;
    p->where = where;
}

/* A name out of the stream, fit for a message. */
static const char *printable(const void *name, size_t length, char out[64])
{
    const uint8_t *in = name;
    size_t n = length < 60 ? length : 60;

    for (size_t i = 0; i < n; i++) {
        out[i] = in[i] >= 0x20 && in[i] < 0x7f ? (char)in[i] : '?';
    }
    memcpy(out + n, n < length ? "..." : "", n < length ? 4 : 1);
    return out;
}

static bool name_is(const void *name, size_t length, const char *text)
{
    return length == strlen(text) && memcmp(name, text, length) == 0;
}

/* Keep bytes; grows geometrically, never by a number from the input. */
static int keep(ps_parser *p, const uint8_t *bytes, size_t length, size_t max,
                const char *what, ps_error *err)
{
    if (length > max || p->raw_length > max - length) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, p->position,
                       "%s is larger than %zu bytes", what, max);
    }
    if (p->raw_length + length > p->raw_capacity) {
        size_t capacity = p->raw_capacity ? p->raw_capacity : 4096;
        uint8_t *raw;

        while (capacity < p->raw_length + length) {
            capacity *= 2;
        }
        raw = realloc(p->raw, capacity);
        if (!raw) {
            return ps_fail(err, PS_ERR_NOMEM, p->position,
                           "out of memory for %s", what);
        }
        p->raw = raw;
        p->raw_capacity = capacity;
    }
    if (length > 0) {
        memcpy(p->raw + p->raw_length, bytes, length);
        p->raw_length += length;
    }
    return PS_OK;
}

/* ---------------------------------------------------------- configuration */

static int keep_configuration(ps_parser *p, const uint8_t *bytes, size_t length,
                              ps_error *err)
{
    return keep(p, bytes, length, MAX_CONFIGURATION,
                "the configuration section", err);
}

static void expect_configuration_next(ps_parser *p)
{
    expect(p, 1, take_configuration_next, "the configuration section");
}

static int take_page_bits(ps_parser *p, const uint8_t *bytes, ps_event *event,
                          ps_error *err)
{
    uint32_t bits = ps_get_be32(bytes);

    (void)event;
    if (bits != PS_PAGE_BITS) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, p->position,
                       "the guest's pages have 2^%u bytes, only 4096 can be "
                       "handled",
                       bits);
    }
    expect_configuration_next(p);
    return keep_configuration(p, bytes, 4, err);
}

static int take_uuid(ps_parser *p, const uint8_t *bytes, ps_event *event,
                     ps_error *err)
{
    (void)event;
    expect_configuration_next(p);
    return keep_configuration(p, bytes, 16, err);
}

static ps_take_fn take_capability_length;

static void expect_capability(ps_parser *p)
{
    if (p->capabilities_left == 0) {
        expect_configuration_next(p);
    } else {
        expect(p, 1, take_capability_length, "the list of capabilities");
    }
}

static int take_capability(ps_parser *p, const uint8_t *bytes, ps_event *event,
                           ps_error *err)
{
    char text[64];
    size_t i;

    (void)event;
    for (i = 0;
         i < sizeof(harmless_capabilities) / sizeof(harmless_capabilities[0]);
         i++) {
        if (name_is(bytes, p->want, harmless_capabilities[i])) {
            break;
        }
    }
    if (i == sizeof(harmless_capabilities) / sizeof(harmless_capabilities[0])) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, p->position,
                       "saved with the migration capability '%s', which "
                       "cannot be handled",
                       printable(bytes, p->want, text));
    }
    if (name_is(bytes, p->want, "x-ignore-shared")) {
        p->ignore_shared = true;
    }
    if (keep_configuration(p, bytes, p->want, err)) {
        return err->code;
    }
    p->capabilities_left--;
    expect_capability(p);
    return PS_OK;
}

static int take_capability_length(ps_parser *p, const uint8_t *bytes,
                                  ps_event *event, ps_error *err)
{
    (void)event;
    if (bytes[0] == 0) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "a capability without a name");
    }
    expect(p, bytes[0], take_capability, "the list of capabilities");
    return keep_configuration(p, bytes, 1, err);
}

static int take_capability_count(ps_parser *p, const uint8_t *bytes,
                                 ps_event *event, ps_error *err)
{
    (void)event;
    p->capabilities_left = ps_get_be32(bytes);
    if (p->capabilities_left > MAX_CAPABILITIES) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "a list of %u capabilities", p->capabilities_left);
    }
    expect_capability(p);
    return keep_configuration(p, bytes, 4, err);
}

static int take_subsection(ps_parser *p, const uint8_t *bytes, ps_event *event,
                           ps_error *err)
{
    static const char where[] = "a sub-section of the configuration";
    size_t length = p->want - 4;
    uint32_t version = ps_get_be32(bytes + length);
    char text[64];

    (void)event;
    if (name_is(bytes, length, "configuration/target-page-bits")) {
        expect(p, 4, take_page_bits, where);
    } else if (name_is(bytes, length, "configuration/capabilities")) {
        expect(p, 4, take_capability_count, where);
    } else if (name_is(bytes, length, "configuration/uuid")) {
        expect(p, 16, take_uuid, where);
    } else {
        return ps_fail(err, PS_ERR_UNSUPPORTED, p->position,
                       "the configuration has the unknown sub-section '%s'",
                       printable(bytes, length, text));
    }
    if (version != 1) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, p->position,
                       "sub-section '%s' has the unknown version %u",
                       printable(bytes, length, text), version);
    }
    return keep_configuration(p, bytes, length + 4, err);
}

static int take_subsection_length(ps_parser *p, const uint8_t *bytes,
                                  ps_event *event, ps_error *err)
{
    (void)event;
    if (bytes[0] == 0) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "a sub-section without a name");
    }
    expect(p, (size_t)bytes[0] + 4, take_subsection,
           "a sub-section of the configuration");
    return keep_configuration(p, bytes, 1, err);
}

/* Only the byte after it tells that the configuration is over. */
static int take_configuration_next(ps_parser *p, const uint8_t *bytes,
                                   ps_event *event, ps_error *err)
{
    if (bytes[0] == QEMU_VM_SUBSECTION) {
        expect(p, 1, take_subsection_length,
               "a sub-section of the configuration");
        return keep_configuration(p, bytes, 1, err);
    }
    if (take_section_type(p, bytes, event, err)) {
        return err->code;
    }
    p->info.configuration = 1;
    event->type = PS_EVENT_CONFIGURATION;
    event->offset = 8;
    event->data = p->raw;
    event->data_length = p->raw_length;
    return PS_OK;
}

static int take_machine(ps_parser *p, const uint8_t *bytes, ps_event *event,
                        ps_error *err)
{
    (void)event;
    if (keep_configuration(p, bytes, p->want, err)) {
        return err->code;
    }
    expect_configuration_next(p);
    return PS_OK;
}

static int take_machine_length(ps_parser *p, const uint8_t *bytes,
                               ps_event *event, ps_error *err)
{
    uint32_t length = ps_get_be32(bytes);

    (void)event;
    if (length == 0 || length > MAX_MACHINE_NAME) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "a machine name of %u bytes", length);
    }
    expect(p, length, take_machine, "the configuration section");
    return keep_configuration(p, bytes, 4, err);
}

/* ----------------------------------------------------------------- header */

static int take_first_type(ps_parser *p, const uint8_t *bytes, ps_event *event,
                           ps_error *err)
{
    if (bytes[0] != QEMU_VM_CONFIGURATION) {
        return take_section_type(p, bytes, event, err);
    }
    expect(p, 4, take_machine_length, "the configuration section");
    return keep_configuration(p, bytes, 1, err);
}

static int take_header(ps_parser *p, const uint8_t *bytes, ps_event *event,
                       ps_error *err)
{
    uint32_t version = ps_get_be32(bytes + 4);

    if (ps_get_be32(bytes) != QEMU_VM_FILE_MAGIC) {
        return ps_fail(err, PS_ERR_NOT_OURS, 0,
                       "this is no QEMU migration stream");
    }
    if (version != QEMU_VM_FILE_VERSION) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, 4,
                       "the stream has the unknown version %u", version);
    }
    p->info.stream_version = version;
    event->type = PS_EVENT_HEADER;
    event->offset = 0;
    event->value = version;
    expect(p, 1, take_first_type, "the stream, after its header");
    return PS_OK;
}

/* ------------------------------------------------------- sections, commands */

static void expect_section(ps_parser *p)
{
    expect(p, 1, take_section_type, "the stream, between two sections");
}

static int refuse_section(ps_parser *p, ps_error *err)
{
    char text[64];

    printable(p->name, p->name_length, text);
    if (p->section_type == QEMU_VM_SECTION_FULL) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, p->item,
                       "the device section '%s' comes before the end of RAM, "
                       "which cannot be handled",
                       text);
    }
    if (p->ram_started && name_is(p->name, p->name_length, "ram")) {
        return ps_fail(err, PS_ERR_DAMAGED, p->item,
                       "the RAM section starts a second time");
    }
    return ps_fail(err, PS_ERR_UNSUPPORTED, p->item,
                   "the iterable section '%s' cannot be handled, only 'ram'",
                   text);
}

static void section_event(ps_parser *p, ps_event *event)
{
    event->type = PS_EVENT_SECTION;
    event->offset = p->item;
    event->value = p->section_type;
    event->section_id = p->section_id;
    expect(p, 8, take_entry, "a RAM section");
}

static int take_section_versions(ps_parser *p, const uint8_t *bytes,
                                 ps_event *event, ps_error *err)
{
    if (p->section_type == QEMU_VM_SECTION_FULL || p->ram_started ||
        !name_is(p->name, p->name_length, "ram")) {
        return refuse_section(p, err);
    }
    p->info.ram_section_id = p->section_id;
    p->info.ram_instance = ps_get_be32(bytes);
    p->info.ram_version = ps_get_be32(bytes + 4);
    if (p->info.ram_version != RAM_VERSION) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, p->position,
                       "the RAM section has the unknown version %u",
                       p->info.ram_version);
    }
    p->ram_started = true;
    section_event(p, event);
    event->instance = p->info.ram_instance;
    event->version = p->info.ram_version;
    event->name = p->name;
    event->name_length = p->name_length;
    return PS_OK;
}

static int take_section_name(ps_parser *p, const uint8_t *bytes,
                             ps_event *event, ps_error *err)
{
    (void)event;
    (void)err;
    p->name_length = (uint32_t)p->want;
    memcpy(p->name, bytes, p->want);
    expect(p, 8, take_section_versions, "a section's header");
    return PS_OK;
}

static int take_section_name_length(ps_parser *p, const uint8_t *bytes,
                                    ps_event *event, ps_error *err)
{
    (void)event;
    if (bytes[0] == 0) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "a section without a name");
    }
    expect(p, bytes[0], take_section_name, "a section's header");
    return PS_OK;
}

static int take_section_id(ps_parser *p, const uint8_t *bytes, ps_event *event,
                           ps_error *err)
{
    p->section_id = ps_get_be32(bytes);
    if (p->section_type == QEMU_VM_SECTION_START ||
        p->section_type == QEMU_VM_SECTION_FULL) {
        expect(p, 1, take_section_name_length, "a section's header");
        return PS_OK;
    }
    if (!p->ram_started || p->section_id != p->info.ram_section_id) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "section %u goes on but was never started",
                       p->section_id);
    }
    section_event(p, event);
    return PS_OK;
}

/* Refuse what we cannot honour; *known has the command's length, or -1. */
static int check_command(uint32_t command, uint64_t at, ps_error *err)
{
    if (command == 0 || command >= sizeof(commands) / sizeof(commands[0])) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, at,
                       "the unknown migration command %u", command);
    }
    if (commands[command].postcopy) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, at,
                       "the migration command %s cannot be handled: the "
                       "memory is not in the stream",
                       commands[command].name);
    }
    return PS_OK;
}

static int take_command_data(ps_parser *p, const uint8_t *bytes,
                             ps_event *event, ps_error *err)
{
    event->type = PS_EVENT_COMMAND;
    event->offset = p->item;
    event->value = p->command;
    event->data = bytes;
    event->data_length = p->want;
    if (p->command == MIG_CMD_POSTCOPY_ADVISE && p->want == 16) {
        if (ps_get_be64(bytes + 8) != PS_PAGE_SIZE) {
            return ps_fail(err, PS_ERR_UNSUPPORTED, p->position,
                           "the guest's pages have not 4096 bytes");
        }
        p->info.postcopy = 1;
    }
    expect_section(p);
    return PS_OK;
}

static int take_command(ps_parser *p, const uint8_t *bytes, ps_event *event,
                        ps_error *err)
{
    uint32_t length = ps_get_be16(bytes + 2);
    int32_t known;

    (void)event;
    p->command = ps_get_be16(bytes);
    if (check_command(p->command, p->item, err)) {
        return err->code;
    }
    known = commands[p->command].length;
    if (p->command == MIG_CMD_POSTCOPY_ADVISE) {
        /* Empty where only other things than RAM are to be copied late. */
        known = length == 0 ? 0 : 16;
    }
    if (length > MAX_COMMAND || (int32_t)length != known) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "the migration command %s has %u bytes",
                       commands[p->command].name, length);
    }
    expect(p, length, take_command_data, "a migration command");
    return PS_OK;
}

static int take_section_type(ps_parser *p, const uint8_t *bytes,
                             ps_event *event, ps_error *err)
{
    (void)event;
    p->item = p->position;
    p->section_type = bytes[0];
    switch (bytes[0]) {
    case QEMU_VM_SECTION_START:
    case QEMU_VM_SECTION_PART:
    case QEMU_VM_SECTION_END:
    case QEMU_VM_SECTION_FULL:
        expect(p, 4, take_section_id, "a section's header");
        return PS_OK;
    case QEMU_VM_COMMAND:
        expect(p, 4, take_command, "a migration command");
        return PS_OK;
    case QEMU_VM_EOF:
        return ps_fail(err,
                       p->ram_started ? PS_ERR_DAMAGED : PS_ERR_UNSUPPORTED,
                       p->position,
                       p->ram_started ? "the stream ends before its memory"
                                      : "the stream has no memory in it");
    default:
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "a section of the unknown type 0x%02x", bytes[0]);
    }
}

/* -------------------------------------------------------- RAM block list */

static int take_blocks_end(ps_parser *p, const uint8_t *bytes, ps_event *event,
                           ps_error *err);
static int handle_entry(ps_parser *p, ps_error *err);

static void expect_block_look(ps_parser *p)
{
    bool last = p->ram_listed == p->ram_total;

    expect(p, last ? 8 : 1, take_block_look, "the RAM block list");
}

static int block_event(ps_parser *p, ps_event *event, ps_error *err)
{
    const ps_listed_block *block = &p->blocks[p->block_count - 1];
    uint64_t page_size = 0;
    uint64_t address = UINT64_MAX;
    char text[64];

    printable(block->name, block->name_length, text);
    if (p->ignore_shared && p->extras == 0) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "RAM block '%s' has no address", text);
    }
    if (p->extras == 2) {
        page_size = p->extra[0];
        address = p->extra[1];
    } else if (p->extras == 1 && p->info.postcopy && !p->ignore_shared) {
        page_size = p->extra[0];
    } else if (p->extras == 1) {
        address = p->extra[0];
    }
    if ((page_size & (page_size - 1)) || (p->extras == 2 && page_size == 0)) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "RAM block '%s' has pages of %llu bytes", text,
                       (unsigned long long)page_size);
    }
    event->type = PS_EVENT_BLOCK;
    event->offset = p->item;
    event->block = p->block_count - 1;
    event->name = block->name;
    event->name_length = block->name_length;
    event->length = block->length;
    event->page_size = page_size;
    event->address = address;
    return PS_OK;
}

/*
 * A page size and an address, each there or not, are multiples of 4096 far
 * below 2^56; a name's length is never 0 and a page entry never without
 * flags. So the bytes after a block tell what they are.
 */
static int add_extra(ps_parser *p, uint64_t value, ps_error *err)
{
    /* Without a configuration section nothing says what is in use. */
    uint32_t most = (p->info.postcopy ? 1u : 0u) +
                    (p->ignore_shared || !p->info.configuration ? 1u : 0u);

    if (p->extras >= most || (value & OFFSET_FLAGS) ||
        (p->extras == 0 && most == 1 && p->info.postcopy && value == 0)) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "the RAM block list is not well formed");
    }
    p->extra[p->extras++] = value;
    expect_block_look(p);
    return PS_OK;
}

static int take_block_extra_rest(ps_parser *p, const uint8_t *bytes,
                                 ps_event *event, ps_error *err)
{
    uint8_t whole[8] = {0};

    (void)event;
    memcpy(whole + 1, bytes, 7);
    return add_extra(p, ps_get_be64(whole), err);
}

static int take_block_look(ps_parser *p, const uint8_t *bytes, ps_event *event,
                           ps_error *err)
{
    if (p->want == 8) {
        uint64_t value = ps_get_be64(bytes);

        if ((value & OFFSET_FLAGS) == 0) {
            return add_extra(p, value, err);
        }
        if (block_event(p, event, err)) {
            return err->code;
        }
        p->entry = value;
        p->item = p->position;
        expect(p, 0, take_blocks_end, "a RAM section");
        return PS_OK;
    }
    if (bytes[0] == 0) {
        expect(p, 7, take_block_extra_rest, "the RAM block list");
        return PS_OK;
    }
    if (block_event(p, event, err)) {
        return err->code;
    }
    p->item = p->position;
    expect(p, bytes[0], take_block_name, "the RAM block list");
    return PS_OK;
}

/* Takes no bytes: the entry after the list has been read already. */
static int take_blocks_end(ps_parser *p, const uint8_t *bytes, ps_event *event,
                           ps_error *err)
{
    (void)bytes;
    p->listed = true;
    if (handle_entry(p, err)) {
        return err->code;
    }
    event->type = PS_EVENT_BLOCKS_END;
    event->offset = p->item;
    event->value = p->ram_total;
    return PS_OK;
}

static int take_block_length(ps_parser *p, const uint8_t *bytes,
                             ps_event *event, ps_error *err)
{
    ps_listed_block *block = &p->blocks[p->block_count - 1];
    char text[64];

    (void)event;
    block->length = ps_get_be64(bytes);
    printable(block->name, block->name_length, text);
    if (block->length == 0 || (block->length & OFFSET_FLAGS)) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "RAM block '%s' has a length of %llu bytes", text,
                       (unsigned long long)block->length);
    }
    if (block->length > p->ram_total - p->ram_listed) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "RAM block '%s' exceeds the total of %llu bytes", text,
                       (unsigned long long)p->ram_total);
    }
    p->ram_listed += block->length;
    p->extras = 0;
    expect_block_look(p);
    return PS_OK;
}

static int take_block_name(ps_parser *p, const uint8_t *bytes, ps_event *event,
                           ps_error *err)
{
    ps_listed_block *block;
    char text[64];

    (void)event;
    for (uint32_t i = 0; i < p->block_count; i++) {
        if (p->blocks[i].name_length == p->want &&
            memcmp(p->blocks[i].name, bytes, p->want) == 0) {
            return ps_fail(err, PS_ERR_DAMAGED, p->position,
                           "RAM block '%s' is listed twice",
                           printable(bytes, p->want, text));
        }
    }
    if (p->block_count == PS_MAX_RAM_BLOCKS) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, p->position,
                       "the guest has more than %u RAM blocks",
                       PS_MAX_RAM_BLOCKS);
    }
    if (p->block_count == p->block_capacity) {
        uint32_t capacity = p->block_capacity ? 2 * p->block_capacity : 16;
        void *blocks = realloc(p->blocks, capacity * sizeof(*p->blocks));

        if (!blocks) {
            return ps_fail(err, PS_ERR_NOMEM, p->position,
                           "out of memory for the RAM block list");
        }
        p->blocks = blocks;
        p->block_capacity = capacity;
    }
    block = &p->blocks[p->block_count++];
    block->name_length = (uint8_t)p->want;
    memcpy(block->name, bytes, p->want);
    expect(p, 8, take_block_length, "the RAM block list");
    return PS_OK;
}

static int take_first_block(ps_parser *p, const uint8_t *bytes, ps_event *event,
                            ps_error *err)
{
    (void)event;
    p->item = p->position;
    if (bytes[0] == 0) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "a RAM block without a name");
    }
    expect(p, bytes[0], take_block_name, "the RAM block list");
    return PS_OK;
}

static int start_block_list(ps_parser *p, ps_error *err)
{
    uint64_t total = p->entry & ~(uint64_t)OFFSET_FLAGS;

    if (p->listed || p->section_type != QEMU_VM_SECTION_START) {
        return ps_fail(err, PS_ERR_DAMAGED, p->item, "a second RAM block list");
    }
    if (total == 0) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, p->item,
                       "the guest has no memory");
    }
    if (total > PS_MAX_RAM_BYTES) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, p->item,
                       "the guest has %llu bytes of memory, at most 2^44 can "
                       "be handled",
                       (unsigned long long)total);
    }
    p->ram_total = total;
    p->ram_listed = 0;
    expect(p, 1, take_first_block, "the RAM block list");
    return PS_OK;
}

/* ------------------------------------------------------------------ pages */

static int take_page(ps_parser *p, const uint8_t *bytes, ps_event *event,
                     ps_error *err)
{
    bool zero = p->want == 1;
    char text[64];

    if (zero && bytes[0] != 0) {
        const ps_listed_block *block = &p->blocks[p->block];

        return ps_fail(err, PS_ERR_UNSUPPORTED, p->position,
                       "a page of '%s' is filled with 0x%02x by the zero "
                       "flag, which only an old QEMU does",
                       printable(block->name, block->name_length, text),
                       bytes[0]);
    }
    event->type = zero ? PS_EVENT_ZERO : PS_EVENT_PAGE;
    event->offset = p->item;
    event->block = p->block;
    event->page_offset = p->entry & ~(uint64_t)OFFSET_FLAGS;
    if (!zero) {
        event->data = bytes;
        event->data_length = PS_PAGE_SIZE;
    }
    expect(p, 8, take_entry, "a RAM section");
    return PS_OK;
}

static int expect_page(ps_parser *p, ps_error *err)
{
    uint64_t offset = p->entry & ~(uint64_t)OFFSET_FLAGS;
    const ps_listed_block *block = &p->blocks[p->block];
    char text[64];

    if (offset >= block->length) {
        return ps_fail(err, PS_ERR_DAMAGED, p->item,
                       "a page at 0x%llx, but RAM block '%s' has 0x%llx bytes",
                       (unsigned long long)offset,
                       printable(block->name, block->name_length, text),
                       (unsigned long long)block->length);
    }
    if (p->entry & RAM_SAVE_FLAG_ZERO) {
        expect(p, 1, take_page, "a zero page");
    } else {
        expect(p, PS_PAGE_SIZE, take_page, "a page");
    }
    return PS_OK;
}

static int take_page_block(ps_parser *p, const uint8_t *bytes, ps_event *event,
                           ps_error *err)
{
    char text[64];

    (void)event;
    for (uint32_t i = 0; i < p->block_count; i++) {
        if (p->blocks[i].name_length == p->want &&
            memcmp(p->blocks[i].name, bytes, p->want) == 0) {
            p->block = i;
            p->block_known = true;
            return expect_page(p, err);
        }
    }
    return ps_fail(err, PS_ERR_DAMAGED, p->position,
                   "a page of the unknown RAM block '%s'",
                   printable(bytes, p->want, text));
}

static int take_page_block_length(ps_parser *p, const uint8_t *bytes,
                                  ps_event *event, ps_error *err)
{
    (void)event;
    if (bytes[0] == 0) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "a page of a RAM block without a name");
    }
    expect(p, bytes[0], take_page_block, "a page's RAM block");
    return PS_OK;
}

static const char *refused_flag(uint64_t flags)
{
    static const struct {
        uint32_t flag;
        const char *name;
    } refused[] = {
        {RAM_SAVE_FLAG_FULL, "FULL"},
        {RAM_SAVE_FLAG_XBZRLE, "XBZRLE"},
        {RAM_SAVE_FLAG_HOOK, "HOOK (RDMA)"},
        {RAM_SAVE_FLAG_COMPRESS_PAGE, "COMPRESS_PAGE"},
        {RAM_SAVE_FLAG_MULTIFD_FLUSH, "MULTIFD_FLUSH"},
    };

    for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++) {
        if (flags & refused[i].flag) {
            return refused[i].name;
        }
    }
    return NULL;
}

static int handle_entry(ps_parser *p, ps_error *err)
{
    uint64_t flags = p->entry & OFFSET_FLAGS;
    const char *refused = refused_flag(flags);

    if (refused) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, p->item,
                       "the RAM flag %s cannot be handled", refused);
    }
    switch (flags) {
    case RAM_SAVE_FLAG_MEM_SIZE:
        return start_block_list(p, err);
    case RAM_SAVE_FLAG_EOS:
        if (p->entry != RAM_SAVE_FLAG_EOS) {
            break;
        }
        if (!p->listed) {
            return ps_fail(err, PS_ERR_DAMAGED, p->item,
                           "the RAM section has no RAM block list");
        }
        if (!p->footers_known) {
            expect(p, 1, take_footer_mark, "the RAM section's footer");
        } else if (p->info.footers) {
            expect(p, 5, take_footer, "the RAM section's footer");
        } else {
            expect(p, 0, take_ram_section_end, "the RAM section");
        }
        return PS_OK;
    case RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_CONTINUE:
    case RAM_SAVE_FLAG_PAGE | RAM_SAVE_FLAG_CONTINUE:
        if (!p->block_known) {
            return ps_fail(err, PS_ERR_DAMAGED, p->item,
                           "a page continues a RAM block that was not named");
        }
        return expect_page(p, err);
    case RAM_SAVE_FLAG_ZERO:
    case RAM_SAVE_FLAG_PAGE:
        if (!p->listed) {
            return ps_fail(err, PS_ERR_DAMAGED, p->item,
                           "a page before the RAM block list");
        }
        expect(p, 1, take_page_block_length, "a page's RAM block");
        return PS_OK;
    default:
        break;
    }
    return ps_fail(err, PS_ERR_DAMAGED, p->item,
                   "a RAM entry with the unknown flags 0x%03x",
                   (unsigned)flags);
}

static int take_entry(ps_parser *p, const uint8_t *bytes, ps_event *event,
                      ps_error *err)
{
    (void)event;
    p->item = p->position;
    p->entry = ps_get_be64(bytes);
    return handle_entry(p, err);
}

/* ------------------------------------------------------- ends of sections */

/* Takes no bytes. */
static int take_ram_section_end(ps_parser *p, const uint8_t *bytes,
                                ps_event *event, ps_error *err)
{
    (void)bytes;
    (void)err;
    if (p->section_type != QEMU_VM_SECTION_END) {
        expect_section(p);
        return PS_OK;
    }
    event->type = PS_EVENT_RAM_END;
    event->offset = p->position;
    p->raw_length = 0;
    p->tail_at = p->position;
    expect(p, 0, NULL, "the device state");
    return PS_OK;
}

static int check_footer_id(ps_parser *p, const uint8_t *bytes, ps_error *err)
{
    if (ps_get_be32(bytes) != p->info.ram_section_id) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "the footer of the RAM section names section %u",
                       ps_get_be32(bytes));
    }
    expect(p, 0, take_ram_section_end, "the RAM section");
    return PS_OK;
}

static int take_footer(ps_parser *p, const uint8_t *bytes, ps_event *event,
                       ps_error *err)
{
    (void)event;
    if (bytes[0] != QEMU_VM_SECTION_FOOTER) {
        return ps_fail(err, PS_ERR_DAMAGED, p->position,
                       "the RAM section has no footer");
    }
    return check_footer_id(p, bytes + 1, err);
}

static int take_footer_id(ps_parser *p, const uint8_t *bytes, ps_event *event,
                          ps_error *err)
{
    (void)event;
    return check_footer_id(p, bytes, err);
}

/* The first section tells: no section type has the footer's mark. */
static int take_footer_mark(ps_parser *p, const uint8_t *bytes, ps_event *event,
                            ps_error *err)
{
    p->footers_known = true;
    if (bytes[0] == QEMU_VM_SECTION_FOOTER) {
        p->info.footers = 1;
        expect(p, 4, take_footer_id, "the RAM section's footer");
        return PS_OK;
    }
    return take_section_type(p, bytes, event, err);
}

/* ------------------------------------------------------------------- push */

int ps_parser_create(ps_parser **out, ps_error *err)
{
    ps_parser *p = calloc(1, sizeof(*p));

    if (!p) {
        return ps_fail(err, PS_ERR_NOMEM, PS_NOWHERE,
                       "out of memory for the stream parser");
    }
    p->info.target_page_bits = PS_PAGE_BITS;
    expect(p, 8, take_header, "the header");
    *out = p;
    return PS_OK;
}

void ps_parser_destroy(ps_parser *parser)
{
    if (parser) {
        free(parser->blocks);
        free(parser->raw);
        free(parser);
    }
}

void ps_parser_info(const ps_parser *parser, ps_stream_info *out)
{
    *out = parser->info;
}

/* The bytes of the step, or NULL when the input has not enough of them. */
static const uint8_t *gather(ps_parser *p, const uint8_t *in, size_t length,
                             size_t *used)
{
    const uint8_t *at = in + *used;
    size_t left = length - *used;
    size_t missing = p->want - p->have;

    if (p->want == 0) {
        return p->stash;
    }
    if (p->have == 0 && left >= p->want) {
        *used += p->want;
        return at;
    }
    if (left < missing) {
        if (left > 0) {
            memcpy(p->stash + p->have, at, left);
            p->have += left;
            *used = length;
        }
        return NULL;
    }
    memcpy(p->stash + p->have, at, missing);
    *used += missing;
    p->have = 0;
    return p->stash;
}

static int parser_failed(ps_parser *p, const ps_error *err)
{
    p->error = *err;
    return err->code;
}

int ps_parser_push(ps_parser *parser, const uint8_t *in, size_t length,
                   size_t *used, ps_event *event, ps_error *err)
{
    ps_parser *p = parser;

    memset(event, 0, sizeof(*event));
    *used = 0;
    if (length == 0) {
        in = p->stash; /* may have been NULL */
    }
    if (p->error.code) {
        *err = p->error;
        return err->code;
    }
    if (p->finished) {
        return ps_fail(err, PS_ERR_ARGUMENT, PS_NOWHERE,
                       "input after the end of the stream");
    }
    while (p->take) {
        const uint8_t *bytes = gather(p, in, length, used);
        size_t want = p->want;

        if (!bytes) {
            return PS_OK;
        }
        if (p->take(p, bytes, event, err)) {
            return parser_failed(p, err);
        }
        p->position += want;
        if (event->type != PS_EVENT_NONE) {
            return PS_OK;
        }
    }
    if (keep(p, in + *used, length - *used, MAX_TAIL, "the device state",
             err)) {
        return parser_failed(p, err);
    }
    p->position += length - *used;
    *used = length;
    return PS_OK;
}

/* ----------------------------------------------------------------- finish */

/* 0x00 EOF, 0x06, be32 length, JSON: found from the end. There is no NUL in
   JSON, so the first place that fits is the only one. */
static bool find_description(ps_parser *p)
{
    size_t end = p->raw_length;
    size_t most = end > MAX_PADDING ? end - MAX_PADDING : 0;

    while (end > most && p->raw[end - 1] == 0) {
        end--;
    }
    if (end < 8 || p->raw[end - 1] != '}') {
        return false;
    }
    for (size_t at = end - 8; end - at <= PS_MAX_DESCRIPTION_BYTES + 6; at--) {
        const uint8_t *mark = p->raw + at;

        if (mark[0] == QEMU_VM_EOF && mark[1] == QEMU_VM_VMDESCRIPTION &&
            mark[6] == '{' && ps_get_be32(mark + 2) == end - at - 6) {
            p->devices_length = at;
            p->description_at = at + 6;
            p->description_length = end - at - 6;
            p->info.description = 1;
            return true;
        }
        if (at == 0) {
            break;
        }
    }
    return false;
}

static int tail_truncated(ps_parser *p, ps_error *err)
{
    return ps_fail(err, PS_ERR_TRUNCATED, p->position,
                   "the stream ends in its device state");
}

/* With footers the last section must end with one, of a section that began
   somewhere before. */
static int check_footers(ps_parser *p, ps_error *err)
{
    size_t length = p->devices_length;
    const uint8_t *footer = p->raw + length - 5;
    uint8_t start[5] = {QEMU_VM_SECTION_FULL};

    if (length < 5 || footer[0] != QEMU_VM_SECTION_FOOTER) {
        return tail_truncated(p, err);
    }
    memcpy(start + 1, footer + 1, 4);
    if (!memmem(p->raw, length - 5, start, 5)) {
        start[0] = QEMU_VM_SECTION_END;
        if (!memmem(p->raw, length - 5, start, 5)) {
            return tail_truncated(p, err);
        }
    }
    return PS_OK;
}

static int check_devices(ps_parser *p, ps_error *err)
{
    const uint8_t *raw = p->raw;
    uint8_t first;

    if (p->devices_length > PS_MAX_DEVICE_BYTES) {
        return ps_fail(err, PS_ERR_UNSUPPORTED, p->tail_at,
                       "the device state is larger than 64 MiB");
    }
    if (p->devices_length == 0) {
        return PS_OK;
    }
    first = raw[0];
    if (first != QEMU_VM_SECTION_FULL && first != QEMU_VM_COMMAND &&
        first != QEMU_VM_SECTION_START) {
        return ps_fail(err, PS_ERR_DAMAGED, p->tail_at,
                       "the device state begins with a section of type "
                       "0x%02x",
                       first);
    }
    if (first == QEMU_VM_COMMAND) {
        if (p->devices_length < 5) {
            return tail_truncated(p, err);
        }
        if (check_command(ps_get_be16(raw + 1), p->tail_at, err)) {
            return err->code;
        }
        if (p->devices_length == 5u + ps_get_be16(raw + 3)) {
            return PS_OK; /* nothing but a command */
        }
    }
    return p->info.footers ? check_footers(p, err) : PS_OK;
}

static int split_tail(ps_parser *p, ps_error *err)
{
    if (!find_description(p)) {
        if (p->raw_length == 0 || p->raw[p->raw_length - 1] != QEMU_VM_EOF) {
            return tail_truncated(p, err);
        }
        if (!p->info.footers) {
            /* Any 0 in a device would look like the end. */
            return ps_fail(err, PS_ERR_UNSUPPORTED, p->position,
                           "the stream has neither footers nor a "
                           "description, so nothing tells whether it is "
                           "whole");
        }
        p->devices_length = p->raw_length - 1;
    }
    return check_devices(p, err);
}

static int finish_early(ps_parser *p, ps_error *err)
{
    static const uint8_t magic[] = {'Q', 'E', 'V', 'M'};

    if (p->position == 0 &&
        memcmp(p->stash, magic, p->have < 4 ? p->have : 4) != 0) {
        return ps_fail(err, PS_ERR_NOT_OURS, 0,
                       "this is no QEMU migration stream");
    }
    return ps_fail(err, PS_ERR_TRUNCATED, p->position + p->have,
                   "the stream ends in %s", p->where);
}

int ps_parser_finish(ps_parser *parser, ps_event *event, ps_error *err)
{
    ps_parser *p = parser;

    memset(event, 0, sizeof(*event));
    if (p->error.code) {
        *err = p->error;
        return err->code;
    }
    if (p->finished == 0) {
        if (p->take ? finish_early(p, err) : split_tail(p, err)) {
            return parser_failed(p, err);
        }
        p->finished = 1;
        event->type = PS_EVENT_DEVICES;
        event->offset = p->tail_at;
        event->data = p->raw;
        event->data_length = p->devices_length;
        return PS_OK;
    }
    if (p->finished == 1 && p->info.description) {
        p->finished = 2;
        event->type = PS_EVENT_DESCRIPTION;
        event->offset = p->tail_at + p->description_at;
        event->data = p->raw + p->description_at;
        event->data_length = p->description_length;
        return PS_OK;
    }
    p->finished = 3;
    event->type = PS_EVENT_END;
    event->offset = p->position;
    return PS_OK;
}
