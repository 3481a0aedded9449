"""Tiny models of transformers under the implementation "heedful": as eager computes them, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import heedful
from heedful.integrations.transformers import NAME, attention, register
from heedful.integrations.transformers.attention import attention_forward

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0}
WINDOW = 4
DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**GROUPED, head_dim=8, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8, sliding_window=WINDOW)),
}
ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**SIZES, vocab_size=40, max_position_embeddings=16)),
    "clip": lambda: CLIPTextModel(CLIPTextConfig(**SIZES, vocab_size=40, max_position_embeddings=16, eos_token_id=1)),
}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 40}


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The masks of all calls that reach the dispatcher, and their other arguments."""
    seen: list[Any] = []

    def recorded(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, *rest: Any, **more: Any) -> Any:
        seen.append((attn_mask, *rest))
        return heedful.attention(query, key, value, attn_mask, *rest, **more)

    monkeypatch.setattr(attention, "attention", recorded)
    return seen


def made(kind: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind().eval()


def padded(side: str, batch: int = 3, length: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens, and their mask: one row whole, the others padded on a side."""
    ids = torch.randint(2, 40, (batch, length), generator=torch.Generator().manual_seed(1))
    kept = torch.arange(length) < torch.tensor([[length], [5], [2]])[:batch]
    keep = kept if side == "right" else kept.flip(1)
    return ids.masked_fill(~keep, 0), keep.long()


@torch.no_grad()
def far_from_eager(model: PreTrainedModel, keep: Tensor | None = None, **inputs: Any) -> float:
    """The largest difference of any output of real tokens, once with eager, once with heedful."""
    outs = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        out = model(**inputs)
        outs.append(out.logits if "logits" in out else out.last_hidden_state)
    apart = (outs[0] - outs[1]).abs()
    return (apart if keep is None else apart[keep.bool()]).max().item()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_padded_batch_is_as_eager_computes_it(name: str, side: str) -> None:
    ids, keep = padded(side)
    assert far_from_eager(made(DECODERS[name]), keep, input_ids=ids, attention_mask=keep) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_as_eager_computes_it(name: str, side: str) -> None:
    ids, keep = padded(side)
    ids[:, -1] = 1
    assert far_from_eager(made(ENCODERS[name]), keep, input_ids=ids, attention_mask=keep) <= 1e-5
    assert far_from_eager(made(ENCODERS[name]), input_ids=ids) <= 1e-5


def test_an_image_encoder_is_as_eager_computes_it() -> None:
    model = made(lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=16, patch_size=4)))
    assert far_from_eager(model, pixel_values=torch.randn(2, 3, 16, 16)) <= 1e-5


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_tokens_generated_with_a_cache_are_eagers(name: str, cache: str | None, masks: list[Any]) -> None:
    ids, keep = padded("left")
    model, tokens = made(DECODERS[name]), []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        tokens.append(
            model.generate(ids, attention_mask=keep, max_new_tokens=6, do_sample=False, cache_implementation=cache)
        )
    assert torch.equal(*tokens)
    assert len(masks) == 2 * 6  # layers, and forwards


@pytest.mark.parametrize("name", ["llama", "mistral"])
@torch.no_grad()
def test_a_prompt_that_goes_on_over_a_cache_is_as_the_whole_one(name: str) -> None:
    ids, keep = padded("left")
    model = made(DECODERS[name])
    model.set_attn_implementation(NAME)
    whole = model(ids, attention_mask=keep).logits
    first = model(ids[:, :4], attention_mask=keep[:, :4], use_cache=True)
    rest = model(ids[:, 4:], attention_mask=keep, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest[:, :][keep[:, 4:].bool()], whole[:, 4:][keep[:, 4:].bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_t5_is_as_eager_computes_it_with_its_bias_of_positions(side: str) -> None:
    model = made(lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)))
    ids, keep = padded(side)
    answers = torch.randint(2, 40, (3, 5))
    assert far_from_eager(model, input_ids=ids, attention_mask=keep, decoder_input_ids=answers) <= 1e-5
    tokens = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        tokens.append(model.generate(ids, attention_mask=keep, max_new_tokens=5, do_sample=False))
    assert torch.equal(*tokens)


def test_what_is_known_of_a_mask_reaches_the_dispatcher(masks: list[Any]) -> None:
    ids, keep = padded("right")
    wanted = {"llama": (("top_left", None), True), "mistral": ((None, (WINDOW - 1, 0, "top_left")), True)}
    for name, ((causal, window), is_padded) in wanted.items():
        model = made(DECODERS[name])
        model.set_attn_implementation(NAME)
        model(ids, attention_mask=keep)
        assert {(mask.causal, mask.window, mask.padding is not None) for mask, *_ in masks} == {
            (causal, window, is_padded)
        }
        assert all(mask.dense is mask.bias is None for mask, *_ in masks)
        masks.clear()


def test_gradients_are_those_of_eager_in_training() -> None:
    ids, keep = padded("right")
    model, grads = made(DECODERS["llama"]).train(), []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids, attention_mask=keep, labels=ids.masked_fill(keep == 0, -100)).loss.backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_dropout_is_that_of_the_model_and_off_in_evaluation(masks: list[Any]) -> None:
    model = made(lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, attention_dropout=0.5)))
    model.set_attn_implementation(NAME)
    model(padded("right")[0])
    model.train()(padded("right")[0])
    assert [dropout for _, dropout, *_ in masks] == [0.0, 0.0, 0.5, 0.5]


def test_packed_sequences_do_not_see_each_other() -> None:
    model = made(DECODERS["llama"])
    model.set_attn_implementation(NAME)
    ids = padded("right")[0][:1]
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    want = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    torch.testing.assert_close(model(ids, position_ids=places, use_cache=False).logits, want, atol=1e-5, rtol=0)


def test_packed_ends_alone_are_enough() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8) for _ in range(3))
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    out, _ = attention_forward(Plain(), query, key, value, None, is_causal=True, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    parts = [
        heedful.attention(*(tensor[:, :, part] for tensor in (query, key, value)), is_causal=True)
        for part in (slice(0, 4), slice(4, 9))
    ]
    torch.testing.assert_close(out.transpose(1, 2), torch.cat(parts, dim=2))


def test_compiled_models_are_one_graph() -> None:
    torch._dynamo.reset()
    model = made(DECODERS["llama"])
    ids, keep = padded("left")
    model.set_attn_implementation(NAME)
    with torch.no_grad():
        want = model(ids, attention_mask=keep, use_cache=False).logits
        got = torch.compile(model, backend="eager", fullgraph=True)(ids, attention_mask=keep, use_cache=False).logits
    torch.testing.assert_close(got[keep.bool()], want[keep.bool()], atol=1e-5, rtol=0)


def test_a_backend_can_be_set_for_its_layers_and_is_reported() -> None:
    model = made(DECODERS["llama"])
    model.set_attn_implementation(NAME)
    report = heedful.set_attention_backend(model, "native", {"*layers.1*": "reference"})
    assert (report.covered, report.total) == (2, 2)
    model(padded("right")[0])
    assert [layer.ran for layer in heedful.attention_report(model)] == [(("native", 1),), (("reference", 1),)]


# What is refused


class Plain(nn.Module):
    """A layer that says nothing of causality."""


def call(queries: int = 5, keys: int = 5, mask: Any = None, **more: Any) -> Any:
    query, key = torch.randn(1, 4, queries, 8), torch.randn(1, 2, keys, 8)
    return attention_forward(Plain(), query, key, key, mask, **more)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"output_attentions": True}, "output_attentions: got True; heedful makes no matrix of weights; .*'eager'"),
        ({"indices": torch.zeros(1)}, "indices: got Tensor; heedful does not know what it changes"),
        ({"block_indices": torch.zeros(1)}, "block_indices: got Tensor"),
        ({"cache": object()}, "cache: got object"),
        ({"keys": 6, "sliding_window": 3, "queries": 1}, "sliding_window: got 3, of 6 keys, and no mask"),
        ({"keys": 6}, "attention_mask: got None for 5 queries and 6 keys of a causal layer"),
    ],
)
def test_what_would_have_to_be_left_out_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(heedful.InvalidArgument, match=text):
        call(**arguments)


def test_what_changes_no_weight_is_taken() -> None:
    given = {"position_ids": torch.arange(5), "use_cache": True, "num_items_in_batch": 3, "indices": None}
    torch.manual_seed(0)
    want = call()[0]
    torch.manual_seed(0)
    assert torch.equal(call(**given)[0], want)


def test_sinks_are_refused_with_the_reason() -> None:
    config = GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW)
    model = made(lambda: GptOssForCausalLM(config))
    model.set_attn_implementation(NAME)
    with pytest.raises(heedful.Refused, match="sinks"):
        model(padded("right")[0])


def test_weights_cannot_be_asked_of_a_model() -> None:
    model = made(DECODERS["llama"])
    model.set_attn_implementation(NAME)
    with pytest.raises(heedful.InvalidArgument, match="output_attentions"):
        model(padded("right")[0], output_attentions=True)


def test_one_query_sees_all_keys_and_causality_is_the_keyword_s_before_the_module_s() -> None:
    module = Plain()
    module.is_causal = False
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    causal = heedful.attention(query, key, key, is_causal=True).transpose(1, 2)
    assert torch.equal(attention_forward(module, query, key, key, None, is_causal=True)[0], causal)
    every = heedful.attention(query, key, key).transpose(1, 2)
    assert torch.equal(attention_forward(module, query, key, key, None)[0], every)
    one = heedful.attention(query[:, :, :1], key, key).transpose(1, 2)
    assert torch.equal(attention_forward(Plain(), query[:, :, :1], key, key, None)[0], one)


# Registration


def test_registering_again_changes_nothing_and_a_name_that_is_taken_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert register() == NAME
    before = {name: transformers.AttentionInterface().get(name) for name in ("sdpa", NAME)}
    assert register() == NAME
    assert {name: AttentionInterface().get(name) for name in before} == before
    assert AttentionMaskInterface().get(NAME) is not None
    theirs = object()
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, theirs)
    with pytest.raises(heedful.errors.RegistrationError, match="AttentionInterface knows another 'heedful'"):
        register()
    assert AttentionInterface().get(NAME) is theirs
