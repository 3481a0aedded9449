"""The report: one page that loads nothing and tells all rows; how its bars are drawn."""

import html.parser
import re

import pytest

from heedful.bench.page import page


def row(backend, status="right", median=None, **more):
    figures = dict.fromkeys(
        ("median_ms", "spread_ms", "times_as_fast_as_torch", "tflops", "share_of_matmul", "peak_bytes", "reason", "ran")
    )
    if median is not None:
        figures |= {
            "median_ms": median,
            "spread_ms": median / 10,
            "times_as_fast_as_torch": 10.0 / median,
            "tflops": 0.1,
            "share_of_matmul": 0.5,
            "peak_bytes": 1 << 20,
            "ran": backend,
        }
    rest = {"lowerings": [], "exactness": "exact", "rounds": 9, "max_abs_error": 1e-6, "allowed_error": 2e-6}
    return {"backend": backend, "status": status, **figures, **rest, **more}


@pytest.fixture
def record():
    rows = [
        row("auto", median=5.0, ran="native", lowerings=["gather_keys"]),
        row("torch", median=10.0),
        row("sage", median=4.0, exactness="quantised"),
        row("native_math", median=500.0),
        row("mine", "wrong", reason="off by 0.3, at most 2e-06 is allowed", max_abs_error=0.3),
        row("flash", "refused", reason="device is cpu, it takes cuda <script>alert(1)</script>"),
    ]
    shape = {"batch": 2, "heads": 4, "kv_heads": 2, "query_length": 1, "key_length": 9, "head_dim": 8, "value_dim": 8}
    case = {
        "case": "a-case",
        "model": "A Model",
        "mask": "padded",
        "kept_keys": 0.2,
        "dtype": "float32",
        "shape": shape,
    }
    return {
        "machine": {
            "date": "2026-01-02",
            "cpu": "A CPU",
            "cores": 2,
            "load": 0.1,
            "torch": "2.13.0",
            "xformers": "0.1",
        },
        "settings": {"rounds": 9, "checked_rows": 64},
        "interrupted": False,
        "wrong": 1,
        "failed": 0,
        "groups": [{**case, "useful_flops": 10**9, "matmul_tflops": 0.2, "rows": rows}],
    }


class Elements(html.parser.HTMLParser):
    """Every element with its attributes; fails where tags do not match."""

    VOID = {"meta", "link", "br", "hr", "img", "input"}

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def plain(text):
    return " ".join(re.sub(r"<[^>]+>", " ", text.partition("</head>")[2]).split())


def test_the_page_loads_nothing(record):
    text = page(record)
    elements = Elements(text).found
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not [attributes for _, attributes in elements if {"src", "href", "onload", "onclick"} & set(attributes)]
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert "default-src 'none'" in text
    assert "&lt;script&gt;alert(1)" in text  # what a backend says is text


def test_every_row_is_told(record):
    text = plain(page(record))
    for words in (
        "a-case",
        "A Model",
        "mask padded",
        "fp32",
        "4 over 2",
        "1 query",
        "about 20 % kept",
        "A CPU",
        "xformers",
    ):
        assert words in text
    for one in record["groups"][0]["rows"]:
        assert text.count(one["backend"]) >= 2
    assert "WRONG mine off by 0.3, at most 2e-06 is allowed" in text
    assert "1 wrong answer " in text
    assert "quantised" in text


def test_a_wrong_row_has_no_bar_and_no_time(record):
    text = page(record)
    bars = re.findall(r'<span class="name" title="(\w+)"', text)
    assert bars == ["sage", "auto", "torch", "native_math"]
    [line] = re.findall(r'<tr class="wrong">.*?</tr>', text, re.S)
    assert " ms" not in line
    assert "×" not in line


def test_bars_are_as_long_as_their_times_and_the_longest_is_cut(record):
    text = page(record)
    ends = [float(end) for end in re.findall(r'class="bar" style="width:([\d.]+)%', text)]
    assert ends[0] / ends[2] == pytest.approx(0.4, rel=0.01)
    assert ends[1] / ends[2] == pytest.approx(0.5, rel=0.01)
    assert ends[3] == 100.0
    assert text.count('class="whisker"') == 3
    assert re.findall(r'class="row ([\w ]+)"', text) == ["head", "approximate", "best", "torch", "cut"]


def test_the_summary_is_about_exact_backends(record):
    text = plain(page(record))
    assert "2.00× auto against torch" in text
    assert "1 of 1 times auto is the fastest exact one" in text


@pytest.mark.parametrize(("median", "spread", "times"), [(4.1, 0.01, 1), (4.5, 0.01, 0), (4.5, 0.6, 1)])
def test_auto_is_the_fastest_where_nothing_tells_it_from_that(record, median, spread, times):
    auto, torch = record["groups"][0]["rows"][:2]
    auto |= {"median_ms": median, "spread_ms": spread}
    torch |= {"median_ms": 4.0, "spread_ms": 0.01}
    assert f"{times} of 1 times auto is the fastest exact one" in plain(page(record))


def test_nothing_measured_is_a_page_too(record):
    record["groups"][0]["rows"] = [row("torch", "skipped", reason="it is for GPUs")]
    record["groups"][0]["matmul_tflops"] = None
    record |= {"interrupted": True, "wrong": 0}
    text = plain(page(record))
    assert "Interrupted" in text
    assert "it is for GPUs" in text
    record["groups"] = []
    assert "0 calls of real models" in plain(page(record))
