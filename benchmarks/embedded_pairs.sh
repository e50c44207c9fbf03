#!/bin/sh
# Makes the pairs and traces that `bvpo-stats alpha-star` runs on by default, from the embedded model and held-out
# questions (the first 200 of them are the default prompts). Temperature 1: at theta_ref nothing else leaves g_t unbiased.
# Run it from the root of the repository after the embedded weights have changed; it takes some ten minutes on one core.
set -eu

PROMPTS=${PROMPTS:-400}
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
DATA=bvpo_stats/embedded/data

"$PYTHON" - "$PROMPTS" > "$WORK/prompts.jsonl" <<'EOF'
import json
import sys
from dataclasses import asdict

from bvpo_stats.embedded.assets import PROMPT_SEED
from bvpo_stats.embedded.task import generate_prompts

for prompt in generate_prompts(int(sys.argv[1]), PROMPT_SEED, "held-out"):
    print(json.dumps(asdict(prompt)))
EOF
bvpo-stats sample --prompts "$WORK/prompts.jsonl" --temperature 1 --output "$WORK/samples"
bvpo-stats pairs --samples "$WORK/samples" --reward embedded --output "$WORK/pairs"
bvpo-stats traces --pairs "$WORK/pairs" --samples "$WORK/samples" --traces-per-answer 8 --output "$WORK/traces"

mkdir -p "$DATA"
gzip -n -9 -c "$WORK/pairs/thinking.jsonl" > "$DATA/thinking.jsonl.gz"
gzip -n -9 -c "$WORK/pairs/nothinking.jsonl" > "$DATA/nothinking.jsonl.gz"
gzip -n -9 -c "$WORK/traces/traces.jsonl" > "$DATA/traces.jsonl.gz"
ls -l "$DATA"
rm -r "$WORK"
