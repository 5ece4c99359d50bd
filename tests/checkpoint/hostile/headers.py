"""safetensors headers that lie about lengths, shapes, types, offsets and names."""

import json
import struct

from tests.checkpoint.hostile.spoil import CONFIG, LAYER, WEIGHTS, case, edit_header, edit_tensors, join, split


@case("a header that claims 2^62 bytes", WEIGHTS, "claims", "resealed")
def _(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + (folder / WEIGHTS).read_bytes()[8:])


@case("a shape of 2^40", WEIGHTS, "can't take", "resealed")
def _(folder):
    edit_header(folder / WEIGHTS, lambda h: h[f"{LAYER}.qdata"].update(shape=[2**20, 2**20]))


@case("an empty shape of 2^40", f"{LAYER}.scale", "wrong shape", "resealed")
def _(folder):
    import torch

    edit_tensors(folder, lambda t: t.update({f"{LAYER}.scale": torch.zeros(0, 2**40, dtype=torch.float16)}))


@case("sizes of a thousand digits", WEIGHTS, "digits", "resealed")
def _(folder):
    header, body = split(folder / WEIGHTS)
    text = json.dumps(header).replace('"shape": [', '"shape": [' + "9" * 1000 + ", ", 1)
    join(folder / WEIGHTS, text.encode(), body)


@case("a shape of 100,000 sizes", WEIGHTS, "no shape of at most", "resealed")
def _(folder):
    edit_header(folder / WEIGHTS, lambda h: h[f"{LAYER}.qdata"].update(shape=[2**40] * 100_000))


@case("a negative size", WEIGHTS, "not a whole number", "resealed")
def _(folder):
    edit_header(folder / WEIGHTS, lambda h: h[f"{LAYER}.qdata"].update(shape=[-1, -1]))


def _to_the_front(header):
    entry = header[f"{LAYER}.qdata"]
    entry["data_offsets"] = [0, entry["shape"][0] * entry["shape"][1]]


@case("overlapping tensors", WEIGHTS, "begins at", "resealed")
def _(folder):
    edit_header(folder / WEIGHTS, _to_the_front)


@case("bytes behind the last tensor", WEIGHTS, "the file at", "resealed")
def _(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"#!/bin/sh")


@case("an unknown dtype", WEIGHTS, "no valid dtype", "resealed")
def _(folder):
    edit_header(folder / WEIGHTS, lambda h: h[f"{LAYER}.qdata"].update(dtype="PICKLE"))


@case("a tensor twice in the header", WEIGHTS, "appears twice", "resealed")
def _(folder):
    header, body = split(folder / WEIGHTS)
    text = json.dumps(header)
    join(folder / WEIGHTS, (text[:-1] + f', "{LAYER}.scale": ' + json.dumps(header[f"{LAYER}.scale"]) + "}").encode(), body)


@case("200,000 tensors", WEIGHTS, "at most 100000", "resealed")
def _(folder):
    header = {f"t{index}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for index in range(200_000)}
    join(folder / WEIGHTS, header, b"")


@case("90,000 tensors that no model has", CONFIG, "is missing", "resealed")
def _(folder):
    header = {f"t{index}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for index in range(90_000)}
    join(folder / WEIGHTS, header, b"")


@case("100,000 tensors, the last one twice", WEIGHTS, "appears twice", "resealed")
def _(folder):
    items = [f'"t{index}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for index in range(100_000)]
    join(folder / WEIGHTS, ("{" + ",".join([*items, items[-1]]) + "}").encode(), b"")


@case("metadata that is no mapping", WEIGHTS, "__metadata__", "resealed")
def _(folder):
    edit_header(folder / WEIGHTS, lambda h: h.update(__metadata__=[1]))


@case("a tensor called like a path", "../../outside/secret", "should not be there", "resealed")
def _(folder):
    import torch

    edit_tensors(folder, lambda t: t.update({"../../outside/secret": torch.zeros(1)}))
