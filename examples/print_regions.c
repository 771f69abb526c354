/* Print the weight regions of one slot, from C, with nothing but POSIX.
 *
 *     cc -std=c11 -Wall -Wextra -Werror -O2 -o print_regions print_regions.c
 *     ./print_regions weights_metadata 0
 *     ./print_regions --header weights_metadata 0          # the header as it is
 *     ./print_regions --header=10 weights_metadata 0       # and its next 9 changes
 *
 * Output: one line a region, "address size device allocation_address allocation_size", decimal.
 * With --header: one line a reading of the slot's header, which is polled, "state layout_generation
 * content_generation physical_epoch kv_physical_epoch pid updated_at checked_at instance".
 * Exit status: 0 done, 1 an error (one sentence on stderr), 2 wrong usage, 3 the map is not to
 * be used now (its owner has exited, or the weights are being changed or are released).
 *
 * It follows docs/format.md: take the shared lock, read the state, the layout and the state
 * again, and go on only if they are of one generation.  Whatever has to happen while the weights
 * stand still (ibv_reg_mr, a copy, a scan) belongs where the regions are printed.
 *
 * Trade-off: instead of a JSON library there is a reader of some 120 lines below.  It walks the
 * whole document by JSON's grammar, so a key inside a string or a nested object is never taken
 * for the one that is looked for, but it builds no tree and decodes no escapes in strings.  A
 * program that wants more than a few fields is better off with a library (jansson, yyjson).
 */

#define _DEFAULT_SOURCE /* flock, nanosleep, O_NOFOLLOW */

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { DONE = 0, FAILED = 1, USAGE = 2, NOT_NOW = 3 };

#define LOCK_PATIENCE_MS 10000
#define READ_ATTEMPTS 200
#define HEADER_ATTEMPTS 1100
#define MAX_DEPTH 64
#define POLL_MS 1

static _Noreturn void quit(int status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("print_regions: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(status);
}

static void pause_ms(long milliseconds)
{
    struct timespec pause = {milliseconds / 1000, (milliseconds % 1000) * 1000000L};
    nanosleep(&pause, NULL);
}

/* --- JSON ------------------------------------------------------------------------------- */

/* Where the reader is in a text that ends with a NUL.  Every function below leaves `at` behind
 * what it read and returns false, for good, once the text is not JSON. */
struct json {
    const char *at;
    int depth;
};

struct text { /* the inside of a string, escapes as they stand */
    const char *start;
    size_t length;
};

static void skip_space(struct json *json)
{
    json->at += strspn(json->at, " \t\r\n");
}

static bool take(struct json *json, char expected)
{
    skip_space(json);
    if (*json->at != expected)
        return false;
    json->at++;
    return true;
}

static bool read_text(struct json *json, struct text *text)
{
    if (!take(json, '"'))
        return false;
    text->start = json->at;
    while (*json->at != '"') {
        if (*json->at == '\\')
            json->at++;
        if ((unsigned char)*json->at < 0x20) /* also the end of the text */
            return false;
        json->at++;
    }
    text->length = (size_t)(json->at++ - text->start);
    return true;
}

static bool read_u64(struct json *json, uint64_t *number)
{
    skip_space(json);
    if (*json->at < '0' || *json->at > '9')
        return false;
    uint64_t value = 0;
    for (; *json->at >= '0' && *json->at <= '9'; json->at++) {
        uint64_t digit = (uint64_t)(*json->at - '0');
        if (value > (UINT64_MAX - digit) / 10)
            return false;
        value = value * 10 + digit;
    }
    *number = value;
    return *json->at != '.' && *json->at != 'e' && *json->at != 'E';
}

static bool skip_value(struct json *json);

/* The next key of an object, its value still to be read; false at the end or on an error.
 * `*first` starts as true.  What tells the two apart is `ended`. */
static bool next_key(struct json *json, bool *first, bool *ended, struct text *key)
{
    *ended = false;
    if (take(json, '}')) {
        *ended = true;
        return false;
    }
    if (!*first && !take(json, ','))
        return false;
    *first = false;
    return read_text(json, key) && take(json, ':');
}

static bool next_item(struct json *json, bool *first, bool *ended)
{
    *ended = false;
    if (take(json, ']')) {
        *ended = true;
        return false;
    }
    if (!*first && !take(json, ','))
        return false;
    *first = false;
    return true;
}

static bool skip_nested(struct json *json)
{
    bool first = true, ended = false, object = *json->at++ == '{';
    struct text key;
    if (++json->depth > MAX_DEPTH)
        return false;
    while (object ? next_key(json, &first, &ended, &key) : next_item(json, &first, &ended))
        if (!skip_value(json))
            return false;
    json->depth--;
    return ended;
}

static bool skip_value(struct json *json)
{
    struct text text;
    skip_space(json);
    switch (*json->at) {
    case '{':
    case '[':
        return skip_nested(json);
    case '"':
        return read_text(json, &text);
    default: { /* a number, true, false, null: some characters up to a delimiter */
        size_t length = strcspn(json->at, " \t\r\n,]}:[{\"");
        json->at += length;
        return length > 0;
    }
    }
}

static bool is(struct text text, const char *expected)
{
    return text.length == strlen(expected) && memcmp(text.start, expected, text.length) == 0;
}

/* --- the documents ------------------------------------------------------------------------ */

struct state {
    struct text schema, state, instance;
    uint64_t schema_version, layout_generation, pid;
};

/* The fields of the state document, or of the layout document, whose pid is in `identity`. */
static bool read_fields(const char *document, struct state *found, const char **regions)
{
    struct json json = {document, 0};
    struct text key;
    bool first = true, ended;
    memset(found, 0, sizeof *found);
    *regions = NULL;
    if (!take(&json, '{'))
        return false;
    while (next_key(&json, &first, &ended, &key)) {
        bool fine;
        if (is(key, "schema"))
            fine = read_text(&json, &found->schema);
        else if (is(key, "state"))
            fine = read_text(&json, &found->state);
        else if (is(key, "instance"))
            fine = read_text(&json, &found->instance);
        else if (is(key, "schema_version"))
            fine = read_u64(&json, &found->schema_version);
        else if (is(key, "layout_generation"))
            fine = read_u64(&json, &found->layout_generation);
        else if (is(key, "pid"))
            fine = read_u64(&json, &found->pid);
        else if (is(key, "identity")) {
            struct json inside = json;
            struct text name;
            bool inside_first = true, inside_ended;
            fine = take(&inside, '{');
            while (fine && next_key(&inside, &inside_first, &inside_ended, &name))
                fine = is(name, "pid") ? read_u64(&inside, &found->pid) : skip_value(&inside);
            fine = fine && skip_value(&json);
        } else {
            if (is(key, "regions"))
                *regions = json.at;
            fine = skip_value(&json);
        }
        if (!fine)
            return false;
    }
    return ended;
}

/* Whether two documents are of one runner: a process may publish several in one slot, one after
 * the other, and their generations begin anew.  Release 0.1 of the server does not tell. */
static bool same_instance(struct text one, struct text other)
{
    return one.length == 0 || other.length == 0 ||
           (one.length == other.length && memcmp(one.start, other.start, one.length) == 0);
}

static bool print_region(struct json *json)
{
    uint64_t ptr = 0, size = 0, allocation_ptr = 0, allocation_size = 0;
    struct text key, device = {"", 0};
    bool first = true, ended;
    if (!take(json, '{'))
        return false;
    while (next_key(json, &first, &ended, &key)) {
        bool fine;
        if (is(key, "ptr"))
            fine = read_u64(json, &ptr);
        else if (is(key, "size"))
            fine = read_u64(json, &size);
        else if (is(key, "allocation_ptr"))
            fine = read_u64(json, &allocation_ptr);
        else if (is(key, "allocation_size"))
            fine = read_u64(json, &allocation_size);
        else if (is(key, "device"))
            fine = read_text(json, &device);
        else
            fine = skip_value(json);
        if (!fine)
            return false;
    }
    if (!ended || ptr == 0 || size == 0 || size > UINT64_MAX - ptr)
        return false;
    printf("%" PRIu64 " %" PRIu64 " %.*s %" PRIu64 " %" PRIu64 "\n", ptr, size,
           (int)device.length, device.start, allocation_ptr, allocation_size);
    return true;
}

static bool print_regions(const char *regions)
{
    struct json json = {regions, 0};
    bool first = true, ended;
    if (!take(&json, '['))
        return false;
    while (next_item(&json, &first, &ended))
        if (!print_region(&json))
            return false;
    return ended;
}

/* --- files and locks ---------------------------------------------------------------------- */

/* "{directory}/{before}{slot}{after}", on the heap. */
static char *path_of(const char *directory, const char *before, const char *slot,
                     const char *after)
{
    size_t size = strlen(directory) + strlen(before) + strlen(slot) + strlen(after) + 2;
    char *path = malloc(size);
    if (path == NULL)
        quit(FAILED, "out of memory");
    snprintf(path, size, "%s/%s%s%s", directory, before, slot, after);
    return path;
}

/* A file's contents, NUL-terminated; NULL where there is none.  An opened file never changes,
 * since the server replaces files by rename. */
static char *read_file(const char *path)
{
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe is not waited for */
    struct stat status;
    if (file < 0 && errno == ENOENT)
        return NULL;
    if (file < 0 || fstat(file, &status) != 0)
        quit(FAILED, "%s: %s", path, strerror(errno));
    if (!S_ISREG(status.st_mode))
        quit(FAILED, "%s is not a file", path);
    size_t size = (size_t)status.st_size, filled = 0;
    char *data = malloc(size + 1);
    if (data == NULL)
        quit(FAILED, "%s: out of memory", path);
    while (filled < size) {
        ssize_t got = read(file, data + filled, size - filled);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            quit(FAILED, "%s: %s", path, got < 0 ? strerror(errno) : "it became shorter");
        filled += (size_t)got;
    }
    close(file);
    data[size] = '\0';
    return data;
}

static int lock_shared(const char *path)
{
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0)
        quit(FAILED, "%s: %s (is this the server's weights_metadata directory?)", path,
             strerror(errno));
    for (long waited = 0; flock(file, LOCK_SH | LOCK_NB) != 0; waited += 5) {
        if (errno == EINTR)
            continue;
        if (errno != EWOULDBLOCK)
            quit(FAILED, "%s: %s", path, strerror(errno));
        if (waited >= LOCK_PATIENCE_MS)
            quit(NOT_NOW, "an update has been running for %d s; try again later",
                 LOCK_PATIENCE_MS / 1000);
        pause_ms(5);
    }
    return file;
}

/* The owner holds this lock for life, so being able to take it means that it has exited. */
static bool owner_lives(const char *path)
{
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0)
        return false;
    bool lives = flock(file, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    close(file);
    return lives;
}

static struct state parse(const char *path, const char *document, const char *schema,
                          const char **regions)
{
    struct state found;
    if (!read_fields(document, &found, regions) || !is(found.schema, schema))
        quit(FAILED, "%s is no %s document", path, schema);
    if (found.schema_version != 1)
        quit(FAILED, "%s has schema version %" PRIu64 ", this program knows 1", path,
             found.schema_version);
    return found;
}

/* --- the header ---------------------------------------------------------------------------- */

enum { HEADER_SIZE = 128, SEQUENCE_AT = 8, CHECKSUM_AT = 124, STATES = 6 };

/* A mapped header.  A load from a mapping behind the end of its file raises SIGBUS, and whoever may
 * write the file can truncate it.  The server never does; where that is no comfort, pread(2) the
 * 128 bytes instead: it costs a system call, some 0.5 us. */
struct header {
    const unsigned char *bytes;
    dev_t device;
    ino_t inode;
};

static uint64_t little_endian(const unsigned char *bytes, int length)
{
    uint64_t value = 0;
    while (length-- > 0)
        value = value << 8 | bytes[length];
    return value;
}

/* CRC-32 as in zlib and IEEE 802.3. */
static uint32_t crc32(const unsigned char *bytes, size_t length)
{
    uint32_t crc = 0xffffffff;
    while (length-- > 0) {
        crc ^= *bytes++;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
    }
    return ~crc;
}

static struct header map_header(const char *path)
{
    struct header header;
    struct stat status;
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
    if (file < 0 || fstat(file, &status) != 0)
        quit(FAILED, "%s: %s", path, strerror(errno));
    if (!S_ISREG(status.st_mode) || status.st_size != HEADER_SIZE)
        quit(FAILED, "%s is not a file of %d bytes", path, HEADER_SIZE);
    header.bytes = mmap(NULL, HEADER_SIZE, PROT_READ, MAP_SHARED, file, 0);
    if (header.bytes == MAP_FAILED)
        quit(FAILED, "%s: %s", path, strerror(errno));
    header.device = status.st_dev;
    header.inode = status.st_ino;
    close(file);
    return header;
}

/* Whether the path still leads to what is mapped: another owner puts a new file in its place. */
static bool is_current(struct header header, const char *path)
{
    struct stat status;
    return lstat(path, &status) == 0 && status.st_dev == header.device &&
           status.st_ino == header.inode;
}

/* All that polling takes: the number is another one as soon as the header has changed. */
static uint64_t sequence_of(struct header header)
{
    const void *at = header.bytes + SEQUENCE_AT; /* 8-byte aligned */
    return atomic_load_explicit((const _Atomic uint64_t *)at, memory_order_acquire);
}

/* One consistent copy; false when there is none after many tries, for an owner that was stopped or
 * killed while it wrote.  The sequence is odd while the owner writes, and another one afterwards;
 * the checksum holds without any promise about the order of memory accesses, so that it also
 * judges a copy that came by RDMA, for which there is no "before and after". */
static bool read_header(struct header header, unsigned char copy[HEADER_SIZE])
{
    for (int attempt = 0; attempt < HEADER_ATTEMPTS; attempt++) {
        uint64_t before = sequence_of(header);
        memcpy(copy, header.bytes, HEADER_SIZE);
        atomic_thread_fence(memory_order_acquire);
        bool still = before == sequence_of(header);
        if (still && copy[SEQUENCE_AT] % 2 == 0 &&
            little_endian(copy + CHECKSUM_AT, 4) == crc32(copy, CHECKSUM_AT))
            return true;
        if (attempt >= 100) /* the owner lost the processor while it wrote */
            pause_ms(1);
    }
    return false;
}

/* The offsets are those of the table in docs/format.md. */
static void print_header(const char *path, const unsigned char *copy)
{
    static const char *const states[STATES] = {"left",     "loading", "ready",
                                               "updating", "failed",  "released"};
    uint64_t state = little_endian(copy + 20, 4);
    if (memcmp(copy, "SGLWHDR1", 8) != 0 || state >= STATES)
        quit(FAILED, "%s is no header that this program knows", path);
    printf("%s", states[state]);
    for (int at = 48; at < 80; at += 8) /* the two generations, the two physical epochs */
        printf(" %" PRIu64, little_endian(copy + at, 8));
    printf(" %" PRIu64, little_endian(copy + 16, 4)); /* pid */
    for (int at = 80; at < 96; at += 8) {             /* updated_at, checked_at (0: never) */
        uint64_t nanoseconds = little_endian(copy + at, 8);
        printf(" %" PRIu64 ".%09" PRIu64, nanoseconds / 1000000000, nanoseconds % 1000000000);
    }
    putchar(' ');
    for (int at = 112; at < 120; at++) /* instance */
        printf("%02x", copy[at]);
    putchar('\n');
    if (fflush(stdout) != 0)
        quit(FAILED, "stdout: %s", strerror(errno));
}

/* Print the header now, and then each time that it has changed, until there are `wanted` lines. */
static void follow_header(const char *path, unsigned long wanted)
{
    unsigned char copy[HEADER_SIZE];
    struct header header = map_header(path);
    uint64_t known = 0;
    for (unsigned long printed = 0; printed < wanted;) {
        if (sequence_of(header) != known) { /* never 0 in a whole header */
            if (!read_header(header, copy))
                quit(NOT_NOW, "%s is not consistent: its owner was stopped or killed", path);
            memcpy(&known, copy + SEQUENCE_AT, sizeof known);
            print_header(path, copy);
            printed++;
        } else {
            pause_ms(POLL_MS);
            if (!is_current(header, path)) {
                munmap((void *)header.bytes, HEADER_SIZE);
                header = map_header(path);
                known = 0;
            }
        }
    }
    munmap((void *)header.bytes, HEADER_SIZE);
}

int main(int count, char **arguments)
{
    unsigned long headers = 0;
    if (count > 1 && strncmp(arguments[1], "--header", 8) == 0) {
        const char *number = arguments[1] + 8;
        char *end = NULL;
        headers = *number == '=' ? strtoul(number + 1, &end, 10) : 1;
        if (headers == 0 || *(end != NULL ? end : number) != '\0')
            count = 0;
        arguments++, count--;
    }
    if (count != 3) {
        fprintf(stderr, "usage: print_regions [--header[=COUNT]] DIRECTORY SLOT\n");
        return USAGE;
    }
    const char *directory = arguments[1], *slot = arguments[2];
    if (headers > 0) {
        char *path = path_of(directory, "weight_header_", slot, ".bin");
        follow_header(path, headers);
        free(path);
        return DONE;
    }
    char *state_path = path_of(directory, "weight_state_", slot, ".json");
    char *layout_path = path_of(directory, "weight_layout_", slot, ".json");
    char *saving_path = path_of(directory, "weight_saving_", slot, ".lock");
    char *owner_path = path_of(directory, "weight_owner_", slot, ".lock");
    int status = DONE;

    /* From here to the end of main no update starts. */
    int lock = lock_shared(saving_path);
    if (!owner_lives(owner_path))
        quit(NOT_NOW, "slot %s is stale: its owner has exited", slot);

    /* Under the lock the two documents agree at once, except for a server that did not get the
     * lock in time and went on without it: therefore the loop. */
    for (int attempt = 0;; attempt++) {
        const char *regions = NULL, *none;
        char *before = read_file(state_path);
        char *layout = read_file(layout_path);
        char *after = read_file(state_path);
        if (before != NULL && layout != NULL && after != NULL) {
            struct state one = parse(state_path, before, "sglang-weight-state", &none);
            struct state two = parse(layout_path, layout, "sglang-weight-layout", &regions);
            struct state three = parse(state_path, after, "sglang-weight-state", &none);
            if (is(three.state, "released") || is(three.state, "updating"))
                quit(NOT_NOW, "slot %s is %.*s", slot, (int)three.state.length,
                     three.state.start);
            if (one.layout_generation == two.layout_generation &&
                two.layout_generation == three.layout_generation && one.pid == two.pid &&
                two.pid == three.pid && same_instance(one.instance, two.instance) &&
                same_instance(two.instance, three.instance)) {
                if (regions == NULL || !print_regions(regions)) {
                    fprintf(stderr, "print_regions: %s has no valid regions\n", layout_path);
                    status = FAILED;
                }
                free(before), free(layout), free(after);
                break;
            }
        }
        free(before), free(layout), free(after);
        if (attempt == READ_ATTEMPTS)
            quit(NOT_NOW, "slot %s has no settled map; %s says why", slot, state_path);
        pause_ms(10);
    }
    close(lock); /* the unlock */
    free(state_path), free(layout_path), free(saving_path), free(owner_path);
    if (fflush(stdout) != 0)
        quit(FAILED, "stdout: %s", strerror(errno));
    return status;
}
