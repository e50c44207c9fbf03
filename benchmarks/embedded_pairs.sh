#!/bin/sh
# Makes the pairs and traces that `bvpo-stats alpha-star` runs on by default, from the embedded model and its prompts.
# Run it from the root of the repository after the embedded weights have changed; it takes minutes.
set -eu

PROMPTS=${PROMPTS:-400}
WORK=$(mktemp -d)
DATA=bvpo_stats/tiny/data

bvpo-stats sample --limit "$PROMPTS" --temperature 1 --output "$WORK/samples"
bvpo-stats pairs --samples "$WORK/samples" --reward embedded --output "$WORK/pairs"
bvpo-stats traces --pairs "$WORK/pairs" --samples "$WORK/samples" --traces-per-answer 8 --output "$WORK/traces"

mkdir -p "$DATA"
gzip -n -9 -c "$WORK/pairs/thinking.jsonl" > "$DATA/thinking.jsonl.gz"
gzip -n -9 -c "$WORK/pairs/nothinking.jsonl" > "$DATA/nothinking.jsonl.gz"
gzip -n -9 -c "$WORK/traces/traces.jsonl" > "$DATA/traces.jsonl.gz"
ls -l "$DATA"
rm -r "$WORK"
