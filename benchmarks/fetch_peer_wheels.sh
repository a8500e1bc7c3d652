#!/usr/bin/env bash
# Fetch the peers for a machine without a network: Linux x86-64, Python 3.12, with torch, triton, transformers, pandas
# and pyarrow already there. Into benchmarks/wheels (not in git).
#
#   benchmarks/fetch_peer_wheels.sh              TRL, Liger, cut-cross-entropy: seconds, 3 MB
#   benchmarks/fetch_peer_wheels.sh --cute       also quack and Liger's Hopper kernels, which need NVIDIA's CuTe DSL:
#                                                repacked by xz from 100 to 60 MB, ten minutes
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
MEBIBYTES_AT_MOST=60

PLAIN=(trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19)
CUTE=(
  quack-kernels==0.6.5 einops==0.8.2 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5
  nvidia-cutlass-dsl==4.7.1 nvidia-cutlass-dsl-libs-base==4.7.1 nvidia-cutlass-dsl-libs-core==4.7.1
  nvidia-cutlass-dsl-libs-cu13==4.7.1
)

download() {
  local folder=$1 platforms=() n
  shift
  for n in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${n}_x86_64"); done
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version "$PYTHON_VERSION" --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 -d "$folder" "$@"
}

mkdir -p wheels
rm -f wheels/*.whl wheels/*.tar.xz
download wheels "${PLAIN[@]}"

if [ "${1:-}" = "--cute" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  download "$work" "${CUTE[@]}"
  mkdir "$work/site"
  for wheel in "$work"/*.whl; do
    "$PYTHON" -m zipfile -e "$wheel" "$work/site"
  done
  echo "packing the CuTe DSL (ten minutes) ..."
  # The filter for x86 machine code saves a fifth; a large dictionary another.
  tar -C "$work/site" -cf - . | nice xz --x86 --lzma2=preset=9e,dict=256MiB >wheels/cute.tar.xz
elif [ $# -gt 0 ]; then
  echo "error: unknown argument $1; the only one is --cute" >&2
  exit 2
fi

du -sh wheels
[ "$(du -sm wheels | cut -f1)" -le "$MEBIBYTES_AT_MOST" ] || {
  echo "error: more than $MEBIBYTES_AT_MOST MiB; leave something out" >&2
  exit 1
}
