"""Folders that are damaged or mean harm: each is refused with a CheckpointError, before anything is allocated, and nothing hangs."""

import json
import os
import struct

import pytest

import dite
from dite.checkpoint.format import MANIFEST, read_header
from dite.errors import CheckpointError, UsageError
from dite.models.load import load_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    return dite.save(tiny_pipeline, tmp_path / "q")


def flip_a_byte(path, at=-100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit_manifest(folder, change):
    path = folder / MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def replace_by_fifo(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def replace_by_link(folder):
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


ATTACKS = {
    "a flipped bit in the weights": (lambda f: flip_a_byte(f / WEIGHTS), "SHA-256"),
    "a flipped bit in a config": (lambda f: flip_a_byte(f / "vae/config.json"), "SHA-256"),
    "truncated weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "the manifest says"),
    "missing weights": (lambda f: (f / WEIGHTS).unlink(), "missing"),
    "a named pipe": (replace_by_fifo, "not a regular file"),
    "a link out of the folder": (replace_by_link, "is a link"),
    "weights that are not listed": (lambda f: (f / "transformer/more.safetensors").write_bytes(b""), "not in the manifest"),
    "a pickle that is not listed": (lambda f: (f / "transformer/diffusion_pytorch_model.bin").write_bytes(b""), "not in the manifest"),
    "a config that is not listed": (lambda f: edit_manifest(f, lambda m: m["files"].pop("transformer/config.json")), "not in the manifest"),
    "a path out of the folder": (lambda f: edit_manifest(f, lambda m: m["files"].update({"../x": {"size": 0, "sha256": ""}})), "inside the folder"),
    "an absolute path": (lambda f: edit_manifest(f, lambda m: m["files"].update({"/etc/passwd": {"size": 0, "sha256": ""}})), "inside the folder"),
    "an unknown manifest key": (lambda f: edit_manifest(f, lambda m: m.update(run="rm")), "can't be read"),
    "a newer format": (lambda f: edit_manifest(f, lambda m: m.update(format_version=99)), "newer dite"),
    "a manifest that is not JSON": (lambda f: (f / MANIFEST).write_text("{"), "can't be read"),
    "a manifest that is a link": (lambda f: ((f / MANIFEST).unlink(), (f / MANIFEST).symlink_to("/dev/zero")), "is a link"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bad_folder_is_refused(folder, attack):
    damage, message = ATTACKS[attack]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        dite.load(folder)


def header_file(tmp_path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(shape, begin, end, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({"a": entry([0, 2**40], 0, 5)}, b"12345", "can't take 5 bytes"),
        ({"a": entry([4], 0, 4), "b": entry([4], 2, 6)}, b"123456", "begins at 2"),
        ({"a": entry([4], 4, 8)}, b"12345678", "begins at 4"),
        ({"a": entry([4], 0, 4)}, b"12345", "the file at"),
        ({"a": entry([-4], 0, 4)}, b"1234", "not a whole number"),
        ({"a": entry([4.0], 0, 4)}, b"1234", "not a whole number"),
        ({"a": entry([4], 0, 4, "EVIL")}, b"1234", "no valid dtype"),
        ({"a": 3}, b"", "no valid dtype"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1", "appears twice"),
        (b"[]", b"", "not a mapping"),
        (b"{", b"", "not valid JSON"),
        (b"[" * 100000, b"", "not valid JSON"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header, body, message):
    with pytest.raises(CheckpointError, match=message):
        read_header(header_file(tmp_path, header, body))


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="claims"):
        read_header(header_file(tmp_path, {}, length=2**60))


def test_a_sound_header_is_read(tmp_path):
    assert read_header(header_file(tmp_path, {"__metadata__": {"format": "pt"}, "a": entry([2, 2], 0, 4)}, b"1234")).keys() == {"a"}


def rewrite(folder, change):
    """Change tensors of the weights and drop the manifest, as someone who bypasses dite.save would."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / MANIFEST).unlink()


LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{LAYER}.scale": t[f"{LAYER}.scale"] * float("nan")}), "NaN or inf"),
        (lambda t: t.update({f"{LAYER}.scale": t[f"{LAYER}.scale"] * 0}), "> 0"),
        (lambda t: t.update({f"{LAYER}.bias": t[f"{LAYER}.bias"] * float("inf")}), "NaN or inf"),
        (lambda t: t.update({"proj_out_1.weight": t["proj_out_1.weight"] * float("nan")}), "proj_out_1.weight is damaged"),
        (lambda t: t.pop("proj_out_1.weight"), "proj_out_1.weight is missing"),
        (lambda t: t.update({f"{LAYER}.qdata": t[f"{LAYER}.qdata"][:, :-1].contiguous()}), "wrong shape"),
        (lambda t: t.update({f"{LAYER}.qdata": t[f"{LAYER}.qdata"].float()}), "codes are torch.uint8"),
        (lambda t: t.pop(f"{LAYER}.scale"), "scale is missing"),
    ],
)
def test_unsound_tensors_are_refused_also_without_a_manifest(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        dite.load(folder)


def test_a_scheme_that_is_not_ours_is_refused(folder):
    path = folder / "transformer/config.json"
    path.write_text(path.read_text().replace('"num_bits": 4', '"num_bits": 5', 1))
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="quantization_config"):
        dite.load(folder)


@pytest.mark.parametrize(
    ("old", "new"), [('"format_version": 1', '"format_version": "1"'), ('"format_version": 1', '"format_version": 1, "run": "rm"')]
)
def test_a_configuration_that_is_not_ours_is_refused(folder, old, new):
    path = folder / "transformer/config.json"
    path.write_text(path.read_text().replace(old, new, 1))
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="quantization_config can't be read"):
        dite.load(folder)


def test_a_named_pipe_without_a_manifest_does_not_hang(folder):
    replace_by_fifo(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_pipeline(folder)


def test_a_readme_may_be_added_to_a_saved_model(folder):
    (folder / "README.md").write_text("my model")
    dite.load(folder)


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "builtin:nothing"])
def test_a_missing_model_is_a_usage_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no" / "such").mkdir(parents=True)
    with pytest.raises(UsageError):
        dite.load(name)


def test_an_empty_folder_holds_no_model(tmp_path):
    with pytest.raises(UsageError, match="holds no model"):
        dite.load(tmp_path)


def test_a_tensor_that_the_scheme_has_no_place_for_is_refused(tiny_pipeline, tmp_path):
    from diffusers import DiTPipeline

    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    dite.save(tiny_pipeline, tmp_path / "q")
    (tmp_path / "q" / "dite_manifest.json").unlink()
    path = tmp_path / "q" / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"symmetric": false', '"symmetric": true'))
    for load in (dite.load, DiTPipeline.from_pretrained):
        with pytest.raises(CheckpointError, match="zero_point should not be there"):
            load(tmp_path / "q")


def test_a_quantized_model_whose_configuration_is_gone_is_refused(tiny_pipeline, tmp_path):
    dite.quantize(tiny_pipeline, "w4a8", effort="fast")
    dite.save(tiny_pipeline, tmp_path / "q")
    (tmp_path / "q" / "dite_manifest.json").unlink()
    path = tmp_path / "q" / "transformer" / "config.json"
    values = json.loads(path.read_text())
    del values["quantization_config"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="lack the tensor"):
        dite.load(tmp_path / "q")


QUICK = ["calibration.num_samples=8", "calibration.num_steps=4", "calibration.num_calls=8", "rounding=nearest", "rank=2"]


def change_tensor(folder, ending, change):
    """Rewrite the tensors whose names end so; the manifest goes, so that only structure is checked."""
    from safetensors.torch import load_file, save_file

    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({name: change(tensor.clone()) if name.endswith(ending) else tensor for name, tensor in tensors.items()}, path)
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("ending", "change", "why"),
    [
        (".smooth", lambda tensor: tensor * 0, "smooth"),
        (".smooth", lambda tensor: -tensor, "smooth"),
        (".smooth", lambda tensor: tensor * 1e30, "smooth"),
        (".smooth", lambda tensor: tensor.long() + 1, "smooth"),
        (".smooth", lambda tensor: tensor[1:], "smooth"),
        (".lowrank_up", lambda tensor: tensor * float("nan"), "NaN"),
        (".lowrank_down", lambda tensor: tensor[:1], "lowrank_down"),
    ],
)
def test_parts_of_a_transform_that_cannot_be_are_refused(tiny_pipeline, tmp_path, ending, change, why):
    dite.quantize(tiny_pipeline, "w4a8", overrides=[*QUICK, "transform=smooth+lowrank"])
    dite.save(tiny_pipeline, tmp_path / "q")
    change_tensor(tmp_path / "q", ending, change)
    with pytest.raises(CheckpointError, match=why):
        dite.load(tmp_path / "q")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"rank": 0', '"rank": 1000', "rank 1000 is more than"),
        ('"calibration": null', '"calibration": [1]', "no mapping"),
        ('"calibration": null', '"calibration": {"plan": "x"}', "no mapping"),
    ],
)
def test_a_scheme_or_a_plan_that_cannot_be_is_refused(folder, old, new, why):
    path = folder / "transformer/config.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=why):
        dite.load(folder)
