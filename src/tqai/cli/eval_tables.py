"""Tables of `tqai eval`."""

from __future__ import annotations

from typing import Any

from tqai.cli.report import console

__all__ = ["print_result"]


def print_result(result: dict[str, Any]) -> None:
    """Quality of every cache, then what else was asked for."""
    from rich.table import Table

    out, caches, request = console(), result["caches"], result["request"]
    table = Table()
    table.add_column("cache", overflow="fold")
    for title in ("bits", "KL", "95% interval", "p99", "same top", "perplexity"):
        table.add_column(title, no_wrap=True)
    for name, found in caches.items():
        bits = found.get("bits_per_value_at", {}).get("mean", found["bits_per_value"])
        kl = found["kl_mean"]
        table.add_row(
            name,
            f"{bits:.3f}",
            f"{kl['value']:.5f}",
            # over documents: one says nothing of others
            "-" if request["documents"] == 1 else f"{kl['low']:.5f}-{kl['high']:.5f}",
            f"{found['kl_p99']['value']:.4f}",
            f"{found['top1_agreement']['value']:.2%}",
            f"{found['perplexity']['value']:.3f}",
        )
    out.print(table)
    first = next(iter(caches.values()))
    out.print(
        f"{result['model']}: {request['documents']} documents of {request['document_tokens']} tokens, the "
        f"first {request['prefill_tokens']} of each not scored; scored tokens read "
        f"{first['history_read_back']:.0%} of their history from the cache; {len(request['seeds'])} seeds; "
        f"bits all-in at {request['bits_tokens'] or request['document_tokens']} tokens; KL in nats per token"
    )
    for name, found in caches.items():
        for line in _more(name, found, request):
            out.print(line)


def _more(name: str, found: dict[str, Any], request: dict[str, Any]) -> list[str]:
    lines = []
    if "first_divergence" in found:
        parted = [step for step in found["first_divergence"] if step is not None]
        count = len(found["first_divergence"])
        lines.append(
            f"{name}: {count - len(parted)} of {count} greedy answers of {request['greedy_tokens']} tokens "
            + "are the uncompressed model's"
            + (f"; the others part at token {', '.join(map(str, sorted(parted)))}" if parted else "")
        )
    for kind in ("local", "accumulated") if "attention_error" in found else ():
        errors = " ".join(f"{error:.4f}" for error in found["attention_error"][kind])
        lines.append(f"{name}: attention-output error by layer, {kind}: {errors}")
    for cell in found.get("retrieval", ()):
        where = "" if cell["depth"] is None else f" at depth {cell['depth']:g}"
        lines.append(
            f"{name}: {cell['kind']}{where}, {cell['prompt_tokens']} tokens: {cell['correct']} of "
            f"{cell['questions']} found"
        )
    return lines
