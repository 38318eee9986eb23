"""How models reach the cache: transformers, later mlx-lm and lm-eval."""
