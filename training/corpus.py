"""Build the training text from openly licensed documentation and source.

The input is a folder of Debian packages (``apt-get download NAME...`` fetches
them without installing).  Each package is unpacked with ``dpkg -x``, its HTML is
stripped to text, boilerplate paragraphs are dropped, and three things are
written:

* ``OUT/train.jsonl`` and ``OUT/heldout.jsonl``: one ``{"source", "path",
  "text"}`` object per document, in a shuffled order;
* ``OUT/sources.json``: name, licence, package version, documents and bytes of
  every source;
* with ``--document FILE``: the held-out CPython tutorial, as one text file.

Whole documents are held out before anything is trained: the tutorial named in
``DOCUMENT_PAGES`` and one in a hundred of all others.  A paragraph that occurs in
held-out text is removed from the training text wherever else it occurs.

Usage::

    python training/corpus.py --packages-only          # print the package names
    python training/corpus.py --debs DIR --out .train --document FILE
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html.parser
import json
import random
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One Debian package: files whose relative path matches ``keep`` are used."""

    package: str
    licence: str
    keep: str
    drop: str = r"(?!)"  # matches nothing
    max_bytes: int = 10_000_000


SOURCES = (
    Source("python3.11-doc", "PSF-2.0", r"/html/.*\.html$", r"genindex|changelog|/search|_static"),
    Source("libpython3.11-stdlib", "PSF-2.0", r"\.py$", r"encodings/|pydoc_data|idlelib/"),
    Source("libpython3.11-minimal", "PSF-2.0", r"\.py$", r"encodings/"),
    Source("postgresql-doc-15", "PostgreSQL", r"/html/.*\.html$", r"bookindex|release-"),
    Source(
        "rust-doc",
        "MIT OR Apache-2.0",
        r"/html/(book|reference|nomicon|rust-by-example|cargo|rustc|edition-guide|rustdoc"
        r"|embedded-book)/.*\.html$",
        r"(second|first|2018)-edition|print\.html",
    ),
    Source("nodejs-doc", "MIT", r"/api/.*\.html$", r"/all\.html"),
    Source("python-django-doc", "BSD-3-Clause", r"/html/.*\.html$", r"genindex|_modules"),
    Source("python-pandas-doc", "BSD-3-Clause", r"/html/_sources/.*\.txt$", r"reference/api"),
    Source("python-scipy-doc", "BSD-3-Clause", r"/html/.*\.html$", r"genindex|_modules|release"),
    Source("python-sympy-doc", "BSD-3-Clause", r"/html/_sources/.*\.txt(\.gz)?$"),
    Source("python-flask-doc", "BSD-3-Clause", r"/html/.*\.html$", r"genindex|_modules"),
    Source("sphinx-doc", "BSD-2-Clause", r"/html/_sources/.*\.txt$"),
    Source("twisted-doc", "MIT", r"/html/(core|web|words|names|mail|conch).*\.html$"),
    Source("sqlite3-doc", "public domain", r"/sqlite3/.*\.html$", r"releaselog|syntax/"),
    Source("apache2-doc", "Apache-2.0", r"/manual/en/.*\.html$"),
    Source("erlang-doc", "Apache-2.0", r"/doc/.*\.html$", r"/java/|notes\.html"),
    Source("cmake-doc", "BSD-3-Clause", r"/_sources/.*\.txt$"),
    Source("llvm-14-doc", "Apache-2.0 WITH LLVM-exception", r"/html/_sources/.*\.txt$", r"AMDGPU/"),
    Source("ghc-doc", "BSD-3-Clause", r"/users_guide/_sources/.*\.txt$"),
    Source("git-doc", "GPL-2.0", r"/git-doc/.*\.txt$", r"RelNotes"),
    Source("linux-doc-6.1", "GPL-2.0", r"/_sources/.*\.rst\.txt$", r"translations", 24_000_000),
    Source("perl-doc", "Artistic OR GPL-1.0-or-later", r"\.pod(\.gz)?$", r"delta\.pod"),
    Source("debian-policy", "GPL-2.0-or-later", r"policy\.html/.*\.html$", r"genindex"),
    Source("debian-reference-en", "GPL-2.0-or-later", r"share/debian-reference/.*\.html$"),
    Source("debian-handbook", "GPL-2.0-or-later OR CC-BY-SA-3.0", r"/en-US/.*\.html$"),
    Source("debian-history", "GPL-2.0-or-later", r"\.en\.html$"),
    Source("debian-faq", "GPL-2.0-or-later", r"\.html$"),
    Source("developers-reference", "GPL-2.0-or-later", r"\.html$", r"genindex"),
    Source("postfix-doc", "IPL-1.0 OR EPL-2.0", r"\.html$"),
    Source("exim4-doc-html", "GPL-2.0-or-later", r"\.html$", r"changes|index"),
    Source("vim-doc", "Vim", r"/html/.*\.html$", r"/tags\.html|russian", 5_000_000),
)


def words(text: str) -> frozenset[str]:
    """The words of a string."""
    return frozenset(text.split())


DOCUMENT_PAGES = (  # of the tutorial, in the order in which they are joined
    "introduction", "controlflow", "datastructures", "modules", "inputoutput", "errors", "classes",
    "stdlib", "stdlib2", "venv", "floatingpoint", "interpreter", "appetite", "whatnow",
)  # fmt: skip
BLOCKS = words("p div li ul ol dl dt dd tr table h1 h2 h3 h4 h5 h6 section article br hr blockquote")
SKIP = words("script style nav head footer aside button noscript svg select form")
VOID = words("br hr img input meta link area base col embed source track wbr")
CHROME = re.compile(r"related|sphinxsidebar|footer|headerlink|nav|breadcrumb|sidebar|toctree|toc\b")


class _Text(html.parser.HTMLParser):
    """Collects a page's readable text; ``<pre>`` keeps its line breaks."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self.stack: list[tuple[str, bool]] = []  # (tag, is skipped)
        self.skipping = self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS and not self.pre:
            self.out.append("\n\n" if tag not in ("br", "tr", "li", "dd") else "\n")
        if tag in ("td", "th"):
            self.out.append(" ")
        if tag in VOID:
            return
        names = " ".join(v or "" for k, v in attrs if k in ("class", "role", "id"))
        skip = tag in SKIP or (tag in ("div", "a", "p") and bool(CHROME.search(names)))
        self.stack.append((tag, skip))
        self.skipping += skip
        self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if not any(t == tag for t, _ in self.stack):
            return
        while self.stack:
            top, skip = self.stack.pop()
            self.skipping -= skip
            self.pre -= top == "pre"
            if top == tag:
                break
        if tag in BLOCKS or tag == "pre":
            self.out.append("\n\n" if tag in ("p", "pre", "table", "ul", "ol") else "\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.out.append(data if self.pre else re.sub(r"\s+", " ", data))


def to_text(path: Path) -> str:
    """The readable text of one file (HTML stripped, gzip unpacked)."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    text = raw.decode("utf-8", "replace")
    if path.name.endswith(".html"):
        parser = _Text()
        parser.feed(text)
        text = "".join(parser.out)
    text = text.replace("\u00b6", "").replace("\u00a0", " ").replace("\r\n", "\n")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def paragraph_key(paragraph: str) -> bytes:
    """A short fingerprint that ignores white space."""
    return hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest()


def read_source(source: Source, debs: Path, scratch: Path) -> tuple[str, list[tuple[str, str]]]:
    """Unpack one package; returns its version and its (path, text) pairs."""
    deb = next(iter(sorted(debs.glob(source.package + "_*.deb"))))
    root = scratch / source.package
    subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)
    docs, seen, size = [], set(), 0
    files = [p for p in root.rglob("*") if p.is_file() and not p.is_symlink()]
    for path in sorted(files, key=lambda p: hashlib.sha1(str(p.relative_to(root)).encode()).digest()):
        name = "/" + str(path.relative_to(root))
        if not re.search(source.keep, name) or re.search(source.drop, name):
            continue
        text = to_text(path)
        key = paragraph_key(text)
        if len(text) < 400 or key in seen or text.count("\ufffd") > 5 or size > source.max_bytes:
            continue
        seen.add(key)
        size += len(text)
        docs.append((name, text))
    return deb.name.split("_")[1].replace("%3a", ":"), docs


def main() -> None:
    """Command line: see the module's docstring."""
    ap = argparse.ArgumentParser()
    ap.add_argument("--packages-only", action="store_true")
    ap.add_argument("--debs", type=Path)
    ap.add_argument("--out", type=Path, default=Path(".train"))
    ap.add_argument("--document", type=Path, help="write the held-out tutorial here")
    args = ap.parse_args()
    if args.packages_only:
        print(*(s.package for s in SOURCES))
        return
    document: dict[str, str] = {}
    held: list[dict[str, str]] = []
    train: list[dict[str, str]] = []
    report = []
    with tempfile.TemporaryDirectory() as scratch:
        for source in SOURCES:
            version, docs = read_source(source, args.debs, Path(scratch))
            for name, text in docs:
                page = re.fullmatch(r".*/tutorial/(\w+)\.html", name)
                if source.package == "python3.11-doc" and page and page[1] in DOCUMENT_PAGES:
                    document[page[1]] = text
                    continue
                in_held = int(hashlib.sha1(name.encode()).hexdigest(), 16) % 100 == 0
                (held if in_held else train).append({"source": source.package, "path": name, "text": text})
            report.append({"package": source.package, "version": version, "licence": source.licence})
            print(source.package, len(docs), sum(len(t) for _, t in docs), flush=True)
    missing = set(DOCUMENT_PAGES) - set(document)
    if missing:
        raise SystemExit(f"held-out pages not found: {sorted(missing)}")
    held_text = [*document.values(), *(d["text"] for d in held)]
    held_keys = {paragraph_key(p) for t in held_text for p in t.split("\n\n") if len(p) > 40}
    times: Counter[bytes] = Counter()
    for doc in train:
        kept = []
        for par in doc["text"].split("\n\n"):
            key = paragraph_key(par)
            times[key] += 1
            if (len(par) > 40 and (key in held_keys or times[key] > 2)) or times[key] > 200:
                continue
            kept.append(par)
        doc["text"] = "\n\n".join(kept)
    train = [d for d in train if len(d["text"]) >= 400]
    random.Random(0).shuffle(train)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, docs in (("train", train), ("heldout", held)):
        with open(args.out / f"{name}.jsonl", "w") as f:
            f.writelines(json.dumps(d) + "\n" for d in docs)
    for row in report:
        mine = [d["text"] for d in train if d["source"] == row["package"]]
        row["train_documents"] = len(mine)
        row["train_bytes"] = sum(len(t.encode()) for t in mine)
        row["heldout_documents"] = sum(d["source"] == row["package"] for d in held)
    (args.out / "sources.json").write_text(json.dumps(report, indent=1) + "\n")
    if args.document:
        args.document.write_text("\n\n\n".join(document[p] for p in DOCUMENT_PAGES) + "\n")
    print("train bytes", sum(r["train_bytes"] for r in report), "held-out documents", len(held))


if __name__ == "__main__":
    main()
