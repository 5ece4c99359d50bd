"""State dicts of the original DiT code (arXiv 2212.09748) as diffusers' DiTTransformer2DModel names them.

x_embedder.proj                    pos_embed.proj
pos_embed                          (none)                                                           compared: diffusers makes its own sines
t_embedder.mlp.{0,2}               transformer_blocks.*.norm1.emb.timestep_embedder.linear_{1,2}    one in each block: diffusers has no common one
y_embedder.embedding_table         transformer_blocks.*.norm1.emb.class_embedder.embedding_table    likewise
blocks.N.adaLN_modulation.1        transformer_blocks.N.norm1.linear
blocks.N.attn.qkv                  transformer_blocks.N.attn1.to_{q,k,v}                            cut in three
blocks.N.attn.proj, mlp.fc1, fc2   transformer_blocks.N.attn1.to_out.0, ff.net.0.proj, ff.net.2
final_layer.adaLN_modulation.1     proj_out_1
final_layer.linear                 proj_out_2

diffusers spreads the frequencies of the timestep's embedding over 127 steps where the original has 128, also for the DiTs that it converted itself:
pictures of a converted model are those of diffusers' own conversion, not the original code's to the last digit.

What a file claims is believed once every tensor of such a DiT is there, in its shape, and no other: so nobody builds what no tensor stands for.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from dite.checkpoint.skeleton import module_limit
from dite.errors import CheckpointError

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: DiT-S, B, L, XL
BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
SHARED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
ENDS = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}
SIGNS = {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight"}
FREQUENCIES = 256  # numbers that a timestep is first turned into
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SAME_SINES = 1e-4  # beside what the stored dtype rounds away; a table that was trained is further off
HINT = "is the file complete, and a DiT's as published? any state dict can become a .safetensors file"


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a DiT's tensors say; `rows` are its classes and one for "no class", `side` is in patches."""

    width: int
    in_channels: int
    patch: int
    out_channels: int
    rows: int
    side: int
    depth: int


def is_upstream_dit(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether these are a DiT's, by the names that no other model has together."""
    return tensors.keys() >= SIGNS


def model_of(tensors: dict[str, torch.Tensor], num_heads: int | None, max_bytes: int) -> Any:
    """The DiTTransformer2DModel that these tensors are, in their dtype. Raises CheckpointError, before anything large is made."""
    from diffusers import DiTTransformer2DModel

    config = config_of(tensors, num_heads)
    check_finite(tensors)
    check_positions(tensors["pos_embed"], config)
    with module_limit(len(tensors), "the state dict"), torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in DiTTransformer2DModel(**config).parameters())
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    needed = numbers * max(dtype.itemsize, torch.float32.itemsize)  # it is made in float32 first
    if needed > max_bytes:  # diffusers has the table of classes once in every block, the file has it once
        why = f"it takes {needed} bytes in diffusers; at most {max_bytes} may be taken"
        raise CheckpointError("this DiT is too large", why, "raise --max-memory")
    model = DiTTransformer2DModel(**config).to(dtype).eval()
    model.load_state_dict(renamed(tensors, config["num_layers"]))
    return model


def config_of(tensors: dict[str, torch.Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """What DiTTransformer2DModel is made with; everything but the heads shows in the shapes. Raises CheckpointError."""
    sizes = sizes_of(tensors)
    heads = HEADS.get(sizes.width) if num_heads is None else num_heads
    if heads is None or heads < 1 or sizes.width % heads:
        known = f"its width is {sizes.width}; known: {', '.join(map(str, HEADS))}"
        why = known if heads is None else f"{heads} heads don't divide the width {sizes.width}"
        raise CheckpointError("the number of attention heads is in no file", why, "give it: --heads N")
    return {
        "num_attention_heads": heads,
        "attention_head_dim": sizes.width // heads,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "num_layers": sizes.depth,
        "sample_size": sizes.side * sizes.patch,
        "patch_size": sizes.patch,
        "num_embeds_ada_norm": sizes.rows - 1,
        "norm_num_groups": next(groups for groups in (32, 16, 8, 4, 2, 1) if sizes.width % groups == 0),  # stored, and not used
        "norm_eps": 1e-6,
    }


def sizes_of(tensors: dict[str, torch.Tensor]) -> Sizes:
    """Read the sizes off four tensors, then hold every tensor against them. Raises CheckpointError that names the tensor and its shape."""
    rule = "it is to be width × channels × patch × patch, the patch square, the width a multiple of 4, nothing 0"
    width, in_channels, patch, other = _shape(tensors, "x_embedder.proj.weight", 4, rule)
    if patch != other or width % 4:
        raise _unfit(tensors, "x_embedder.proj.weight", rule)
    rule = f"it is to have {patch}² rows for each channel, each of the width {width}"
    outputs, _ = _shape(tensors, "final_layer.linear.weight", 2, rule)
    if outputs % patch**2:
        raise _unfit(tensors, "final_layer.linear.weight", rule)
    rule = f"it is to have a row for each class, at least one, and one for no class, each of the width {width}"
    rows, _ = _shape(tensors, "y_embedder.embedding_table.weight", 2, rule)
    if rows < 2:
        raise _unfit(tensors, "y_embedder.embedding_table.weight", rule)
    rule = f"it is to be 1 × tokens × width {width}, the tokens a square number"
    _, tokens, _ = _shape(tensors, "pos_embed", 3, rule)
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise _unfit(tensors, "pos_embed", rule)
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    sizes = Sizes(width, in_channels, patch, outputs // patch**2, rows, side, depth)
    _compare(tensors, shapes_of(sizes), depth)
    return sizes


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of a DiT of these sizes, as the original code names it, with its shape.

    >>> shapes_of(Sizes(width=8, in_channels=4, patch=2, out_channels=8, rows=11, side=4, depth=1))["blocks.0.attn.qkv.weight"]
    (24, 8)
    """
    width = sizes.width
    layers: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, sizes.in_channels, sizes.patch, sizes.patch),
        "t_embedder.mlp.0": (width, FREQUENCIES),
        "t_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (sizes.patch**2 * sizes.out_channels, width),
    }
    for block in (f"blocks.{index}" for index in range(sizes.depth)):
        layers |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width), f"{block}.adaLN_modulation.1": (6 * width, width)}
        layers |= {f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width)}
    shapes = {f"{name}.weight": shape for name, shape in layers.items()} | {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return shapes | {"y_embedder.embedding_table.weight": (sizes.rows, width), "pos_embed": (1, sizes.side**2, width)}


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError that names the tensor where one holds NaN or inf: no loader would take the converted model."""
    for name, tensor in tensors.items():
        if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise CheckpointError(f"{name} is damaged", f"it holds NaN or inf; its shape is {tuple(tensor.shape)}", "is there an earlier checkpoint?")


def check_positions(table: torch.Tensor, config: dict[str, Any]) -> None:
    """Raise CheckpointError unless `table` (1, tokens, width) holds the sines that diffusers' model will make: it keeps no other."""
    from diffusers.models.embeddings import PatchEmbed

    size, patch, channels = config["sample_size"], config["patch_size"], config["in_channels"]
    made = PatchEmbed(size, size, patch, channels, config["num_attention_heads"] * config["attention_head_dim"]).pos_embed
    off = (table.double() - made.double()).abs().max().item()
    most = SAME_SINES + torch.finfo(table.dtype).eps / 2
    if off > most:
        why = f"its shape is {tuple(table.shape)}; it is up to {off:.2g} off, and rounding at most {most:.2g}; a table that was learned is lost"
        raise CheckpointError("pos_embed holds other positions than diffusers makes", why, "convert to a .safetensors file")


def renamed(tensors: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """The same tensors by diffusers' names; they are those of `shapes_of`."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in ENDS:
            found[f"{ENDS[module]}.{kind}"] = tensor
        elif module in SHARED:
            found |= {f"transformer_blocks.{index}.norm1.emb.{SHARED[module]}.{kind}": tensor for index in range(num_layers)}
        elif name != "pos_embed":
            _, index, part = module.split(".", 2)
            if part == "attn.qkv":
                names = (f"transformer_blocks.{index}.attn1.to_{letter}.{kind}" for letter in "qkv")
                found |= dict(zip(names, tensor.chunk(3), strict=True))
            else:
                found[f"transformer_blocks.{index}.{BLOCK[part]}.{kind}"] = tensor
    return found


def _shape(tensors: dict[str, torch.Tensor], name: str, rank: int, rule: str) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"{name} is missing", rule, HINT)
    shape = tuple(tensors[name].shape)
    if len(shape) != rank or not all(shape):
        raise _unfit(tensors, name, rule)
    return shape


def _compare(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], depth: int) -> None:
    """Raise CheckpointError for the first tensor that has no place, another shape or dtype, or that isn't there."""
    for name, tensor in tensors.items():
        if name not in shapes:
            rule = f"a published DiT has no such tensor; with {depth} blocks, these are blocks.0 to blocks.{depth - 1}"
            raise CheckpointError(f"{name[:80]} has no place in DiTTransformer2DModel", f"its shape is {tuple(tensor.shape)}; {rule}", HINT)
        if tuple(tensor.shape) != shapes[name]:
            raise _unfit(tensors, name, f"beside the others it is to be {shapes[name]}")
        if tensor.dtype not in DTYPES:
            raise _unfit(tensors, name, f"its dtype is {tensor.dtype}; known: {', '.join(map(str, DTYPES))}")
    missing = next((name for name in shapes if name not in tensors), None)
    if missing is not None:
        raise CheckpointError(f"{missing} is missing", f"a DiT with {depth} blocks has it, of shape {shapes[missing]}", HINT)


def _unfit(tensors: dict[str, torch.Tensor], name: str, rule: str) -> CheckpointError:
    return CheckpointError(f"{name} fits no DiT", f"its shape is {tuple(tensors[name].shape)}; {rule}", HINT)
