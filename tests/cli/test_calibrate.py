"""`tqai calibrate` writes a file that `bits="auto"` takes."""

from __future__ import annotations

import pytest


def test_calibrates_and_says_what_the_budget_buys(tqai_command, tiny_model, tmp_path):
    from tqai.cache.calibration import Calibration

    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and so on. " * 40)
    output = tmp_path / "calibration.json"
    done = tqai_command(
        *("calibrate", "-m", tiny_model, "--text", str(text), "-o", str(output), "--json"),
        *("--tokens", "160", "--prefill", "100", "--bits-budget", "3.5", "--offsets", "auto"),
    )
    assert done.status == 0, done.err
    result = done.json
    assert len(result["layer_bits"]) == 2
    assert result["bits_per_value"] <= 3.5
    found = Calibration.load(output)
    assert found.about["settings"]["offsets"] == "auto"
    assert [list(pair) for pair in found.layer_bits(_config(), 3.5)] == result["layer_bits"]


def _config():
    from tqai.config import CacheConfig

    return CacheConfig(offsets="auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "/nowhere/at/all.json"), "no such folder"),
        (("-o", "c.json", "--bits-budget", "0"), "bits_budget=0"),
        (("-o", "c.json", "--text", "/no/such/text"), "--text /no/such/text: No such file"),
        (("-o", "c.json", "--prefill", "2000", "--tokens", "100"), "allowed are up to 99"),
    ],
)
def test_what_is_wrong_is_said(tqai_command, tiny_model, arguments, message):
    done = tqai_command("calibrate", "-m", tiny_model, *arguments)
    assert done.status == (1 if "No such file" in message else 2)
    assert message in done.err
