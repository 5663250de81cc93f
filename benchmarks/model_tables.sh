#!/usr/bin/env bash
# The tables of CAMMSR and MDSRec, their options and parts left out, beside the baselines: every
# data set, three seeds, one protocol. What is finished is not run again. Without an argument all
# of them, which wants a GPU; or name some of: amazon ml100k microlens beauty_toys.
#
#     DATA=../shared/data benchmarks/model_tables.sh amazon
#     DATA=../shared/data JOBS=4 SEEDS=3 benchmarks/model_tables.sh          # on a GPU
set -euo pipefail
data=${DATA:?set DATA to the folder above amazon-scientific-clip}
out=${OUT:-tables}
causal=(layernorm no_swap swap_id_text swap_id_image swap_text_image
    without_attentive_gate without_category_guidance)

compare() { # a name, then models and the rest
    local name=$1 models=$2
    shift 2
    recbole-mm compare --data_path="$data" --out="$out/$name" --jobs="${JOBS:-2}" \
        --seeds="${SEEDS:-3}" --models="$models" --MAX_ITEM_LIST_LENGTH=50 \
        --epochs=60 --stopping_step=6 --show=NDCG@10,NDCG@5,MRR@10,MRR@5,Hit@10,Hit@5 "$@"
}
baselines=SASRec,SASRecFast,SASRecF,GRU4Rec,GRU4RecF,LightGCN,SASRecMM

amazon() {
    compare "$FUNCNAME" "$baselines,CAMMSR,CAMMSR+*,MDSRec,MDSRec+*" \
        --datasets=amazon-scientific-clip '--selected_features=[categories]'
}
# histories are long here: CAMMSR as printed costs a hundred times its causal form
ml100k() {
    compare "$FUNCNAME" \
        "$baselines,CAMMSR+causal$(printf ',CAMMSR+causal+%s' "${causal[@]}"),MDSRec,MDSRec+*" \
        --datasets=ml-100k-mm '--selected_features=[categories]'
}
microlens() { # titles only, and no column that SASRecF could read
    compare "$FUNCNAME" 'SASRec,SASRecFast,GRU4Rec,LightGCN,SASRecMM,MDSRec,MDSRec+*' \
        --datasets=microlens-50k
}
# RecBole's SASRec there says whether our protocol is the paper's; SASRecFast+prefixes is the same
# for less
beauty_toys() {
    local forms=CAMMSR+paper_values+causal,CAMMSR+causal,CAMMSR+causal+no_swap
    compare "$FUNCNAME" \
        "SASRec,SASRecFast+prefixes,SASRecFast,GRU4Rec,SASRecMM,CAMMSR,CAMMSR+paper_values,$forms" \
        --datasets=amazon-beauty-attr,amazon-toys-attr \
        --variants="$(dirname "$0")/variants/objective.yaml"
}

for table in "${@:-amazon ml100k microlens beauty_toys}"; do
    for name in $table; do "$name"; done
done
