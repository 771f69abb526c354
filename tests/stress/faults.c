/* Faults at a chosen file operation, for LD_PRELOAD.  Test equipment.
 *
 *     cc -shared -fPIC -O1 -Wall -Wextra -Werror -o faults.so faults.c -ldl
 *
 * Counted are open, write, close, rename, unlink, mkdir and flock on paths that begin with the
 * armed prefix, and on descriptors opened there.  The armed process calls fault_arm through
 * ctypes; everything is per process, and a forked child inherits it as it stands.
 */

#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, CLOSE = 4, RENAME = 8, UNLINK = 16, MKDIR = 32, FLOCK = 64 };
enum { COUNT, KILL_BEFORE, KILL_AFTER, KILL_WITHIN, FAIL, LOSE_ANSWER, SHORTEN };

#define DESCRIPTORS 65536

static char prefix[4096];
static unsigned char watched[DESCRIPTORS];
static int armed, action, error_code, operations;
static long position, count, hits;
static char trail[1 << 16];
static size_t trail_length;
static long clock_step, clock_calls;

/* Arm: at the `at`-th (from 1) of the operations in `mask`, and at `times` of them from there
 * on (-1: all), do `what`. */
void fault_arm(const char *where, long at, int what, int code, int mask, long times)
{
    snprintf(prefix, sizeof prefix, "%s", where);
    armed = 1, action = what, error_code = code, operations = mask;
    position = at, hits = times, count = 0, trail_length = 0, trail[0] = '\0';
}

void fault_disarm(void) { armed = 0; }
void fault_rearm(void) { armed = 1; }
long fault_count(void) { return count; }
const char *fault_trail(void) { return trail; }
/* Every look at the time of day is `step` seconds before the one before it. */
void fault_clock(long step) { clock_step = step, clock_calls = 0; }

static bool ours(const char *path)
{
    return armed && path != NULL && strncmp(path, prefix, strlen(prefix)) == 0;
}

static bool ours_fd(int fd)
{
    return armed && fd >= 0 && fd < DESCRIPTORS && watched[fd];
}

/* What to do with this operation: COUNT for nothing. */
static int due(int operation, const char *name, const char *path)
{
    if (!(operations & operation))
        return COUNT;
    count++;
    const char *file = path == NULL ? NULL : strrchr(path, '/');
    int wrote = snprintf(trail + trail_length, sizeof trail - trail_length, "%s %s\n", name,
                         file == NULL ? "" : file + 1);
    if (wrote > 0 && trail_length + (size_t)wrote < sizeof trail)
        trail_length += (size_t)wrote;
    if (count < position || (hits >= 0 && count >= position + hits))
        return COUNT;
    if (action == KILL_BEFORE)
        kill(getpid(), SIGKILL);
    return action;
}

/* After the operation was made with `result`. */
static long done(int what, long result)
{
    if (what == KILL_AFTER || what == KILL_WITHIN)
        kill(getpid(), SIGKILL);
    if (what == LOSE_ANSWER) {
        errno = error_code;
        return -1;
    }
    return result;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAILED_BY(what) ((what) == FAIL && ((errno = error_code), true))

static int opened(int what, int fd)
{
    if (what == LOSE_ANSWER && fd >= 0)
        REAL(close)(fd);
    else if (fd >= 0 && fd < DESCRIPTORS)
        watched[fd] = 1;
    return (int)done(what, fd);
}

#define OPEN_BODY(name, call)                                                                     \
    mode_t mode = 0;                                                                              \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                          \
        va_list arguments;                                                                        \
        va_start(arguments, flags);                                                               \
        mode = va_arg(arguments, mode_t);                                                         \
        va_end(arguments);                                                                        \
    }                                                                                             \
    if (!ours(path))                                                                              \
        return call;                                                                              \
    int what = due(OPEN, #name, path);                                                            \
    if (FAILED_BY(what))                                                                          \
        return -1;                                                                                \
    return opened(what, call);

int open(const char *path, int flags, ...) { OPEN_BODY(open, REAL(open)(path, flags, mode)) }
int open64(const char *path, int flags, ...) { OPEN_BODY(open, REAL(open64)(path, flags, mode)) }
int openat(int at, const char *path, int flags, ...)
{
    OPEN_BODY(open, REAL(openat)(at, path, flags, mode))
}
int openat64(int at, const char *path, int flags, ...)
{
    OPEN_BODY(open, REAL(openat64)(at, path, flags, mode))
}

ssize_t write(int fd, const void *data, size_t size)
{
    if (!ours_fd(fd))
        return REAL(write)(fd, data, size);
    int what = due(WRITE, "write", NULL);
    if (FAILED_BY(what))
        return -1;
    bool half = (what == KILL_WITHIN || what == SHORTEN) && size > 1;
    return done(what, REAL(write)(fd, data, half ? size / 2 : size));
}

int close(int fd)
{
    if (!ours_fd(fd)) {
        if (fd >= 0 && fd < DESCRIPTORS)
            watched[fd] = 0;
        return REAL(close)(fd);
    }
    int what = due(CLOSE, "close", NULL);
    watched[fd] = 0;
    int result = REAL(close)(fd); /* Linux closes it also where it reports an error */
    if (FAILED_BY(what))
        return -1;
    return (int)done(what, result);
}

int rename(const char *from, const char *to)
{
    if (!ours(to))
        return REAL(rename)(from, to);
    int what = due(RENAME, "rename", to);
    if (FAILED_BY(what))
        return -1;
    return (int)done(what, REAL(rename)(from, to));
}

int unlink(const char *path)
{
    if (!ours(path))
        return REAL(unlink)(path);
    int what = due(UNLINK, "unlink", path);
    if (FAILED_BY(what))
        return -1;
    return (int)done(what, REAL(unlink)(path));
}

int mkdir(const char *path, mode_t mode)
{
    if (!ours(path))
        return REAL(mkdir)(path, mode);
    int what = due(MKDIR, "mkdir", path);
    if (FAILED_BY(what))
        return -1;
    return (int)done(what, REAL(mkdir)(path, mode));
}

int flock(int fd, int operation)
{
    static int (*real)(int, int);
    if (real == NULL)
        real = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
    if (!ours_fd(fd))
        return real(fd, operation);
    int what = due(FLOCK, "flock", NULL);
    if (FAILED_BY(what))
        return -1;
    return (int)done(what, real(fd, operation));
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = REAL(clock_gettime)(clock, now);
    if (clock_step != 0 && clock == CLOCK_REALTIME)
        now->tv_sec -= clock_step * ++clock_calls;
    return result;
}
