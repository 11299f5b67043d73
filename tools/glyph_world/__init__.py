"""The glyph world: small pictures with known content, style and background, and models trained on them."""
