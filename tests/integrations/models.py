"""Small random models and their tokenizer."""

from __future__ import annotations

import torch
import transformers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = [
    "the old cat sleeps",
    "a dog runs near the river and the blue house under the old tree",
    "rain",
    "the moon rises over snow and stone",
    "a quick red bird sings",
    "night falls",
    "the small green fish sees the sun without water and the large white star over the far earth",
    "wind and fire",
    "a happy dog",
]
WORDS = sorted({word for text in TEXTS for word in text.split()})
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
DECODER = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, **SPECIAL_IDS}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SIZES, pad_token_id=0),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=2, n_heads=2, hidden_dim=48
    ),
    # Windows are shorter than the texts.
    "modernbert": lambda: transformers.ModernBertConfig(
        **SIZES, **SPECIAL_IDS, local_attention=8, cls_token_id=2, sep_token_id=3
    ),
    "nomic-bert": lambda: transformers.NomicBertConfig(**SIZES, **SPECIAL_IDS),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **DECODER, sliding_window=6, query_pre_attn_scalar=16, use_bidirectional_attention=True
    ),
}
WIDE = {**SIZES, "hidden_size": 64}
DEBERTA = {
    **WIDE, "relative_attention": True, "position_biased_input": False, "type_vocab_size": 0,
    "pos_att_type": "c2p|p2c", "norm_rel_ebd": "layer_norm", "share_att_key": True,
}  # fmt: skip
# Models whose modules are replaced.
REPLACED = {
    # Logarithmic buckets, and beyond the last of them, within the longest text.
    "deberta-v3": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(**DEBERTA, position_buckets=8, max_position_embeddings=30)
    ),
    "deberta-v2, convolution": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(
            **DEBERTA, position_buckets=16, max_position_embeddings=64, conv_kernel_size=3
        )
    ),
    "deberta-v2, own projections": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(
            **{**DEBERTA, "share_att_key": False, "pos_att_type": "p2c"}, max_relative_positions=16,
        )
    ),
    "deberta-v2, absolute": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(**{**WIDE, "type_vocab_size": 2}, pos_att_type=None)
    ),
    "mpnet": lambda: transformers.MPNetModel(
        transformers.MPNetConfig(**WIDE), add_pooling_layer=False
    ),
    # Beyond max_distance within the longest text.
    "t5": lambda: transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=99, d_model=64, d_kv=24, d_ff=48, num_layers=2, num_heads=2,
            relative_attention_num_buckets=8, relative_attention_max_distance=20,
        )
    ),
}  # fmt: skip


def tiny(name: str) -> transformers.PreTrainedModel:
    """Return a random model in evaluation mode."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS[name]()).eval()
    sharpen(model)
    return model


def sharpen(model: torch.nn.Module) -> None:
    """Larger queries and keys: a softmax of low entropy shows a wrong mask."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and any(x in name for x in ("q_proj", "query", "q_lin", "Wqkv")):
                weight.mul_(8)


def tiny_replaced(name: str) -> transformers.PreTrainedModel:
    """Return a random model of ``REPLACED`` in evaluation mode, as transformers made it."""
    torch.manual_seed(0)
    model = REPLACED[name]().eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            # Larger queries and biases, as in sharpen().
            if path.endswith(("query_proj.weight", "attn.q.weight", "SelfAttention.q.weight")):
                weight.mul_(12 if "SelfAttention" not in path else 4)
            if "relative_attention_bias" in path:
                weight.normal_()
    return model


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words to ids, between [CLS] and [SEP], as BERT has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=64,
    )  # fmt: skip
