#!/bin/sh
# Compiles the CUDA kernels for every architecture we ship, without a GPU and without a CUDA build of torch (the
# stable-ABI headers of any torch will do). Fails on errors, warnings and register spills.
#
#   PYTHON=.venv/bin/python csrc/check_cuda.sh
set -eu
python=${PYTHON:-python3}
nvcc=${NVCC:-nvcc}
source=$(dirname "$0")/cuda/gram.cu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

torch_include=$("$python" -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "include"))')
python_include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
architectures=${CUDA_ARCHITECTURES:-80 90a 100 120}
gencode=
for arch in $architectures; do gencode="$gencode -gencode arch=compute_$arch,code=sm_$arch"; done

# shellcheck disable=SC2086  # the list of -gencode options is meant to split
if ! "$nvcc" -std=c++17 -O3 --threads 0 $gencode -Xptxas -v -Werror all-warnings -Xcompiler -Wall,-Werror,-fPIC \
    -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030A0000 \
    -isystem "$torch_include" -isystem "$python_include" -c -o "$work/gram.o" "$source" 2>"$work/log"; then
  cat "$work/log" >&2
  echo "CUDA check: compilation failed" >&2
  exit 1
fi
grep -E 'Compiling entry|spill|registers' "$work/log"
compiled=$(grep -c 'Compiling entry' "$work/log")
clean=$(grep -c '0 bytes spill stores, 0 bytes spill loads' "$work/log")
if [ "$compiled" -eq 0 ] || [ "$compiled" -ne "$clean" ]; then
  echo "CUDA check: $clean of $compiled kernels compile without spills" >&2
  exit 1
fi
echo "CUDA check: $compiled kernels for architectures $architectures, no warnings, no spills"
