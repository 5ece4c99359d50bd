"""How the cases of this folder are written: one function each, which is given a saved quantized pipeline and spoils it.

    @case("what is wrong", "the file", "a word of the message", seal=...)

`seal`: `sealed` keeps the manifest as it is; `resealed` writes a new one that agrees with the spoiled files, as an attacker would; `unsealed` removes
it. The bytes outside the folder that a case points at lie in `folder.parent / "outside"`, which nothing may open.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MANIFEST, WEIGHTS, CONFIG = "dite_manifest.json", "transformer/diffusion_pytorch_model.safetensors", "transformer/config.json"
INDEX, VAE, SCHEDULER = "model_index.json", "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"
LAYER = "transformer_blocks.0.attn1.to_q"


@dataclass(frozen=True)
class Case:
    spoil: Callable[[Path], None]
    file: str
    word: str
    seal: str


CASES: dict[str, Case] = {}


def case(name: str, file: str, word: str, seal: str = "sealed"):
    def keep(spoil):
        assert name not in CASES
        CASES[name] = Case(spoil, file, word, seal)
        return spoil

    return keep


def spoiled(name: str, folder: Path) -> Case:
    """Carry out a case on `folder`."""
    chosen = CASES[name]
    chosen.spoil(folder)
    if chosen.seal == "resealed":
        reseal(folder)
    elif chosen.seal == "unsealed":
        (folder / MANIFEST).unlink()
    return chosen


def reseal(folder: Path) -> None:
    """A manifest that agrees with what lies in the folder."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    files = {name: {"size": (data := (folder / name).read_bytes()).__len__(), "sha256": hashlib.sha256(data).hexdigest()} for name in names}
    edit(folder / MANIFEST, lambda values: values.update(files=files))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def split(path: Path) -> tuple[dict, bytes]:
    """The header and the bytes of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: dict | bytes, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    header, body = split(path)
    change(header)
    join(path, header, body)


def edit_tensors(folder: Path, change: Callable[[dict], object], file: str = WEIGHTS) -> None:
    """Change tensors and write a sound file of them."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


def outside(folder: Path) -> Path:
    return folder.parent / "outside" / "secret.safetensors"


def config_of(folder: Path) -> Path:
    return folder / CONFIG
