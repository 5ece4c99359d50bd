"""Models with faults in them, and one that reads prompts: small enough to be started a hundred times."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

BROKEN = 7  # the class whose pictures are NaN


def break_class(model: str, folder: Path, label: str) -> str:
    """Save a copy of a DiT in `folder` that gives NaN for class BROKEN, which it calls `label`; returns the folder."""
    import torch

    import dite
    from dite.sampling import class_ids, class_names

    pipe = dite.Pipeline.from_pretrained(model).pipe
    with torch.no_grad():
        for block in pipe.transformer.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight[BROKEN] = float("nan")
    pipe.save_pretrained(folder)
    index = folder / "model_index.json"
    document = json.loads(index.read_text(encoding="utf-8"))
    names = {number: f"class {number}" for number in class_ids(pipe)} | class_names(pipe) | {BROKEN: label}
    document["id2label"] = {str(number): name for number, name in names.items()}
    index.write_text(json.dumps(document), encoding="utf-8")
    return str(folder)


def reader(folder: Path) -> str:
    """Save a small PixArt with random weights in `folder`, which reads letters and forgets whatever is behind the 120th; returns the folder."""
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        attention_head_dim=16,
        num_attention_heads=3,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=32,
        cross_attention_dim=48,
        caption_channels=20,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )
    encoder = T5EncoderModel(T5Config(vocab_size=64, d_model=20, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    pipe = PixArtAlphaPipeline(tokenizer=_letters(), text_encoder=encoder, vae=vae, transformer=transformer, scheduler=DPMSolverMultistepScheduler())
    pipe.save_pretrained(folder)
    return str(folder)


def _letters() -> Any:
    """A tokenizer whose words are letters."""
    from transformers import T5TokenizerFast

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in f"▁{string.ascii_lowercase}{string.digits},.")]
    return T5TokenizerFast(vocab=words, extra_ids=0)
