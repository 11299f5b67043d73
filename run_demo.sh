#!/usr/bin/env bash
# The whole road of docs and README on this machine's CPU: a style and a content adapter are trained on the shipped
# pictures, merged over a grid of weights and compared, with a tiny FLUX that is made on the spot.
#     bash run_demo.sh
# Needs python3 (3.10 or newer) and git's clone of this repository; the first run makes .venv and installs into it.
# Everything is written under demo_output/, and a second run replaces it. The tiny FLUX has learned nothing, so its
# pictures are patterns, not cats: what is shown is that every step works and what it leaves behind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

bash tools/setup_env.sh
source tools/find_python.sh
PYTHON="$PWD/$(venv_python .venv)"
export PYTHON HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg TRANSFORMERS_VERBOSITY=error

OUT=demo_output
MODEL=$OUT/tiny-flux
RANK_USED=8
STYLE=$OUT/style CONTENT=$OUT/content ONE=$OUT/one-subject RESIDUAL=$OUT/residual
IMAGES=$OUT/images SIMILARITY=$OUT/similarity

step=0
started=$SECONDS
trap '[[ $? == 0 ]] || echo "run_demo.sh: step $step of 6 failed, see the message above; nothing outside $OUT was touched" >&2' EXIT

# begin FOLDER TEXT: announce the next step and clear the folder that it will write.
begin() {
  step=$((step + 1))
  echo
  echo "== $step/6  $2  ($((SECONDS - started)) s so far)"
  if [[ -e $1 ]]; then
    echo "replacing $1 of an earlier run"
    rm -rf "$1"
  fi
}

mkdir -p "$OUT"
if [[ -d $MODEL ]]; then echo "keeping $MODEL if it was made by this version"; else echo "making $MODEL"; fi
"$PYTHON" tools/make_tiny_flux.py "$MODEL"

# What the documented values are for one GPU and FLUX.1-dev is here made small enough for a laptop.
export MODEL_NAME="$MODEL" MODEL_PATH="$MODEL"
export RESOLUTION=128 MAX_TRAIN_STEPS=40 CHECKPOINTING_STEPS=20 LEARNING_RATE=1e-2 GRADIENT_ACCUMULATION_STEPS=1
export VALIDATION_EPOCHS=20 NUM_VALIDATION_IMAGES=1

begin "$STYLE" "train the style: assets/sty/cat"
OUTPUT_DIR=$STYLE bash flux_dir/train_deltaR_sty.sh cpu $RANK_USED

begin "$CONTENT" "train the content: assets/cnt/dog"
OUTPUT_DIR=$CONTENT bash flux_dir/train_deltaR_cnt.sh cpu $RANK_USED

begin "$ONE" "train one subject with Q and R free"
OUTPUT_DIR=$ONE bash flux_dir/train_QR.sh cpu $RANK_USED

begin "$RESIDUAL" "write the residual file (only other tools need it)"
OUTPUT_DIR=$RESIDUAL RANK=$RANK_USED bash flux_dir/save_flux_residual.sh cpu

export STYLE_LORA_PATH=$STYLE/pytorch_lora_weights.safetensors
export CONTENT_LORA_PATH=$CONTENT/pytorch_lora_weights.safetensors
begin "$IMAGES" "merge style and content over a grid of weights"
OUTPUT_DIR=$IMAGES RESIDUAL_PATH=$RESIDUAL/flux_residual_weights.safetensors NUM_STEPS=8 \
  STYLE_WEIGHTS=0.0,0.5,1.0 CONTENT_WEIGHTS=0.0,0.5,1.0 bash flux_dir/inference_merge.sh cpu

begin "$SIMILARITY" "compare the two adapters"
OUTPUT_DIR=$SIMILARITY LORA1_PATH=$STYLE_LORA_PATH LORA2_PATH=$CONTENT_LORA_PATH \
  bash flux_dir/visualize_qrlora_similarity.sh cpu

cat <<END

== done in $((SECONDS - started)) s. To look at:
  $IMAGES/                 one picture per pair of weights, and all of them on one labelled sheet
  $SIMILARITY/             plots, JSON and summary_statistics.txt: how alike the two adapters are
  $STYLE/, $CONTENT/   the adapters (pytorch_lora_weights.safetensors), checkpoints, loss, validation pictures
  $(venv_python .venv) -m tensorboard.main --logdir $OUT   loss curves and pictures in the browser
The tiny FLUX is untrained: its pictures are patterns, and two adapters on it learn much the same. Read the similarity
of real adapters, not of these.
Next, with a GPU and FLUX.1-dev:  bash flux_dir/train_deltaR_sty.sh 0 64
END
