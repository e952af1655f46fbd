// All kernels in one translation unit: what scripts/build-kernels.sh compiles into kernels/flea.fatbin.
#include "crc32c.cu"
#include "dequantise.cu"
#include "unpack.cu"
