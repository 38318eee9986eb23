"""lm-eval (EleutherAI's evaluation harness): the model "hf-tqai", registered when this package is imported.

    model.py      the class that lm-eval sees
    passes.py     a model and a compressed cache: scores of given tokens, greedy continuations
    __main__.py   `python -m tqai.integrations.lm_eval`: lm-eval's command line with the model registered

    python -m tqai.integrations.lm_eval --model hf-tqai --tasks wikitext \\
        --model_args pretrained=FOLDER,cache=K3/V3,codec=trellis,residual_window=128

Needs lm-eval 0.4.9 or newer (`pip install 'tqai[lm-eval]'`). This package alone imports lm_eval.
"""

from tqai.integrations.lm_eval.model import TqaiLM

__all__ = ["TqaiLM"]
