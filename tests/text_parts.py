"""Tiny text encoders with tokenizers of every published kind, in folders as transformers writes them.

Each function writes one folder and returns it; a whole tiny pipeline is these side by side, for SDXL say
`tiny_clip(root / "text_encoder", 32)`, `tiny_clip_tokenizer(root / "tokenizer")`,
`tiny_clip(root / "text_encoder_2", 48, projection=24)` and `tiny_clip_tokenizer(root / "tokenizer_2", pad="!")`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from networks import randomise
from safetensors.torch import load_file, save_file

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
SYLLABLES = (
    "c r", "cr a", "cra c", "crac k</w>", "c e", "ce l", "cel l</w>", "o n</w>", "t h", "th e</w>", "a r", "d a",
)  # fmt: skip
CLIP_TOKENS = 2 * 256 + len(SYLLABLES) + 2
QWEN3_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
QWEN3_TEMPLATE = (  # what Qwen3's own template makes of one user message
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
MISTRAL_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
)  # fmt: skip
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + m.content[0].text + '[/SYSTEM_PROMPT]' }}{% else %}"
    "{{ '[INST]' + m.content[0].text + '[/INST]' }}{% endif %}{% endfor %}"
)


def tiny_clip(
    folder: Path, width: int = 32, projection: int | None = None, layers: int = 3, act: str = "quick_gelu",
    heads: int = 2, vocabulary: int = CLIP_TOKENS, eos: int | None = None, seed: int = 0,
) -> Path:  # fmt: skip
    """CLIPTextModel, or with `projection` CLIPTextModelWithProjection; `eos` 2 is what old config files say."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, projection_dim=projection or width,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=77, hidden_act=act,
        bos_token_id=vocabulary - 2, eos_token_id=eos or vocabulary - 1, pad_token_id=1,
    )  # fmt: skip
    _saved((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), folder, seed)
    tensors = load_file(folder / "model.safetensors")
    published = {n if n.startswith("text_") else f"text_model.{n}": tensor for n, tensor in tensors.items()}
    save_file(published, folder / "model.safetensors", {"format": "pt"})  # as every published file names them
    return folder


def tiny_clip_tokenizer(folder: Path, pad: str = CLIP_END) -> Path:
    """A CLIP tokenizer of the real kind (bytes, then merges, then the two ends) that knows a dozen syllables."""
    from transformers import CLIPTokenizer

    letters = list(byte_letters().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(s.replace(" ", "") for s in SYLLABLES)]
    vocabulary = {token: i for i, token in enumerate([*tokens, CLIP_START, CLIP_END])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *SYLLABLES]) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def tiny_t5(folder: Path, width: int = 96, layers: int = 2, vocabulary: int = 64, seed: int = 0) -> Path:
    """A T5 v1.1 encoder (gated GELU)."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=2 * width, num_layers=layers, num_heads=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=20, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    return _saved(T5EncoderModel(config), folder, seed)


def tiny_t5_tokenizer(folder: Path) -> Path:
    """A unigram tokenizer of letters with T5's three special tokens in front."""
    from transformers import T5TokenizerFast

    letters = "▁abcdefghijklmnopqrstuvwxyz.,0123456789"
    words = [("▁crack", -2.0), ("▁the", -2.0), ("▁cell", -2.5)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((letter, -6.0) for letter in letters), *words]
    T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(folder)
    return folder


def tiny_qwen3(folder: Path, width: int = 32, layers: int = 5, tied: bool = True, seed: int = 0) -> Path:
    """Qwen3ForCausalLM, heads shared in pairs; the head is the embedding (4B) or its own (8B)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=256 + len(QWEN3_SPECIAL), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, rope_theta=1e6,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return _saved(Qwen3ForCausalLM(config), folder, seed)


def tiny_qwen3_tokenizer(folder: Path) -> Path:
    """Bytes, and Qwen's special tokens; pads on the right with <|endoftext|>."""
    from transformers import Qwen2TokenizerFast

    vocabulary = {token: i for i, token in enumerate([*byte_letters().values(), *QWEN3_SPECIAL])}
    tokenizer = Qwen2TokenizerFast(vocab=vocabulary, merges=[], model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN3_SPECIAL)})
    tokenizer.chat_template = QWEN3_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def tiny_mistral3(folder: Path, width: int = 32, layers: int = 5, seed: int = 0) -> Path:
    """Mistral3ForConditionalGeneration with a vision tower that text never enters."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text = MistralConfig(
        vocab_size=256 + len(MISTRAL_SPECIAL), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=1024, rope_theta=1e6, sliding_window=None, tie_word_embeddings=False,
    )  # fmt: skip
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=5, tie_word_embeddings=False)
    return _saved(Mistral3ForConditionalGeneration(config), folder, seed)


def tiny_mistral3_tokenizer(folder: Path) -> Path:
    """What of a Pixtral processor's folder concerns text: bytes, Mistral's special tokens, padding left, a template.

    The processor itself needs torchvision, which the project does without; its template is rendered as here.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*MISTRAL_SPECIAL, *byte_letters().values()])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left", model_max_length=1024, additional_special_tokens=list(MISTRAL_SPECIAL[3:]),
    )  # fmt: skip
    tokenizer.chat_template = MISTRAL_TEMPLATE
    tokenizer.save_pretrained(folder)
    settings = {"processor_class": "PixtralProcessor", "patch_size": 14, "image_token": "[IMG]"}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def tiny_bert(folder: Path, width: int = 32, layers: int = 2, vocabulary: int = 48, seed: int = 0) -> Path:
    """Latent diffusion's own BERT, as diffusers writes it."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = LDMBertConfig(
        vocab_size=vocabulary, max_position_embeddings=77, encoder_layers=layers, encoder_ffn_dim=2 * width,
        encoder_attention_heads=2, head_dim=8, d_model=width,
    )  # fmt: skip
    return _saved(LDMBertModel(config), folder, seed)


def tiny_bert_tokenizer(folder: Path) -> Path:
    """Word pieces of letters, with BERT's special tokens."""
    from transformers import BertTokenizerFast

    letters = "abcdefghijklmnopqrst"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), "crack"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=77).save_pretrained(folder)
    return folder


def byte_letters() -> dict[int, str]:
    """Bytes as printable characters, in the order of CLIP's and GPT-2's vocabularies."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {b: chr(b) for b in keep} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(keep)))}


def _saved(network: Any, folder: Path, seed: int) -> Path:
    randomise(network, seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if (parameter.ndim == 2 and "embed" in name) or name.startswith("shared"):
                parameter.mul_(parameter.shape[1] ** 0.5)  # tokens must differ by more than rounding
    network.eval().save_pretrained(folder)
    return folder
