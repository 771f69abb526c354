/* A stand-in for libcuda.so.1 where there is no GPU: the calls that the hook makes, and no others.
 *
 * "Device memory" is shared memory of the host.  What it shows is that our own code asks the right
 * things in the right order and leaves nothing open; that a real driver answers so is shown in
 * tests/gpu.  Statuses are CUresult values.  Copies are done when their stream or event is waited
 * for, and not before.
 *
 * FAKE_CUDA_DIR    folder for memory that is shared by legacy IPC handles
 * FAKE_CUDA_UUIDS  the devices: 32 hex digits each, separated by commas
 * FAKE_CUDA_FAIL   CALL:STATUS[:N]: that call fails, only the N-th time if N is given
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uint64_t ptr_t;
enum { MALLOC = 1, MAPPED, IPC, RESERVED, PINNED, REGISTERED };
enum { MOST = 8192, PIECE = 65536 };

struct range { int kind; ptr_t at; size_t size; int handle, number; };
struct handle { int fd, refs, types, rdma; size_t size; };
struct copy { ptr_t from; void *to; size_t width, height, pitch, to_pitch; int event; };
struct stream { int used, first, last; long before; struct copy *queue; };
struct event { int used, stream; long position; };
struct call { char name[48]; long count; };

static struct range ranges[MOST];
static struct handle handles[MOST];
static struct stream streams[64];
static struct event events[64];
static struct call calls[128];
static int contexts[16];
static int next_number;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread void *stack[16];
static __thread int depth;
static __thread int capture_mode;

/* How often a call was made; counts it if asked to. */
static long counted(const char *name, int more) {
    for (int i = 0; i < 128; i++) {
        if (!calls[i].name[0]) strncpy(calls[i].name, name, 47);
        if (!strcmp(calls[i].name, name)) return calls[i].count += more;
    }
    return 0;
}
long fake_cuda_calls(const char *name) { return counted(name, 0); }

static int injected(const char *name) {
    static char known[128];
    static long seen;
    const char *said = getenv("FAKE_CUDA_FAIL");
    counted(name, 1);
    if (!said) return 0;
    if (strcmp(known, said)) { snprintf(known, 128, "%s", said); seen = 0; }
    char wanted[48];
    int status = 0, number = 0;
    if (sscanf(said, "%47[^:]:%d:%d", wanted, &status, &number) < 2) return 0;
    if (strcmp(wanted, name)) return 0;
    seen++;
    return !number || seen == number ? status : 0;
}
#define ENTER { int status_ = injected(__func__); if (status_) return status_; }
#define IN_CONTEXT ENTER if (!depth || !stack[depth - 1]) return 201;

static struct range *find(ptr_t at, int least, int most) {
    for (int i = 0; i < MOST; i++)
        if (ranges[i].kind >= least && ranges[i].kind <= most && ranges[i].at <= at &&
            at < ranges[i].at + ranges[i].size) return &ranges[i];
    return NULL;
}
static struct range *add(int kind, ptr_t at, size_t size, int handle, int number) {
    for (int i = 0; i < MOST; i++)
        if (!ranges[i].kind) {
            ranges[i] = (struct range){kind, at, size, handle, number};
            return &ranges[i];
        }
    abort();
}
static void let_go(int i) {
    if (--handles[i].refs == 0) { close(handles[i].fd); handles[i].fd = -1; handles[i].size = 0; }
}
/* What is open in this process, by kind. */
int fake_cuda_open(const char *kind) {
    int n = 0;
    static const char *names[] = {"", "malloc", "mapped", "ipc", "reserved", "pinned", "registered"};
    for (int k = 1; k < 7; k++)
        if (!strcmp(kind, names[k])) for (int i = 0; i < MOST; i++) n += ranges[i].kind == k;
    if (!strcmp(kind, "handles")) for (int i = 0; i < MOST; i++) n += handles[i].refs > 0;
    if (!strcmp(kind, "streams")) for (int i = 0; i < 64; i++) n += streams[i].used;
    if (!strcmp(kind, "events")) for (int i = 0; i < 64; i++) n += events[i].used;
    if (!strcmp(kind, "contexts")) for (int i = 0; i < 16; i++) n += contexts[i];
    if (!strcmp(kind, "pushed")) n = depth;
    return n;
}

int cuInit(unsigned flags) { ENTER return 0; }
int cuGetErrorName(int code, const char **name) {
    *name = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY"
          : code == 400 ? "CUDA_ERROR_INVALID_HANDLE" : "CUDA_ERROR_OF_THE_FAKE";
    return 0;
}

/* --- devices and contexts */

static int uuid_of(int device, unsigned char *raw) {
    const char *said = getenv("FAKE_CUDA_UUIDS");
    if (!said) said = "00112233445566778899aabbccddeeff";
    for (int i = 0; i < device; i++) { said = strchr(said, ','); if (!said++) return 101; }
    for (int i = 0; i < 16; i++) if (sscanf(said + 2 * i, "%2hhx", raw + i) != 1) return 101;
    return 0;
}
int cuDeviceGetCount(int *count) {
    ENTER
    unsigned char raw[16];
    for (*count = 0; !uuid_of(*count, raw); ++*count);
    return *count ? 0 : 100;
}
int cuDeviceGet(int *device, int ordinal) {
    ENTER
    unsigned char raw[16];
    *device = ordinal;
    return uuid_of(ordinal, raw);
}
int cuDeviceGetUuid_v2(unsigned char *raw, int device) { ENTER return uuid_of(device, raw); }
int cuDeviceGetPCIBusId(char *text, int size, int device) {
    ENTER snprintf(text, size, "0000:%02x:00.0", device); return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER *value = attribute == 116; return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER contexts[device]++; *context = &contexts[device]; return 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) { ENTER contexts[device]--; return 0; }
int cuCtxPushCurrent_v2(void *context) { ENTER stack[depth++] = context; return 0; }
int cuCtxPopCurrent_v2(void **context) {
    ENTER if (!depth) return 201; *context = stack[--depth]; return 0;
}
int cuCtxSetCurrent(void *context) {
    ENTER
    if (!context) { if (depth) depth--; return 0; }
    if (!depth) depth++;
    stack[depth - 1] = context;
    return 0;
}
int cuCtxGetCurrent(void **context) { ENTER *context = depth ? stack[depth - 1] : NULL; return 0; }
int cuCtxGetDevice(int *device) { IN_CONTEXT *device = (int *)stack[depth - 1] - contexts; return 0; }
int cuCtxSynchronize(void) { IN_CONTEXT return 0; }
int cuThreadExchangeStreamCaptureMode(int *mode) {
    ENTER int old = capture_mode; capture_mode = *mode; *mode = old; return 0;
}

/* --- memory */

static int file_of(int pid, int number, int flags) {
    char path[512];
    snprintf(path, 512, "%s/%d-%d", getenv("FAKE_CUDA_DIR"), pid, number);
    if (flags < 0) return unlink(path);
    return open(path, flags | O_CLOEXEC, 0600);
}
int cuMemAlloc_v2(ptr_t *at, size_t size) {
    IN_CONTEXT
    pthread_mutex_lock(&lock);
    int number = ++next_number, fd = file_of(getpid(), number, O_RDWR | O_CREAT);
    if (fd < 0 || ftruncate(fd, size)) abort();
    *at = (ptr_t)mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    add(MALLOC, *at, size, -1, number);
    pthread_mutex_unlock(&lock);
    return 0;
}
int cuMemFree_v2(ptr_t at) {
    IN_CONTEXT
    struct range *found = find(at, MALLOC, MALLOC);
    if (!found) return 1;
    file_of(getpid(), found->number, -1);
    munmap((void *)found->at, found->size);
    found->kind = 0;
    return 0;
}
int cuMemGetAddressRange_v2(ptr_t *base, size_t *size, ptr_t at) {
    IN_CONTEXT
    struct range *found = find(at, MALLOC, IPC);
    if (!found) return 500;
    *base = found->at, *size = found->size;
    return 0;
}
int cuPointerGetAttribute(uint64_t *value, int attribute, ptr_t at) {
    IN_CONTEXT
    struct range *found = find(at, MALLOC, IPC), *host = find(at, PINNED, REGISTERED);
    if (!found && !host) return 1;
    *value = 0;
    if (attribute == 2) *(unsigned *)value = found ? 2 : 1;
    if (attribute == 9) *(int *)value = (int *)stack[depth - 1] - contexts;
    if (attribute == 10) *(char *)value = found && found->kind == MALLOC;
    return 0;
}
int cuMemHostAlloc(void **at, size_t size, unsigned flags) {
    IN_CONTEXT
    *at = aligned_alloc(4096, size);
    add(PINNED, (ptr_t)*at, size, -1, 0);
    return 0;
}
int cuMemFreeHost(void *at) {
    IN_CONTEXT
    struct range *found = find((ptr_t)at, PINNED, PINNED);
    if (!found) return 1;
    found->kind = 0;
    free(at);
    return 0;
}
int cuMemHostRegister_v2(void *at, size_t size, unsigned flags) {
    IN_CONTEXT
    if (find((ptr_t)at, PINNED, REGISTERED)) return 712;
    add(REGISTERED, (ptr_t)at, size, -1, 0);
    return 0;
}
int cuMemHostUnregister(void *at) {
    IN_CONTEXT
    struct range *found = find((ptr_t)at, REGISTERED, REGISTERED);
    if (!found) return 713;
    found->kind = 0;
    return 0;
}

/* --- legacy IPC */

struct ipc { char magic[8]; int pid, number; uint64_t size; char rest[40]; };

int cuIpcGetMemHandle(struct ipc *handle, ptr_t at) {
    IN_CONTEXT
    struct range *found = find(at, MALLOC, MALLOC);
    if (!found || found->at != at) return 1;
    *handle = (struct ipc){"fakecud", getpid(), found->number, found->size, {0}};
    return 0;
}
int cuIpcOpenMemHandle_v2(ptr_t *at, struct ipc handle, unsigned flags) {
    IN_CONTEXT
    if (memcmp(handle.magic, "fakecud", 8) || flags != 1) return 400;
    if (handle.pid == getpid()) return 201;
    int fd = file_of(handle.pid, handle.number, O_RDONLY);
    if (fd < 0) return 400;
    void *found = mmap(NULL, handle.size, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    *at = (ptr_t)found;
    add(IPC, *at, handle.size, -1, 0);
    return 0;
}
int cuIpcCloseMemHandle(ptr_t at) {
    IN_CONTEXT
    struct range *found = find(at, IPC, IPC);
    if (!found || found->at != at) return 1;
    munmap((void *)found->at, found->size);
    found->kind = 0;
    return 0;
}

/* --- cuMemMap and its relations; handles are numbers from 1 on */

struct properties { int type, types, location[2]; void *win32; unsigned char flags[8]; };
struct access { int type, id, flags; };

static int made(uint64_t *handle, int fd, size_t size, int types, int rdma) {
    for (int i = 0; i < MOST; i++)
        if (!handles[i].refs) {
            handles[i] = (struct handle){fd, 1, types, rdma, size};
            *handle = i + 1;
            return 0;
        }
    abort();
}
int cuMemCreate(uint64_t *handle, size_t size, struct properties *asked, uint64_t flags) {
    IN_CONTEXT
    if (size % PIECE) return 1;
    int fd = memfd_create("fake_cuda", MFD_CLOEXEC);
    if (ftruncate(fd, size)) abort();
    return made(handle, fd, size, asked->types, asked->flags[1]);
}
int cuMemRelease(uint64_t handle) {
    ENTER
    if (handle < 1 || handle > MOST || !handles[handle - 1].refs) return 1;
    let_go(handle - 1);
    return 0;
}
int cuMemRetainAllocationHandle(uint64_t *handle, ptr_t at) {
    ENTER
    struct range *found = find(at, MAPPED, MAPPED);
    if (!found) return 1;
    handles[found->handle].refs++;
    *handle = found->handle + 1;
    return 0;
}
int cuMemGetAllocationPropertiesFromHandle(struct properties *found, uint64_t handle) {
    ENTER
    if (handle < 1 || handle > MOST || !handles[handle - 1].refs) return 1;
    memset(found, 0, sizeof *found);
    found->type = 1, found->types = handles[handle - 1].types;
    found->flags[1] = handles[handle - 1].rdma;
    return 0;
}
int cuMemExportToShareableHandle(int *fd, uint64_t handle, int type, uint64_t flags) {
    ENTER
    if (handle < 1 || handle > MOST || !(handles[handle - 1].types & type & 1)) return 1;
    *fd = dup(handles[handle - 1].fd);
    return 0;
}
int cuMemImportFromShareableHandle(uint64_t *handle, void *fd, int type) {
    IN_CONTEXT
    char path[64], name[64] = "";
    snprintf(path, 64, "/proc/self/fd/%d", (int)(intptr_t)fd);
    if (readlink(path, name, 63) < 0 || strncmp(name, "/memfd:fake_cuda", 16)) return 1;
    int mine = fcntl((int)(intptr_t)fd, F_DUPFD_CLOEXEC, 0);
    return made(handle, mine, lseek(mine, 0, SEEK_END), type, 0);
}
int cuMemAddressReserve(ptr_t *at, size_t size, size_t align, ptr_t wish, uint64_t flags) {
    IN_CONTEXT
    void *found = size % PIECE ? MAP_FAILED
        : mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return size % PIECE ? 1 : 2;
    *at = (ptr_t)found;
    add(RESERVED, *at, size, -1, 0);
    return 0;
}
int cuMemAddressFree(ptr_t at, size_t size) {
    IN_CONTEXT
    struct range *found = find(at, RESERVED, RESERVED);
    if (!found || found->at != at || found->size != size) return 1;
    munmap((void *)at, size);
    found->kind = 0;
    return 0;
}
int cuMemMap(ptr_t at, size_t size, size_t offset, uint64_t handle, uint64_t flags) {
    IN_CONTEXT
    struct range *room = find(at, RESERVED, RESERVED);
    if (!room || at + size > room->at + room->size || offset || find(at, MAPPED, MAPPED)) return 1;
    if (handle < 1 || handle > MOST || handles[handle - 1].size != size) return 1;
    if (mmap((void *)at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, handles[handle - 1].fd, 0) ==
        MAP_FAILED) return 2;
    handles[handle - 1].refs++;
    add(MAPPED, at, size, handle - 1, 0);
    return 0;
}
int cuMemSetAccess(ptr_t at, size_t size, struct access *access, size_t count) {
    IN_CONTEXT
    if (access->type != 1 || count != 1) return 1;
    int protection = access->flags == 3 ? PROT_READ | PROT_WRITE : access->flags ? PROT_READ : 0;
    return mprotect((void *)at, size, protection) ? 1 : 0;
}
int cuMemUnmap(ptr_t at, size_t size) {
    IN_CONTEXT
    struct range *found = find(at, MAPPED, MAPPED);
    if (!found || found->at != at || found->size != size) return 1;
    mmap((void *)at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    let_go(found->handle);
    found->kind = 0;
    return 0;
}

/* --- copies */

int cuStreamCreate(void **stream, unsigned flags) {
    IN_CONTEXT
    if (flags != 1) return 1; /* one that waits for SGLang's */
    for (int i = 0; i < 64; i++)
        if (!streams[i].used) {
            streams[i] = (struct stream){1, 0, 0, 0, malloc(sizeof(struct copy) * 300000)};
            *stream = &streams[i];
            return 0;
        }
    abort();
}
/* The copies up to the ``until``-th that the stream was ever given. */
static void work(struct stream *stream, long until) {
    for (; stream->first < stream->last && stream->before + stream->first < until; stream->first++) {
        struct copy *copy = &stream->queue[stream->first];
        for (size_t row = 0; row < copy->height; row++)
            memcpy((char *)copy->to + row * copy->to_pitch,
                   (char *)copy->from + row * copy->pitch, copy->width);
    }
    if (stream->first == stream->last) {
        stream->before += stream->last;
        stream->first = stream->last = 0;
    }
}
static int enqueue(struct stream *stream, struct copy copy) {
    ptr_t end = copy.from + (copy.height - 1) * copy.pitch + copy.width;
    ptr_t to = (ptr_t)copy.to, to_end = to + (copy.height - 1) * copy.to_pitch + copy.width;
    for (ptr_t at = copy.from; at < end;) { /* all of it is mapped */
        struct range *found = find(at, MALLOC, IPC);
        if (!found) return 1;
        at = found->at + found->size;
    }
    struct range *host = find(to, PINNED, REGISTERED);
    if (!host || to_end > host->at + host->size) return 999; /* pageable: it would not be async */
    if (stream < streams || !stream->used || stream->last >= 300000) return 400;
    stream->queue[stream->last++] = copy;
    return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, ptr_t from, size_t size, void *stream) {
    IN_CONTEXT
    return enqueue(stream, (struct copy){from, to, size, 1, size, size, 0});
}
struct copy2d {
    size_t sx, sy; int stype; void *shost; ptr_t sdevice; void *sarray; size_t spitch;
    size_t dx, dy; int dtype; void *dhost; ptr_t ddevice; void *darray; size_t dpitch;
    size_t width, height;
};
int cuMemcpy2DAsync_v2(struct copy2d *c, void *stream) {
    IN_CONTEXT
    if (c->stype != 2 || c->dtype != 1 || c->sx || c->sy || c->dx || c->dy) return 1;
    if (c->spitch < c->width || c->dpitch < c->width) return 1;
    return enqueue(stream, (struct copy){c->sdevice, c->dhost, c->width, c->height, c->spitch,
                                         c->dpitch, 0});
}
int cuStreamSynchronize(struct stream *stream) { IN_CONTEXT work(stream, stream->before + stream->last); return 0; }
int cuStreamDestroy_v2(struct stream *stream) {
    IN_CONTEXT work(stream, stream->before + stream->last); free(stream->queue); stream->used = 0; return 0;
}
int cuEventCreate(void **event, unsigned flags) {
    IN_CONTEXT
    for (int i = 0; i < 64; i++)
        if (!events[i].used) {
            events[i] = (struct event){1, -1, 0};
            *event = &events[i];
            return 0;
        }
    abort();
}
int cuEventRecord(struct event *event, struct stream *stream) {
    IN_CONTEXT
    event->stream = stream - streams, event->position = stream->before + stream->last;
    return 0;
}
int cuEventSynchronize(struct event *event) {
    IN_CONTEXT if (event->stream >= 0) work(&streams[event->stream], event->position); return 0;
}
int cuEventQuery(struct event *event) {
    IN_CONTEXT
    struct stream *stream = &streams[event->stream];
    return event->stream < 0 || stream->before + stream->first >= event->position ? 0 : 600;
}
int cuStreamIsCapturing(void *stream, int *status) { IN_CONTEXT *status = 0; return 0; }
int cuEventDestroy_v2(struct event *event) { IN_CONTEXT event->used = 0; return 0; }
