"""`tqai info`."""

import tqai


def test_json(tqai_command):
    result = tqai_command("info", "--json")
    assert result.status == 0, result.err
    assert result.json["tqai"] == tqai.__version__
    assert result.json["devices"][-1]["device"] == "cpu"
    assert result.json["backends"]["torch"]["cpu"] is None
    assert result.json["presets"]["K4/V2"] == {"bits_k": 4, "bits_v": 2}


def test_a_backend_that_cannot_load_says_why(tqai_command, monkeypatch):
    import tqai.backends

    monkeypatch.setitem(tqai.backends.BACKENDS, "broken", "tqai.backends.no_such_module:Nothing")
    assert "no_such_module" in tqai_command("info", "--json").json["backends"]["broken"]["cpu"]
    assert "cannot be loaded" in " ".join(tqai_command("info").out.split())


def test_table(tqai_command):
    result = tqai_command("info")
    assert result.status == 0, result.err
    for words in ("numpy", "device cpu", "backend torch on cpu", "first choice", "K4/V2"):
        assert words in result.out
