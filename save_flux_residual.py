"""Write the residual W − QR of each FLUX layer: save_flux_residual.py --model_path FLUX.1-dev \
--rank 64 --output_dir out"""

from lowrank.cli.run import run

if __name__ == "__main__":
    run("residual")
