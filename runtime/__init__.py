"""Opens exported models in stock runtimes; imports neither torch nor transformers."""
