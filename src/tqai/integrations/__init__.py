"""How models reach the cache: transformers, mlx-lm and lm-eval. `patching` tells models apart."""
