/* The ggml device FLEA, as a program sees it that compiles the device in (`flea run` does).
 *
 * Stock llama.cpp binaries need none of this: they load libggml-flea.so through GGML_BACKEND_PATH and the device finds
 * the model by itself. A program that controls its own loading calls, in this order:
 *
 *   1. flea_model_open(path, options with FLEA_OPEN_DEFER_PLAN and host_pending_bytes = ggml_backend_flea_pending_bytes())
 *   2. ggml_backend_flea_configure(&config with that model)
 *   3. ggml_backend_register(ggml_backend_flea_reg()), then load the model with all layers on the device FLEA; on several GPUs, on
 *      all devices of the registration, divided as ggml_backend_flea_split says
 *   4. ggml_backend_flea_loaded()
 *   5. ... llama_decode ..., free the context, free the llama model
 *   6. ggml_backend_flea_configure(NULL), flea_model_close(model)
 */
#ifndef GGML_FLEA_H
#define GGML_FLEA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "flea.h"
#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(GGML_FLEA_SHARED)
#define GGML_FLEA_API __attribute__((visibility("default")))
#else
#define GGML_FLEA_API
#endif

/* Keys and values with less memory than they need. The program gives each tensor of the KV cache an address that has
   memory only between acquire and release of its layer. Every call returns FLEA_OK or a negative status, and may come from any
   thread; `context` is handed through. Calls and context are valid until the device is configured anew. */
typedef struct ggml_flea_kv {
  uint32_t struct_size; /* sizeof(ggml_flea_kv) */
  const void *context;
  /* The address of `rows_count` rows of `row_bytes` bytes, keys (side 0) or values (side 1) of a layer; NULL: refused. */
  void *(*place)(const void *context, uint32_t layer, uint32_t side, uint64_t rows_count, uint64_t row_bytes);
  /* Waits until keys and values of a layer are in memory. */
  int32_t (*acquire)(const void *context, uint32_t layer);
  /* Rows [first, end) were written under the lease. */
  int32_t (*wrote)(const void *context, uint32_t layer, uint32_t side, uint64_t first, uint64_t end);
  int32_t (*release)(const void *context, uint32_t layer);
  /* Every row is zero again. */
  int32_t (*clear)(const void *context);
  /* The tensors are gone. */
  int32_t (*remove)(const void *context);
  /* Memory that all leases together can need. */
  uint64_t (*ring_bytes)(const void *context);
} ggml_flea_kv;

typedef struct ggml_flea_config {
  uint32_t struct_size; /* sizeof(ggml_flea_config) */
  /* true: the device's memory reports itself as host memory from the start, so that llama.cpp's loader reads straight
     "into" tensor->data. Only for a loader that never writes there for a streamed tensor (windows are not writable). */
  bool loader_skips_streamed;
  /* true: a layer is computed with when all of it is in memory. false: as soon as what its first operations need is. */
  bool whole_layers;
  /* Already opened by the caller, who closes it after the last llama_model that uses it is freed. With a model given
     nothing is searched and FLEA_MODEL, FLEA_MEMORY, FLEA_READER and FLEA_ENDPOINT are not read. */
  flea_model *model;
  /* NULL: keys and values stay in memory. Copied. */
  const ggml_flea_kv *kv;
  /* true: while a few tokens are computed, the experts that the next layer's router will probably choose are read ahead. Turns
     itself off where more guesses are wrong than right. */
  bool guesses_experts;
} ggml_flea_config;

/* Looks for ggml's device of a GPU (CUDA<index>), on which a model computes that was opened with flea_open_options.vram. Where
   the program has none, `library` is loaded (a libggml-cuda.so of the very version of ggml in this program; NULL: none). Returns
   FLEA_OK, or NOTFOUND, INVALID or UNSUPPORTED with a text in ggml_backend_flea_last_failure. Any thread. */
GGML_FLEA_API int32_t ggml_backend_flea_find_gpu(uint32_t index, const char *library);

/* How many devices the registration has, one for each GPU that the model is on; in `shares`, which has `count` elements, how many of
   llama.cpp's layers are on each: for llama_model_params.tensor_split. Zeros behind them. FLEA_E_INVALID where they do not fit. */
GGML_FLEA_API int32_t ggml_backend_flea_split(float *shares, size_t count);

/* Says that a loader which skipped streamed tensors has finished: on a GPU the device's memory is host memory no more. */
GGML_FLEA_API void ggml_backend_flea_loaded(void);

/* The backend's registration; one static object, never freed. Any thread. */
GGML_FLEA_API ggml_backend_reg_t ggml_backend_flea_reg(void);

/* Sets what to stream before a model is loaded; NULL forgets it. The struct is copied. Not while a model that uses
   the device is loaded: returns FLEA_E_BUSY then, else FLEA_OK. */
GGML_FLEA_API int32_t ggml_backend_flea_configure(const ggml_flea_config *config);

/* For flea_open_options.host_pending_bytes: what the device's own memory (KV cache, compute) has reserved but not touched
   yet. Written right before the first acquire; the pointer is valid for the life of the program. */
GGML_FLEA_API const uint64_t *ggml_backend_flea_pending_bytes(void);

/* The model that is streamed now, or NULL. Valid until its llama_model is freed. */
GGML_FLEA_API flea_model *ggml_backend_flea_model(void);

/* The text of the last failure in the device (graph_compute says only GGML_STATUS_FAILED), and flea's status for it:
   FLEA_OK when nothing failed. The text is valid until the same thread calls this again. */
GGML_FLEA_API int32_t ggml_backend_flea_last_failure(const char **text);

/* Bytes the host's loader handed over for streamed weights and that were dropped; 0 where the loader skips them. */
GGML_FLEA_API uint64_t ggml_backend_flea_loader_bytes(void);

/* Leases that were given back behind an event of the GPU, nobody waiting for it. */
GGML_FLEA_API uint64_t ggml_backend_flea_releases_behind_gpu(void);

/* Pieces of graphs that were computed before their layer was whole. */
GGML_FLEA_API uint64_t ggml_backend_flea_early_pieces(void);

/* How often a graph was cut to see which experts a router had chosen. */
GGML_FLEA_API uint64_t ggml_backend_flea_expert_cuts(void);

/* Experts guessed for the next layer, and how many of them were right. */
GGML_FLEA_API uint64_t ggml_backend_flea_expert_guesses(uint64_t *right);

#ifdef __cplusplus
}
#endif

#endif /* GGML_FLEA_H */
