"""The status page: self-contained, and drawn in a real browser where there is one."""

import re
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

PAGE = files("tqai.server.api").joinpath("status.html").read_text("utf-8")
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "serve.png"


def test_page_is_served_without_external_requests(served):
    answer = served.http.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.text == PAGE and not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", PAGE)


def test_everything_that_the_page_reads_is_there(served):
    found = served.http.get("/status.json").json()
    read = set(re.findall(r"\bfound\.(\w+)", PAGE))
    assert read <= set(found), read - set(found)
    counters = re.search(r"for \(const name of \[(.*?)\]\)\n\s*show\(name, count", PAGE)[1]
    assert set(re.findall(r'"(\w+)"', counters)) <= set(found["counters"])
    used = set(re.findall(r"""(?:element|show)\("([\w-]+)\"""", PAGE))
    assert used <= set(re.findall(r'id="([\w-]+)"', PAGE))


def test_the_picture_is_a_png():
    assert PICTURE.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here")
def test_charts_are_drawn_in_chromium(served, tmp_path, monkeypatch):
    import sys
    import time

    monkeypatch.syspath_prepend(str(PICTURE.parents[2] / "scripts"))
    from picture_status import Page

    with Page(shutil.which("chromium"), served.url, str(tmp_path)) as page:
        deadline = time.monotonic() + 120
        while page.evaluate("document.getElementById('plot-pool')?.getAttribute('points')") in (None, ""):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        served.post("/v1/completions", prompt="x", max_tokens=5, ignore_eos=True)
        while page.evaluate("document.getElementById('generated_tokens').textContent") == "0":
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert page.evaluate("document.getElementById('state').textContent") == "serving"
        assert page.picture().startswith(b"\x89PNG")
    sys.modules.pop("picture_status", None)
