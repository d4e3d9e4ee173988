"""Models of a few thousand weights, built from configurations: nothing is downloaded.

Every parameter is filled from an explicit generator, so a seed gives the same model everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
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


def fill(
    module: nn.Module, seed: int = 0, scale: float = 1.0, *, whole_kernels: bool = False
) -> None:
    """Fill every parameter from a generator: matrices ~ N(0, scale^2 / inputs), norms near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim < 2:
                centre = 1.0 if "norm" in name or "ln_" in name else 0.0
                noise = centre + (0.1 if name.endswith("weight") else 0.02) * noise
            else:
                inputs = parameter.shape[1:] if whole_kernels else parameter.shape[-1:]
                noise = scale * noise / math.prod(inputs) ** 0.5
            parameter.copy_(noise.to(parameter.dtype))


def _finish(
    model: PreTrainedModel,
    seed: int,
    dtype: torch.dtype,
    scale: float = 1.0,
    *,
    whole_kernels: bool = False,
) -> PreTrainedModel:
    model = model.to(dtype)
    model.config.dtype = dtype
    fill(model, seed, scale, whole_kernels=whole_kernels)
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


IMAGE_MODELS = ("resnet", "mobilenet", "vit", "convnext", "efficientnet")


def image_classifier(
    kind: str = "resnet",
    *,
    classes: int = 5,
    channels: int = 3,
    size: int = 32,
    seed: int = 0,
    names: Sequence[str] = (),
) -> PreTrainedModel:
    """Return an image classifier of a few thousand weights, its batch norms as after training."""
    shared: dict[str, Any] = {"num_channels": channels, "num_labels": len(names) or classes}
    if names:
        shared["id2label"] = dict(enumerate(names))
        shared["label2id"] = {name: index for index, name in enumerate(names)}
    model: PreTrainedModel
    if kind == "resnet":
        config = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **shared
        )
        model = ResNetForImageClassification(config)
    elif kind == "mobilenet":
        model = MobileNetV2ForImageClassification(
            MobileNetV2Config(
                image_size=size,
                depth_multiplier=0.1,
                depth_divisible_by=4,
                min_depth=4,
                finegrained_output=False,
                **shared,
            )
        )
    elif kind == "vit":
        model = ViTForImageClassification(
            ViTConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=size,
                patch_size=8,
                **shared,
            )
        )
    elif kind == "convnext":
        model = ConvNextForImageClassification(
            ConvNextConfig(
                hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=size, **shared
            )
        )
    else:
        model = EfficientNetForImageClassification(
            EfficientNetConfig(
                width_coefficient=0.1,
                depth_coefficient=0.1,
                depth_divisor=4,
                hidden_dim=128,
                image_size=size,
                kernel_sizes=[3, 5],
                in_channels=[8, 8],
                out_channels=[8, 12],
                strides=[1, 2],
                num_block_repeats=[1, 1],
                expand_ratios=[1, 4],
                **shared,
            )
        )
    return run_norms(_finish(model, seed, torch.float32, whole_kernels=True), seed)


def run_norms(module: nn.Module, seed: int = 0) -> Any:
    """Give every batch norm weights and statistics as training would leave them."""
    generator = torch.Generator().manual_seed(seed + 1)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            norm.running_mean.copy_(0.1 * torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
            norm.num_batches_tracked.fill_(100)
            if norm.affine:
                with torch.no_grad():
                    norm.weight.copy_(
                        0.8 + 0.4 * torch.rand(norm.num_features, generator=generator)
                    )
                    norm.bias.copy_(0.1 * torch.randn(norm.num_features, generator=generator))
    return module


def image_processor(size: int = 32, channels: int = 3) -> Any:
    """Return a processor that resizes to a square and puts pixels between -1 and 1."""
    return ViTImageProcessorPil(
        size={"height": size, "width": size},
        image_mean=[0.5] * channels,
        image_std=[0.5] * channels,
    )


def text_classifier(
    *, classes: int = 3, seed: int = 0, names: Sequence[str] = (), attention: str = "eager"
) -> BertForSequenceClassification:
    """Return a one-layer BERT with a head for classes."""
    shared: dict[str, Any] = {"num_labels": len(names) or classes}
    if names:
        shared["id2label"] = dict(enumerate(names))
        shared["label2id"] = {name: index for index, name in enumerate(names)}
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        attn_implementation=attention,
        **shared,
    )
    return _finish(BertForSequenceClassification(config), seed, torch.float32)


def save_image_classifier(
    folder: Path, model: PreTrainedModel | None = None, *, size: int = 32, channels: int = 3
) -> Path:
    """Save an image classifier and its processor as a checkpoint folder."""
    (model if model is not None else image_classifier()).save_pretrained(folder)
    image_processor(size, channels).save_pretrained(folder)
    return folder


def save_text_classifier(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """Save a text classifier and its tokenizer as a checkpoint folder."""
    return save(folder, model if model is not None else text_classifier())


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
