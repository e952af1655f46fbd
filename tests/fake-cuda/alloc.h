/* cuMemAlloc of the fake CUDA driver. Part of libcuda.c. */
#pragma once

/* What libraries take: a handle that is mapped at once. */
CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t size) {
  AllocationProp prop = {.type = 1, .location = {.type = 1, .id = current ? (int)(current - contexts) : 0}};
  AccessDesc access = {.location = prop.location, .flags = 3};
  CUmemGenericAllocationHandle handle;
  size = (size + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
  CUresult result = current ? cuMemCreate(&handle, size, &prop, 0) : INVALID_CONTEXT;
  if (result == SUCCESS) result = cuMemAddressReserve(out, size, 0, 0, 0);
  if (result == SUCCESS) result = cuMemMap(*out, size, 0, handle, 0);
  if (result == SUCCESS) result = cuMemSetAccess(*out, size, &access, 1);
  return result == SUCCESS ? cuMemRelease(handle) : result;
}

CUresult cuMemFree_v2(CUdeviceptr at) {
  pthread_mutex_lock(&lock);
  const Range *range = mappings;
  while (range && range->at != (uintptr_t)at) range = range->next;
  size_t size = range ? range->len : 0;
  pthread_mutex_unlock(&lock);
  CUresult result = cuMemUnmap(at, size);
  return result == SUCCESS ? cuMemAddressFree(at, size) : result;
}
