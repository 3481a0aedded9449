"""What the adapters call, held against what the real packages take.

The records in ``signatures/`` were read from the packages' own sources. A stand-in has the recorded signatures exactly,
and every call that a strategy makes of a stand-in binds to the record, not only to the stand-in.
"""

import ast
import contextlib
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from signatures.record import definitions, module_file, parameters
from signatures.records import all_records, bound_to_record, signature_of

import heedful
from heedful.facts import DeviceFacts
from heedful.sources import Package

SITES = {site.name: site for site in sorted((Path(__file__).parent / "stand_ins").iterdir()) if site.is_dir()}
RECORDS = all_records()
DEVICES = ("sm_90", "sm_80", "sm_100", "sm_120", "gfx942", "npu", "xla")


def distribution(site):
    """Name and version that a site's dist-info states, the name as indexes compare it."""
    for file in site.glob("*.dist-info/METADATA"):
        fields = dict(line.split(": ", 1) for line in file.read_text("utf-8").splitlines() if ": " in line)
        return plain(fields["Name"]), fields["Version"]
    return None, None


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def records_of(site):
    """The records that a stand-in imitates: of its version, or where none has that, of its package."""
    name, version = distribution(site)
    of_package = [record for record in RECORDS.values() if plain(record["package"]) == name]
    return [record for record in of_package if record["version"] == version] or of_package


def recorded(site):
    """Every recorded function that a stand-in has: name, record, definition."""
    for record in records_of(site):
        for name, function in record["functions"].items():
            parts = name.split(".")
            for cut in range(len(parts) - 1, 0, -1):
                file = module_file(site, ".".join(parts[:cut]))
                if file is not None:
                    found = list(definitions(ast.parse(file.read_bytes()), parts[cut:]))
                    yield from ((name, function, one) for one in found)
                    break


IMITATED = [pytest.param(*found, id=f"{name}-{found[0]}") for name, site in SITES.items() for found in recorded(site)]


@pytest.mark.parametrize(("name", "function", "definition"), IMITATED)
def test_a_stand_in_has_the_recorded_signature(name, function, definition):
    assert parameters(definition) == function["parameters"], name


@pytest.mark.parametrize("site", [name for name, site in SITES.items() if distribution(site)[0]])
def test_every_stand_in_of_a_package_has_a_record(site):
    assert list(recorded(SITES[site]))


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_says_what_it_was_read_from(name):
    record = RECORDS[name]
    assert record["package"]
    assert record["source"]
    assert record.get("version") or record.get("commit")
    assert record["functions"]
    for function, entry in record["functions"].items():
        assert function.count(".") >= 1
        for parameter in entry["parameters"]:
            assert set(parameter) == {"name", "kind", "default", "required"}
            variadic = parameter["kind"].startswith("VAR_")
            assert parameter["required"] == (parameter["default"] is None and not variadic)
        assert len(signature_of(entry).parameters) == len(entry["parameters"])


@contextlib.contextmanager
def on_path(site):
    """The site first on the path, its modules new; what was imported by those names before comes back afterwards."""
    tops = {entry.stem for entry in site.iterdir() if not entry.name.endswith(".dist-info")}

    def take_out():
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in tops}

    before = take_out()
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(site))
        take_out()
        sys.modules.update(before)


def adapters():
    """Strategy names with the site that imitates the package they call."""
    factory = heedful.AttentionStrategyFactory(plugins=False)
    for name, strategy in factory.strategies().items():
        for source in strategy.sources:
            for site, folder in SITES.items():
                if isinstance(source, Package) and distribution(folder)[0] and module_file(folder, source.module):
                    yield pytest.param(name, source, folder, id=f"{name}-{site}")


def calls():
    """Calls that ask for one thing each: which arguments an adapter passes depends on them."""
    yield "plain", {}
    yield "causal", {"attn_mask": heedful.Causal("bottom_right")}
    yield "square causal", {"is_causal": True, "queries": 24}
    yield "window", {"attn_mask": heedful.SlidingWindow(3, 2, "bottom_right")}
    yield "grouped heads", {"enable_gqa": True}
    yield "scale", {"scale": 0.3}
    yield "softcap", {"softcap": 5.0}
    yield "dropout", {"dropout_p": 0.1}
    yield "lse", {"return_lse": True}
    yield "bool mask", {"attn_mask": torch.rand(2, 1, 16, 24) > 0.3}
    yield "float mask", {"attn_mask": torch.randn(2, 1, 16, 24)}
    yield "padding", {"attn_mask": heedful.KeyPadding.from_lengths(torch.tensor([9, 24]), 24)}
    ends = torch.tensor([0, 7, 24], dtype=torch.int32)
    yield "packed", {"layout": "THD", "attn_mask": heedful.Varlen(ends)}
    yield "packed causal", {"layout": "THD", "attn_mask": heedful.Varlen(ends) & heedful.Causal("bottom_right")}
    yield "packed lse", {"layout": "THD", "attn_mask": heedful.Varlen(ends), "return_lse": True}


def tensors(dtype, layout="BHSD", queries=16, enable_gqa=False, **_):
    kv_heads = 2 if enable_gqa else 4
    if layout == "THD":
        return [torch.randn(24, heads, 64, dtype=dtype) for heads in (4, kv_heads, kv_heads)]
    shapes = ((4, queries), (kv_heads, 24), (kv_heads, 24))
    return [torch.randn(2, *shape, 64, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(("name", "source", "site"), list(adapters()))
def test_what_an_adapter_calls_binds_to_the_record(name, source, site, monkeypatch):
    entries = {key: entry for record in records_of(site) for key, entry in record["functions"].items()}
    bound, ran = set(), set()
    with on_path(site):
        module = importlib.import_module(source.module)
        for function in source.names:
            original = getattr(module, function)
            entry = entries.get(f"{original.__module__}.{original.__qualname__}")
            if entry is not None:
                monkeypatch.setattr(module, function, bound_to_record(original, entry, bound.add))
        for device in DEVICES:
            made = DeviceFacts.parse(device)
            facts = heedful.Facts("2.13", "3.11", "Linux", {"cpu": made})
            dispatcher = heedful.AttentionDispatcher(heedful.AttentionStrategyFactory(plugins=False), facts)
            for what, call in calls():
                if what in ran:
                    continue
                dtype = torch.bfloat16
                words = {key: value for key, value in call.items() if key != "queries"}
                with contextlib.suppress(heedful.Refused):
                    dispatcher.attention(*tensors(dtype, **call), backend=name, **words)
                    ran.add(what)
        monkeypatch.undo()
    assert "plain" in ran
    assert bound, "no call was held against a record"
