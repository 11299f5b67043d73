#!/usr/bin/env bash
exec bash "$(dirname "${BASH_SOURCE[0]}")/../flux_dir/visualize_qrlora_similarity.sh" "$@"
