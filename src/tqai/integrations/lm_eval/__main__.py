"""lm-eval's command line, with the model "hf-tqai" among its models."""

from lm_eval.__main__ import cli_evaluate

import tqai.integrations.lm_eval  # noqa: F401 - registers the model

if __name__ == "__main__":
    cli_evaluate()
