#!/usr/bin/env bash
# Default against tuned: the same number of trials for MUFASA, CAMMSR, MDSRec and SASRec on
# amazon-scientific-clip, selected on validation; then each default and each best configuration once
# on test. What is finished is not run again.
#
#     DATA=/work/shared/data benchmarks/tune_default.sh [TRIALS] [--key=value ...]
set -euo pipefail
data=${DATA:?set DATA to the folder above amazon-scientific-clip}
out=${OUT:-tuned}
trials=${1:-20}
shift || true
dataset=amazon-scientific-clip

for model in MUFASA CAMMSR MDSRec SASRec; do
    recbole-mm tune --model=$model --dataset=$dataset --data_path="$data" --out="$out" \
        --engine=optuna --algo=bayes --trials="$trials" "$@"
done
for model in MUFASA CAMMSR MDSRec SASRec; do
    recbole-mm run --model=$model --dataset=$dataset --data_path="$data" "$@"
    recbole-mm run --config_files="$out/$dataset/$model.yaml" --data_path="$data"
done
