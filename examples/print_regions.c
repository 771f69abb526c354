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
 * Where the owner's process cannot be looked at (on another host, in another pid namespace), its
 * lock alone decides whether it lives: one sentence on stderr says so, with status 0.
 *
 * It follows docs/format.md: take the shared lock, read the state, the layout and the state
 * again, and go on only if they are of one generation.  Whatever has to happen while the weights
 * stand still (ibv_reg_mr, a copy, a scan) belongs where the regions are printed.
 *
 * Nothing in the directory is trusted to be what it is called: a pipe, a device or a file of
 * 100 GB in a document's place is refused, without waiting and without taking memory for it.
 *
 * Trade-off: instead of a JSON library there is a reader of some 200 lines below.  It walks the
 * whole document by JSON's grammar (RFC 8259, UTF-8, nested 64 deep at most), so a key inside a
 * string or a nested object is never taken for the one that is looked for, but it builds no tree
 * and decodes no escapes in strings.  A program that wants more than a few fields is better off
 * with a library (jansson, yyjson).
 */

#define _DEFAULT_SOURCE /* flock, nanosleep, readlink, O_NOFOLLOW */

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
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
#define READ_PATIENCE_MS 2000
#define HEADER_ATTEMPTS 1100
#define MAX_DEPTH 64
#define POLL_MS 1
/* The layout of a model of 100,000 tensors has some 50 MB. */
#define MAX_DOCUMENT_BYTES (256L * 1024 * 1024)
#define FOREIGN "it was not written by the hook"

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

/* Why something could not be read, for those who may go on without it. */
static char problem[1024];

static void note_problem(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(problem, sizeof problem, format, arguments);
    va_end(arguments);
}

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void pause_ms(long milliseconds)
{
    struct timespec pause = {milliseconds / 1000, (milliseconds % 1000) * 1000000L};
    nanosleep(&pause, NULL);
}

/* --- JSON ------------------------------------------------------------------------------- */

/* Where the reader is in a text that ends with a NUL, which is no character of JSON's: nothing
 * reads past it.  Every function below leaves `at` behind what it read and returns false, for
 * good, once the text is not JSON. */
struct json {
    const char *at;
    int depth;
};

struct text { /* the inside of a string, escapes as they stand; NULL where there is none */
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

/* One character of UTF-8 (RFC 3629) that is not ASCII: no overlong form, no surrogate. */
static bool skip_character(struct json *json)
{
    const unsigned char *at = (const unsigned char *)json->at;
    unsigned char least = 0x80, most = 0xbf;
    int more = at[0] >= 0xf0 ? 3 : at[0] >= 0xe0 ? 2 : 1;
    if (at[0] < 0xc2 || at[0] > 0xf4)
        return false;
    if (at[0] == 0xe0 || at[0] == 0xf0)
        least = at[0] == 0xe0 ? 0xa0 : 0x90;
    if (at[0] == 0xed || at[0] == 0xf4)
        most = at[0] == 0xed ? 0x9f : 0x8f;
    if (at[1] < least || at[1] > most)
        return false;
    for (int next = 2; next <= more; next++)
        if (at[next] < 0x80 || at[next] > 0xbf)
            return false;
    json->at += 1 + more;
    return true;
}

static bool skip_escape(struct json *json)
{
    char what = *++json->at;
    if (what == '\0' || strchr("\"\\/bfnrtu", what) == NULL)
        return false;
    json->at++;
    if (what != 'u')
        return true;
    if (strspn(json->at, "0123456789abcdefABCDEF") < 4)
        return false;
    json->at += 4;
    return true;
}

static bool read_text(struct json *json, struct text *text)
{
    if (!take(json, '"'))
        return false;
    text->start = json->at;
    while (*json->at != '"') {
        unsigned char character = (unsigned char)*json->at;
        if (character < 0x20) /* also the end of the text */
            return false;
        if (character == '\\' ? !skip_escape(json) : character >= 0x80 && !skip_character(json))
            return false;
        if (character != '\\' && character < 0x80)
            json->at++;
    }
    text->length = (size_t)(json->at++ - text->start);
    return true;
}

static bool skip_digits(struct json *json)
{
    size_t length = strspn(json->at, "0123456789");
    json->at += length;
    return length > 0;
}

static bool skip_number(struct json *json)
{
    json->at += *json->at == '-';
    if (*json->at == '0')
        json->at++; /* nothing but a fraction or an exponent may follow */
    else if (!skip_digits(json))
        return false;
    if (*json->at == '.') {
        json->at++;
        if (!skip_digits(json))
            return false;
    }
    if (*json->at == 'e' || *json->at == 'E') {
        json->at++;
        json->at += *json->at == '+' || *json->at == '-';
        return skip_digits(json);
    }
    return true;
}

static bool skip_word(struct json *json, const char *word)
{
    size_t length = strlen(word);
    if (strncmp(json->at, word, length) != 0)
        return false;
    json->at += length;
    return true;
}

static bool read_u64(struct json *json, uint64_t *number)
{
    skip_space(json);
    if (*json->at < '0' || *json->at > '9')
        return false;
    const char *start = json->at;
    uint64_t value = 0;
    for (; *json->at >= '0' && *json->at <= '9'; json->at++) {
        uint64_t digit = (uint64_t)(*json->at - '0');
        if (value > (UINT64_MAX - digit) / 10)
            return false;
        value = value * 10 + digit;
    }
    *number = value;
    if (*start == '0' && json->at - start > 1)
        return false;
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
    case 't':
        return skip_word(json, "true");
    case 'f':
        return skip_word(json, "false");
    case 'n':
        return skip_word(json, "null");
    default:
        return skip_number(json);
    }
}

/* A text, or null, which `start` then is. */
static bool read_text_or_null(struct json *json, struct text *text)
{
    skip_space(json);
    *text = (struct text){NULL, 0};
    return *json->at == '"' ? read_text(json, text) : skip_word(json, "null");
}

static bool at_end(struct json *json, const char *end)
{
    skip_space(json);
    return json->at == end;
}

static bool is(struct text text, const char *expected)
{
    return text.start != NULL && text.length == strlen(expected) &&
           memcmp(text.start, expected, text.length) == 0;
}

/* --- the documents ------------------------------------------------------------------------ */

/* A process, as it is told from every other one. */
struct process {
    uint64_t pid, start_ticks;
    bool has_start_ticks;
    struct text boot_id;
};

/* What the two documents have in common, and what this program needs of one of them. */
struct document {
    struct text schema, state, instance, hostname, pid_namespace;
    uint64_t schema_version, layout_generation, content_generation;
    struct process process; /* in the layout, from `identity` */
    const char *regions;
    bool has_pid, has_identity, has_tensors, has_layout_generation, has_content_generation;
};

/* A field that tells the process, or any other one. */
static bool read_process_field(struct json *json, struct text key, struct document *found)
{
    struct process *process = &found->process;
    if (is(key, "pid"))
        return found->has_pid = read_u64(json, &process->pid);
    if (is(key, "boot_id"))
        return read_text_or_null(json, &process->boot_id);
    if (is(key, "hostname"))
        return read_text_or_null(json, &found->hostname);
    if (is(key, "pid_namespace"))
        return read_text_or_null(json, &found->pid_namespace);
    if (!is(key, "process_start_ticks"))
        return skip_value(json);
    skip_space(json);
    process->has_start_ticks = *json->at != 'n';
    return process->has_start_ticks ? read_u64(json, &process->start_ticks)
                                    : skip_word(json, "null");
}

static bool read_identity(struct json *json, struct document *found)
{
    struct text key;
    bool first = true, ended;
    if (!take(json, '{'))
        return false;
    memset(&found->process, 0, sizeof found->process);
    found->has_pid = false;
    while (next_key(json, &first, &ended, &key))
        if (!read_process_field(json, key, found))
            return false;
    return found->has_identity = ended;
}

/* The fields of the layout document, whose process is in `identity`, or of the state document. */
static bool read_fields(const char *text, size_t size, bool layout, struct document *found)
{
    struct json json = {text, 0};
    struct text key;
    bool first = true, ended;
    memset(found, 0, sizeof *found);
    if (!take(&json, '{'))
        return false;
    while (next_key(&json, &first, &ended, &key)) {
        bool fine;
        if (is(key, "schema"))
            fine = read_text(&json, &found->schema);
        else if (is(key, "state"))
            fine = read_text(&json, &found->state);
        else if (is(key, "instance"))
            fine = read_text_or_null(&json, &found->instance);
        else if (is(key, "schema_version"))
            fine = read_u64(&json, &found->schema_version);
        else if (is(key, "layout_generation"))
            fine = found->has_layout_generation = read_u64(&json, &found->layout_generation);
        else if (is(key, "content_generation"))
            fine = found->has_content_generation = read_u64(&json, &found->content_generation);
        else if (layout && is(key, "identity"))
            fine = read_identity(&json, found);
        else if (is(key, "regions")) {
            found->regions = json.at;
            fine = skip_value(&json);
        } else if (is(key, "tensors")) {
            skip_space(&json);
            found->has_tensors = *json.at == '{';
            fine = skip_value(&json);
        } else
            fine = layout ? skip_value(&json) : read_process_field(&json, key, found);
        if (!fine)
            return false;
    }
    return ended && at_end(&json, text + size) && found->has_layout_generation &&
           found->has_content_generation && found->has_pid;
}

static bool same_text(struct text one, struct text other)
{
    if (one.start == NULL || other.start == NULL)
        return one.start == other.start;
    return one.length == other.length && memcmp(one.start, other.start, one.length) == 0;
}

static bool same_process(struct process one, struct process other)
{
    return one.pid == other.pid && one.has_start_ticks == other.has_start_ticks &&
           one.start_ticks == other.start_ticks && same_text(one.boot_id, other.boot_id);
}

/* Whether two documents are of one runner: a process may publish several in one slot, one after
 * the other, and their generations begin anew.  Release 0.1 of the server does not tell. */
static bool same_instance(struct text one, struct text other)
{
    return one.start == NULL || other.start == NULL || same_text(one, other);
}

static bool belong_together(struct document one, struct document other)
{
    return one.layout_generation == other.layout_generation &&
           same_process(one.process, other.process) && same_instance(one.instance, other.instance);
}

/* A device as torch writes it, which is one column of the output. */
static bool is_device(struct text text)
{
    for (size_t at = 0; at < text.length; at++)
        if (text.start[at] <= ' ' || text.start[at] > '~' || text.start[at] == '\\')
            return false;
    return text.length > 0 && text.length < 64;
}

/* One region, checked and, with `print`, printed. */
static bool read_region(struct json *json, bool print)
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
    if (!ended || ptr == 0 || size == 0 || size > UINT64_MAX - ptr || !is_device(device))
        return false;
    if (!print)
        return true;
    printf("%" PRIu64 " %" PRIu64 " %.*s %" PRIu64 " %" PRIu64 "\n", ptr, size,
           (int)device.length, device.start, allocation_ptr, allocation_size);
    return true;
}

static bool read_regions(const char *regions, bool print)
{
    struct json json = {regions, 0};
    bool first = true, ended;
    if (regions == NULL || !take(&json, '['))
        return false;
    while (next_item(&json, &first, &ended))
        if (!read_region(&json, print))
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

enum found { ABSENT, FOUND, UNREADABLE };

/* The one way in which anything in the directory is opened.  It waits for nobody: a pipe is opened
 * without its writer, and what is no regular file, or larger than `limit` bytes, is refused.
 * `more`: O_NOFOLLOW where a symbolic link is refused, too.  UNREADABLE says why in `problem`. */
static enum found open_regular(const char *path, int more, off_t limit, int *file,
                               struct stat *status)
{
    size_t length = strlen(path);
    bool json = length > 5 && strcmp(path + length - 5, ".json") == 0;
    *file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | more);
    if (*file < 0 && errno == ENOENT) {
        note_problem("%s does not exist", path);
        return ABSENT;
    }
    bool opened = *file >= 0 && fstat(*file, status) == 0;
    if (opened && S_ISREG(status->st_mode) && (limit == 0 || status->st_size <= limit))
        return FOUND;
    if (!opened || (json && S_ISDIR(status->st_mode)))
        note_problem("%s cannot be read (%s); read as a user who may, and check that it is a file",
                     path, strerror(opened ? EISDIR : errno));
    else if (S_ISREG(status->st_mode))
        note_problem("%s has %jd bytes, %jd at most; " FOREIGN, path, (intmax_t)status->st_size,
                     (intmax_t)limit);
    else
        note_problem("%s is not %s but a %s; " FOREIGN, path, json ? "JSON" : "a file",
                     S_ISDIR(status->st_mode) ? "folder" : "pipe or a device");
    if (*file >= 0)
        close(*file);
    *file = -1;
    return UNREADABLE;
}

/* A file's contents, NUL-terminated, on the heap.  An opened file never changes, since the server
 * replaces files by rename. */
static enum found read_file(const char *path, char **data, size_t *size)
{
    int file;
    struct stat status;
    *data = NULL, *size = 0;
    enum found found = open_regular(path, 0, MAX_DOCUMENT_BYTES, &file, &status);
    if (found != FOUND)
        return found;
    size_t wanted = (size_t)status.st_size, filled = 0;
    char *bytes = malloc(wanted + 1);
    if (bytes == NULL)
        quit(FAILED, "%s: out of memory", path);
    while (filled < wanted) {
        ssize_t got = read(file, bytes + filled, wanted - filled);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            note_problem("%s: %s", path, got < 0 ? strerror(errno) : "it became shorter");
            free(bytes), close(file);
            return UNREADABLE;
        }
        filled += (size_t)got;
    }
    close(file);
    bytes[wanted] = '\0';
    *data = bytes, *size = wanted;
    return FOUND;
}

/* A document and its text, which is the caller's to free. */
static enum found read_document(const char *path, const char *schema, struct document *document,
                                char **text)
{
    size_t size;
    memset(document, 0, sizeof *document);
    enum found found = read_file(path, text, &size);
    if (found != FOUND)
        return found;
    bool layout = strcmp(schema, "sglang-weight-layout") == 0;
    if (!read_fields(*text, size, layout, document) || !is(document->schema, schema) ||
        (layout ? !document->has_identity || !document->has_tensors || !document->regions
                : document->state.length == 0))
        note_problem("%s is no %s document; " FOREIGN, path, schema);
    else if (document->schema_version != 1)
        note_problem("%s has schema version %" PRIu64 ", this program knows 1", path,
                     document->schema_version);
    else
        return FOUND;
    free(*text);
    *text = NULL;
    return UNREADABLE;
}

static int lock_shared(const char *path)
{
    int file;
    struct stat status;
    enum found found = open_regular(path, O_NOFOLLOW, 0, &file, &status);
    if (found == ABSENT)
        quit(FAILED, "%s: %s (is this the server's weights_metadata directory?)", path,
             strerror(ENOENT));
    if (found == UNREADABLE)
        quit(FAILED, "%s", problem);
    int64_t deadline = now_ms() + LOCK_PATIENCE_MS;
    while (flock(file, LOCK_SH | LOCK_NB) != 0) {
        if (errno != EWOULDBLOCK && errno != EINTR)
            quit(FAILED, "%s: %s", path, strerror(errno));
        if (now_ms() >= deadline)
            quit(NOT_NOW, "an update has been running for %d s; try again later",
                 LOCK_PATIENCE_MS / 1000);
        pause_ms(5);
    }
    return file;
}

/* --- whether the owner lives ---------------------------------------------------------------- */

/* The owner holds its lock for life.  A held lock alone proves nothing, for whoever may read the
 * file may lock it as well: the process that the state names has to exist, too, where it can be
 * looked at.  Everything here is as in the package's reader (reader/ownership.py). */
enum lock { LOCK_HELD, LOCK_FREE, LOCK_ABSENT, LOCK_UNKNOWN };

struct liveness {
    bool alive, certain;
    char why[128]; /* what the answer rests on */
};

static enum lock lock_at(const char *path)
{
    int file;
    struct stat status;
    enum found found = open_regular(path, O_NOFOLLOW, 0, &file, &status);
    if (found != FOUND)
        return found == ABSENT ? LOCK_ABSENT : LOCK_UNKNOWN;
    int failed = flock(file, LOCK_SH | LOCK_NB) != 0 ? errno : 0;
    close(file);
    if (failed == 0)
        return LOCK_FREE;
    return failed == EWOULDBLOCK || failed == EACCES ? LOCK_HELD : LOCK_UNKNOWN;
}

/* The first line of a file of the kernel's, or what there is room for. */
static bool read_line(const char *path, char *line, int size)
{
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return false;
    bool found = fgets(line, size, file) != NULL;
    fclose(file);
    if (found)
        line[strcspn(line, "\n")] = '\0';
    return found;
}

static bool is_this_host(struct text name)
{
    char mine[256] = "";
    return gethostname(mine, sizeof mine - 1) == 0 && is(name, mine);
}

/* Whether the process runs, or ran, under this kernel, since it was started last. */
static bool is_of_this_boot(struct process process, struct text hostname)
{
    char mine[64];
    if (process.boot_id.start == NULL ||
        !read_line("/proc/sys/kernel/random/boot_id", mine, sizeof mine))
        return is_this_host(hostname); /* not Linux: the name is all there is */
    return is(process.boot_id, mine);
}

enum running { EXITED, RUNS, UNSEEN };

/* Whether the process that has this pid here started then and has not exited. */
static enum running look_at(struct process process)
{
    char path[64], stat[1024], state = '?';
    uint64_t ticks = 0;
    long threads = 0;
    if (process.pid == 0 || process.pid > INT32_MAX)
        return EXITED; /* and nothing that kill(2) takes for a group */
    snprintf(path, sizeof path, "/proc/%" PRIu64 "/stat", process.pid);
    /* Field 2 is the command in parentheses and may itself hold spaces and parentheses; fields 3,
     * 20 and 22 are the state, the number of threads and the start time (proc(5)). */
    const char *after = read_line(path, stat, sizeof stat) ? strrchr(stat, ')') : NULL;
    if (after == NULL ||
        sscanf(after,
               ") %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %ld %*s"
               " %" SCNu64,
               &state, &threads, &ticks) != 3)
        return kill((pid_t)process.pid, 0) != 0 && errno == ESRCH ? EXITED : UNSEEN;
    if (process.has_start_ticks && process.start_ticks != ticks)
        return EXITED;
    /* One that has exited and waits for its parent holds nothing any more; with threads left
     * only its main thread has ended. */
    if ((state == 'Z' || state == 'X') && threads <= 1)
        return EXITED;
    return process.has_start_ticks ? RUNS : UNSEEN;
}

/* The owner's pid namespace as its layout tells it: 1 if it is this process's, 0 if another one,
 * -1 where it is not told. */
static int shares_namespace(struct process owner, const char *layout_path)
{
    struct document layout;
    char *text, mine[64] = "";
    int answer = -1;
    if (read_document(layout_path, "sglang-weight-layout", &layout, &text) != FOUND)
        return answer;
    if (same_process(layout.process, owner) && layout.pid_namespace.start != NULL)
        answer = readlink("/proc/self/ns/pid", mine, sizeof mine - 1) > 0 &&
                 is(layout.pid_namespace, mine);
    free(text);
    return answer;
}

static struct liveness answer(bool alive, bool certain, const char *format, ...)
{
    struct liveness answer = {alive, certain, ""};
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(answer.why, sizeof answer.why, format, arguments);
    va_end(arguments);
    return answer;
}

/* `state`: NULL where there is none that could be read. */
static struct liveness liveness(enum lock lock, const struct document *state,
                                const char *layout_path)
{
    const char *says = lock == LOCK_HELD ? "its lock is held" : "its lock cannot be read";
    if (lock == LOCK_ABSENT)
        return answer(false, true, "there is no owner lock");
    if (state == NULL && lock == LOCK_FREE)
        return answer(false, true, "its lock is free");
    if (state == NULL)
        return answer(true, false, "there is no state file yet that would say whose lock it is");
    bool here = is_of_this_boot(state->process, state->hostname);
    if (lock == LOCK_FREE)
        return answer(false, here, "its lock is free%s",
                      here ? "" : ", as far as this host can see");
    if (!here)
        return answer(true, false, "%s, and its process is on another host", says);
    enum running found = look_at(state->process);
    if (found == UNSEEN)
        return answer(true, false, "%s, and its process cannot be looked at", says);
    if (found == RUNS)
        return answer(true, true, "%s, and its process runs", says);
    int shared = shares_namespace(state->process, layout_path);
    if (shared == 1)
        return answer(false, true, "its process has exited; what holds its lock is another one");
    if (lock == LOCK_UNKNOWN && shared < 0 && is_this_host(state->hostname))
        return answer(false, false, "%s, and there is no such process here", says);
    return answer(true, false, "%s, and its process is in another pid namespace", says);
}

/* --- the header ---------------------------------------------------------------------------- */

enum { HEADER_SIZE = 128, SEQUENCE_AT = 8, CHECKSUM_AT = 124, STATES = 6 };

/* A mapped header.  A load from a mapping behind the end of its file raises SIGBUS, and whoever may
 * write the file can truncate it.  The server never does, and the handler below says that somebody
 * has; a library, whose handler that cannot be, uses pread(2) for the 128 bytes instead: it costs a
 * system call, some 0.5 us. */
struct header {
    const unsigned char *bytes;
    dev_t device;
    ino_t inode;
};

static void say_cut_short(int signal)
{
    static const char text[] = "print_regions: the header was cut short while it was read\n";
    (void)signal;
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
        _exit(FAILED);
    _exit(FAILED); /* what has been printed is flushed already */
}

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
    int file;
    if (open_regular(path, O_NOFOLLOW, 0, &file, &status) != FOUND)
        quit(FAILED, "%s", problem);
    if (status.st_size != HEADER_SIZE)
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
    bool knows = false; /* any number may be the first one */
    for (unsigned long printed = 0; printed < wanted;) {
        if (!knows || sequence_of(header) != known) {
            if (!read_header(header, copy))
                quit(NOT_NOW, "%s is not consistent: its owner was stopped or killed", path);
            memcpy(&known, copy + SEQUENCE_AT, sizeof known);
            knows = true;
            print_header(path, copy);
            printed++;
        } else {
            pause_ms(POLL_MS);
            if (!is_current(header, path)) {
                munmap((void *)header.bytes, HEADER_SIZE);
                header = map_header(path);
                knows = false;
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
        bool given = *number == '=';
        size_t digits = given ? strspn(number + 1, "0123456789") : 0;
        headers = digits > 0 && digits < 10 ? strtoul(number + 1, NULL, 10) : !given;
        if (headers == 0 || number[given + digits] != '\0')
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
        signal(SIGBUS, say_cut_short);
        follow_header(path, headers);
        free(path);
        return DONE;
    }
    char *state_path = path_of(directory, "weight_state_", slot, ".json");
    char *layout_path = path_of(directory, "weight_layout_", slot, ".json");
    char *saving_path = path_of(directory, "weight_saving_", slot, ".lock");
    char *owner_path = path_of(directory, "weight_owner_", slot, ".lock");

    /* From here to the end of main no update starts. */
    int lock = lock_shared(saving_path);

    /* Under the lock the two documents agree at once, except for a server that did not get the
     * lock in time and went on without it: therefore the loop. */
    for (int64_t deadline = now_ms() + READ_PATIENCE_MS;;) {
        struct document before, layout, after;
        char *before_text = NULL, *layout_text = NULL, *after_text = NULL;
        enum lock owner_lock = lock_at(owner_path);
        enum found found = read_document(state_path, "sglang-weight-state", &before, &before_text);
        if (found != FOUND && owner_lock == LOCK_UNKNOWN)
            quit(FAILED, "%s", problem); /* neither the lock nor a process to look at */
        struct liveness owner =
            liveness(owner_lock, found == FOUND ? &before : NULL, layout_path);
        if (!owner.alive)
            quit(NOT_NOW, "slot %s is stale: its owner has exited: %s", slot, owner.why);
        if (found == UNREADABLE ||
            read_document(layout_path, "sglang-weight-layout", &layout, &layout_text) ==
                UNREADABLE ||
            read_document(state_path, "sglang-weight-state", &after, &after_text) == UNREADABLE)
            quit(FAILED, "%s", problem);
        if (after_text != NULL && (is(after.state, "released") || is(after.state, "updating")))
            quit(NOT_NOW, "slot %s is %.*s", slot, (int)after.state.length, after.state.start);
        bool settled = before_text != NULL && layout_text != NULL && after_text != NULL &&
                       belong_together(before, layout) && belong_together(layout, after) &&
                       same_instance(before.instance, after.instance);
        if (settled) {
            /* All before the first is printed, so that there are never some of them. */
            if (!read_regions(layout.regions, false))
                quit(FAILED, "%s has no valid regions; " FOREIGN, layout_path);
            read_regions(layout.regions, true);
            if (!owner.certain)
                fprintf(stderr,
                        "print_regions: whether the owner of slot %s lives is not certain: %s\n",
                        slot, owner.why);
        }
        free(before_text), free(layout_text), free(after_text);
        if (settled)
            break;
        if (now_ms() >= deadline)
            quit(NOT_NOW, "slot %s has no settled map; %s says why", slot, state_path);
        pause_ms(10);
    }
    close(lock); /* the unlock */
    free(state_path), free(layout_path), free(saving_path), free(owner_path);
    if (fflush(stdout) != 0)
        quit(FAILED, "stdout: %s", strerror(errno));
    return DONE;
}
