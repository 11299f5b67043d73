"""Draw style × content: inference_merge.py --model_path FLUX.1-dev --style_lora_path sty.safetensors \
--content_lora_path cnt.safetensors --prompt "a <c> dog in <s> style" --style_weights 0.9,1.0 --output_dir out"""

from lowrank.cli.run import run

if __name__ == "__main__":
    run("merge")
