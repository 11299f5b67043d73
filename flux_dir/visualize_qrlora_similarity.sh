#!/usr/bin/env bash
# Compare two adapters layer by layer: cosines of Q, ΔR and base R as plots, JSON and a text summary.
#     bash flux_dir/visualize_qrlora_similarity.sh <GPU_ID> [flags of visualize_similarity.py]
#     bash flux_dir/visualize_qrlora_similarity.sh 0
# Output: ./output_vis/qrlora_sim-YYYYMMDD-HHMMSS/*.png, *.json, summary_statistics.txt, vis_script.sh.
# No need to edit: LORA1_PATH=a.safetensors LORA2_PATH=b.safetensors bash flux_dir/visualize_qrlora_similarity.sh 0
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments "<GPU_ID>" "0" "$@"

LORA1_PATH="${LORA1_PATH:-$(newest_adapter LORA1_PATH "<s>" train_deltaR_sty.sh)}"
LORA2_PATH="${LORA2_PATH:-$(newest_adapter LORA2_PATH "<c>" train_deltaR_cnt.sh)}"
LORA1_NAME="${LORA1_NAME:-sty}"
LORA2_NAME="${LORA2_NAME:-cnt}"
FIXED_SCALE="${FIXED_SCALE---fixed_scale}"  # accepted as documented; both scales are always drawn
OUTPUT_DIR="${OUTPUT_DIR:-./output_vis/qrlora_sim-$(date +%Y%m%d-%H%M%S)}"

COPY_AS=vis_script.sh
script visualize_similarity.py --lora1_path "$LORA1_PATH" --lora2_path "$LORA2_PATH" \
  --lora1_name "$LORA1_NAME" --lora2_name "$LORA2_NAME" --output_dir "$OUTPUT_DIR" ${FIXED_SCALE:+"$FIXED_SCALE"}
