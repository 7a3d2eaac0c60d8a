#!/bin/sh
# Makes everything in this folder: sh docs/study/smollm2/run.sh, with TTT_FAST_DATA naming the folder of memo_trap.jsonl
# and text_domains.jsonl. Interrupted, the same command goes on; larger --prompts add to what is there.
set -eu
cd "$(dirname "$0")"
sgd="--optimizer sgd --momentum 0.9 --weight-decay 0"

memo_trap() {
    out=$1; shift
    ttt-fast study memo-trap --model demo --data "$TTT_FAST_DATA/memo_trap.jsonl" --out "$out" "$@"
}

memo_trap memo-trap-sgd --prompts 32 $sgd --lr 1e-5 1e-4 1e-3 --max-grad-norm none 10 \
    --scope all ffn attention --steps 0 10 20 40
memo_trap memo-trap-adamw --prompts 16 --optimizer adamw --lr 1e-5 1e-4 --weight-decay 0 --max-grad-norm none \
    --scope all ffn --steps 0 10 20 40
memo_trap memo-trap-200-prompts --prompts 200 $sgd --lr 1e-4 --max-grad-norm 10 --scope all --steps 0 10 20
ttt-fast study text-halves --model demo --data "$TTT_FAST_DATA/text_domains.jsonl" --out text-halves \
    --prompts 24 $sgd --lr 1e-4 1e-3 --max-grad-norm none --scope ffn --steps 0 1 5 10
memo_trap memo-trap-100-steps --prompts 16 $sgd --lr 1e-4 --max-grad-norm 10 --scope all ffn attention \
    --steps 0 20 40 60 80 100

# The 16 prompts that both have.
ttt-fast study-report memo-trap-sgd memo-trap-adamw --out sgd-and-adamw
