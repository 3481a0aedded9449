"""The short forms of the strategy pattern, as they are usually written, run as they stand."""

import pytest
import torch
import torch.nn.functional as F

from heedful import AttentionDispatcher, AttentionStrategy, AttentionStrategyFactory, Refused, UnknownBackend

query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.fixture(autouse=True)
def _default_registry_restored():
    """Whatever a test registers in the process's registry is gone afterwards, also when the test fails."""
    before = set(AttentionStrategyFactory.strategies())
    yield
    for name in set(AttentionStrategyFactory.strategies()) - before:
        AttentionStrategyFactory.unregister_strategy(name)


def test_a_subclass_with_only_compute_attention():
    class Mine(AttentionStrategy):
        def compute_attention(self, query, key, value, **kwargs):
            return F.scaled_dot_product_attention(query, key, value, **kwargs)

    AttentionStrategyFactory.register_strategy("mine", Mine)
    strategy = AttentionStrategyFactory.create_strategy("mine")
    assert isinstance(strategy, Mine)
    expected = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(strategy.compute_attention(query, key, value), expected)
    assert torch.equal(strategy.validate_and_compute(query, key, value), expected)

    dispatcher = AttentionDispatcher(AttentionStrategyFactory)
    assert torch.equal(dispatcher.dispatch("mine", query=query, key=key, value=value), expected)


def test_validate_constraints_raises_the_refusals():
    class Mine(AttentionStrategy):
        def compute_attention(self, query, key, value, **kwargs):
            return F.scaled_dot_product_attention(query, key, value, **kwargs)

    Mine().validate_constraints(query=query, key=key, value=value)
    with pytest.raises(Refused, match=r"Mine refuses: dropout_p is 0\.1, it takes 0\.0"):
        Mine().validate_constraints(query=query, key=key, value=value, dropout_p=0.1)
    with pytest.raises(Refused, match="Mine refuses: mask is causal, it takes no mask"):
        Mine().validate_and_compute(query, key, value, is_causal=True)


def test_validate_and_compute_is_the_template_method():
    steps = []

    class Mine(AttentionStrategy):
        def validate_constraints(self, **kwargs):
            steps.append(("validate", sorted(kwargs)))
            super().validate_constraints(**kwargs)

        def compute_attention(self, query, key, value, **kwargs):
            steps.append(("compute", sorted(kwargs)))
            return value

    assert Mine().validate_and_compute(query, key, value, scale=None) is value
    assert steps == [("validate", ["key", "query", "scale", "value"]), ("compute", [])]


def test_validate_constraints_of_ones_own():
    class Mine(AttentionStrategy):
        def validate_constraints(self, **kwargs):
            if kwargs["query"].shape[-1] != 16:
                raise ValueError("this kernel was compiled for head dim 16")

        def compute_attention(self, query, key, value, **kwargs):
            return value

    with pytest.raises(ValueError, match="compiled for head dim 16"):
        Mine().validate_and_compute(query, key, value)
    AttentionStrategyFactory.register_strategy("mine", Mine)
    dispatcher = AttentionDispatcher(AttentionStrategyFactory)
    with pytest.raises(Refused, match=r"mine refuses: .*compiled for head dim 16"):
        dispatcher.dispatch("mine", query=query, key=key, value=value)
    out = dispatcher.dispatch(["mine", "native"], query=query, key=key, value=value)
    assert torch.equal(out, F.scaled_dot_product_attention(query, key, value))


def test_dispatch():
    out = AttentionDispatcher(AttentionStrategyFactory).dispatch("native", query=query, key=key, value=value)
    assert torch.equal(out, F.scaled_dot_product_attention(query, key, value))


def test_what_a_short_form_does_not_declare_is_refused_and_not_dropped():
    class Mine(AttentionStrategy):
        def compute_attention(self, query, key, value, **kwargs):
            return value

    AttentionStrategyFactory.register_strategy("mine", Mine)
    dispatcher = AttentionDispatcher(AttentionStrategyFactory)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2, 3] = False  # one that hides nothing would be no mask
    for call in ({"attn_mask": mask}, {"is_causal": True}, {"dropout_p": 0.5}, {"return_lse": True}, {"softcap": 9.0}):
        with pytest.raises(Refused, match="mine refuses"):
            dispatcher.dispatch("mine", query=query, key=key, value=value, **call)
    with pytest.raises(Refused, match="mine refuses: gradient is wanted"):
        dispatcher.dispatch("mine", query=query.clone().requires_grad_(), key=key, value=value)


def test_rewrites_serve_a_short_form_too():
    """It declares neither grouped heads, another scale, nor another layout, and is right on all three."""

    class Mine(AttentionStrategy):
        def compute_attention(self, query, key, value, **kwargs):
            return F.scaled_dot_product_attention(query, key, value, **kwargs)

    AttentionStrategyFactory.register_strategy("mine", Mine)
    tensors = [tensor.transpose(1, 2) for tensor in (query, key[:, :1], value[:, :1])]
    call = {"scale": 0.3, "enable_gqa": True}
    out = AttentionDispatcher(AttentionStrategyFactory).attention(*tensors, layout="BSHD", backend="mine", **call)
    expected = F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], **call)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_nothing_is_left_registered():
    with pytest.raises(UnknownBackend):
        AttentionStrategyFactory.create_strategy("mine")
