"""Writes the generated documentation: docs/cli.md whole, and the parts of documents between markers.

    python scripts/generate_docs.py            write
    python scripts/generate_docs.py --check    write nothing; exit 1 and name the files that would change

A generated part of a document lies between two lines

    <!-- generated: NAME -->
    <!-- end of generated: NAME -->

where NAME is one of PARTS. Figures come from benchmarks/results/*.json and from nowhere else.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import cache_option_tables  # noqa: E402
import choice_tables  # noqa: E402
import code_tables  # noqa: E402
import cpu_tables  # noqa: E402
import gpu_tables  # noqa: E402
import kernel_tables  # noqa: E402
import mlx_tables  # noqa: E402
import serve_tables  # noqa: E402
import soak_tables  # noqa: E402
import study_tables  # noqa: E402
import trellis_tables  # noqa: E402
from option_tables import activations_table, qjl_table, solvers_table  # noqa: E402
from results import read_if_there  # noqa: E402

DOCUMENTS = (
    "README.md",
    "docs/cache-options.md",
    "docs/performance.md",
    "docs/performance-cpu.md",
    "docs/performance-gpu.md",
    "docs/performance-trellis.md",
    "docs/quality.md",
    "docs/quality-options.md",
    "docs/mlx.md",
    "docs/serve.md",
)
CLI = "docs/cli.md"
PICTURE = "docs/images/demo.svg"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 on drift")
    check = parser.parse_args().check
    changed = drifted(ROOT)
    for path, text in changed.items():
        if check:
            print(f"{path.relative_to(ROOT)} differs from what `make docs` writes", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if check and changed else 0


def drifted(root: Path) -> dict[Path, str]:
    """The files under `root` that are not as generated, with the text that they should have."""
    wanted = {root / CLI: cli_reference()}
    for name in DOCUMENTS:
        wanted[root / name] = with_parts((root / name).read_text("utf-8"), root)
    return {
        path: text for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text
    }


def with_parts(text: str, root: Path) -> str:
    """`text` with every marked part generated anew."""

    def generated(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- generated: {name} -->\n{PARTS[name](root)}\n<!-- end of generated: {name} -->"

    pattern = r"<!-- generated: (?P<name>[\w-]+) -->\n.*?<!-- end of generated: (?P=name) -->"
    return re.sub(pattern, generated, text, flags=re.S)


def cli_reference() -> str:
    """docs/cli.md, from the commands themselves."""
    import typer

    from tqai.cli.app import app

    group: Any = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "Generated from the commands by `make docs`.",
        "",
        "    tqai COMMAND [OPTIONS]        or: python -m tqai COMMAND [OPTIONS]",
        "",
        "Every command takes `--json`: one JSON object on standard output and nothing else there. Progress",
        "goes to standard error. Exit codes: 0 done, 1 failed, 2 wrong use or setting, 130 interrupted. An",
        "error is one line on standard error; `TQAI_DEBUG=1` shows the traceback. `tqai --version` prints",
        "the version, `tqai --install-completion` sets up completion in the shell.",
    ]
    for name, command in group.commands.items():
        arguments = [p.name.upper() for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["tqai", name, *arguments, "[OPTIONS]"])
        lines += ["", f"## {name}", "", " ".join(command.help.split()), "", f"    {usage}", ""]
        lines += ["| | | default |", "|---|---|---|"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            shown = ", ".join(f"`{option}`" for option in parameter.opts)
            if parameter.param_type_name == "argument":
                shown = f"`{parameter.name.upper()}`"
            lines.append(f"| {shown} | {parameter.help} | {_default(parameter)} |")
    return "\n".join(lines) + "\n"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if getattr(parameter, "is_flag", False):
        return "off"
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    return "none" if parameter.default is None else str(parameter.default)


def picture(root: Path) -> str:
    """The picture of `tqai demo` (`make picture` draws it), where there is one."""
    if not (root / PICTURE).is_file():
        return "`make demo` shows it."
    return f"![tqai demo: the embedded model's answers with both caches]({PICTURE})"


def quality_table(root: Path) -> str:
    """Size, quality and retrieval of every cache on the embedded model."""
    result = read_if_there(root, "demo_model")
    if result is None:
        return "No result is committed yet; `make bench` writes it."
    settings = result["settings"]
    questions = settings["questions"]
    lines = [
        f"| cache | MB held | bits per value | KL, nats per token | perplexity | found of {questions} |",
        "|---|---|---|---|---|---|",
    ]
    for name, memory in result["memory"].items():
        quality, found = result["quality"][name], result["retrieval"][name]
        kl = quality["kl_mean"]["value"]
        lines.append(
            f"| {_cache_name(name)} | {memory['held_bytes'] / 1e6:.2f} | {memory['bits_per_value']:.2f} "
            f"| {'-' if name == 'dynamic' else f'{kl:.4f}'} | {quality['perplexity']['value']:.3f} "
            f"| {found['correct']} |"
        )
    lines += [
        "",
        f"Bytes and bits at {settings['memory_tokens']} tokens, everything counted: codes, scales, exact "
        f"window, tables, slack. KL against the uncompressed model and perplexity over "
        f"{settings['documents']} held-out documents of {settings['document_tokens']} tokens, read in chunks "
        f"of {settings['chunk_tokens']} that see the history as the cache gives it back. Retrieval: "
        f"six-digit codes hidden in {settings['retrieval_tokens']} tokens. {_provenance(result)}",
    ]
    return "\n".join(lines)


def speed_table(root: Path) -> str:
    """Decoding speed of every cache on the embedded model, as a ratio to DynamicCache of the same run."""
    result = read_if_there(root, "demo_model")
    if result is None:
        return "No result is committed yet; `make bench` writes it."
    contexts = list(result["speed"])
    lines = [
        "| cache | " + " | ".join(f"{tokens} tokens" for tokens in contexts) + " |",
        "|---|" + "---|" * len(contexts),
    ]
    for name in result["memory"]:
        cells = []
        for tokens in contexts:
            speed, base = result["speed"][tokens][name], result["speed"][tokens]["dynamic"]
            if "withheld" in speed:
                cells.append("withheld")
                continue
            ratio = speed["tokens_per_second"] / base["tokens_per_second"]
            cells.append(f"{speed['tokens_per_second']:.1f} ({ratio:.2f}x)")
        lines.append(f"| {_cache_name(name)} | {' | '.join(cells)} |")
    lines += ["", f"Tokens per second of decoding, and the ratio to DynamicCache. {_provenance(result)}"]
    return "\n".join(lines)


def cpu_generate_table(root: Path) -> str:
    """`generate` end to end on the CPU, against DynamicCache."""
    result = read_if_there(root, "cpu_generate")
    if result is None:
        return "No result is committed yet; `python benchmarks/cpu_generate.py` writes it."
    lines = [
        "| prompt tokens | cache | ms per token | tokens per second | time to first token |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        name = "dynamic" if row["cache"] == "DynamicCache" else row["cache"]
        lines.append(
            f"| {row['prompt_tokens']} | {_cache_name(name)} | {row['token_ms']:.1f} "
            f"| {row['tokens_per_second_ratio']:.2f}x | {row['prefill_time_ratio']:.2f}x |"
        )
    lines += [
        "",
        f"`model.generate`, greedy, {result['rows'][0]['new_tokens']} new tokens, embedded model in float32; "
        f"ratios to DynamicCache of the same round. {result['cpu']}, {result['cpus']} cores; "
        f"{result['date'][:10]}.",
    ]
    return "\n".join(lines)


def _cache_name(name: str) -> str:
    if name == "dynamic":
        return "uncompressed (DynamicCache)"
    kind, _, bits = name.partition("-")
    return f"transformers {kind}, {bits} bits" if bits else f"tqai {name}"


def _provenance(result: dict[str, Any]) -> str:
    model, versions = result["model"], result["versions"]
    return (
        f"Model: {model['parameters'] / 1e6:.1f} million parameters, {model['dtype']}, {model['device']}. "
        f"Machine: {result['cpu']}, {result['cpus']} cores; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; {result['date'][:10]}."
    )


PARTS: dict[str, Callable[[Path], str]] = {
    "picture": picture,
    "quality": quality_table,
    "speed": speed_table,
    "kernels-short": kernel_tables.short_table,
    "cpu-attention": cpu_tables.attention_table,
    "cpu-targets": cpu_tables.targets_table,
    "cpu-second-machine": cpu_tables.second_machine_table,
    "cpu-generate": cpu_generate_table,
    "cpu-trellis-attention": trellis_tables.cpu_attention_table,
    "cpu-trellis-codes": trellis_tables.cpu_codes_table,
    "cpu-trellis-prefill": trellis_tables.cpu_prefill_table,
    "gpu-attention": gpu_tables.attention_table,
    "gpu-eager": gpu_tables.eager_table,
    "gpu-roofline": gpu_tables.roofline_table,
    "gpu-floor": gpu_tables.floor_table,
    "gpu-encode": gpu_tables.encode_table,
    "gpu-triton": gpu_tables.triton_table,
    "gpu-generate": gpu_tables.generate_table,
    "gpu-trellis": trellis_tables.gpu_attention_table,
    "mlx-speed": mlx_tables.speed_table,
    "mlx-memory": mlx_tables.memory_table,
    "mlx-quality": mlx_tables.quality_table,
    "offsets-time": cache_option_tables.offsets_time_table,
    "offsets-error": cache_option_tables.offsets_error_table,
    "auto-bits": cache_option_tables.bits_table,
    "balance": cache_option_tables.balance_table,
    "choices": choice_tables.choices_table,
    "choices-balance": choice_tables.balance_table,
    "choices-layers": choice_tables.layers_table,
    "serve-steps": serve_tables.steps_table,
    "serve-first": serve_tables.first_token_table,
    "serve-gaps": serve_tables.gap_table,
    "serve-gpu-load": serve_tables.gpu_load_table,
    "serve-cpu-load": serve_tables.cpu_load_table,
    "serve-soak": soak_tables.soak_table,
    "serve-fuzz": soak_tables.fuzz_table,
    "codes": code_tables.codes_table,
    "study-kl": study_tables.kl_tables,
    "study-short": study_tables.short_table,
    "study-copies": study_tables.copies_table,
    "study-targets": study_tables.targets_table,
    "study-peers": study_tables.peers_table,
    "study-retrieval": study_tables.retrieval_table,
    "qjl": qjl_table,
    "solvers": solvers_table,
    "activations": activations_table,
}

if __name__ == "__main__":
    sys.exit(main())
