"""Package data: the shipped codebooks, and (`python -m tqai.core.tables`) what writes them."""
