"""`TqaiLM`: a transformers model with a compressed cache, as lm-eval's model "hf-tqai"."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tqai.config import CacheConfig
from tqai.errors import ConfigError, UnsupportedError
from tqai.integrations.lm_eval.passes import fill, greedy, scores

__all__ = ["CHUNK_TOKENS", "TqaiLM"]

logger = logging.getLogger("tqai")

CHUNK_TOKENS = 32
NEW_TOKENS = 256


@register_model("hf-tqai")
class TqaiLM(TemplateLM):
    """lm-eval's requests, answered by a model whose cache is compressed.

    Contexts fill the cache; continuations and texts go through it in chunks that read it back. The newest
    tokens of a context (an unfinished page of 64, and the window) are exact, so a task whose prompts are
    shorter than some hundred tokens says little about a cache.

    `--model_args` of lm-eval are the arguments of the constructor.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: Any,
        cache: str | None = None,
        tokenizer: Any = None,
        chunk_tokens: int | str = CHUNK_TOKENS,
        max_length: int | str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: Any = 1,
        max_batch_size: Any = None,
        add_bos_token: bool = False,
        **settings: Any,
    ) -> None:
        """
        Args:
            pretrained: a folder or hub name, or a transformers model.
            cache: name of a preset, "dynamic" for transformers' uncompressed cache, None for the default.
            tokenizer: a folder, hub name or tokenizer, None for the model's own (needed with a model).
            chunk_tokens: tokens per forward pass of what is scored, at least 1.
            max_length: tokens that fit, None for the model's positions.
            dtype: of the weights: "auto", "float32", "bfloat16", "float16".
            device: such as "cpu" or "cuda:0" (the CPU, with a warning, where torch sees no GPU), None for a
                GPU if there is one.
            batch_size, max_batch_size: taken because lm-eval gives them; requests are answered one by one.
            add_bos_token: begin contexts and texts with the token of the beginning.
            settings: fields of `CacheConfig`: `codec`, `residual_window`, `sink_tokens`, `seed`, ...

        Raises:
            ConfigError: a cache or setting that does not exist.
        """
        super().__init__()
        self.chunk_tokens = int(chunk_tokens)
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens={chunk_tokens}: allowed are whole numbers from 1")
        self._make_config = None if cache == "dynamic" else _config(cache, settings)
        if cache == "dynamic" and settings:
            raise ConfigError(f"cache='dynamic' takes no settings, but was given {', '.join(settings)}")
        self.model = _loaded(pretrained, dtype, device)
        self.tokenizer = _tokenizer(tokenizer if tokenizer is not None else pretrained)
        self.max_length = _max_length(self.model, max_length)
        self.add_bos_token = add_bos_token in (True, "True", "true")
        self.batch_size = 1

    def make_cache(self) -> Any:
        """A new, empty cache."""
        if self._make_config is None:
            from transformers import DynamicCache

            return DynamicCache(config=self.model.config)
        from tqai.integrations.transformers import TurboQuantCache

        return TurboQuantCache(self.model, config=self._make_config)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens are added where asked for, or else with `add_bos_token`."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special, **kwargs))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as one text."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for context, group in itertools.groupby(requests, key=lambda request: request[1]):
            members = list(group)
            filled, cut_at = None, None
            for key, _, following in members:
                start = self._kept(context, following)
                if filled is None or start != cut_at:
                    filled, cut_at = fill(self.model, context[start:], self.make_cache), start
                answer = scores(self.model, filled, following, self.chunk_tokens)
                found.append(answer)
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def _kept(self, context: list[int], following: list[int]) -> int:
        """The first token of the context that still fits, counted from its beginning."""
        room = self.max_length - len(following) + 1
        if room < 1:
            raise UnsupportedError(
                f"a continuation of {len(following)} tokens: the model has {self.max_length} positions"
            )
        return max(len(context) - room, 0)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` tokens and in chunks of each."""
        found = []
        for request in requests:
            (text,) = request.args
            total = 0.0
            for window in get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, 1
            ):
                context, following = make_disjoint_window(window)
                filled = fill(self.model, context, self.make_cache)
                total += scores(self.model, filled, following, self.chunk_tokens)[0]
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to the first of the stop strings, which is left away."""
        return [self._generated(*request.args) for request in requests]

    def _generated(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0):
            raise UnsupportedError("do_sample=True: continuations are greedy here; allowed is False")
        stops = _stops(options.get("until"))
        new_tokens = int(options.get("max_gen_toks", options.get("max_new_tokens", NEW_TOKENS)))
        ids = self.tok_encode(context) or [self.prefix_token_id]
        ids = ids[-max(self.max_length - new_tokens, 1) :]
        filled = fill(self.model, ids, self.make_cache)

        def text_of(tokens: list[int]) -> str:
            text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
            return text

        def finished(tokens: list[int]) -> bool:
            return tokens[-1] == self.eot_token_id or any(stop in text_of(tokens) for stop in stops)

        text = text_of(greedy(self.model, filled, new_tokens, finished))
        for stop in stops:
            text = text.split(stop)[0]
        self.cache_hook.add_partial("generate_until", (context, options), text)
        return text


def _config(cache: str | None, settings: dict[str, Any]) -> CacheConfig:
    return CacheConfig.asked(settings) if cache is None else CacheConfig.preset(cache, **settings)


def _loaded(pretrained: Any, dtype: str, device: str | None) -> Any:
    if not isinstance(pretrained, str | PathLike):
        return pretrained
    from transformers import AutoModelForCausalLM

    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("device=%s: torch sees no NVIDIA GPU, the model runs on the CPU", where)
        where = "cpu"  # lm-eval's command line says cuda:0 where nobody has said anything
    return AutoModelForCausalLM.from_pretrained(pretrained, dtype=wanted).to(where).eval()


def _tokenizer(source: Any) -> Any:
    if hasattr(source, "encode") and not isinstance(source, str):
        return source
    if not isinstance(source, str | PathLike):
        raise ConfigError("tokenizer=None: a model that is given as an object wants its tokenizer too")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def _max_length(model: Any, asked: int | str | None) -> int:
    if asked is not None:
        return int(asked)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(positions or 2048)


def _stops(until: Any) -> list[str]:
    words = [until] if isinstance(until, str) else list(until or ())
    return [word for word in words if word]
