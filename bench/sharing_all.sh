#!/usr/bin/env bash
# Layer sharing's tables on one GPU (40 GB are enough), both sizes side by side, then ablations and the untouched model.
#
#   bench/sharing_all.sh BASE TESTBED.py tokens.npy OUT WORK [TOKENS A RUN]
#
# tokens.npy is what `bench/sharing.py tokenise` wrote. Runs that stand in OUT/sharing-*.jsonl are not done again: begin with
# the tuning of an earlier time there, and without its main sets. Logs lie in WORK.
set -euo pipefail
base=$1 testbed=$2 tokens=$3 out=$4 work=$5 train=${6:-13800000}
cd "$(dirname "$0")/.."
mkdir -p "$out" "$work"
common=(--base "$base" --testbed "$testbed" --tokens "$tokens" --device cuda --compile --batch 32 --micro 32 --chunk 8176
  --out "$out" --work "$work" --seconds 36000 --every 1000 --report 20)
for size in 12 24; do
  # The search takes minutes and waits for nobody; the set that needs its plan comes last, and finds it in a file.
  python3 bench/sharing.py plan "${common[@]}" --set "main$size" > "$work/plan$size.log" 2>&1 &
  python3 bench/sharing.py run "${common[@]}" --together 9 --tune-tokens 750000 --train-tokens "$train" \
    --set "tune$size" "main$size" > "$work/run$size.log" 2>&1 &
done
wait
python3 bench/sharing.py run "${common[@]}" --set base > "$work/base.log" 2>&1
python3 bench/sharing.py run "${common[@]}" --rows 60 --together 11 --tune-tokens 1000000 --set pmr ablation > "$work/rest.log" 2>&1
