#!/usr/bin/env bash
# The documented path of flux_dir/visualize_qrlora_similarity.sh. Values may be written here, as the documents say, or
# given in the environment; left empty, the newest style and content adapters under ./exps_flux are compared.
#     bash test/visualize_qrlora_similarity.sh <GPU_ID>
LORA1_PATH="${LORA1_PATH:-}"
LORA2_PATH="${LORA2_PATH:-}"
LORA1_NAME="${LORA1_NAME:-sty}"
LORA2_NAME="${LORA2_NAME:-cnt}"
export LORA1_PATH LORA2_PATH LORA1_NAME LORA2_NAME
exec bash "$(dirname "${BASH_SOURCE[0]}")/../flux_dir/visualize_qrlora_similarity.sh" "$@"
