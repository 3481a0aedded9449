"""``heedful explain``, as a user types it; what it says without tensors is what is said of real ones."""

import json

import pytest
import torch
from rich.text import Text
from typer.testing import CliRunner

import heedful
from heedful import Bias, Causal, Dense, KeyPadding, SlidingWindow, Varlen
from heedful.cases import CASES
from heedful.cli import app, machines
from heedful.facts import DeviceFacts, Facts
from heedful.problem import AttentionProblem

run = CliRunner(env={"HEEDFUL_BACKEND": None, "NO_COLOR": "1", "FORCE_COLOR": None}).invoke


def plain(text):
    """The text without the frame, the colours and the line breaks that typer puts into it."""
    return " ".join(Text.from_ansi(text).plain.replace("│", " ").split())


def told(*arguments, **environ):
    """The data that the command prints."""
    answer = run(app, ["explain", *arguments, "--json"], env=environ)
    assert answer.exit_code in (0, 1), answer.output
    data = json.loads(answer.stdout)
    assert answer.exit_code == data["refused"]
    return data


def answers(data):
    return {row["name"]: row["answer"] for row in data["backends"]}


# What it prints


def test_the_decision_and_every_backend():
    arguments = ["--shape", "2,10,4096,64", "--mask", "padding", "--kept", "0.2", "--device", "sm75"]
    answer = run(app, ["explain", *arguments], env={"COLUMNS": "120"})
    assert answer.exit_code == 0, answer.output
    for words in (
        "problem  B2 H10 Q4096 K4096 D64 float16 BHSD on cuda sm_75, mask key padding (right, 2/8 kept)",
        "machine  sm_75, packages taken as installed",
        "wish     auto (from auto)",
        "runs     native: preference table for cuda",
        "note     hidden keys ",
        "materialise_mask (mends mask)",
        "compute capability is 7.5, it takes at least 8.0 (use native)",
    ):
        assert words in answer.stdout
    assert all(name in answer.stdout for name in heedful.AttentionStrategyFactory.strategies())


@pytest.mark.parametrize("columns", ["80", "120"])
def test_nothing_is_cut_off(columns):
    answer = run(app, ["explain", "--shape", "1,8,64,64", "--backend", "flash"], env={"COLUMNS": columns})
    assert "…" not in answer.stdout
    assert max(map(len, answer.stdout.splitlines())) <= int(columns)


def test_a_refusal_is_printed_and_is_status_1():
    answer = run(
        app, ["explain", "--shape", "1,8,64,64", "--backend", "flash", "--device", "cpu"], env={"COLUMNS": "200"}
    )
    assert answer.exit_code == 1
    assert "refused  nothing wanted takes it" in answer.stdout
    assert "device is cpu, it takes cuda (move the tensors, or name another backend)" in answer.stdout
    assert "native_math, reference would take it" in answer.stdout


def test_brackets_are_no_markup():
    answer = run(app, ["explain", "--shape", "2,8,64,64", "--mask", "dense:BQK"], env={"COLUMNS": "120"})
    assert "mask dense bool [BQK]" in answer.stdout


def test_the_same_as_json():
    data = told("--shape", "2,10,4096,64", "--device", "sm_90", "--mask", "causal", "--mask", "padding", "--lse")
    assert data["machine"]["capability"] == [9, 0]
    assert data["machine"]["supposed"] is True
    problem = AttentionProblem.from_dict(data["problem"])
    assert json.loads(json.dumps(problem.to_dict())) == data["problem"]
    assert set(answers(data)) == set(heedful.AttentionStrategyFactory.strategies())
    for row in data["backends"]:
        assert row["accepts"] == (not row["refusals"])
        assert all(step["mends"] or step["why"] for step in row["steps"])
        assert all(set(refusal) == {"field", "observed", "required", "remedy", "text"} for refusal in row["refusals"])
    assert next(row["name"] for row in data["backends"] if row["answer"] == "runs") == data["backend"]


def test_quantised_backends_take_it_by_name_only():
    said = answers(told("--shape", "2,10,4096,64", "--device", "sm_90"))
    assert said["sage"] == "by name"
    assert answers(told("--shape", "2,10,4096,64", "--device", "sm_90", "--backend", "sage"))["sage"] == "runs"


def test_all_cases_are_printed_and_can_be_asked():
    printed = run(app, ["explain", "--cases"], env={"COLUMNS": "120"}).stdout
    assert all(case.name in printed for case in CASES)
    listed = json.loads(run(app, ["explain", "--cases", "--json"]).stdout)
    assert [case["name"] for case in listed] == [case.name for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_has_its_models_sizes_and_mask(case):
    problem = AttentionProblem.from_dict(told("--case", case.name, "--device", "sm_90")["problem"])
    assert (problem.batch, problem.heads, problem.kv_heads) == (case.batch, case.heads, case.kv_heads)
    assert (problem.query_length, problem.key_length) == (case.query_length, case.key_length)
    kinds = {"none": (), "causal": ("causal",), "key_padding": ("key_padding",)}
    assert problem.mask.kinds == kinds[case.mask]
    other = told("--case", case.name, "--device", "sm_90", "--layout", "bshd")["problem"]
    assert AttentionProblem.from_dict(other) == problem.replace(layout="BSHD")


def test_a_case_with_another_mask():
    assert told("--case", "pixart-sigma-cross", "--mask", "none")["problem"]["mask"]["key_padding"] is False
    assert told("--case", "pixart-sigma-cross", "--kept", "0.9")["problem"]["mask"]["kept"] == 8


# Without tensors, the same problem as with them

SHAPE, KEPT = (2, 4, 16, 8), 8
ROWS = torch.arange(16)
WORDS = {
    "padding": KeyPadding(ROWS[None] < torch.tensor([[8], [8]])),
    "left-padding": KeyPadding(ROWS[None] >= torch.tensor([[8], [8]])),
    "interior-padding": KeyPadding((ROWS % 2 == 0)[None].repeat(2, 1)),
    "causal": Causal(),
    "causal-bottom-right": Causal("bottom_right"),
    "window:4,0": SlidingWindow(4, 0),
    "window:4,": SlidingWindow(4, None),
    "window-bottom-right:3,3": SlidingWindow(3, 3, "bottom_right"),
    "dense": Dense(torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) > 0.5),
    "dense:BHQK": Dense(torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5),
    "bias:hqk": Bias(torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))),
    "causal padding": Causal() & KeyPadding(ROWS[None] < torch.tensor([[8], [8]])),
    "causal left-padding": Causal() & KeyPadding(ROWS[None] >= torch.tensor([[8], [8]])),
    "window:4,4 bias": SlidingWindow(4, 4) & Bias(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))),
    "none": None,
}


@pytest.mark.parametrize("words", WORDS)
def test_a_mask_in_words_is_what_the_analysis_of_a_real_one_gives(words, dispatcher):
    query = torch.zeros(SHAPE)
    masks = [part for word in words.split() for part in ("--mask", word)]
    data = told("--shape", "2,4,16,8", *masks, "--device", "cpu")
    plan = dispatcher.explain(query, query, query, attn_mask=WORDS[words])
    assert AttentionProblem.from_dict(data["problem"]) == plan.problem
    assert data["backend"] == plan.backend


@pytest.mark.parametrize("key_tokens", [32, 48])
def test_packed_sequences(key_tokens, dispatcher):
    query, key = torch.zeros(32, 4, 8), torch.zeros(key_tokens, 2, 8)
    ends = [torch.tensor([0, 16, 32], dtype=torch.int32), torch.tensor([0, 24, 48], dtype=torch.int32)]
    packing = Varlen(ends[0], None if key_tokens == 32 else ends[1])
    plan = dispatcher.explain(query, key, key, attn_mask=packing, layout="THD", enable_gqa=True)
    sizes = ["--shape", "32,4,8", "--key-shape", f"{key_tokens},2,8", "--layout", "thd"]
    data = told(*sizes, "--mask", "varlen", "--device", "cpu")
    assert AttentionProblem.from_dict(data["problem"]) == plan.problem


def test_numbers_and_flags_reach_the_problem():
    arguments = ["--grad", "--lse", "--deterministic", "--dropout", "0.1", "--scale", "0.5", "--softcap", "30"]
    sizes = ["--shape", "1,4096,32,128", "--kv-heads", "8", "--value-dim", "64", "--layout", "BSHD", "--dtype", "bf16"]
    problem = AttentionProblem.from_dict(told(*sizes, *arguments)["problem"])
    assert (problem.heads, problem.kv_heads, problem.head_dim, problem.value_dim) == (32, 8, 128, 64)
    assert (problem.query_length, problem.layout, problem.dtype) == (4096, "BSHD", torch.bfloat16)
    assert (problem.needs_grad, problem.needs_lse, problem.deterministic) == (True, True, True)
    assert (problem.dropout_p, problem.scale, problem.softcap) == (0.1, 0.5, 30.0)
    assert told("--shape", "1,4,64,64", "--compile")["problem"]["compiling"] is True


@pytest.mark.parametrize(("arguments", "environ"), [(["--compile"], {}), ([], {"HEEDFUL_ANALYSE": "0"})])
def test_contents_are_unknown_where_nothing_is_analysed(arguments, environ):
    mask = told("--shape", "2,4,64,64", "--mask", "padding", *arguments, **environ)["problem"]["mask"]
    assert mask["key_padding"] is True
    assert (mask["side"], mask["kept"], mask["rows_seen"]) == (None, None, False)
    packed = told("--shape", "64,4,64", "--layout", "THD", "--mask", "varlen", *arguments, **environ)
    assert packed["problem"]["mask"]["packing"] == "unknown"


def test_padding_that_keeps_all_keys_is_no_mask():
    assert told("--shape", "2,4,64,64", "--mask", "padding", "--kept", "1")["problem"]["mask"]["key_padding"] is False
    hidden = told("--shape", "2,4,64,64", "--mask", "padding", "--kept", "0")["problem"]["mask"]
    assert (hidden["kept"], hidden["rows_seen"]) == (0, False)


def test_an_empty_problem_needs_no_kernel():
    data = told("--shape", "0,4,64,64")
    assert (data["backend"], data["refused"]) == ("none", False)


# Wishes


def test_a_list_is_a_fallback_order():
    data = told("--shape", "1,4,64,64", "--backend", "flash, native_math,auto")
    assert (data["wish"], data["backend"]) == (["flash", "native_math", "auto"], "native_math")


def test_the_environment_is_heeded_and_named():
    data = told("--shape", "1,4,64,64", HEEDFUL_BACKEND="reference")
    assert (data["backend"], data["origin"]) == ("reference", "HEEDFUL_BACKEND")
    answer = run(app, ["explain", "--shape", "1,4,64,64"], env={"HEEDFUL_BACKEND": "flesh"})
    assert "HEEDFUL_BACKEND: no backend is called 'flesh'" in str(answer.exception)


def test_the_machine_at_hand_tells_what_is_not_installed(monkeypatch):
    devices = {"cpu": DeviceFacts("cpu", "cpu"), "cuda:0": DeviceFacts("cuda", "a GPU", (9, 0), "sm_90")}
    here = Facts("2.9", "3.11", "Linux", devices, packages={})
    monkeypatch.setattr(machines, "probe", lambda: here)
    data = told("--shape", "1,4,64,64", "--backend", "flash")
    assert data["machine"] == {**data["machine"], "name": "a GPU", "supposed": False}
    assert data["problem"]["dtype"] == "float16"
    said = {row["name"]: [refusal["text"] for refusal in row["refusals"]] for row in data["backends"]}
    assert "flash-attn not installed" in said["flash"][0]
    assert "pip install flash-attn" in said["flash"][0]
    assert "flash-attn not installed" not in str(told("--shape", "1,4,64,64", "--device", "sm_90"))
    assert told("--shape", "1,4,64,64", "--device", "cuda")["machine"]["supposed"] is False


def names_of_diffusers():
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    return [*(name.value for name in dispatch.AttentionBackendName), "aiter"]


def test_a_name_of_diffusers_that_cannot_run_here_still_explains_itself():
    for name in names_of_diffusers():
        data = told("--shape", "2,8,64,64", "--backend", name, "--device", "cpu")
        asked = data["backends"][0]
        runs = asked["answer"] == "runs"
        assert data["refused"] is not runs
        assert runs or asked["refusals"][0]["text"].startswith("device is cpu, it takes "), name
        printed = run(app, ["explain", "--shape", "2,8,64,64", "--backend", name, "--device", "cpu"])
        assert f"wish     {data['wish']} (from call)" in printed.stdout


# What is refused before anything is explained

SDXL = ["--shape", "2,10,4096,64"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--shape: it is missing; give query's sizes, or --case (see --cases)"),
        (["--shape", "2,x,3"], "--shape: got '2,x,3'; give B,H,S,D as whole numbers with commas, such as 2,10,4096,64"),
        (["--shape", "2,-1,3,4"], "--shape: got '2,-1,3,4'; give B,H,S,D"),
        (["--shape", "4"], "--shape: query: got shape (4,); layout BHSD needs at least 2 dimensions"),
        (
            ["--shape", "2,4,8", "--layout", "BSHD"],
            "--shape: query: got shape (2, 4, 8); layout BSHD needs 4 dimensions",
        ),
        (["--shape", "9999999,1,2000000000,64"], "--shape: got 9999999 x 2000000000 x 2000000000 scores"),
        ([*SDXL, "--key-shape", "2,10,77"], "--key-shape: key: got head dim 77; query has 64"),
        ([*SDXL, "--key-shape", "2,3,77,64"], "--key-shape: key: got 3 heads; they must divide query's 10"),
        ([*SDXL, "--key-shape", "3,10,77,64"], "--key-shape: key, value: got leading sizes"),
        ([*SDXL, "--key-shape", "2,10,77,64", "--kv-heads", "5"], "--kv-heads: got 5; --key-shape 2,10,77,64 has 10"),
        (["--shape", "77,64", "--kv-heads", "5"], "--kv-heads: got 5, and shape 77,64 has no heads; give B,H,S,D"),
        ([*SDXL, "--kv-heads", "0"], "--kv-heads"),
        ([*SDXL, "--layout", "HSD"], "--layout: got 'HSD'; give one of BHSD, BSHD, THD"),
        ([*SDXL, "--dtype", "int8"], "--dtype: got 'int8'; give one of fp16, bf16, fp32, fp64"),
        ([*SDXL, "--dtype", "nn"], "--dtype: got 'nn'; give one of"),
        ([*SDXL, "--mask", "padded"], "--mask: got 'padded'; give one of none, causal,"),
        ([*SDXL, "--mask", "causal,padding"], "repeat --mask to join several"),
        ([*SDXL, "--mask", "window:5"], "--mask: got 'window:5'; give two numbers of keys, such as window:128,0"),
        ([*SDXL, "--mask", "window:a,b"], "--mask: got 'window:a,b'; give two numbers"),
        ([*SDXL, "--mask", "dense:XY"], "--mask: got 'dense:xy'; give one of"),
        ([*SDXL, "--mask", "padding", "--mask", "left-padding"], "--mask: got 'left-padding', the second of its kind"),
        ([*SDXL, "--mask", "varlen"], "--mask: attn_mask: got Varlen with batch 2; pack the sequences"),
        (["--shape", "64,8,64", "--layout", "THD"], "--mask: attn_mask: got no Varlen; layout='THD' needs"),
        ([*SDXL, "--kept", "0.5"], "--kept: got 0.5, and no padding; add --mask padding"),
        ([*SDXL, "--mask", "padding", "--kept", "2"], "--kept"),
        ([*SDXL, "--dropout", "2"], "--dropout: dropout_p: got 2.0; give a number from 0.0 to 1.0"),
        ([*SDXL, "--scale", "nan"], "--scale: scale: got nan; give a finite number"),
        ([*SDXL, "--softcap", "0"], "--softcap: softcap: got 0.0; give a finite number above 0"),
        ([*SDXL, "--backend", "flesh"], "--backend: backend: no backend is called 'flesh'; did you mean 'flash'"),
        ([*SDXL, "--backend", ","], "--backend: backend: got []; give a name"),
        ([*SDXL, "--backend", ""], "--backend: backend: got ''; give a name"),
        ([*SDXL, "--device", "cuda"], "--device: got 'cuda', and this machine has no GPU; name one, such as sm_90"),
        (["--case", "pixart"], "--case: no case is called 'pixart'; closest: "),
        ([*SDXL, "--case", "clip-l-text"], "--case: got 'clip-l-text' beside --shape; give one of both"),
        (["--case", "clip-l-text", "--layout", "THD"], "--layout: got 'THD'; cases are not packed"),
    ],
)
def test_what_is_malformed_is_named_with_its_value_and_a_remedy(arguments, words, monkeypatch):
    monkeypatch.setattr(
        machines, "probe", lambda: Facts("2.9", "3.11", "Linux", {"cpu": DeviceFacts("cpu", "cpu")}, {})
    )
    answer = run(app, ["explain", *arguments], env={"COLUMNS": "400"})
    assert answer.exit_code == 2, answer.output
    assert words in plain(answer.stderr)
