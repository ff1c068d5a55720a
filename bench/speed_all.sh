#!/usr/bin/env bash
# Issue 4's figures on one H100, shortest first, about 15 minutes: a step that fails does not stop the others.
#
#   bench/speed_all.sh OUT WORK [PATH/binary_gemm_kernel.py of BitDelta]
set -uo pipefail
out=$1 work=$2 theirs=${3:-}
cd "$(dirname "$0")/.."
mkdir -p "$out" "$work"
step() { # name, seconds at most, command
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout "$limit" "$@" > "$work/$name.log" 2>&1
  echo "$name: exit $? after $((SECONDS - began)) s" | tee -a "$work/steps.log"
}
# Some images' pytest-benchmark refuses to run beside xdist.
test_() { python3 -m pytest -q -p no:cacheprovider -p no:benchmark -n 8 "$@"; }
export -f test_
step product 400 bash -c 'test_ tests/test_kernels_product.py'
step steps 240 bash -c 'test_ tests/test_kernels_step.py tests/test_serving_decode.py'
step gptq 120 bash -c 'test_ tests/test_moments.py tests/test_kernels.py'
step compress-2 180 python3 -m bayou bench compress --layers 2 --plain --keep "$work/two.bayou" --out "$out/compress-2-layers-h100.json"
step kernels-quick 240 python3 -m bayou bench kernels --quick --file "$work/two.bayou" --out "$out/kernels-quick-h100.json"
step load 120 python3 -m bayou bench load --out "$out/load-h100.json"
step compress 300 python3 -m bayou bench compress --out "$out/compress-h100.json"
step kernels 560 python3 -m bayou bench kernels --file "$work/two.bayou" --out "$out/kernels-h100.json"
[ -n "$theirs" ] && step bitdelta 240 python3 bench/bitdelta_kernel.py --theirs "$theirs" --out "$out/bitdelta-kernel-h100.json"
step roofline 200 python3 bench/roofline.py run --file "$work/two.bayou" --ncu-csv "$work/roofline.csv"
step roofline-table 20 python3 bench/roofline.py table "$work/roofline.csv" --out "$out/roofline-h100.json"
step sanitizer 300 compute-sanitizer --error-exitcode 7 python3 -m pytest -q -p no:cacheprovider tests/test_kernels_product.py -k "compiled and (2g128z or tile)"
echo over >> "$work/steps.log"
