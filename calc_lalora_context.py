"""Measure the curvature that LaLoRA's penalty uses: calc_lalora_context.py \
--pretrained_model_name_or_path sd_xl_base_1.0.safetensors \
--source_data_dir pictures/general --train_data_dir my/pictures --output_path lalora_context.safetensors \
--resolution 1024 --batch_size 4 --mixed_precision bf16"""

from lowrank.cli.run import run

if __name__ == "__main__":
    run("context")
