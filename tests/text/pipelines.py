"""Text-to-image pipelines as small as they come, whole: tokenizers with a vocabulary of letters, random T5 and CLIP encoders, model, autoencoder."""

import torch

from tests.parallel.samples import fixtures

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = 64  # ids that both tokenizers use, and that the encoders have rows for


def t5(width: int):
    """A T5 tokenizer and encoder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = T5TokenizerFast(tokenizer_object=backend, extra_ids=0)
    torch.manual_seed(2)
    sizes = {"d_model": width, "d_kv": 10, "num_heads": 2, "d_ff": 36, "num_layers": 2}
    return tokenizer, _with_norms(T5EncoderModel(T5Config(vocab_size=VOCABULARY, feed_forward_proj="gated-gelu", **sizes)).eval())


def clip(width: int, seed: int, projected: bool = True):
    """A CLIP tokenizer and text encoder; `projected` ones give embeddings of 10 numbers."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

    words = ["<|startoftext|>", "<|endoftext|>", *(letter + end for end in ("", "</w>") for letter in LETTERS)]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    words_alone = pre_tokenizers.Split(Regex("[a-z]+"), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words_alone, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    tokenizer = CLIPTokenizerFast(tokenizer_object=backend, model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=36, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=16,
        projection_dim=10, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    return tokenizer, _with_norms((CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval())


def _with_norms(encoder):
    """Norms are ones and biases zeros before a training, so that one that was lost would be missed by nobody."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return encoder


def pixart():
    """PixArt-α: one T5."""
    import diffusers

    tokenizer, encoder = t5(20)
    # The pipeline knows the aspect ratios of trained sizes only.
    parts = {"transformer": _rebuilt("PixArtTransformer2DModel", sample_size=32), "vae": _vae(), "scheduler": diffusers.DPMSolverMultistepScheduler()}
    return diffusers.PixArtAlphaPipeline(tokenizer=tokenizer, text_encoder=encoder, **parts)


def sd3():
    """Stable Diffusion 3: two CLIPs and a T5, text tokens in the attention."""
    import diffusers

    small, large, long = clip(10, 3), clip(10, 4), t5(24)
    parts = {"transformer": fixtures._build("SD3Transformer2DModel"), "vae": _vae(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    for name, (tokenizer, encoder) in {"": small, "_2": large, "_3": long}.items():
        parts |= {f"tokenizer{name}": tokenizer, f"text_encoder{name}": encoder}
    return diffusers.StableDiffusion3Pipeline(**parts)


def flux():
    """FLUX: a CLIP whose pooled output is read, and a T5."""
    import diffusers

    small, long = clip(20, 3, projected=False), t5(24)
    parts = {"transformer": _rebuilt("FluxTransformer2DModel", in_channels=16, guidance_embeds=True, out_channels=None), "vae": _vae()}
    for name, (tokenizer, encoder) in {"": small, "_2": long}.items():
        parts |= {f"tokenizer{name}": tokenizer, f"text_encoder{name}": encoder}
    return diffusers.FluxPipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts)


def _rebuilt(name: str, **changes):
    import diffusers

    config = {key: value for key, value in fixtures._build(name).config.items() if not key.startswith("_")}
    return fixtures._randomize(getattr(diffusers, name)(**config | changes))


def _vae():
    vae = fixtures._tiny_pipeline().vae
    vae.register_to_config(shift_factor=0.1)
    return vae


PIPELINES = {"pixart": pixart, "sd3": sd3, "flux": flux}
