"""`python -m tqai.integrations.mlx_lm.serving`: mlx_lm.server with compressed caches.

    python -m tqai.integrations.mlx_lm.serving --bits-k 4 --bits-v 2 --model FOLDER --port 8080

Options of the cache are taken first, all others are mlx_lm.server's own. In a program of one's own,
`compressed_models(config)` does the same for every model that the server loads while it lasts.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlx_lm import server

from tqai.config import PRESETS, CacheConfig
from tqai.errors import UnsupportedError
from tqai.integrations.mlx_lm.patching import patch
from tqai.integrations.mlx_lm.settings import served

__all__ = ["compressed_models", "main"]

logger = logging.getLogger("tqai")


@contextmanager
def compressed_models(config: CacheConfig | None = None) -> Iterator[None]:
    """While it lasts, models that mlx_lm.server loads get compressed caches; draft models too.

    A model that cannot have one is served as it is, and a warning says why.

    Raises:
        UnsupportedError: a setting that the caches for mlx-lm do not serve.
    """
    config = served(config)
    original = server.ModelProvider.load

    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = (self.model, self.draft_model)
        loaded = original(self, *args, **kwargs)
        for model in (self.model, self.draft_model):
            if model is not None and not any(model is other for other in known):
                try:
                    patch(model, config=config)
                except UnsupportedError as error:
                    logger.warning("served without compression: %s", error)
        return loaded

    server.ModelProvider.load = load
    try:
        yield
    finally:
        server.ModelProvider.load = original


def main(arguments: Sequence[str] | None = None) -> None:
    """Run mlx_lm.server; `arguments` None means those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tqai.integrations.mlx_lm.serving",
        description="mlx_lm.server with compressed caches.",
        epilog="All other options are those of mlx_lm.server; -- --help shows them.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="K4/V2", help=f"preset: {', '.join(PRESETS)}")
    parser.add_argument("--bits-k", type=int, help="bits per key coordinate, 1 to 8")
    parser.add_argument("--bits-v", type=int, help="bits per value coordinate, 1 to 8")
    parser.add_argument("--sink-tokens", type=int, help="the first N tokens stay exact")
    parser.add_argument("--residual-window", type=int, help="at least the newest N tokens stay exact")
    own, others = parser.parse_known_args(arguments)
    names = ("bits_k", "bits_v", "sink_tokens", "residual_window")
    changes = {name: getattr(own, name) for name in names if getattr(own, name) is not None}
    config = CacheConfig.preset(own.config, **changes)
    sys.argv = ["mlx_lm.server", *(argument for argument in others if argument != "--")]
    with compressed_models(config):
        server.main()


if __name__ == "__main__":
    main()
