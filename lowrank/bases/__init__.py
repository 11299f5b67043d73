"""Subspaces that a method's frozen factors span: of weights, gradients or files, and their caches."""
