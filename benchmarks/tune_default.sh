#!/usr/bin/env bash
# Default against tuned on amazon-scientific-clip: the same 20 trials for SASRec, SASRecFast, SASRecMM
# and the three models, selected on validation; then defaults and best configurations, three seeds
# each, once on test. What is finished is not run again; some hours of one thread.
#
#     DATA=../shared/data benchmarks/tune_default.sh
set -euo pipefail
cd "$(dirname "$0")/.."
data=${DATA:?set DATA to the folder above amazon-scientific-clip}
out=${OUT:-tuned}
models=SASRec,SASRecFast,SASRecMM,MUFASA,MDSRec,CAMMSR
common=(--data_path="$data" --MAX_ITEM_LIST_LENGTH=50)

search() { # a model, then the folder and what is set for all of its trials
    local model=$1
    shift
    recbole-mm tune --model=$model --dataset=amazon-scientific-clip --trials=20 \
        "$@" "${common[@]}" --epochs=40 --stopping_step=4
}
compare() {
    recbole-mm compare --datasets=amazon-scientific-clip --seeds=3 "${common[@]}" \
        --epochs=60 --stopping_step=6 '--selected_features=[categories]' "$@"
}
for model in ${models//,/ }; do
    search $model --out="$out"
done
search CAMMSR --out="$out/causal" --config_files=properties/ablation/CAMMSR/causal.yaml
compare --models=$models,CAMMSR+causal --out="$out/default"
compare --models=$models --tuned="$out" --out="$out/best"
compare --models=CAMMSR --tuned="$out/causal" --out="$out/best_causal"
