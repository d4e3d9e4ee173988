"""Models of a few thousand weights, built from configurations: nothing is downloaded.

Every parameter is filled from an explicit generator, so a seed gives the same model everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hawqkit.models.batches import Sequences, make_sequences

VOCABULARY = 96
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "[a]{% generation %}{{ message['content'] }}[/a]{% endgeneration %}"
    "{% else %}[u]{{ message['content'] }}[/u]{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
PLAIN_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("{% generation %}", "").replace(
    "{% endgeneration %}", ""
)


def fill(module: nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Fill every parameter from a generator: matrices ~ N(0, scale^2 / inputs), norms near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim < 2:
                centre = 1.0 if "norm" in name or "ln_" in name else 0.0
                noise = centre + (0.1 if name.endswith("weight") else 0.02) * noise
            else:
                noise = scale * noise / parameter.shape[-1] ** 0.5
            parameter.copy_(noise.to(parameter.dtype))


def _finish(
    model: PreTrainedModel, seed: int, dtype: torch.dtype, scale: float = 1.0
) -> PreTrainedModel:
    model = model.to(dtype)
    model.config.dtype = dtype
    fill(model, seed, scale)
    return model.eval()


def llama(
    *,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    seed: int = 0,
    attention: str = "eager",
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    vocabulary: int = VOCABULARY,
) -> LlamaForCausalLM:
    """Return a two-layer Llama with grouped attention: 4 heads, 2 key-value heads."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return _finish(LlamaForCausalLM(config), seed, dtype)


def gpt2(
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: str = "eager",
    layers: int = 2,
    hidden: int = 64,
    tied: bool = True,
) -> GPT2LMHeadModel:
    """Return a two-layer GPT-2: Conv1D weights, learned positions, no dropout."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=hidden,
        n_layer=layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    return _finish(GPT2LMHeadModel(config), seed, dtype)


def mixtral(*, seed: int = 0) -> MixtralForCausalLM:
    """Return a two-layer mixture of experts."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _finish(MixtralForCausalLM(config), seed, torch.float32)


def bert() -> BertForMaskedLM:
    """Return an encoder, which is no causal language model."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return _finish(BertForMaskedLM(config), 0, torch.float32)


def tokenizer(*, bos: bool = False, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Return a tokenizer of single characters; `bos` makes it prepend `<s>`, as Llama's does."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "[u]", "[/u]", "[a]", "[/a]"]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?'\"()-\n$%&/"
    words = [*special, *dict.fromkeys(letters)]
    assert len(words) <= VOCABULARY
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    if bos:
        from tokenizers.processors import TemplateProcessing

        inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
        model_max_length=256,
    )
    fast.chat_template = chat_template
    return fast


def save(folder: Path, model: PreTrainedModel | None = None, **options: Any) -> Path:
    """Save a pico model and its tokenizer as a checkpoint folder; `options` go to `tokenizer`."""
    (model if model is not None else llama()).save_pretrained(folder)
    tokenizer(**options).save_pretrained(folder)
    return folder


def sequences(
    count: int = 6,
    length: int = 24,
    *,
    seed: int = 0,
    ragged: bool = False,
    documents: int | None = None,
    withheld: int = 0,
    vocabulary: int = VOCABULARY,
) -> Sequences:
    """Return random tokens; `ragged` gives unequal lengths, the last `withheld` only predict."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8, vocabulary, (count, length), generator=generator)
    lengths = torch.full((count,), length)
    if ragged:
        lengths = torch.randint(max(3, length // 3), length + 1, (count,), generator=generator)
        lengths[0] = length
    attention = torch.arange(length)[None, :] < lengths[:, None]
    tokens = torch.where(attention, tokens, 0)
    document = torch.arange(count) % (documents or count)
    return make_sequences(
        tokens,
        attention,
        attention.clone(),
        document=document,
        withheld=torch.arange(count) >= count - withheld,
        source="random tokens",
        seed=seed,
    )
