/* A libcuda.so.1 for machines without a GPU: what flea calls of the CUDA driver, on memfds and one thread.
 *
 * It is there to be strict, not fast. Memory of the "GPU" is a memfd, mapped where cuMemMap says; a device pointer is the
 * address of that mapping. Copies are done by a thread of their own that takes its time and, between streams, its choice:
 * what nobody has ordered by an event comes in any order. A copy reads its source when it ends, not when it is asked for,
 * so host memory that is used again too early gives wrong bytes; and its target shows poison from the moment it begins, so
 * a reader that does not wait for the event sees poison. New memory is poison too. What a driver forbids is refused: copies
 * outside of mapped memory with access, host ranges that are pinned in part, calls without a context.
 *
 * Kernels are those of kernels/flea.cu, compiled for the processor (kernels.cpp): they run in stream order, take their time as
 * copies do, and what they overwrite shows poison meanwhile. One that would touch memory that is not mapped is not run.
 *
 * There is no device-wide synchronisation here at all: a program that calls one does not find it.
 *
 * Environment, read once:
 *   FAKE_CUDA_DEVICES=N       how many GPUs (1)
 *   FAKE_CUDA_DRIVER=N        version of the driver (13000)
 *   FAKE_CUDA_MEMORY=BYTES    of each GPU (256 MiB)
 *   FAKE_CUDA_TAKEN=BYTES     of that, what others hold (0)
 *   FAKE_CUDA_DELAY_US=N      what a copy takes: up to three times this, by chance (200)
 *   FAKE_CUDA_READ_US=N       the same for copies out of the GPU's memory, and for kernels (as above)
 *   FAKE_CUDA_LOST_AFTER=N    the GPU is lost at the N-th copy or kernel: from then on every call fails
 *   FAKE_CUDA_IMPORT=refuse   descriptors of memory are not taken
 *   FAKE_CUDA_PIN=refuse      host memory cannot be pinned
 *   FAKE_CUDA_IMAGE=refuse    images of kernels are for other GPUs
 *   FAKE_CUDA_KERNEL=NAME     images lack this kernel
 *   FAKE_CUDA_SEED=N          of the order between streams (1)
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "errors.h"
#include "kernels.h"

typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef unsigned long long CUmemGenericAllocationHandle;

enum { ATTRIBUTE_MAJOR = 75, ATTRIBUTE_MINOR = 76, ATTRIBUTE_VMM = 102, ATTRIBUTE_POSIX_FD = 103 };
enum { DEVICES_MAX = 8, POISON = 0xA5 };
static const size_t GRANULARITY = 2u << 20;

/* As in cuda.h; only what is looked at has a name. */
typedef struct {
  int type;
  int id;
} Location;
typedef struct {
  int type;
  int requested_handle_types;
  Location location;
  void *win32;
  unsigned char flags[8];
} AllocationProp;
typedef struct {
  Location location;
  int flags;
} AccessDesc;

typedef struct Handle {
  int fd;
  size_t size;
  CUdevice device;
  unsigned uses; /* the owner, and mappings */
  bool imported;
  struct Handle *next;
} Handle;

typedef struct Range { /* reserved addresses, a mapping, or pinned host memory */
  uintptr_t at;
  size_t len;
  Handle *handle;
  int access;
  struct Range *next;
} Range;

typedef struct Event {
  unsigned long issued, done;
  uint64_t done_ns;
  unsigned uses;
  bool destroyed;
} Event;

typedef enum { COPY, SET, LAUNCH, RECORD, WAIT, HOST } Kind;
typedef struct Op {
  Kind kind;
  void *to;
  const void *from;
  void *staged; /* a copy of pageable memory */
  bool to_device, from_device, begun, running;
  uint64_t due_ns;
  unsigned char value;
  size_t len;
  Event *event;
  unsigned long serial;
  const FakeKernel *kernel;
  unsigned blocks;
  unsigned long long parameters[FAKE_PARAMETERS_MAX];
  void (*call)(void *);
  void *argument;
  bool *done;
  struct Op *next;
} Op;

typedef struct Stream {
  Op *head, **tail;
  bool destroyed;
  struct Stream *next;
} Stream;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER;
static pthread_cond_t progress = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool ready;
static CUresult broken; /* what every call says once the GPU is lost */
static int devices_count, driver_version;
static size_t memory_bytes, taken_bytes, used_bytes[DEVICES_MAX];
static unsigned long delay_us, read_us, lost_after, copies_count;
static uint64_t choice;
static bool import_refused, pin_refused, image_refused;
static Handle *handles;
static Range *reservations, *mappings, *pinned;
static Stream *streams;
static int contexts[DEVICES_MAX];
static _Thread_local int *current;

static unsigned long number(const char *name, unsigned long otherwise) {
  const char *text = getenv(name);
  return text && *text ? strtoul(text, NULL, 10) : otherwise;
}

static bool says_refuse(const char *name) {
  const char *text = getenv(name);
  return text && strcmp(text, "refuse") == 0;
}

/* ---- the engine ------------------------------------------------------------------------------------------------ */

static uint64_t now_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_REALTIME, &time);
  return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static unsigned chance(unsigned count) {
  choice = choice * 6364136223846793005u + 1442695040888963407u;
  return (unsigned)((choice >> 33) % count);
}

/* Whether all of a range is mapped with the access wanted (1 = read, 3 = write). */
static bool accessible(const void *at, size_t len, int access) {
  uintptr_t from = (uintptr_t)at, end = from + len;
  while (from < end) {
    const Range *found = NULL;
    for (const Range *range = mappings; range && !found; range = range->next)
      if (range->at <= from && from < range->at + range->len && (range->access & access) == access) found = range;
    if (!found) return false;
    from = found->at + found->len;
  }
  return true;
}

static void event_unused(Event *event) {
  if (--event->uses == 0 && event->destroyed) free(event);
}

static bool runnable(const Stream *stream, uint64_t now) {
  const Op *op = stream->head;
  if (!op || (op->kind == WAIT && op->event->done < op->serial)) return false;
  return !op->begun || op->due_ns <= now;
}

static Stream *choose(uint64_t now) {
  unsigned count = 0;
  for (Stream *stream = streams; stream; stream = stream->next) count += runnable(stream, now);
  if (count == 0) return NULL;
  unsigned wanted = chance(count);
  for (Stream *stream = streams; stream; stream = stream->next)
    if (runnable(stream, now) && wanted-- == 0) return stream;
  return NULL;
}

/* When the next copy ends; 0 when none is on its way. */
static uint64_t next_due(void) {
  uint64_t due = 0;
  for (Stream *stream = streams; stream; stream = stream->next)
    if (stream->head && stream->head->begun && (due == 0 || stream->head->due_ns < due)) due = stream->head->due_ns;
  return due;
}

static bool is_legal_launch(const Op *op) {
  FakeSpan spans[FAKE_SPANS_MAX];
  unsigned count = op->kernel->touches(op->parameters, spans);
  for (unsigned i = 0; i < count; i++)
    if (!accessible((void *)(uintptr_t)spans[i].at, spans[i].len, spans[i].written ? 3 : 1)) return false;
  return true;
}

static bool is_legal(const Op *op) {
  if (op->kind == LAUNCH) return is_legal_launch(op);
  return (!op->to_device || accessible(op->to, op->len, 3)) && (!op->from_device || accessible(op->from, op->len, 1));
}

/* What a kernel overwrites as a whole. What it adds to stays as it is. */
static void poison_outputs(const Op *op) {
  FakeSpan spans[FAKE_SPANS_MAX];
  unsigned count = op->kernel->touches(op->parameters, spans);
  for (unsigned i = 0; i < count; i++)
    if (spans[i].written && !spans[i].read) memset((void *)(uintptr_t)spans[i].at, POISON, spans[i].len);
}

/* Its target shows poison from now on, and others come in between. */
static void begin_work(Op *op, uint64_t now) {
  if (lost_after && ++copies_count >= lost_after) {
    broken = DEVICE_UNAVAILABLE;
    return;
  }
  if (!is_legal(op)) {
    const char *what = op->kernel ? op->kernel->name : "a copy";
    fprintf(stderr, "fake libcuda: %s of %zu bytes outside of mapped memory\n", what, op->len);
    broken = ILLEGAL_ADDRESS;
    return;
  }
  op->begun = true;
  op->due_ns = now + (op->from_device || op->kernel ? read_us : delay_us) * (1000 + chance(2001));
  bool overlaps_itself = op->from_device && op->to_device;
  if (op->to_device && !overlaps_itself) memset(op->to, POISON, op->len);
  if (op->kernel) poison_outputs(op);
}

static void end_work(const Op *op) {
  if (!is_legal(op)) {
    fprintf(stderr, "fake libcuda: memory of a copy or kernel of %zu bytes was unmapped before its end\n", op->len);
    broken = ILLEGAL_ADDRESS;
  } else if (op->kernel) {
    op->kernel->run(op->blocks, op->parameters);
  } else if (op->kind == SET) {
    memset(op->to, op->value, op->len);
  } else {
    memmove(op->to, op->from, op->len);
  }
}

static bool host_call(Op *op, uint64_t now);

static void run(Stream *stream, uint64_t now) {
  Op *op = stream->head;
  if (!host_call(op, now)) return;
  bool takes_time = op->kind == COPY || op->kind == SET || op->kind == LAUNCH;
  if (takes_time && !op->begun) {
    begin_work(op, now);
    return;
  }
  if (takes_time) end_work(op);
  if (op->kind == RECORD && op->event->done < op->serial) {
    op->event->done = op->serial;
    op->event->done_ns = now;
  }
  stream->head = op->next;
  if (!stream->head) stream->tail = &stream->head;
  if (op->event) event_unused(op->event);
  if (op->done) *op->done = true;
  free(op->staged);
  free(op);
}

static void sweep(void) {
  for (Stream **at = &streams; *at;) {
    Stream *stream = *at;
    if (stream->destroyed && !stream->head) {
      *at = stream->next;
      free(stream);
    } else {
      at = &stream->next;
    }
  }
}

static void *engine(void *unused) {
  (void)unused;
  pthread_mutex_lock(&lock);
  for (;;) {
    uint64_t now = now_ns(), due = next_due();
    Stream *stream = broken ? NULL : choose(now);
    if (stream) {
      run(stream, now);
      pthread_cond_broadcast(&progress);
    } else if (due && !broken) {
      struct timespec until = {(time_t)(due / 1000000000u), (long)(due % 1000000000u)};
      pthread_cond_timedwait(&work, &lock, &until);
    } else {
      sweep();
      pthread_cond_wait(&work, &lock);
    }
  }
  return NULL;
}

static void begin(void) {
  devices_count = (int)number("FAKE_CUDA_DEVICES", 1);
  if (devices_count > DEVICES_MAX) devices_count = DEVICES_MAX;
  driver_version = (int)number("FAKE_CUDA_DRIVER", 13000);
  memory_bytes = number("FAKE_CUDA_MEMORY", 256ul << 20);
  taken_bytes = number("FAKE_CUDA_TAKEN", 0);
  delay_us = number("FAKE_CUDA_DELAY_US", 200);
  read_us = number("FAKE_CUDA_READ_US", delay_us);
  lost_after = number("FAKE_CUDA_LOST_AFTER", 0);
  choice = number("FAKE_CUDA_SEED", 1);
  import_refused = says_refuse("FAKE_CUDA_IMPORT");
  pin_refused = says_refuse("FAKE_CUDA_PIN");
  image_refused = says_refuse("FAKE_CUDA_IMAGE");
  pthread_t thread;
  if (pthread_create(&thread, NULL, engine, NULL) == 0) pthread_detach(thread);
}

/* ---- calls ----------------------------------------------------------------------------------------------------- */

#define ENTER()                        \
  if (!ready) return NOT_INITIALIZED;  \
  pthread_mutex_lock(&lock);           \
  CUresult result = broken;            \
  if (result != SUCCESS) goto leave

#define ENTER_CONTEXT()                 \
  if (ready && !current) return INVALID_CONTEXT; \
  ENTER()

#define REQUIRE(condition, otherwise) \
  do {                                \
    if (!(condition)) {               \
      result = (otherwise);           \
      goto leave;                     \
    }                                 \
  } while (0)

#define LEAVE()                \
  leave:                       \
  pthread_mutex_unlock(&lock); \
  return result

CUresult cuInit(unsigned flags) {
  if (flags != 0) return INVALID_VALUE;
  pthread_once(&once, begin);
  if (devices_count == 0) return NO_DEVICE;
  ready = true;
  return SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  pthread_once(&once, begin);
  *version = driver_version;
  return SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  ENTER();
  *count = devices_count;
  LEAVE();
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  ENTER();
  REQUIRE(ordinal >= 0 && ordinal < devices_count, INVALID_DEVICE);
  *device = ordinal;
  LEAVE();
}

CUresult cuDeviceGetName(char *name, int len, CUdevice device) {
  ENTER();
  snprintf(name, (size_t)len, "Fake GPU %d", device);
  LEAVE();
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
  ENTER();
  REQUIRE(device >= 0 && device < devices_count, INVALID_DEVICE);
  *bytes = memory_bytes;
  LEAVE();
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
  ENTER();
  REQUIRE(device >= 0 && device < devices_count, INVALID_DEVICE);
  switch (attribute) {
    case ATTRIBUTE_MAJOR: *value = 8; break;
    case ATTRIBUTE_MINOR: *value = 9; break;
    case ATTRIBUTE_VMM:
    case ATTRIBUTE_POSIX_FD: *value = 1; break;
    default: *value = 0;
  }
  LEAVE();
}

CUresult cuDevicePrimaryCtxRetain(void **context, CUdevice device) {
  ENTER();
  REQUIRE(device >= 0 && device < devices_count, INVALID_DEVICE);
  contexts[device]++;
  *context = &contexts[device];
  LEAVE();
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  ENTER();
  REQUIRE(device >= 0 && device < devices_count && contexts[device] > 0, INVALID_DEVICE);
  contexts[device]--;
  LEAVE();
}

CUresult cuCtxSetCurrent(void *context) {
  ENTER();
  current = context;
  LEAVE();
}

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
  ENTER_CONTEXT();
  size_t held = used_bytes[current - contexts] + taken_bytes;
  *free_bytes = held < memory_bytes ? memory_bytes - held : 0;
  *total_bytes = memory_bytes;
  LEAVE();
}

/* ---- memory ---------------------------------------------------------------------------------------------------- */

static bool is_granular(size_t value) { return value != 0 && value % GRANULARITY == 0; }

static void handle_unused(Handle *handle) {
  if (--handle->uses > 0) return;
  for (Handle **at = &handles; *at; at = &(*at)->next)
    if (*at == handle) {
      *at = handle->next;
      break;
    }
  if (!handle->imported) used_bytes[handle->device] -= handle->size;
  close(handle->fd);
  free(handle);
}

static Handle *handle_of(CUmemGenericAllocationHandle value) {
  Handle *handle = handles;
  while (handle && (uintptr_t)handle != (uintptr_t)value) handle = handle->next;
  return handle;
}

static Handle *new_handle(int fd, size_t size, CUdevice device, bool imported) {
  Handle *handle = calloc(1, sizeof *handle);
  *handle = (Handle){.fd = fd, .size = size, .device = device, .uses = 1, .imported = imported, .next = handles};
  return handles = handle;
}

static void poison(int fd, size_t size) {
  void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) return;
  memset(at, POISON, size);
  munmap(at, size);
}

CUresult cuMemGetAllocationGranularity(size_t *granularity, const AllocationProp *prop, int option) {
  (void)option;
  ENTER();
  REQUIRE(prop->type == 1 && prop->location.type == 1, INVALID_VALUE);
  *granularity = GRANULARITY;
  LEAVE();
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *out, size_t size, const AllocationProp *prop, unsigned long long flags) {
  ENTER();
  REQUIRE(flags == 0 && is_granular(size) && prop->type == 1 && prop->location.type == 1, INVALID_VALUE);
  CUdevice device = prop->location.id;
  REQUIRE(device >= 0 && device < devices_count, INVALID_DEVICE);
  REQUIRE(used_bytes[device] + taken_bytes + size <= memory_bytes, OUT_OF_MEMORY);
  int fd = memfd_create("fake-vram", MFD_CLOEXEC);
  REQUIRE(fd >= 0, OUT_OF_MEMORY);
  if (ftruncate(fd, (off_t)size) != 0) {
    close(fd);
    REQUIRE(false, OUT_OF_MEMORY);
  }
  poison(fd, size);
  used_bytes[device] += size;
  *out = (uintptr_t)new_handle(fd, size, device, false);
  LEAVE();
}

CUresult cuMemRelease(CUmemGenericAllocationHandle value) {
  ENTER();
  Handle *handle = handle_of(value);
  REQUIRE(handle, INVALID_VALUE);
  handle_unused(handle);
  LEAVE();
}

CUresult cuMemExportToShareableHandle(void *out, CUmemGenericAllocationHandle value, int type, unsigned long long flags) {
  ENTER();
  Handle *handle = handle_of(value);
  REQUIRE(handle && type == 1 && flags == 0, INVALID_VALUE);
  int fd = dup(handle->fd);
  REQUIRE(fd >= 0, OUT_OF_MEMORY);
  *(int *)out = fd;
  LEAVE();
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *out, void *os_handle, int type) {
  ENTER();
  REQUIRE(!import_refused, NOT_PERMITTED);
  REQUIRE(type == 1, INVALID_VALUE);
  struct stat stat;
  int fd = (int)(intptr_t)os_handle;
  REQUIRE(fstat(fd, &stat) == 0 && is_granular((size_t)stat.st_size), INVALID_VALUE);
  fd = dup(fd);
  REQUIRE(fd >= 0, OUT_OF_MEMORY);
  *out = (uintptr_t)new_handle(fd, (size_t)stat.st_size, 0, true);
  LEAVE();
}

static Range **find(Range **list, uintptr_t at, size_t len) {
  for (; *list; list = &(*list)->next)
    if ((*list)->at == at && (*list)->len == len) return list;
  return NULL;
}

static bool overlaps(const Range *list, uintptr_t at, size_t len) {
  for (; list; list = list->next)
    if (list->at < at + len && at < list->at + list->len) return true;
  return false;
}

static bool inside(const Range *list, uintptr_t at, size_t len) {
  for (; list; list = list->next)
    if (list->at <= at && at + len <= list->at + list->len) return true;
  return false;
}

static void add(Range **list, uintptr_t at, size_t len, Handle *handle) {
  Range *range = calloc(1, sizeof *range);
  *range = (Range){.at = at, .len = len, .handle = handle, .next = *list};
  *list = range;
}

static void take(Range **at) {
  Range *range = *at;
  *at = range->next;
  free(range);
}

static void close_range_at(uintptr_t at, size_t len) {
  mmap((void *)at, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
}

CUresult cuMemAddressReserve(CUdeviceptr *out, size_t size, size_t alignment, CUdeviceptr wish, unsigned long long flags) {
  (void)wish;
  ENTER();
  REQUIRE(is_granular(size) && flags == 0 && alignment <= GRANULARITY, INVALID_VALUE);
  size_t all = size + GRANULARITY;
  char *base = mmap(NULL, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  REQUIRE(base != MAP_FAILED, OUT_OF_MEMORY);
  uintptr_t at = ((uintptr_t)base + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
  if (at > (uintptr_t)base) munmap(base, at - (uintptr_t)base);
  size_t behind = (uintptr_t)base + all - (at + size);
  if (behind) munmap((void *)(at + size), behind);
  add(&reservations, at, size, NULL);
  *out = at;
  LEAVE();
}

CUresult cuMemAddressFree(CUdeviceptr at, size_t size) {
  ENTER();
  Range **range = find(&reservations, (uintptr_t)at, size);
  REQUIRE(range && !overlaps(mappings, (uintptr_t)at, size), INVALID_VALUE);
  take(range);
  munmap((void *)(uintptr_t)at, size);
  LEAVE();
}

CUresult cuMemMap(CUdeviceptr at, size_t size, size_t offset, CUmemGenericAllocationHandle value, unsigned long long flags) {
  ENTER();
  Handle *handle = handle_of(value);
  REQUIRE(handle && flags == 0 && offset == 0 && is_granular(size) && at % GRANULARITY == 0, INVALID_VALUE);
  REQUIRE(size <= handle->size && inside(reservations, (uintptr_t)at, size), INVALID_VALUE);
  REQUIRE(!overlaps(mappings, (uintptr_t)at, size), INVALID_VALUE);
  void *got = mmap((void *)(uintptr_t)at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, handle->fd, 0);
  REQUIRE(got != MAP_FAILED, OUT_OF_MEMORY);
  handle->uses++;
  add(&mappings, (uintptr_t)at, size, handle);
  LEAVE();
}

CUresult cuMemUnmap(CUdeviceptr at, size_t size) {
  ENTER();
  Range **range = find(&mappings, (uintptr_t)at, size);
  REQUIRE(range, INVALID_VALUE);
  close_range_at((uintptr_t)at, size);
  handle_unused((*range)->handle);
  take(range);
  LEAVE();
}

CUresult cuMemSetAccess(CUdeviceptr at, size_t size, const AccessDesc *access, size_t count) {
  ENTER();
  REQUIRE(count == 1 && access->location.type == 1, INVALID_VALUE);
  REQUIRE(access->flags == 0 || access->flags == 1 || access->flags == 3, INVALID_VALUE);
  Range **range = find(&mappings, (uintptr_t)at, size);
  REQUIRE(range, INVALID_VALUE);
  (*range)->access = access->flags;
  int protection = access->flags == 3 ? PROT_READ | PROT_WRITE : access->flags == 1 ? PROT_READ : PROT_NONE;
  REQUIRE(mprotect((void *)(uintptr_t)at, size, protection) == 0, INVALID_VALUE);
  LEAVE();
}

CUresult cuMemHostRegister_v2(void *at, size_t size, unsigned flags) {
  (void)flags;
  ENTER_CONTEXT();
  REQUIRE(at && size, INVALID_VALUE);
  REQUIRE(!pin_refused, OUT_OF_MEMORY);
  REQUIRE(!overlaps(pinned, (uintptr_t)at, size), ALREADY_REGISTERED);
  add(&pinned, (uintptr_t)at, size, NULL);
  LEAVE();
}

CUresult cuMemHostUnregister(void *at) {
  ENTER_CONTEXT();
  Range **range = &pinned;
  while (*range && (*range)->at != (uintptr_t)at) range = &(*range)->next;
  REQUIRE(*range, NOT_REGISTERED);
  take(range);
  LEAVE();
}

/* ---- streams and events ---------------------------------------------------------------------------------------- */

CUresult cuStreamCreate(void **out, unsigned flags) {
  ENTER_CONTEXT();
  REQUIRE(flags <= 1, INVALID_VALUE);
  Stream *stream = calloc(1, sizeof *stream);
  stream->tail = &stream->head;
  stream->next = streams;
  *out = streams = stream;
  LEAVE();
}

static bool is_stream(const Stream *wanted) {
  const Stream *stream = streams;
  while (stream && stream != wanted) stream = stream->next;
  return stream && !stream->destroyed;
}

CUresult cuStreamDestroy_v2(void *stream) {
  ENTER_CONTEXT();
  REQUIRE(is_stream(stream), INVALID_HANDLE);
  ((Stream *)stream)->destroyed = true;
  pthread_cond_signal(&work);
  LEAVE();
}

static void push(Stream *stream, Op op) {
  Op *own = malloc(sizeof *own);
  *own = op;
  own->next = NULL;
  if (own->event) own->event->uses++;
  *stream->tail = own;
  stream->tail = &own->next;
  pthread_cond_signal(&work);
}

CUresult cuEventCreate(void **out, unsigned flags) {
  (void)flags;
  ENTER_CONTEXT();
  Event *event = calloc(1, sizeof *event);
  event->uses = 1;
  *out = event;
  LEAVE();
}

CUresult cuEventDestroy_v2(void *raw) {
  ENTER_CONTEXT();
  Event *event = raw;
  REQUIRE(event && !event->destroyed, INVALID_HANDLE);
  event->destroyed = true;
  event_unused(event);
  LEAVE();
}

CUresult cuEventRecord(void *raw, void *stream) {
  ENTER_CONTEXT();
  Event *event = raw;
  REQUIRE(event && is_stream(stream), INVALID_HANDLE);
  push(stream, (Op){.kind = RECORD, .event = event, .serial = ++event->issued});
  LEAVE();
}

CUresult cuEventQuery(void *raw) {
  ENTER_CONTEXT();
  Event *event = raw;
  REQUIRE(event, INVALID_HANDLE);
  result = event->done >= event->issued ? SUCCESS : NOT_READY;
  LEAVE();
}

CUresult cuEventSynchronize(void *raw) {
  ENTER_CONTEXT();
  Event *event = raw;
  REQUIRE(event, INVALID_HANDLE);
  unsigned long wanted = event->issued;
  while (event->done < wanted && !broken) pthread_cond_wait(&progress, &lock);
  result = broken;
  LEAVE();
}

CUresult cuEventElapsedTime(float *milliseconds, void *from, void *to) {
  ENTER_CONTEXT();
  const Event *begun = from, *ended = to;
  REQUIRE(begun && ended && begun->issued && ended->issued, INVALID_HANDLE);
  REQUIRE(begun->done >= begun->issued && ended->done >= ended->issued, NOT_READY);
  *milliseconds = (float)((double)(ended->done_ns - begun->done_ns) / 1e6);
  LEAVE();
}

CUresult cuStreamWaitEvent(void *stream, void *raw, unsigned flags) {
  ENTER_CONTEXT();
  Event *event = raw;
  REQUIRE(flags == 0 && event && is_stream(stream), INVALID_HANDLE);
  if (event->issued) push(stream, (Op){.kind = WAIT, .event = event, .serial = event->issued});
  LEAVE();
}

/* ---- copies ---------------------------------------------------------------------------------------------------- */

/* Pinned memory is used when the copy runs; pageable memory is read now, and written before the call returns. A range of
 * which only a part is pinned is an error. */
static bool host_range(const void *at, size_t len, bool *is_pinned) {
  *is_pinned = inside(pinned, (uintptr_t)at, len);
  return *is_pinned || !overlaps(pinned, (uintptr_t)at, len);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t len, void *stream) {
  ENTER_CONTEXT();
  bool is_pinned;
  REQUIRE(is_stream(stream), INVALID_HANDLE);
  REQUIRE(len && host_range(from, len, &is_pinned), INVALID_VALUE);
  Op op = {.kind = COPY, .to = (void *)(uintptr_t)to, .from = from, .len = len, .to_device = true};
  if (!is_pinned) {
    op.from = op.staged = malloc(len);
    memcpy(op.staged, from, len);
  }
  push(stream, op);
  LEAVE();
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t len, void *stream) {
  ENTER_CONTEXT();
  bool is_pinned, done = false;
  REQUIRE(is_stream(stream), INVALID_HANDLE);
  REQUIRE(len && host_range(to, len, &is_pinned), INVALID_VALUE);
  Op op = {.kind = COPY, .to = to, .from = (void *)(uintptr_t)from, .len = len, .from_device = true};
  if (!is_pinned) op.done = &done;
  push(stream, op);
  while (!is_pinned && !done && !broken) pthread_cond_wait(&progress, &lock);
  result = broken;
  LEAVE();
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t len, void *stream) {
  ENTER_CONTEXT();
  REQUIRE(is_stream(stream), INVALID_HANDLE);
  REQUIRE(len, INVALID_VALUE);
  push(stream, (Op){.kind = COPY, .to = (void *)(uintptr_t)to, .from = (void *)(uintptr_t)from, .len = len, .to_device = true, .from_device = true});
  LEAVE();
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t len, void *stream) {
  ENTER_CONTEXT();
  REQUIRE(is_stream(stream), INVALID_HANDLE);
  REQUIRE(len, INVALID_VALUE);
  push(stream, (Op){.kind = SET, .to = (void *)(uintptr_t)to, .value = value, .len = len, .to_device = true});
  LEAVE();
}

#include "alloc.h"
#include "launch.h"
#include "host_func.h"
