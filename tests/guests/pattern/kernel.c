/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A guest whose memory can be checked by formula: no paging, no scheduler, one
 * line of text in on COM1, one line out. Pages of the arena are numbered from
 * 16 MiB up, so arena page N is at physical address 16 MiB + N * 4096.
 * tests/support/pattern.py has the same formulas.
 *
 *   fill SEED FIRST COUNT KIND    KIND: data text zero dup unit:N:HEX
 *   check SEED FIRST COUNT KIND   the first wrong page and word, if any
 *   write MARK FIRST COUNT        dirty pages: last word = mark
 *   marks MARK FIRST COUNT        check those marks
 *   touch SEED FIRST COUNT random|seq N   time the first load of N pages
 *   spin on FIRST COUNT | off | check     count in those pages while idle
 *   count?   tsc   nonce HEX   nonce?   pages?
 */
#include <stdbool.h>
#include <stdint.h>

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define LATENCIES (8u << 20)
#define CONTROL (15u << 20)
#define ARENA (16u << 20)
#define MAX_TOUCHES (1u << 20)
#define DUP_PERIOD 16u
#define MARK_WORD (PAGE / 4 - 1)
#define COUNTER_WORD (PAGE / 4 - 2)

typedef struct {
    uint32_t flags, mem_lower, mem_upper, boot_device, cmdline;
    uint32_t mods_count, mods_addr, syms[4], mmap_length, mmap_addr;
} multiboot_info;

typedef struct __attribute__((packed)) {
    uint32_t size;
    uint64_t base, length;
    uint32_t type;
} multiboot_region;

typedef enum { DATA, TEXT, ZERO, DUP, UNIT } kind_name;

typedef struct {
    kind_name name;
    uint32_t unit_length;
    uint8_t unit[64];
} page_kind;

static uint32_t arena_pages;
static uint32_t multipliers[WORDS];
static uint32_t *const latency = (uint32_t *)LATENCIES;

/* In a place of its own, so that a test finds it in a memory image. */
typedef struct {
    char magic[8];
    char nonce[128];
    struct {
        uint32_t on, first, count, total;
    } spin;
} control_block;

static volatile control_block *const control = (control_block *)CONTROL;

void kernel_main(uint32_t magic, const multiboot_info *info);
extern void serial_interrupt(void);

/* Ports, serial line, text */

static void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static uint8_t inb(uint16_t port)
{
    uint8_t value;

    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static uint64_t rdtsc(void)
{
    uint32_t low, high;

    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (uint64_t)high << 32 | low;
}

enum { COM1 = 0x3f8, LSR = COM1 + 5, LSR_DATA = 1, LSR_EMPTY = 0x20 };

static void put_char(char c)
{
    while (!(inb(LSR) & LSR_EMPTY)) {
    }
    outb(COM1, (uint8_t)c);
}

static void put(const char *s)
{
    while (*s) {
        put_char(*s++);
    }
}

static void put_number(uint64_t n)
{
    char digits[21], *p = digits + sizeof(digits) - 1;

    *p = 0;
    do {
        /* 64 by 32 in two steps: no libgcc here */
        uint32_t high = (uint32_t)(n >> 32), low = (uint32_t)n, rest;
        uint32_t high_quotient = high / 10;

        __asm__("divl %4"
                : "=a"(low), "=d"(rest)
                : "a"(low), "d"(high % 10), "r"(10u));
        n = (uint64_t)high_quotient << 32 | low;
        *--p = (char)('0' + rest);
    } while (n);
    put(p);
}

static void put_field(const char *name, uint64_t n)
{
    put_char(' ');
    put(name);
    put_char('=');
    put_number(n);
}

/* Words of the line that is being carried out */

static char *cursor;

static char *next_word(void)
{
    char *word;

    while (*cursor == ' ') {
        cursor++;
    }
    word = cursor;
    while (*cursor && *cursor != ' ') {
        cursor++;
    }
    if (*cursor) {
        *cursor++ = 0;
    }
    return word;
}

static bool same(const char *a, const char *b)
{
    while (*a && *a == *b) {
        a++;
        b++;
    }
    return *a == *b;
}

static bool number(const char *s, uint32_t *n)
{
    *n = 0;
    if (!*s) {
        return false;
    }
    for (; *s; s++) {
        if (*s < '0' || *s > '9') {
            return false;
        }
        *n = *n * 10 + (uint32_t)(*s - '0');
    }
    return true;
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9') {
        return c - '0';
    }
    if (c >= 'a' && c <= 'f') {
        return c - 'a' + 10;
    }
    return -1;
}

/* KIND: unit:N:HEX has N bytes, a power of two up to 64. */
static bool parse_kind(char *word, page_kind *kind)
{
    static const char *const names[] = {"data", "text", "zero", "dup"};
    uint32_t i;
    char *hex;

    for (i = 0; i < 4; i++) {
        if (same(word, names[i])) {
            kind->name = (kind_name)i;
            return true;
        }
    }
    for (i = 0; i < 5; i++) {
        if (word[i] != "unit:"[i]) {
            return false;
        }
    }
    word += 5;
    for (hex = word; *hex && *hex != ':'; hex++) {
    }
    if (!*hex) {
        return false;
    }
    *hex++ = 0;
    kind->name = UNIT;
    if (!number(word, &kind->unit_length) || kind->unit_length == 0 ||
        kind->unit_length > 64 ||
        (kind->unit_length & (kind->unit_length - 1))) {
        return false;
    }
    for (i = 0; i < kind->unit_length; i++, hex += 2) {
        int high = hex_digit(hex[0]);
        int low = high < 0 ? -1 : hex_digit(hex[1]);

        if (low < 0) {
            return false;
        }
        kind->unit[i] = (uint8_t)(high << 4 | low);
    }
    for (; i < 64; i++) {
        kind->unit[i] = kind->unit[i % kind->unit_length];
    }
    return *hex == 0;
}

/* FIRST COUNT, within the arena */
static bool parse_range(uint32_t *first, uint32_t *count)
{
    return number(next_word(), first) && number(next_word(), count) &&
           *first <= arena_pages && *count <= arena_pages - *first;
}

/* Formulas */

static uint32_t mix(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

static void init_multipliers(void)
{
    uint32_t x = 0x9e3779b9u;

    for (uint32_t i = 0; i < WORDS; i++) {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        multipliers[i] = x;
    }
}

static volatile uint64_t *arena_page(uint32_t page)
{
    return (volatile uint64_t *)(ARENA + page * PAGE);
}

/*
 * Word 0 names seed and page, so that all pages of a seed differ and a page in
 * the wrong place says where it belongs.
 */
typedef struct {
    uint64_t first, mask, base;
    uint32_t key;
    const uint64_t *unit;
} page_formula;

static page_formula formula(uint32_t seed, uint32_t page, const page_kind *kind)
{
    page_formula f = {.mask = ~0ull};

    if (kind->name == DUP) {
        page %= DUP_PERIOD;
    }
    f.first = (uint64_t)seed << 32 | page;
    f.key = mix(page + mix(seed)) | 0x80000001u;
    if (kind->name == TEXT) {
        f.mask = 0x0f0f0f0f0f0f0f0full; /* letters a to p */
        f.base = 0x6161616161616161ull;
    } else if (kind->name == ZERO) {
        f.first = f.mask = 0;
    } else if (kind->name == UNIT) {
        f.unit = (const uint64_t *)kind->unit;
        f.first = f.unit[0];
    }
    return f;
}

static uint64_t word_of(const page_formula *f, uint32_t i)
{
    if (i == 0) {
        return f->first;
    }
    if (f->unit) {
        return f->unit[i % 8];
    }
    return ((uint64_t)f->key * multipliers[i] & f->mask) + f->base;
}

/* Commands: each answers with one line */

static bool fail(const char *why)
{
    put("error ");
    put(why);
    put_char('\n');
    return false;
}

static bool parse_pages(uint32_t *seed, uint32_t *first, uint32_t *count,
                        page_kind *kind)
{
    if (!number(next_word(), seed) || !parse_range(first, count)) {
        return fail("range");
    }
    if (!parse_kind(next_word(), kind)) {
        return fail("kind");
    }
    return true;
}

static void fill(void)
{
    uint32_t seed, first, count;
    page_kind kind;

    if (!parse_pages(&seed, &first, &count, &kind)) {
        return;
    }
    for (uint32_t page = first; page < first + count; page++) {
        page_formula f = formula(seed, page, &kind);
        volatile uint64_t *words = arena_page(page);

        for (uint32_t i = 0; i < WORDS; i++) {
            words[i] = word_of(&f, i);
        }
    }
    put("ok\n");
}

static void check(void)
{
    uint32_t seed, first, count;
    page_kind kind;

    if (!parse_pages(&seed, &first, &count, &kind)) {
        return;
    }
    for (uint32_t page = first; page < first + count; page++) {
        page_formula f = formula(seed, page, &kind);
        volatile uint64_t *words = arena_page(page);

        for (uint32_t i = 0; i < WORDS; i++) {
            uint64_t found = words[i];

            if (found != word_of(&f, i)) {
                put("error page");
                put_field("page", page);
                put_field("word", i);
                put_field("found", found);
                put_field("expected", word_of(&f, i));
                put_char('\n');
                return;
            }
        }
    }
    put("ok\n");
}

static void marks(bool set)
{
    uint32_t mark, first, count;

    if (!number(next_word(), &mark) || !parse_range(&first, &count)) {
        fail("range");
        return;
    }
    for (uint32_t page = first; page < first + count; page++) {
        volatile uint32_t *word =
            (volatile uint32_t *)arena_page(page) + MARK_WORD;

        if (set) {
            *word = mark + page;
        } else if (*word != mark + page) {
            put("error mark");
            put_field("page", page);
            put_field("found", *word);
            put_char('\n');
            return;
        }
    }
    put("ok\n");
}

/* A permutation of 0 .. 2^bits - 1 */
static uint32_t permute(uint32_t x, uint32_t key, uint32_t bits)
{
    uint32_t mask = (1u << bits) - 1, half = (bits + 1) / 2;

    for (int round = 0; round < 3; round++) {
        x = (x * 0x9e3779b1u + key) & mask;
        x ^= x >> half;
        key = mix(key);
    }
    return x;
}

static void sift_down(uint32_t *heap, uint32_t from, uint32_t n)
{
    uint32_t child;

    while ((child = 2 * from + 1) < n) {
        uint32_t value = heap[from];

        if (child + 1 < n && heap[child] < heap[child + 1]) {
            child++;
        }
        if (value >= heap[child]) {
            return;
        }
        heap[from] = heap[child];
        heap[child] = value;
        from = child;
    }
}

static void sort(uint32_t *values, uint32_t n)
{
    for (uint32_t i = n / 2; i-- > 0;) {
        sift_down(values, i, n);
    }
    for (uint32_t i = n; i-- > 1;) {
        uint32_t value = values[0];

        values[0] = values[i];
        values[i] = value;
        sift_down(values, 0, i);
    }
}

static void touch(void)
{
    uint32_t seed, first, count, n, bits = 1, at = 0, sum = 0;
    uint64_t begin, end, total = 0;
    bool random;

    if (!number(next_word(), &seed) || !parse_range(&first, &count)) {
        fail("range");
        return;
    }
    random = same(next_word(), "random");
    if (!number(next_word(), &n) || n == 0 || n > count || n > MAX_TOUCHES) {
        fail("number");
        return;
    }
    while ((1u << bits) < count) {
        bits++;
    }
    begin = rdtsc();
    for (uint32_t i = 0; i < n; i++) {
        uint32_t page = i;
        uint64_t before;

        if (random) {
            do {
                page = permute(at++, mix(seed), bits);
            } while (page >= count);
        }
        volatile uint32_t *word = (volatile uint32_t *)arena_page(first + page);
        before = rdtsc();
        uint32_t value = word[2];
        uint64_t ticks = rdtsc() - before;
        sum += value;
        total += ticks;
        latency[i] = ticks >> 32 ? ~0u : (uint32_t)ticks;
    }
    end = rdtsc();
    sort(latency, n);
    put("ok");
    put_field("n", n);
    put_field("p50", latency[n / 2]);
    put_field("p90", latency[n - n / 10 - 1]);
    put_field("p99", latency[n - n / 100 - 1]);
    put_field("max", latency[n - 1]);
    put_field("total", total);
    put_field("elapsed", end - begin);
    put_field("sum", sum);
    put_char('\n');
}

/*
 * Counting goes round the pages. At any instant page i of COUNT holds
 * total / COUNT, plus one if i < total % COUNT; the page at total % COUNT may be
 * one ahead. A memory image that mixes two instants shows.
 */
static volatile uint32_t *spin_counter(uint32_t i)
{
    return (volatile uint32_t *)arena_page(control->spin.first + i) +
           COUNTER_WORD;
}

static void spin_some(void)
{
    for (int i = 0; i < 64; i++) {
        volatile uint32_t *counter =
            spin_counter(control->spin.total % control->spin.count);

        *counter = *counter + 1;
        control->spin.total = control->spin.total + 1;
    }
}

static void put_count(void)
{
    put("ok");
    put_field("count", control->spin.total);
    put_char('\n');
}

static void spin_check(void)
{
    uint32_t count = control->spin.count, total = control->spin.total;

    for (uint32_t i = 0; i < count; i++) {
        uint32_t found = *spin_counter(i);
        uint32_t expected = total / count + (i < total % count ? 1 : 0);

        if (found != expected) {
            put("error count");
            put_field("page", control->spin.first + i);
            put_field("found", found);
            put_field("expected", expected);
            put_char('\n');
            return;
        }
    }
    put_count();
}

static void spin_command(void)
{
    char *word = next_word();
    uint32_t first, count;

    if (same(word, "check")) {
        spin_check();
    } else if (same(word, "off")) {
        control->spin.on = false;
        put_count();
    } else if (!same(word, "on") || !parse_range(&first, &count) || !count) {
        fail("spin on FIRST COUNT, spin off, spin check");
    } else {
        control->spin.first = first;
        control->spin.count = count;
        control->spin.total = 0;
        for (uint32_t i = 0; i < count; i++) {
            *spin_counter(i) = 0;
        }
        control->spin.on = true;
        put("ok\n");
    }
}

static void set_nonce(void)
{
    char *word = next_word();
    uint32_t i;

    for (i = 0; word[i] && i < sizeof(control->nonce) - 1; i++) {
        control->nonce[i] = word[i];
    }
    control->nonce[i] = 0;
    put("ok\n");
}

static void put_nonce(void)
{
    put("ok nonce=");
    for (uint32_t i = 0; control->nonce[i]; i++) {
        put_char(control->nonce[i]);
    }
    put_char('\n');
}

static void put_value(const char *name, uint64_t n)
{
    put("ok");
    put_field(name, n);
    put_char('\n');
}

static void carry_out(char *line)
{
    char *word;

    cursor = line;
    word = next_word();
    if (same(word, "fill")) {
        fill();
    } else if (same(word, "check")) {
        check();
    } else if (same(word, "write")) {
        marks(true);
    } else if (same(word, "marks")) {
        marks(false);
    } else if (same(word, "touch")) {
        touch();
    } else if (same(word, "spin")) {
        spin_command();
    } else if (same(word, "count?")) {
        put_count();
    } else if (same(word, "tsc")) {
        put_value("tsc", rdtsc());
    } else if (same(word, "nonce")) {
        set_nonce();
    } else if (same(word, "nonce?")) {
        put_nonce();
    } else if (same(word, "pages?")) {
        put_value("pages", arena_pages);
    } else {
        fail("unknown command");
    }
}

/* Start */

/* Pages from 16 MiB to the end of the RAM that 16 MiB lies in */
static uint32_t find_arena(const multiboot_info *info)
{
    uint32_t at = info->mmap_addr;

    while (at < info->mmap_addr + info->mmap_length) {
        const multiboot_region *r = (const multiboot_region *)at;
        uint64_t end = r->base + r->length;

        if (r->type == 1 && r->base <= ARENA && end > ARENA) {
            return (uint32_t)((end - ARENA) / PAGE);
        }
        at += r->size + 4;
    }
    return 0;
}

/* Only COM1 (IRQ 4) interrupts, so that an idle guest sleeps. */
static void init_interrupts(void)
{
    static uint32_t idt[2 * 0x25];
    struct __attribute__((packed)) {
        uint16_t limit;
        uint32_t base;
    } pointer = {sizeof(idt) - 1, (uint32_t)idt};
    uint32_t handler = (uint32_t)serial_interrupt;

    idt[2 * 0x24] = 8u << 16 | (handler & 0xffff);
    idt[2 * 0x24 + 1] = (handler & 0xffff0000u) | 0x8e00;
    __asm__ volatile("lidt %0" : : "m"(pointer), "m"(idt));
    outb(0x20, 0x11);
    outb(0xa0, 0x11);
    outb(0x21, 0x20);
    outb(0xa1, 0x28);
    outb(0x21, 4);
    outb(0xa1, 2);
    outb(0x21, 1);
    outb(0xa1, 1);
    outb(0x21, 0xef);
    outb(0xa1, 0xff);
}

static void init_serial(void)
{
    outb(COM1 + 1, 1);    /* interrupt when data has come */
    outb(COM1 + 3, 0x83); /* divisor: 115200 baud */
    outb(COM1 + 0, 1);
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 3); /* 8N1 */
    outb(COM1 + 2, 7); /* FIFO on, interrupt at the first byte */
    outb(COM1 + 4, 0xb);
    outb(COM1 + 1, 1);
}

void kernel_main(uint32_t magic, const multiboot_info *info)
{
    static char line[256];
    uint32_t length = 0;

    init_serial();
    init_interrupts();
    init_multipliers();
    if (magic != 0x2badb002u || !(info->flags & 0x40)) {
        put("pattern: no memory map\n");
        return;
    }
    arena_pages = find_arena(info);
    for (int i = 0; i < 8; i++) {
        control->magic[i] = "PATTERN1"[i];
    }
    put("pattern: ready ");
    put_number(arena_pages);
    put_char('\n');
    for (;;) {
        if (!(inb(LSR) & LSR_DATA)) {
            if (control->spin.on) {
                spin_some();
            } else {
                /* cli is on here: STI takes effect after HLT has begun */
                __asm__ volatile("sti; hlt; cli");
            }
            continue;
        }
        char c = (char)inb(COM1);

        if (c == '\n') {
            line[length] = 0;
            length = 0;
            carry_out(line);
            if (control->spin.on) {
                spin_some(); /* commands that come fast do not stop it */
            }
        } else if (c != '\r' && length < sizeof(line) - 1) {
            line[length++] = c;
        }
    }
}
