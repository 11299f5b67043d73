"""Where a method's factors point: subspaces of weights and of gradients, and the files that keep them."""
