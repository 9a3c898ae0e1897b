#!/usr/bin/env bash
# What does each layout cost on this machine? The demo's model, the same samples and the same loss in every point.
#
# Look at: the last column (tokens/s), and that the losses agree to fp32 rounding. On a machine with fewer cores than
# ranks the order says how much communication a layout does, not how it would scale.
# Interrupted? Run it again with the same folder: finished points are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/layouts}
.venv/bin/megapar train -m run.dir="$folder" experiment=demo task.sample_tokens=0 train.eval_every=0 \
  train.steps=20 parallel=single,dp2,pp2,tp2,pp2dp2,tp2dp2,tp2pp2,tp2pp2dp2
