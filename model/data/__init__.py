"""From files of rows to packed token sequences."""
