"""What `import tqai` offers, and how little it loads."""

import subprocess
import sys
import time

import pytest

import tqai

NAMES = [
    "PRESETS",
    "CacheConfig",
    "CodebookRegistry",
    "PolarQuantizer",
    "TqaiError",
    "TurboQuantCache",
    "TurboQuantConfig",
    "TurboQuantIP",
    "TurboQuantMSE",
    "TurboQuantProd",
    "__version__",
    "compress_activations",
    "compute_memory_bytes",
    "convert",
    "errors",
    "patch",
    "solve_codebook",
    "unpatch",
]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_is_exactly_the_public_names():
    assert sorted(tqai.__all__) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_resolves(name):
    value = getattr(tqai, name)
    assert value is not None
    assert getattr(tqai, name) is value
    assert name in dir(tqai)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tqai.no_such_name


def test_import_loads_no_framework():
    out = run_python("import sys, tqai; print(*sorted(name.split('.')[0] for name in sys.modules))")
    assert not {"numpy", "torch", "transformers", "mlx", "typer", "rich"} & set(out.split())


def test_configuration_loads_no_framework():
    code = "import sys, tqai; tqai.CacheConfig(); tqai.errors.ConfigError; print(*sys.modules)"
    assert not {"torch", "transformers", "mlx"} & set(run_python(code).split())


def test_quantizers_need_no_framework():
    code = "import sys, tqai; tqai.TurboQuantMSE; print(*sys.modules)"
    assert not {"torch", "transformers", "mlx"} & set(run_python(code).split())


def test_import_takes_under_200_ms():
    """Of processor time, which on a quiet machine is the time, and which neighbours disturb less."""
    code = "import time; t = time.process_time(); import tqai; print(time.process_time() - t)"
    deadline = time.monotonic() + 20
    best = float(run_python(code))
    while best >= 0.2 and time.monotonic() < deadline:
        best = min(best, float(run_python(code)))
    assert best < 0.2


def test_typed_marker_lies_beside_the_package():
    from importlib.resources import files

    assert files("tqai").joinpath("py.typed").is_file()
