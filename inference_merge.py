"""Generate images with merged style and content adapters: inference_merge.py --model_path FLUX.1-dev \
--style_lora_path sty.safetensors --content_lora_path cnt.safetensors \
--prompt "a <c> dog in <s> style" --output_dir out"""

from lowrank.cli.run import run

if __name__ == "__main__":
    run("merge")
