/* Modules and launches of the fake CUDA driver. Part of libcuda.c, which includes it last. */
#pragma once

typedef struct {
  bool loaded;
} Module;

enum { FATBIN_MAGIC = 0xBA55ED50, BLOCK_THREADS = 256, BLOCKS_MAX = 0x7fffffff };

CUresult cuModuleLoadData(void **out, const void *image) {
  ENTER_CONTEXT();
  unsigned magic;
  memcpy(&magic, image, sizeof magic);
  REQUIRE(magic == FATBIN_MAGIC && (uintptr_t)image % 8 == 0, INVALID_IMAGE);
  REQUIRE(!image_refused, NO_BINARY_FOR_GPU);
  Module *module = calloc(1, sizeof *module);
  module->loaded = true;
  *out = module;
  LEAVE();
}

CUresult cuModuleUnload(void *raw) {
  ENTER_CONTEXT();
  Module *module = raw;
  REQUIRE(module && module->loaded, INVALID_HANDLE);
  /* Kept, so that a second unload is noticed. */
  module->loaded = false;
  LEAVE();
}

CUresult cuModuleGetFunction(void **out, void *raw, const char *name) {
  ENTER_CONTEXT();
  const Module *module = raw;
  REQUIRE(module && module->loaded, INVALID_HANDLE);
  const char *missing = getenv("FAKE_CUDA_KERNEL");
  const FakeKernel *kernel = fake_kernel(name);
  REQUIRE(kernel && (!missing || strcmp(missing, name) != 0), NOT_FOUND);
  *out = (void *)(uintptr_t)kernel;
  LEAVE();
}

CUresult cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z,
                        unsigned shared_bytes, void *stream, void **parameters, void **extra) {
  ENTER_CONTEXT();
  const FakeKernel *kernel = function;
  REQUIRE(is_stream(stream), INVALID_HANDLE);
  REQUIRE(kernel && fake_kernel(kernel->name) == kernel && parameters && !extra && shared_bytes == 0, INVALID_VALUE);
  REQUIRE(grid_x >= 1 && grid_x <= BLOCKS_MAX && grid_y == 1 && grid_z == 1, INVALID_VALUE);
  REQUIRE(block_x == BLOCK_THREADS && block_y == 1 && block_z == 1, INVALID_VALUE);
  Op op = {.kind = LAUNCH, .kernel = kernel, .blocks = grid_x};
  for (unsigned i = 0; i < kernel->parameters_count; i++) memcpy(&op.parameters[i], parameters[i], sizeof op.parameters[i]);
  push(stream, op);
  LEAVE();
}
