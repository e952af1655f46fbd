#!/usr/bin/env bash
# Prints flea.pc:  scripts/flea-pc.sh VERSION PREFIX LIBDIR INCLUDEDIR
set -euo pipefail
version=$1 prefix=$2 libdir=$3 includedir=$4
cat <<PC
prefix=$prefix
libdir=${libdir/#$prefix/\$\{prefix\}}
includedir=${includedir/#$prefix/\$\{prefix\}}

Name: flea
Description: Streams model weights from NVMe into preallocated memory just before they are used
Version: $version
Libs: -L\${libdir} -lflea
Libs.private: -lgcc_s -lutil -lrt -lpthread -lm -ldl -lc
Cflags: -I\${includedir}
PC
