/* A libcufile.so.0 for machines without GPUDirect Storage, for the fake GPU of libcuda.c: what flea calls, by pread.
 *
 * Memory of the fake GPU is mapped where its addresses say, so a read is one into memory. What the real one would do by a detour
 * (offsets, lengths and targets that are not multiples of 4 KiB) is refused here.
 *
 * Environment:
 *   FAKE_CUFILE=real          peer to peer (the default)
 *   FAKE_CUFILE=compat        compatibility mode: everything works, and nothing of it is GDS
 *   FAKE_CUFILE=may_fall      peer to peer, but compatibility mode cannot be forbidden
 *   FAKE_CUFILE=hang          opening the driver never ends
 *   FAKE_CUFILE=wrong         the second half of what is read is another place's
 *   FAKE_CUFILE=refuse        opening the driver fails
 *   FAKE_CUFILE_FAIL_AFTER=N  the N-th read of a process and all later ones fail with EIO
 *   FAKE_CUFILE_FAIL_AT=N     every read that byte N of a file is part of fails with EIO
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

/* As in cufile.h; only what is looked at has a name. */
typedef struct {
  int error, cuda_error;
} Status;
typedef struct {
  int kind;
  union {
    int fd;
    void *handle;
  } file;
  const void *operations;
} Description;
typedef struct {
  unsigned major, minor;
  size_t poll_bytes, direct_bytes;
  unsigned status_flags, control_flags;
  unsigned features, sizes[5];
} Properties;

enum { NVFS_SETUP_ERROR = 5002, INVALID_VALUE = 5022, NOT_OPEN = 5001 };
enum { NVME_SUPPORTED = 4, ALLOW_COMPAT = 1, PAGE = 4096 };
static const Status FINE = {0, 0};

static bool compat_allowed = true, is_open;
static atomic_ulong reads_count;

static bool is(const char *mode) {
  const char *text = getenv("FAKE_CUFILE");
  return strcmp(text ? text : "real", mode) == 0;
}

Status cuFileSetParameterBool(int parameter, bool value) {
  if (parameter != ALLOW_COMPAT || is_open) return (Status){INVALID_VALUE, 0};
  if (!is("may_fall") && !is("compat")) compat_allowed = value;
  return FINE;
}

Status cuFileDriverOpen(void) {
  while (is("hang")) pause();
  if (is("refuse")) return (Status){NVFS_SETUP_ERROR, 0};
  is_open = true;
  return FINE;
}

Status cuFileDriverGetProperties(Properties *properties) {
  if (!is_open) return (Status){NOT_OPEN, 0};
  memset(properties, 0, sizeof *properties);
  properties->control_flags = compat_allowed ? 1u << ALLOW_COMPAT : 0;
  if (is("compat")) return FINE;
  properties->major = 2;
  properties->status_flags = 1u << NVME_SUPPORTED;
  return FINE;
}

Status cuFileHandleRegister(void **handle, Description *description) {
  if (!is_open || description->kind != 1) return (Status){NOT_OPEN, 0};
  *handle = (void *)(intptr_t)(description->file.fd + 1);
  return FINE;
}

void cuFileHandleDeregister(void *handle) { (void)handle; }

Status cuFileBufRegister(const void *at, size_t len, int flags) {
  if (!is_open || (uintptr_t)at % PAGE != 0 || len == 0 || flags != 0) return (Status){INVALID_VALUE, 0};
  return FINE;
}

Status cuFileBufDeregister(const void *at) {
  (void)at;
  return FINE;
}

ssize_t cuFileRead(void *handle, void *base, size_t len, off_t offset, off_t target_offset) {
  if (!is_open || offset % PAGE != 0 || len % PAGE != 0 || target_offset % PAGE != 0) return -INVALID_VALUE;
  const char *fail_after = getenv("FAKE_CUFILE_FAIL_AFTER");
  if (fail_after && atomic_fetch_add(&reads_count, 1) + 1 >= strtoul(fail_after, NULL, 10)) {
    errno = EIO;
    return -1;
  }
  const char *fail_at = getenv("FAKE_CUFILE_FAIL_AT");
  const off_t bad = fail_at ? (off_t)strtoull(fail_at, NULL, 10) : -1;
  if (fail_at && offset <= bad && bad < offset + (off_t)len) {
    errno = EIO;
    return -1;
  }
  int fd = (int)(intptr_t)handle - 1;
  char *to = (char *)base + target_offset;
  ssize_t got = pread(fd, to, len, offset);
  if (got > PAGE && is("wrong")) memset(to + got / 2, 0x77, (size_t)(got - got / 2));
  return got;
}
