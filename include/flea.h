/* flea: streams LLM weights from NVMe into preallocated memory just before a host computes with them. */
#ifndef FLEA_H
#define FLEA_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

#define FLEA_ABI_VERSION 1

#define FLEA_OK 0
#define FLEA_E_INVALID -1
#define FLEA_E_NOMEM -2
#define FLEA_E_IO -3
#define FLEA_E_FORMAT -4
#define FLEA_E_NOTFOUND -5
#define FLEA_E_AGAIN -6
#define FLEA_E_TIMEOUT -7
#define FLEA_E_BUSY -8
#define FLEA_E_CONN -9
#define FLEA_E_PERM -10
#define FLEA_E_REFUSED -11
#define FLEA_E_UNSUPPORTED -12
#define FLEA_E_TRUNCATED -13
#define FLEA_E_CHANGED -14
#define FLEA_E_CHECKSUM -15
#define FLEA_E_REVOKED -16
#define FLEA_E_CANCELED -17
#define FLEA_E_INTERNAL -99

/* flea_open_options.backing */
#define FLEA_BACKING_DEFAULT 0
#define FLEA_BACKING_PRIVATE 1
#define FLEA_BACKING_SHARED 2
/* flea_open_options.reader and flea_stats_data.reader */
#define FLEA_READER_AUTO 0
#define FLEA_READER_IO_URING 1
#define FLEA_READER_PREAD 2
/* flea_open_options.flags: plan (and start reading) at the first acquire, not at open */
#define FLEA_OPEN_DEFER_PLAN 1u
/* flea_stats_data.fallbacks */
#define FLEA_FALLBACK_BUFFERED 1u    /* O_DIRECT refused: buffered reads, pages dropped behind */
#define FLEA_FALLBACK_PREAD 2u       /* io_uring refused: pread threads */
#define FLEA_FALLBACK_SMALL_PAGES 4u /* 2 MiB pages wanted, 4 KiB got */
#define FLEA_FALLBACK_NUMA 8u        /* memory could not be bound to the drive's node */
/* flea_tensor_data.flags */
#define FLEA_TENSOR_HOST_KEPT 1u /* rows or globals that the host keeps itself (token_embd); may be planned as well (tied head) */

typedef struct flea_model flea_model;

typedef struct flea_open_options {
  uint32_t struct_size;   /* sizeof(flea_open_options) */
  uint32_t backing;
  uint32_t reader;
  uint32_t slots_count;   /* 0 = 3; else 2..64 */
  uint32_t page_bytes;    /* 0 = by layer size; else 4096 or 2097152 */
  uint32_t request_bytes; /* 0 = default */
  uint32_t depth;         /* requests in flight, 0 = default */
  uint32_t flags;
  uint64_t pool_bytes;    /* the weight budget; 0 = derived from `memory` */
  const char *memory;     /* whole-process budget: "4GiB", "50%"; NULL = automatic. Only when pool_bytes is 0 */
  const char *endpoint;   /* NULL = in this process */
  /* Optional: a number of bytes the host has reserved but not touched yet (KV, compute). Read once, when the plan is
     made; it must stay valid until then. */
  const uint64_t *host_pending_bytes;
} flea_open_options;

typedef struct flea_info {
  uint32_t struct_size;
  uint32_t planned;       /* 1 once a plan exists; the fields marked (plan) are 0 before */
  uint32_t layer_count;
  uint32_t tensor_count;
  uint32_t shard_count;
  uint32_t page_bytes;
  uint32_t slots_count;
  uint32_t backing;       /* (plan) */
  uint64_t model_bytes;   /* all tensors of the model */
  uint64_t host_tensor_bytes; /* tensors the host keeps */
  uint64_t slot_bytes;        /* (plan) */
  uint64_t total_bytes;       /* (plan) */
  uint64_t host_bytes;        /* (plan) */
  uint64_t weight_budget_bytes; /* (plan) */
  uint64_t resident_bytes;      /* (plan) */
  uint64_t ring_bytes;          /* (plan) */
  uint64_t streamed_bytes_per_pass; /* (plan) */
  const char *architecture;  /* lives as long as the model */
} flea_info;

typedef struct flea_tensor {
  uint32_t struct_size;
  uint32_t type;          /* ggml type number */
  int32_t layer;          /* first layer that uses it, -1 = none (host-kept only) */
  int32_t layer_last;     /* last layer: > layer when a tensor is cut by rows into several layers */
  uint64_t rows_per_layer;/* rows in each of those but the last; 0 when not cut */
  uint32_t flags;
  uint32_t dims;
  uint64_t shape[4];      /* ggml order: shape[0] is contiguous */
  uint64_t bytes;
  uint64_t file_offset;
  uint32_t shard;
  const void *data;       /* constant address in the window; NULL when layer is -1. Readable only under a lease */
  const char *name;       /* lives as long as the model */
} flea_tensor;

typedef struct flea_stats_data {
  uint32_t struct_size;
  uint32_t reader;        /* FLEA_READER_IO_URING or FLEA_READER_PREAD */
  uint32_t direct_io;     /* 1 = O_DIRECT on every shard */
  uint32_t fallbacks;
  uint64_t acquires;      /* successful */
  uint64_t releases;
  uint64_t loads;         /* transient runs read */
  uint64_t bytes_read;    /* resident and transient, as asked of the kernel */
  uint64_t reads;         /* requests completed */
  uint64_t retries;
  uint64_t stalls;        /* acquires that waited */
  uint64_t stall_ns;      /* time acquires waited */
  uint64_t read_ns;       /* time with at least one request in flight */
  uint64_t mispredicts;   /* layers demanded out of the learned order */
  uint64_t resident_bytes;
  uint64_t page_bytes;
  double huge_page_share; /* measured, 0..1 of the pool */
} flea_stats_data;

uint32_t flea_abi_version(void);
int32_t flea_model_open(const char *path, const flea_open_options *options, flea_model **out);
void flea_model_close(flea_model *model);
int32_t flea_model_info(const flea_model *model, flea_info *out);
int32_t flea_model_tensor(const flea_model *model, const char *name, flea_tensor *out);
int32_t flea_model_tensor_at(const flea_model *model, uint32_t index, flea_tensor *out);
int32_t flea_layer_of(const flea_model *model, const void *addr); /* layer, or FLEA_E_NOTFOUND; lock-free */
int32_t flea_acquire(flea_model *model, uint32_t layer, const void *addr, size_t bytes, int64_t timeout_ns);
int32_t flea_release(flea_model *model, uint32_t layer);
int32_t flea_hint(flea_model *model, const uint32_t *layers, size_t count);
int32_t flea_stats(const flea_model *model, flea_stats_data *out);
const char *flea_last_error(void);
int32_t flea_last_errno(void);
const char *flea_status_name(int32_t status);

#ifdef __cplusplus
}
#endif
#endif
