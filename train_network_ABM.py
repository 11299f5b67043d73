"""Train an adapter for SD 1.x or 2.x: accelerate launch train_network_ABM.py \
--pretrained_model_name_or_path v1-5-pruned-emaonly.safetensors --train_data_dir my/pictures \
--resolution 512,512 --network_module networks.lora --network_dim 32 --output_dir out --output_name cat"""

from lowrank.cli.run import run

if __name__ == "__main__":
    run("sd_train")
