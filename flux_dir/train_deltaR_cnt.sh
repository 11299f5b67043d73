#!/usr/bin/env bash
# Train a content: Q and R stay frozen, an upper-trapezoidal ΔR learns the subject of the pictures.
#     bash flux_dir/train_deltaR_cnt.sh <GPU_ID> <RANK> [flags of flux_train_qrlora.py]
#     bash flux_dir/train_deltaR_cnt.sh 0 64
# Output: ./exps_flux/MMDD-HHMMSS-<c>-64/pytorch_lora_weights.safetensors, checkpoint-N/, logs/, train_script.sh.
# No need to edit: every value here, and every one in the function train of common.sh, can be given in the
# environment, as in  INSTANCE_DIR=my/pictures MAX_TRAIN_STEPS=500 bash flux_dir/train_deltaR_cnt.sh 0 64
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments "<GPU_ID> <RANK>" "0 64" "$@"

TRIGGER_NAME="${TRIGGER_NAME:-<c>}"
INSTANCE_DIR="${INSTANCE_DIR:-$ASSETS/cnt/dog}"
INSTANCE_PROMPT="${INSTANCE_PROMPT:-a photo of a $TRIGGER_NAME dog}"
VALID_PROMPT="${VALID_PROMPT-a photo of a $TRIGGER_NAME dog on the beach}"  # empty: no validation
LORA_INIT_METHOD="${LORA_INIT_METHOD:-triu_deltaR}"
ZERO_INIT=--use_zero_init

train
