"""GGUF files, the writing half, and what people ask of one: `python -m gguf_export`. mlx_dgemma/gguf/ reads them."""
