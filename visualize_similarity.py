"""Compare two adapters: visualize_similarity.py --lora1_path sty.safetensors --lora2_path cnt.safetensors"""

from lowrank.cli.run import run

if __name__ == "__main__":
    run("similarity")
