#!/usr/bin/env bash
# Compiles the kernels with the address and undefined-behaviour sanitizers, at every level, and runs the driver.
set -euo pipefail
cd "$(dirname "$0")/.."
out=../build/sanitize
mkdir -p "$out"
compile() {
  local object=$1
  shift
  "${CXX:-g++}" -std=c++17 -O1 -g -ffp-contract=off -Wall -Wextra -Wno-psabi -fno-sanitize-recover=all \
    -fsanitize=address,undefined -c "$@" -o "$out/$object.o"
}
jobs=()
compile plain kernels.cpp -DAAPO_LEVEL=plain & jobs+=($!)
compile wide kernels.cpp -DAAPO_LEVEL=wide -DAAPO_WIDTH=16 & jobs+=($!)
compile levels levels.cpp & jobs+=($!)
compile entries entries.cpp & jobs+=($!)
compile driver check/driver.cpp & jobs+=($!)
if [ "$(uname -m)" = x86_64 ]; then
  compile avx2 kernels.cpp -DAAPO_LEVEL=avx2 -mavx2 -mfma & jobs+=($!)
  compile avx512 kernels.cpp -DAAPO_LEVEL=avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma & jobs+=($!)
fi
for job in "${jobs[@]}"; do wait "$job"; done
"${CXX:-g++}" -fsanitize=address,undefined "$out"/*.o -o "$out/driver"
"$out/driver"
