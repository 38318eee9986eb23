"""`tqai benchmark`."""

import pytest

FAST = ("--tokens", "128")


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    import tqai.cli.kernel_speed

    monkeypatch.setattr(tqai.cli.kernel_speed, "MIN_SECONDS", 0.0)


def test_distortion_is_what_theory_says(tqai_command):
    result = tqai_command("benchmark", *FAST, "--bits-k", "4", "--bits-v", "2", "--json")
    assert result.status == 0, result.err
    keys, values = result.json["distortion"]["keys"], result.json["distortion"]["values"]
    assert keys["nmse"] == pytest.approx(0.00915, rel=0.02)
    assert values["nmse"] == pytest.approx(0.1153, rel=0.02)
    assert keys["snr_db"] == pytest.approx(20.39, abs=0.1)
    # with a least-squares scale the error is orthogonal to the approximation: cos^2 = 1 - NMSE
    assert keys["cosine"] ** 2 == pytest.approx(1 - keys["nmse"], rel=1e-3)
    assert result.json["bits_per_value"] == pytest.approx(3 + 16 / 128)
    assert result.json["encode"]["vectors_per_second"] > 0
    assert result.json["attention"]["speedup"] > 0


def test_table(tqai_command):
    result = tqai_command("benchmark", *FAST, "--head-dim", "80", "--config", "K3/V3")
    assert result.status == 0, result.err
    for words in ("head_dim 80", "NMSE", "SNR", "cosine", "3.200 bits per value", "ratio"):
        assert words in result.out


def test_no_speed_without_a_right_result(tqai_command, monkeypatch):
    from tqai.backends.torch_ops.backend import TorchBackend

    attend = TorchBackend.attend

    def slightly_wrong(self, *arguments):
        result = attend(self, *arguments)
        return result._replace(out=result.out * 1.01)

    monkeypatch.setattr(TorchBackend, "attend", slightly_wrong)
    result = tqai_command("benchmark", *FAST, "--backend", "torch", "--json")
    assert result.status == 1
    assert "attends wrongly" in result.one_line()


def test_no_speed_without_right_codes(tqai_command, monkeypatch):
    from tqai.backends.torch_ops.backend import TorchBackend

    decode = TorchBackend.decode

    def slightly_wrong(self, *arguments):
        result = decode(self, *arguments)
        return result._replace(keys=result.keys * 1.001)

    monkeypatch.setattr(TorchBackend, "decode", slightly_wrong)
    result = tqai_command("benchmark", *FAST, "--backend", "torch", "--json")
    assert "decodes wrongly" in result.one_line()


@pytest.mark.parametrize(
    "arguments",
    [("--head-dim", "0"), ("--head-dim", "5000"), ("--tokens", "63"), ("--bits-v", "0"), ("--seed", "-1")],
)
def test_wrong_use_is_one_line(tqai_command, arguments):
    result = tqai_command("benchmark", *arguments)
    result.one_line()
    assert result.status == 2


@pytest.mark.parametrize("n_vectors", [1, 700, 3000])
def test_errors_are_of_as_many_vectors_as_asked(tqai_command, n_vectors):
    """1024 are encoded for the timing: fewer are a part of them, more are drawn."""
    arguments = ("benchmark", *FAST, "--config", "K4/V2", "--json")
    result = tqai_command(*arguments, "--n-vectors", str(n_vectors))
    assert result.status == 0, result.err
    assert result.json["n_vectors"] == n_vectors
    keys = result.json["distortion"]["keys"]
    assert keys["nmse"] == pytest.approx(0.00915, rel=0.5 if n_vectors == 1 else 0.03)
    assert keys["cosine"] ** 2 == pytest.approx(1 - keys["nmse"], rel=1e-3)
    every = tqai_command(*arguments).json["distortion"]["keys"]
    assert keys != every


def test_all_configs(tqai_command):
    from tqai.config import PRESETS

    result = tqai_command("benchmark", *FAST, "--all-configs", "--json")
    assert result.status == 0, result.err
    assert list(result.json["configs"]) == list(PRESETS)
    for name, (bits_k, bits_v) in PRESETS.items():
        one = result.json["configs"][name]
        assert (one["config"]["bits_k"], one["config"]["bits_v"]) == (bits_k, bits_v)
        assert one["bits_per_value"] == pytest.approx((bits_k + bits_v) / 2 + 16 / 128)
    table = tqai_command("benchmark", *FAST, "--all-configs").out
    assert all(name in table for name in PRESETS)


@pytest.mark.parametrize("arguments", [("--n-vectors", "0"), ("--all-configs", "--bits-k", "3")])
def test_wrong_use_of_the_newer_options(tqai_command, arguments):
    result = tqai_command("benchmark", *arguments)
    result.one_line()
    assert result.status == 2
