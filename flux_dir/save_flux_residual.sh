#!/usr/bin/env bash
# Write the residual W - QR of every adapted layer of the base model, for programs based on the published code. This
# project does not need the file, because adapters never change the base.
#     bash flux_dir/save_flux_residual.sh <GPU_ID> [flags of save_flux_residual.py]
#     bash flux_dir/save_flux_residual.sh 0
# Output: OUTPUT_DIR/flux_residual_weights.safetensors. RANK must be the rank of the adapters.
# No need to edit: RANK=16 MODEL_PATH=/models/FLUX.1-dev bash flux_dir/save_flux_residual.sh 0
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments "<GPU_ID>" "0" "$@"

MODEL_PATH="${MODEL_PATH:-${MODEL_NAME:-black-forest-labs/FLUX.1-dev}}"
RANK="${RANK:-64}"
OUTPUT_DIR="${OUTPUT_DIR:-$LAUNCHERS}"
DTYPE="${DTYPE:-$(on_cpu fp32 fp16)}"

whole_number RANK "$RANK"
script save_flux_residual.py --model_path "$MODEL_PATH" --rank "$RANK" --output_dir "$OUTPUT_DIR" --dtype "$DTYPE"
