"""A text model of transformers: padded prompts, grouped heads and a cache, with the masks kept as structure.

    python examples/text_model.py

The model here is tiny, with random weights, and is built offline. The real one:

    model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B", attn_implementation="heedful")
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import heedful
from heedful.integrations.transformers import register


def tiny_model() -> LlamaForCausalLM:
    """A decoder of two layers, four heads over two key and value heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()


def write(model: LlamaForCausalLM) -> torch.Tensor:
    """Five tokens after each of two prompts, the shorter one padded on its left: (2, 12)."""
    prompts = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    words = {"attention_mask": real, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens: torch.Tensor = model.generate(prompts, **words)
    return tokens


def main() -> None:
    """Write by transformers' own attention, then by heedful; compare, and say what ran."""
    model = tiny_model()
    model.set_attn_implementation("eager")
    before = write(model)

    register()  # once a process: attention and masks, under the name "heedful"
    model.set_attn_implementation("heedful")
    heedful.set_attention_backend(model, "auto")  # only for the report by layer
    print("the same tokens:", torch.equal(write(model), before))
    print(heedful.attention_report(model))
    print()
    print(heedful.report())


if __name__ == "__main__":
    main()
