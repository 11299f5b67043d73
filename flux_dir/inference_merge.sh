#!/usr/bin/env bash
# Sample the merge  W + α Q ΔR_style + β Q ΔR_content  for every α in STYLE_WEIGHTS and β in CONTENT_WEIGHTS.
#     bash flux_dir/inference_merge.sh <GPU_ID> [flags of inference_merge.py]
#     bash flux_dir/inference_merge.sh 0
# Output: ./outputs_infer_flux/YYYYMMDD_HHMMSS/inference_s0.90_c1.00.png …, script.sh.
# No need to edit: STYLE_WEIGHTS=0.7,1.0 PROMPT="a <c> dog asleep in <s> style" bash flux_dir/inference_merge.sh 0
# Weights: 0.8 to 1.2 is usual, 0.5 to 0.7 is weak, 1.3 to 1.5 is strong.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments "<GPU_ID>" "0" "$@"

MODEL_PATH="${MODEL_PATH:-${MODEL_NAME:-black-forest-labs/FLUX.1-dev}}"
STYLE_LORA_PATH="${STYLE_LORA_PATH:-$(newest_adapter STYLE_LORA_PATH "<s>" train_deltaR_sty.sh)}"
CONTENT_LORA_PATH="${CONTENT_LORA_PATH:-$(newest_adapter CONTENT_LORA_PATH "<c>" train_deltaR_cnt.sh)}"
PROMPT="${PROMPT:-a <c> dog in <s> style}"
NUM_STEPS="${NUM_STEPS:-28}"
SEED="${SEED:-42}"
STYLE_WEIGHTS="${STYLE_WEIGHTS:-0.9,1.0}"
CONTENT_WEIGHTS="${CONTENT_WEIGHTS:-0.9,1.0}"
DTYPE="${DTYPE:-$(on_cpu fp32 fp16)}"
OUTPUT_DIR="${OUTPUT_DIR:-./outputs_infer_flux/$(date +%Y%m%d_%H%M%S)}"

RESIDUAL_PATH="${RESIDUAL_PATH:-}"  # optional: the file is only compared with base, rank and basis

COPY_AS=script.sh
script inference_merge.py --model_path "$MODEL_PATH" \
  --style_lora_path "$STYLE_LORA_PATH" --content_lora_path "$CONTENT_LORA_PATH" \
  ${RESIDUAL_PATH:+--residual_path "$RESIDUAL_PATH"} \
  --prompt "$PROMPT" --num_inference_steps "$NUM_STEPS" --seed "$SEED" \
  --style_weights "$STYLE_WEIGHTS" --content_weights "$CONTENT_WEIGHTS" \
  --dtype "$DTYPE" --output_dir "$OUTPUT_DIR"
