#!/bin/sh
# build.sh PYTHON OUT: builds the emulated card for the CUDA build of torch that PYTHON has (with bitsandbytes' library, if there).
set -eu
packages=$("$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
out=$2
here=$(dirname "$0")
mkdir -p "$out"
include="-I$(dirname "$(find "$packages/nvidia" -name cuda_runtime_api.h | head -1)") -I$packages/triton/backends/nvidia/include"
compile() { gcc -shared -fPIC -O1 -w $include "$here/card.c" "$@" -lpthread; }
compile -o "$out/some.so"
# Every other symbol of CUDA that the libraries ask for is a function that returns success; triton looks these up when it runs.
triton="cuCtxGetDevice cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuDevicePrimaryCtxRetain cuDriverGetVersion cuFuncSetAttribute
cuFuncSetCacheConfig cuLaunchKernelEx cuModuleGetFunction cuModuleLoadData cuModuleUnload cuOccupancyMaxActiveClusters
cuPointerGetAttribute cuTensorMapEncodeTiled"
{ nm -D --undefined-only "$packages"/torch/lib/*.so "$packages"/bitsandbytes/libbitsandbytes_cuda1[23]*.so 2>/dev/null; printf '%s\n' $triton; } |
    awk '{print $NF}' | sed 's/@.*//' | grep -E '^(cu[A-Z]|cuda|__cuda|cublas|cusolver|cusparse)' | sort -u > "$out/asked"
nm -D --defined-only "$out/some.so" | awk '{print $NF}' | sort -u > "$out/there"
comm -23 "$out/asked" "$out/there" | awk '{print "int " $1 "() { return 0; }"}' > "$out/rest.c"
compile "$out/rest.c" -o "$out/card.so"
compile "$out/rest.c" -Wl,-soname,libcuda.so.1 -o "$out/libcuda.so.1"
rm "$out/some.so" "$out/asked" "$out/there" "$out/rest.c"
