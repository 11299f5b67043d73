# Functions for the launchers of this folder, which source this file: read the arguments, find Python, and start a
# script on one GPU, on several, or on the CPU. A launcher itself contains only its values.

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(dirname "$HERE")"
source "$ROOT/tools/find_python.sh"
# In the repository root, default paths are relative, as in the documentation.
if [[ $PWD -ef $ROOT ]]; then ROOT=. ASSETS=assets LAUNCHERS=flux_dir
else ASSETS="$ROOT/assets" LAUNCHERS="$ROOT/flux_dir"; fi

refuse() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# arguments "<GPU_ID> <RANK>" "0 64" "$@": set GPU_ID, RANK if the first text contains it, and the array MORE of the
# remaining arguments, which are passed to the Python script unchanged.
arguments() {
  local names="$1" example="$2" missing=""
  shift 2
  case ${1:-} in
    -h | --help) usage "$names" "$example"; exit 0 ;;
    "" | -*) missing="GPU_ID" ;;
  esac
  GPU_ID="${1:-}"
  if [[ -z $missing && $names == *RANK* ]]; then
    case ${2:-} in
      "" | -*) missing="RANK" ;;
      *) RANK="$2"; shift ;;
    esac
  fi
  if [[ -n $missing ]]; then
    { echo "$(basename "$0"): $missing is missing"; usage "$names" "$example"; } >&2
    exit 2
  fi
  shift
  MORE=("$@")
  [[ $GPU_ID =~ ^(cpu|[0-9]+(,[0-9]+)*|(GPU|MIG)-[^,]+(,(GPU|MIG)-[^,]+)*)$ ]] \
    || refuse "GPU_ID is '$GPU_ID', not a GPU number; give one as 0, several as 0,1, or cpu"
}

usage() {
  cat <<END
usage:   bash $0 $1 [flags for the Python script]
example: bash $0 $2
  GPU_ID  a GPU number, a list (0,1: one process for each), or cpu
END
  [[ $1 != *RANK* ]] || echo "  RANK    rank of the adapter, 64 in the paper's code"
  cat <<END
Every value at the top of $0 is replaced by an environment variable of its name:
         MODEL_NAME=/models/FLUX.1-dev OUTPUT_DIR=./out bash $0 $2
END
}

# whole_number NAME VALUE: refuse anything but 1, 2, 3, …
whole_number() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || refuse "$1 is '$2', not a positive whole number; try 64"
}

# on_cpu A B: A when GPU_ID is cpu, else B.
on_cpu() {
  if [[ $GPU_ID == cpu ]]; then echo "$1"; else echo "$2"; fi
}

# newest_adapter NAME TRIGGER LAUNCHER: print the adapter of the newest finished run with TRIGGER in ./exps_flux.
newest_adapter() {
  local file newest=""
  for file in ./exps_flux/*-"$2"-*/pytorch_lora_weights.safetensors; do
    if [[ -f $file && (-z $newest || $file -nt $newest) ]]; then newest="$file"; fi
  done
  [[ -n $newest ]] || refuse "no ./exps_flux/*-$2-*/pytorch_lora_weights.safetensors here; train one with" \
    "'bash $LAUNCHERS/$3 $GPU_ID 64', or set $1=/path/to/pytorch_lora_weights.safetensors"
  echo "$1 is not set: taking the newest, $newest" >&2
  echo "$newest"
}

# keep_copy NAME: write this launcher and its command to OUTPUT_DIR/NAME.
keep_copy() {
  mkdir -p "$OUTPUT_DIR"
  {
    cat "$0"
    # %q writes newlines as \n, so that a folder's name cannot end the comment
    printf '\n# Started with GPU_ID %s on %s in %q as:\n#   ' "$GPU_ID" "$(date '+%Y-%m-%d %H:%M:%S')" "$PWD"
    printf '%q ' "${CALL[@]}"
    echo
  } > "$OUTPUT_DIR/$1"
}

# visible: let the Python process see the GPUs of GPU_ID and no others.
visible() {
  PYTHON_BIN="$(ready_python "$ROOT")" || refuse "no python with accelerate found; run" \
    "'bash $ROOT/tools/setup_env.sh', activate your own environment, or set PYTHON=/path/to/python"
  if [[ $GPU_ID == cpu ]]; then
    export CUDA_VISIBLE_DEVICES="" ACCELERATE_USE_CPU=true
  else
    export CUDA_VISIBLE_DEVICES="$GPU_ID"
  fi
  # torch.distributed reads RANK as the process number, so the rank of the adapter must not be exported.
  export -n RANK
}

# run COMMAND …: print the command, write the copy COPY_AS unless it is empty, and run the command.
run() {
  CALL=("$@")
  [[ -z ${COPY_AS:-} ]] || keep_copy "$COPY_AS"
  printf '+ ' >&2
  printf '%q ' "$@" >&2
  echo >&2
  exec "$@"
}

# script NAME FLAGS…: run a script that does not train, in one process.
script() {
  visible
  run "$PYTHON_BIN" "$ROOT/$1" "${@:2}" ${MORE[@]+"${MORE[@]}"}
}

# launch NAME FLAGS…: run a training script through accelerate, one process per GPU.
launch() {
  visible
  # --quiet: accelerate prints no traceback after the one-sentence error of the script.
  local how=(--num_machines 1 --dynamo_backend no --num_cpu_threads_per_process "${OMP_NUM_THREADS:-$(nproc)}") ids
  IFS=, read -r -a ids <<< "$GPU_ID"
  if [[ $GPU_ID == cpu ]]; then
    how+=(--cpu --num_processes 1 --quiet)
  elif ((${#ids[@]} > 1)); then
    # Port 0: accelerate chooses a free port, so that two runs on one machine do not collide.
    how+=(--multi_gpu --num_processes "${#ids[@]}" --gpu_ids all --main_process_port "${MAIN_PROCESS_PORT:-0}")
    # Consumer GPUs lack P2P and InfiniBand, and NCCL hangs if it tries to use them; set 0 to use them.
    export NCCL_P2P_DISABLE="${NCCL_P2P_DISABLE:-1}" NCCL_IB_DISABLE="${NCCL_IB_DISABLE:-1}"
  else
    how+=(--num_processes 1 --gpu_ids all --quiet)
  fi
  run "$PYTHON_BIN" -m accelerate.commands.launch "${how[@]}" --mixed_precision "$MIXED_PRECISION" \
    "$ROOT/$1" "${@:2}" ${MORE[@]+"${MORE[@]}"}
}

# train: run flux_train_qrlora.py with the values that the three training launchers share. It needs TRIGGER_NAME,
# INSTANCE_DIR, INSTANCE_PROMPT, VALID_PROMPT, LORA_INIT_METHOD, and ZERO_INIT (a flag, or empty).
train() {
  whole_number RANK "$RANK"
  MODEL_NAME="${MODEL_NAME:-black-forest-labs/FLUX.1-dev}"
  OUTPUT_DIR="${OUTPUT_DIR:-./exps_flux/$(date +%m%d-%H%M%S)-$TRIGGER_NAME-$RANK}"
  MIXED_PRECISION="${MIXED_PRECISION:-$(on_cpu no bf16)}"
  local flags=(
    --pretrained_model_name_or_path "$MODEL_NAME"
    --instance_data_dir "$INSTANCE_DIR"
    --instance_prompt "$INSTANCE_PROMPT"
    --output_dir "$OUTPUT_DIR"
    --rank "$RANK"
    --lora_init_method "$LORA_INIT_METHOD"
    ${ZERO_INIT:+"$ZERO_INIT"}
    --mixed_precision "$MIXED_PRECISION"
    --resolution "${RESOLUTION:-512}"
    --train_batch_size "${TRAIN_BATCH_SIZE:-1}"
    # The published launchers have 4, but their trainer also steps at the end of every epoch, so with one picture it
    # accumulates 1. This trainer would accumulate 4; 1 repeats the published training.
    --gradient_accumulation_steps "${GRADIENT_ACCUMULATION_STEPS:-1}"
    --guidance_scale "${GUIDANCE_SCALE:-1}"
    # The published code draws sigma uniformly without a shift; kohya's default is 3.0.
    --discrete_flow_shift "${DISCRETE_FLOW_SHIFT:-1.0}"
    --learning_rate "${LEARNING_RATE:-1e-4}"
    --adam_weight_decay "${ADAM_WEIGHT_DECAY:-1e-4}"
    --lr_scheduler "${LR_SCHEDULER:-constant}"
    --lr_warmup_steps "${LR_WARMUP_STEPS:-0}"
    --max_train_steps "${MAX_TRAIN_STEPS:-1000}"
    --checkpointing_steps "${CHECKPOINTING_STEPS:-250}"
    --seed "${SEED:-0}"
    --report_to "${REPORT_TO:-tensorboard}"
  )
  if [[ -n $VALID_PROMPT ]]; then
    flags+=(--validation_prompt "$VALID_PROMPT" --validation_epochs "${VALIDATION_EPOCHS:-100}"
      --num_validation_images "${NUM_VALIDATION_IMAGES:-4}")
  fi
  COPY_AS=train_script.sh
  launch flux_train_qrlora.py "${flags[@]}"
}
