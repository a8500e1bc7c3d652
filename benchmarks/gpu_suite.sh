#!/usr/bin/env bash
# The GPU tests and the whole comparison on one GPU, from a bare checkout without a network, within nine minutes.
#
#   benchmarks/gpu_suite.sh                      needs python3 with a CUDA torch and triton; for the tests pytest,
#                                                transformers and tokenizers; uses what else it finds
#   PEER_WHEELS=folder benchmarks/gpu_suite.sh   peers from wheels (default benchmarks/wheels; fetch_peer_wheels.sh)
#   OUT=folder                                   where results go (default benchmarks/results/gpu)
#   SECONDS_IN_ALL=540, SECONDS_FOR_TESTS=270    time shares
#
# compute-sanitizer takes minutes, and is run apart: python3 -m pytest tests/gpu/test_loss.py -k compute_sanitizer
#
# Tables come last. If the tests are not green, every table says so, and the exit status is 1. It is 1, too, where one of
# our gradients is wrong in the benchmarks or a method breaks the device. In OUT remain JSON files and logs, six at most.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
PEER_WHEELS=${PEER_WHEELS:-benchmarks/wheels}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-540}
SECONDS_FOR_TESTS=${SECONDS_FOR_TESTS:-270}
SECONDS_FOR_ACCURACY=60
SECONDS_FOR_STEPS=80
SECONDS_TO_REPORT=15
export PYTHONUNBUFFERED=1

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
# By this name: quack takes what is elsewhere for its user's own code, and refuses parts of CuTe in it.
site=$temporary/site-packages
mkdir "$site"

# Wheels are archives, and these hold nothing that has to be built: unpacking them is all that pip would do.
install_peers() {
  local archive found=0
  for archive in "$PEER_WHEELS"/*.whl "$PEER_WHEELS"/*.tar.xz; do
    [ -e "$archive" ] || continue
    found=1
    case $archive in
      *.whl) "$PYTHON" -m zipfile -e "$archive" "$site" ;;
      *) "$PYTHON" -m tarfile -e "$archive" "$site" ;;
    esac || echo "could not unpack $archive; going on without it"
  done
  [ "$found" = 1 ] || echo "== no wheels in $PEER_WHEELS (fetch_peer_wheels.sh): peers not installed are \"unavailable\""
}

seconds_left() { echo $((SECONDS_IN_ALL - SECONDS - $1)); }

# Sets note: empty if the tests are green.
run_tests() {
  note=""
  if ! "$PYTHON" -m pytest --version >/dev/null 2>&1; then
    note="GPU TESTS NOT RUN: pytest is not installed"
    return
  fi
  if [ ! -d tests/gpu ]; then
    note="GPU TESTS NOT RUN: there is no tests/gpu"
    return
  fi
  # Whole runs first: what there is no time for comes off the end. By name, for of files within a folder that is given
  # as well pytest keeps its own order.
  local status=0 file files=(tests/gpu/test_run.py tests/gpu/test_training.py)
  for file in tests/gpu/test_*.py; do
    [[ " ${files[*]} " == *" $file "* ]] || files+=("$file")
  done
  timeout --signal=INT --kill-after=10 "$SECONDS_FOR_TESTS" \
    "$PYTHON" -m pytest "${files[@]}" --durations=5 -k "not compute_sanitizer" 2>&1 | tee "$OUT/tests.log" || status=$?
  case $status in
    0)
      # A dot behind its name; files that skip themselves for want of a package are no reason to call the loss tested.
      for file in test_loss.py test_variants.py; do
        grep -q "^tests/gpu/$file [a-zA-Z]*\." "$OUT/tests.log" || note="GPU TESTS NOT RUN: nothing passed in $file"
      done
      ;;
    124 | 137) note="GPU TESTS NOT FINISHED in $SECONDS_FOR_TESTS s: the figures below are of code that is not tested" ;;
    *) note="GPU TESTS FAILED (see tests.log): the figures below are of wrong code" ;;
  esac
}

install_peers
# nvidia-cutlass-dsl puts its packages in a folder of their own and names it in a .pth file, which PYTHONPATH ignores.
export PYTHONPATH="$PWD:$site:$site/nvidia_cutlass_dsl/dsl_packages${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: $PYTHON has no torch that sees a CUDA device; name another: PYTHON=... $0" >&2
  exit 2
fi

run_tests
echo "== tests: ${note:-green} (${SECONDS} s)"
notes=()
[ -z "$note" ] || notes=(--note "$note")

# Of a result file: whether one of our methods failed or has a wrong gradient in it.
ours_is_wrong() {
  "$PYTHON" -c 'import json, sys
rows = [row for case in json.load(open(sys.argv[1]))["cases"] for row in case["rows"] if row["kind"] == "ours"]
sys.exit(not any(row["status"] in ("wrong gradient", "failed") for row in rows))' "$1" 2>/dev/null
}

# ended NAME STATUS FILE: what became of a benchmark. Status 1 is a wrong gradient, or a method that broke the device;
# what ran out of time may have seen a wrong one before.
wrong=""
ended() {
  case $2 in
    0) return ;;
    124 | 130 | 137)
      echo "== $1: out of time"
      ours_is_wrong "$3" || return
      ;;
    *) echo "== $1: exit status $2" ;;
  esac
  wrong="${wrong:+$wrong, }$1"
}

# bench SECONDS ...: interrupted after so many; a file is written after every case, so what is done is kept.
bench() {
  local limit=$1
  shift
  timeout --signal=INT --kill-after=5 "$limit" "$PYTHON" -m aapo_fast.cli bench "$@"
}

# head FOLDER ...: the goals first, then one head over N, then the other heads, then what is long: what there is no time
# for comes off the end.
head() {
  local folder=$1 limit
  shift
  limit=$(seconds_left $((SECONDS_FOR_ACCURACY + SECONDS_FOR_STEPS + SECONDS_TO_REPORT)))
  [ "$limit" -gt 30 ] || return
  bench "$limit" head --device cuda --dtype bfloat16 --rounds 6 \
    --minutes "$(awk -v s="$limit" 'BEGIN { print (s - 15) / 60 }')" --output "$folder" "${notes[@]}" "$@" --rows 4096 \
    --shape 8192,4096,151936 4096,4096,128256 16384,2048,248320 \
    1024,4096,151936 2048,4096,151936 16384,4096,151936 \
    gemma-2-2b qwen2.5-0.5b qwen2.5-1.5b qwen2.5-7b smollm2-135m 32768,4096,151936 65536,4096,151936 \
    >/dev/null
  ended "bench head" $? "$folder/head.json"
}

head "$OUT"
culprit=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["broken_by"])' "$OUT/head.json" 2>/dev/null)
if [ -n "$culprit" ]; then
  echo "== $culprit broke the device; once more without it"
  mkdir -p "$OUT/again"
  head "$OUT/again" --without "$culprit"
fi
bench "$(seconds_left $((SECONDS_FOR_STEPS + SECONDS_TO_REPORT)))" accuracy --device cuda --dtype bfloat16 --shape 2048,4096,151936 \
  --output "$OUT" "${notes[@]}" >/dev/null
ended "bench accuracy" $? "$OUT/accuracy.json"

steps=$(seconds_left $SECONDS_TO_REPORT)
timeout --signal=INT --kill-after=5 "$steps" "$PYTHON" benchmarks/gpu_train_step.py --seconds $((steps - 10)) \
  --json "$OUT/train_step.json" >"$OUT/train_step.log" 2>&1 || echo "== train steps: exit status $?"

# The JSON has all that is in them, and `report` makes them again.
rm -f "$OUT"/{,again/}{head,accuracy}.{md,svg}
echo "== ${SECONDS} s"
bench 60 report "$OUT"
[ -z "$note" ] || echo "**$note**"
grep '^|' "$OUT/train_step.log"
[ -z "$wrong" ] || echo "== WRONG OR FAILED: $wrong"
[ -z "$note" ] && [ -z "$wrong" ]
