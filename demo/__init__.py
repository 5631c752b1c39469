"""The bundled checkpoint: its tasks, tokenizer, trainer and evaluation."""
