"""LaLoRA: the curvature of the base model's loss, its context file, and the penalty made from it."""
