"""GGUF files, the reading half: header, metadata, vocabulary, values. Needs no MLX; gguf_export/ writes them."""
