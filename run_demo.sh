#!/usr/bin/env bash
# Run the documented steps on the CPU, with a small trained model of this repository: train a style and a content adapter from
# a few pictures each, add them over a 3×3 grid of strengths, count with a classifier what 32 pictures show, and compare the adapters.
#     bash run_demo.sh                  # FLUX
#     bash run_demo.sh --family NAME    # another model of assets/demo
# Needs python3 (3.10 or newer) and a git clone of this repository; the first run creates .venv and installs into it.
# All output is in demo_output/FAMILY, and a second run replaces it. The models draw only the small world that
# assets/demo/README.md describes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

known=$(cd assets/demo && echo */model_index.json)  # "flux/model_index.json sd15/model_index.json …"
known=${known//\/model_index.json/}
usage="usage: bash run_demo.sh [--family ${known// /|}]"
FAMILY=flux
if [[ $# == 1 && $1 =~ ^(-h|--help)$ ]]; then
  echo "$usage"
  exit 0
elif [[ $# == 2 && $1 == --family && " $known " == *" $2 "* ]]; then
  FAMILY=$2
elif [[ $# != 0 ]]; then
  echo "run_demo.sh: '$*' is not understood; $usage" >&2
  exit 2
fi

bash tools/setup_env.sh
source tools/find_python.sh
PYTHON="$PWD/$(venv_python .venv)"
# One thread: the model is small, so more threads would mostly wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHON HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg TRANSFORMERS_VERBOSITY=error

OUT=demo_output/$FAMILY
MODEL=assets/demo/$FAMILY
METHOD=lora RANK_USED=8  # the method that draws both best, with a rank of 1/8 of the narrowest layer: docs/demo.md
[[ $FAMILY != flux ]] || RANK_USED=16
STYLE_PICTURES=assets/sty/blueprint CONTENT_PICTURES=assets/cnt/teapot
STYLE=$OUT/style CONTENT=$OUT/content ONE=$OUT/one-subject RESIDUAL=$OUT/residual
IMAGES=$OUT/images SIMILARITY=$OUT/similarity
SEEDS=$OUT/seeds EFFECTS=$OUT/effects
STEPS_STYLE=400 STEPS_CONTENT=300 RATE=2e-3
GRID_STYLE=0.7,1.0,1.3 GRID_CONTENT=0.7,1.0,1.3
GUIDANCE=2  # lower than without adapters
PROMPT="a <c> teapot in <s> style on a white background"

step=0 steps=6
NEXT="Next, with a GPU: docs/sd.md has the commands for your own SD 1.5 or SDXL and pictures."
if [[ $FAMILY == flux ]]; then
  steps=8
  NEXT="Next, with a GPU and FLUX.1-dev:  bash flux_dir/train_deltaR_sty.sh 0 64"
fi
started=$SECONDS
trap '[[ $? == 0 ]] || echo "run_demo.sh: step $step of $steps failed, see the message above; nothing outside $OUT was touched" >&2' EXIT

# begin FOLDER TEXT: announce the next step and clear the folder that it will write.
begin() {
  step=$((step + 1))
  echo
  echo "== $step/$steps  $2  ($((SECONDS - started)) s so far)"
  if [[ -e $1 ]]; then
    echo "replacing $1 of an earlier run"
    rm -rf "$1"
  fi
}

# train FOLDER PICTURES STEPS: one adapter, from pictures with a caption in a text file beside each.
train() {
  local script=train_network_ABM.py more=()
  [[ $FAMILY != sdxl ]] || script=sdxl_train_network_ABM.py
  if [[ $FAMILY == flux ]]; then script=flux_train_qrlora.py more=(--guidance_scale 1 --discrete_flow_shift 1.0); fi
  CUDA_VISIBLE_DEVICES="" ACCELERATE_USE_CPU=true "$PYTHON" -m accelerate.commands.launch --cpu --quiet \
    --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "$script" \
    --pretrained_model_name_or_path "$MODEL" --instance_data_dir "$2" --caption_extension .txt --output_dir "$1" \
    --output_name pytorch_lora_weights --network_module "networks.$METHOD" \
    --network_dim $RANK_USED --network_alpha $RANK_USED --network_train_unet_only --resolution 64 --train_batch_size 4 \
    --max_train_steps "$3" --learning_rate $RATE --cache_latents --lr_scheduler cosine --seed 0 --log_with tensorboard \
    ${more[@]+"${more[@]}"}
}

# draw FOLDER STYLES CONTENTS [FLAGS]: pictures with every pair of strengths, and one sheet of them.
draw() {
  OUTPUT_DIR=$1 PROMPT=$PROMPT STYLE_WEIGHTS=$2 CONTENT_WEIGHTS=$3 NUM_STEPS=20 \
    bash flux_dir/inference_merge.sh cpu --guidance_scale $GUIDANCE \
    --style_reference $STYLE_PICTURES/00.png --content_reference $CONTENT_PICTURES/00.png "${@:4}"
}

mkdir -p "$OUT"
# Values for the small model and one picture, in place of the launchers' values for FLUX.1-dev.
export MODEL_NAME="$MODEL" MODEL_PATH="$MODEL"
export RESOLUTION=64 TRAIN_BATCH_SIZE=4 CHECKPOINTING_STEPS=100 GRADIENT_ACCUMULATION_STEPS=1 LR_SCHEDULER=cosine
export VALIDATION_EPOCHS=100 NUM_VALIDATION_IMAGES=1

begin "$STYLE" "train the style: $STYLE_PICTURES"
train "$STYLE" "$STYLE_PICTURES" $STEPS_STYLE

begin "$CONTENT" "train the content: $CONTENT_PICTURES"
train "$CONTENT" "$CONTENT_PICTURES" $STEPS_CONTENT

if [[ $FAMILY == flux ]]; then
  begin "$ONE" "train one subject with Q and R free"
  OUTPUT_DIR=$ONE MAX_TRAIN_STEPS=40 LEARNING_RATE=1e-3 bash flux_dir/train_QR.sh cpu 16

  begin "$RESIDUAL" "write the residual file (only other tools need it)"
  OUTPUT_DIR=$RESIDUAL RANK=16 bash flux_dir/save_flux_residual.sh cpu
fi

export STYLE_LORA_PATH=$STYLE/pytorch_lora_weights.safetensors
export CONTENT_LORA_PATH=$CONTENT/pytorch_lora_weights.safetensors
begin "$IMAGES" "add style and content over a grid of strengths"
draw "$IMAGES" $GRID_STYLE $GRID_CONTENT

begin "$EFFECTS" "draw without adapters, with each alone, and with both"
draw "$EFFECTS" 0,1 0,1

begin "$SEEDS" "draw both at strength 1 with 32 seeds and count"
draw "$SEEDS" 1 1 --num_images 32 --seed 0
"$PYTHON" tools/score_pictures.py "$SEEDS" --content teapot --style blueprint --under "$IMAGES/sheet.png" --json "$OUT/score.json"

begin "$SIMILARITY" "compare the two adapters"
OUTPUT_DIR=$SIMILARITY LORA1_PATH=$STYLE_LORA_PATH LORA2_PATH=$CONTENT_LORA_PATH \
  bash flux_dir/visualize_qrlora_similarity.sh cpu

cat <<END

== done in $((SECONDS - started)) s. To look at:
  $IMAGES/sheet.png        what both adapters draw together, labelled, beside the first pictures they learned from
  $EFFECTS/sheet.png       strength 0 and 1 of each: the base, the style alone, the content alone, both
  $OUT/score.json          in how many of 32 pictures the scorer finds both
  $SIMILARITY/             plots, JSON and summary_statistics.txt: similarity of the two adapters
  $STYLE/, $CONTENT/       the adapters (pytorch_lora_weights.safetensors), checkpoints, loss, validation pictures
  $(venv_python .venv) -m tensorboard.main --logdir $OUT   loss curves and pictures in the browser
$NEXT
END
