/* KV codecs from C: encodes vectors to a frame, decodes them, and shows what is refused.
 *
 *   kv [CODEC] [DIM]      CODEC: "tq:4"; DIM: 128
 *
 * The vectors are made up; one holds a NaN, which must come back as it was while the others do not notice. Exit code 0
 * when everything is as flea.h says.
 */
#include <flea.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT 256

static int fail(const char *what, int32_t status) {
  fprintf(stderr, "%s: %s: %s\n", what, flea_status_name(status), flea_last_error());
  return 1;
}

/* Squared error of all vectors but the one with the NaN, over their squared length. */
static double error_of(const float *values, const float *back, size_t dim, size_t odd) {
  double error = 0, energy = 0;
  size_t i;
  for (i = 0; i < COUNT * dim; i++) {
    if (i / dim == odd) continue;
    error += (double)(values[i] - back[i]) * (values[i] - back[i]);
    energy += (double)values[i] * values[i];
  }
  return error / energy;
}

static int round_trip(const flea_kv *kv, const float *values, float *back, unsigned char *frame, size_t bound, size_t dim) {
  flea_kv_frame info = {.struct_size = sizeof info};
  size_t written = 0;
  int32_t status = flea_kv_encode(kv, FLEA_KV_F32, values, COUNT, frame, bound, &written);
  if (status != FLEA_OK) return fail("flea_kv_encode", status);
  status = flea_kv_frame_info(frame, written, &info);
  if (status != FLEA_OK) return fail("flea_kv_frame_info", status);
  if (info.count != COUNT || info.dim != dim) return fail("flea_kv_frame_info: other vectors", status);
  status = flea_kv_decode(kv, frame, written, back, COUNT);
  if (status != FLEA_OK) return fail("flea_kv_decode", status);
  if (memcmp(values + 7 * dim, back + 7 * dim, dim * sizeof *values) != 0) return fail("the odd vector changed", 0);
  printf("%zu values in %zu bytes: %.3f bits each, squared error %.2e\n", COUNT * dim, written,
         8.0 * (double)written / (double)(COUNT * dim), error_of(values, back, dim, 7));
  if (flea_kv_decode(kv, frame, written - 1, back, COUNT) >= 0) return fail("a cut frame was taken", 0);
  frame[written / 2] ^= 4;
  status = flea_kv_decode(kv, frame, written, back, COUNT);
  if (status != FLEA_E_CHECKSUM) return fail("a changed frame was taken", status);
  if (flea_kv_encode(kv, FLEA_KV_F32, values, COUNT, frame, 8, &written) != FLEA_E_INVALID || written <= 8)
    return fail("too little room was not noticed", 0);
  return 0;
}

int main(int argc, char **argv) {
  const char *codec = argc > 1 ? argv[1] : "tq:4";
  size_t dim = argc > 2 ? (size_t)atoi(argv[2]) : 128, bound, i;
  flea_kv *kv = NULL, *none = NULL;
  float *values, *back;
  unsigned char *frame;
  int result = 1;
  int32_t status = flea_kv_open(codec, (uint32_t)dim, NULL, 0, &kv);
  if (status != FLEA_OK) return fail(codec, status);
  if (flea_kv_open("tq:9", 128, NULL, 0, &none) != FLEA_E_INVALID || none != NULL) return fail("tq:9 was taken", 0);
  bound = flea_kv_bound(kv, COUNT);
  values = malloc(COUNT * dim * sizeof *values);
  back = malloc(COUNT * dim * sizeof *back);
  frame = malloc(bound);
  if (values != NULL && back != NULL && frame != NULL) {
    for (i = 0; i < COUNT * dim; i++) values[i] = sinf((float)i * 0.37f) + 0.5f * cosf((float)(i * i % 9973));
    values[7 * dim + 3] = NAN;
    result = round_trip(kv, values, back, frame, bound, dim);
  }
  free(values);
  free(back);
  free(frame);
  flea_kv_close(kv);
  return result;
}
