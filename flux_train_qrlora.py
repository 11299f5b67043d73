"""Train an adapter for FLUX: accelerate launch flux_train_qrlora.py \
--pretrained_model_name_or_path FLUX.1-dev \
--instance_data_dir assets/sty/cat --instance_prompt "a cat in <s> style" --rank 64 --output_dir out"""

from lowrank.cli.run import run

if __name__ == "__main__":
    run("flux_train")
