"""One main per root script."""
