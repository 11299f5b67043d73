"""Structured LoRA adapters for diffusion models: train, merge, compare, export."""

__version__ = "0.1.0"
