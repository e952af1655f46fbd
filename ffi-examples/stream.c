/* The smallest C host of flea: streams a model and prints a checksum of every layer.
 *
 *   stream MODEL [MEMORY] [PASSES]      MEMORY: "4GiB", "50%"; PASSES: 2
 *
 * It computes nothing; a real host multiplies with the weights between acquire and release. The checksums of every
 * pass must agree, whether a layer was resident or streamed. Exit code 0 when they do.
 */
#include <flea.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const char *what, int32_t status) {
  fprintf(stderr, "%s: %s: %s\n", what, flea_status_name(status), flea_last_error());
  return 1;
}

/* FNV-1a over 8 bytes at a time, the rest one by one. */
static uint64_t checksum(const unsigned char *bytes, uint64_t len, uint64_t hash) {
  uint64_t i = 0, word;
  for (; i + 8 <= len; i += 8) {
    memcpy(&word, bytes + i, 8);
    hash = (hash ^ word) * UINT64_C(0x100000001b3);
  }
  for (; i < len; i++) hash = (hash ^ bytes[i]) * UINT64_C(0x100000001b3);
  return hash;
}

/* The part of a tensor that belongs to `layer`: a large output head is cut by rows into several layers. */
static void part_of(const flea_tensor *tensor, int32_t layer, uint64_t *from, uint64_t *len) {
  *from = 0;
  *len = tensor->bytes;
  if (tensor->rows_per_layer > 0) {
    uint64_t row_bytes = tensor->bytes / (tensor->shape[1] * tensor->shape[2] * tensor->shape[3]);
    *from = (uint64_t)(layer - tensor->layer) * tensor->rows_per_layer * row_bytes;
    *len = layer < tensor->layer_last ? tensor->rows_per_layer * row_bytes : tensor->bytes - *from;
  }
}

static int stream_layer(flea_model *model, const flea_info *info, uint32_t layer, uint64_t *sum) {
  int32_t status = flea_acquire(model, layer, NULL, 0, -1);
  uint32_t i;
  if (status != FLEA_OK) return fail("flea_acquire", status);
  *sum = UINT64_C(0xcbf29ce484222325);
  for (i = 0; i < info->tensor_count; i++) {
    flea_tensor tensor = {.struct_size = sizeof tensor};
    uint64_t from, len;
    status = flea_model_tensor_at(model, i, &tensor);
    if (status != FLEA_OK) return fail("flea_model_tensor_at", status);
    if ((int32_t)layer < tensor.layer || (int32_t)layer > tensor.layer_last) continue;
    part_of(&tensor, (int32_t)layer, &from, &len);
    *sum = checksum((const unsigned char *)tensor.data + from, len, *sum);
  }
  status = flea_release(model, layer);
  return status == FLEA_OK ? 0 : fail("flea_release", status);
}

int main(int argc, char **argv) {
  flea_open_options options = {.struct_size = sizeof options};
  flea_info info = {.struct_size = sizeof info};
  flea_stats_data stats = {.struct_size = sizeof stats};
  flea_model *model = NULL;
  uint64_t *sums = NULL;
  int passes = argc > 3 ? atoi(argv[3]) : 2, pass, result = 0;
  int32_t status;
  uint32_t layer;

  if (argc < 2 || passes < 1) {
    fprintf(stderr, "usage: %s MODEL [MEMORY] [PASSES]\n", argv[0]);
    return 2;
  }
  if (flea_abi_version() != FLEA_ABI_VERSION) fprintf(stderr, "note: libflea has another version than this header\n");
  options.memory = argc > 2 ? argv[2] : NULL;
  status = flea_model_open(argv[1], &options, &model);
  if (status != FLEA_OK) return fail(argv[1], status);
  flea_model_info(model, &info);
  sums = calloc(info.layer_count, sizeof *sums);
  if (sums == NULL) result = 1;

  for (pass = 0; pass < passes && result == 0; pass++) {
    for (layer = 0; layer < info.layer_count && result == 0; layer++) {
      uint64_t sum = 0;
      result = stream_layer(model, &info, layer, &sum);
      if (pass == 0) sums[layer] = sum;
      if (result == 0 && sum != sums[layer]) {
        fprintf(stderr, "layer %" PRIu32 " changed between passes\n", layer);
        result = 1;
      }
    }
  }
  for (layer = 0; layer < info.layer_count && result == 0; layer++)
    printf("layer %3" PRIu32 " %016" PRIx64 "\n", layer, sums[layer]);
  if (result == 0 && flea_stats(model, &stats) == FLEA_OK)
    printf("acquires %" PRIu64 " loads %" PRIu64 " bytes_read %" PRIu64 " resident_bytes %" PRIu64 "\n", stats.acquires,
           stats.loads, stats.bytes_read, stats.resident_bytes);
  free(sums);
  flea_model_close(model);
  return result;
}
