"""Train an adapter for SDXL: accelerate launch sdxl_train_network_ABM.py \
--pretrained_model_name_or_path sd_xl_base_1.0.safetensors --train_data_dir my/pictures \
--resolution 1024,1024 --network_module networks.lora --network_dim 32 --output_dir out --output_name cat"""

from lowrank.cli.run import run

if __name__ == "__main__":
    run("sd_train", "main_sdxl")
