/* The kernels of kernels/flea.cu on the processor, as the fake driver finds them: by name, with what they touch. */
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

enum { FAKE_PARAMETERS_MAX = 8, FAKE_SPANS_MAX = 4 };

/* Memory of the GPU that a kernel touches. */
typedef struct {
  unsigned long long at, len;
  int read, written;
} FakeSpan;

/* Every parameter has eight bytes. */
typedef struct {
  const char *name;
  unsigned parameters_count;
  void (*run)(unsigned blocks, const unsigned long long *parameters);
  unsigned (*touches)(const unsigned long long *parameters, FakeSpan *spans);
} FakeKernel;

const FakeKernel *fake_kernel(const char *name);

#ifdef __cplusplus
}
#endif
