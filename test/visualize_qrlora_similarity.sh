#!/usr/bin/env bash
# Run flux_dir/visualize_qrlora_similarity.sh under its documented path. Set the values here or in the environment; if they
# are empty, the newest style and content adapters in ./exps_flux are compared.
#     bash test/visualize_qrlora_similarity.sh <GPU_ID>
LORA1_PATH="${LORA1_PATH:-}"
LORA2_PATH="${LORA2_PATH:-}"
LORA1_NAME="${LORA1_NAME:-sty}"
LORA2_NAME="${LORA2_NAME:-cnt}"
export LORA1_PATH LORA2_PATH LORA1_NAME LORA2_NAME
exec bash "$(dirname "${BASH_SOURCE[0]}")/../flux_dir/visualize_qrlora_similarity.sh" "$@"
