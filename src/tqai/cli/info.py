"""`tqai info`: versions, devices, backends and why each one serves or not."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import tqai
from tqai.cli.options import JsonOption
from tqai.cli.report import console, print_json
from tqai.config import DEFAULT_PRESET, NAMED_PRESETS, PRESETS, CacheConfig

__all__ = ["info"]

PACKAGES = ("numpy", "torch", "transformers", "safetensors", "triton", "cuda-core", "mlx", "mlx-lm")
TYPICAL_HEAD_DIM = 128


def info(json: JsonOption = False) -> None:
    """Show versions, devices, and which backend would serve this machine, with the reason."""
    from tqai import demo

    facts: dict[str, Any] = {
        "tqai": tqai.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "backends": _backends(),
        "presets": {name: {"bits_k": k, "bits_v": v} for name, (k, v) in PRESETS.items()}
        | {name: dict(settings) for name, settings in NAMED_PRESETS.items()},
        "default_preset": DEFAULT_PRESET,
        "default_config": CacheConfig.asked({}).to_dict(),
        "embedded_model": (demo.model_path() / "config.json").is_file(),
    }
    if json:
        print_json(facts)
    else:
        _print(facts)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    """Devices that torch can use, the one that commands take by default first."""
    if find_spec("torch") is None:
        return []
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {"device": f"cuda:{index}", "name": properties.name, "memory_bytes": properties.total_memory}
        )
    found.append({"device": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()})
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _backends() -> dict[str, dict[str, str | None]]:
    """Per backend, for each device type here: None if it serves the default configuration, else why not."""
    from tqai.backends import BACKENDS, load
    from tqai.cache.page_format import page_format_for
    from tqai.errors import TqaiError

    default = CacheConfig.asked({}).with_changes(last_layer_bits=None)
    page_format = page_format_for(default, TYPICAL_HEAD_DIM, TYPICAL_HEAD_DIM)
    device_types = list(dict.fromkeys(entry["device"].partition(":")[0] for entry in _devices())) or ["cpu"]
    found: dict[str, dict[str, str | None]] = {}
    for name in BACKENDS:
        try:
            backend = load(name)
        except TqaiError as error:
            found[name] = dict.fromkeys(device_types, str(error))
            continue
        found[name] = {
            kind: backend.refuses(page_format, kind, "float32" if kind == "cpu" else "bfloat16")
            for kind in device_types
        }
    return found


def _print(facts: dict[str, Any]) -> None:
    from rich.table import Table

    out = console()
    table = Table(show_header=False, box=None)
    table.add_row("tqai", facts["tqai"])
    table.add_row("Python", f"{facts['python']}, {facts['platform']}, {facts['cpu_cores']} cores")
    for name, version in facts["packages"].items():
        table.add_row(name, version or "not installed")
    for entry in facts["devices"]:
        table.add_row(f"device {entry['device']}", entry["name"])
    chosen = set[str]()
    for name, devices in facts["backends"].items():
        for kind, refusal in devices.items():
            if refusal is None:
                words = "serves" if kind in chosen else "serves, first choice"
                chosen.add(kind)
            else:
                words = f"off: {refusal}"
            table.add_row(f"backend {name} on {kind}", words)
    table.add_row("presets", ", ".join(facts["presets"]))
    default = CacheConfig.from_dict(facts["default_config"])
    table.add_row("default", f"{facts['default_preset']}: {default.label}, codec {default.codec}")
    table.add_row("embedded model", "present" if facts["embedded_model"] else "missing")
    out.print(table)
