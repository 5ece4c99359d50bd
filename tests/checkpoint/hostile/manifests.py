"""Manifests that lie, or that no reader should have to read."""

from tests.checkpoint.hostile.spoil import MANIFEST, WEIGHTS, case, edit, replace_text


@case("a path out of the folder", "../outside/secret.safetensors", "inside the folder")
def _(folder):
    edit(folder / MANIFEST, lambda m: m["files"].update({"../outside/secret.safetensors": {"size": 6, "sha256": "0" * 64}}))


@case("an absolute path", "/etc/passwd", "inside the folder")
def _(folder):
    edit(folder / MANIFEST, lambda m: m["files"].update({"/etc/passwd": {"size": 0, "sha256": "0" * 64}}))


@case("a path with a zero byte", "x", "inside the folder")
def _(folder):
    edit(folder / MANIFEST, lambda m: m["files"].update({"x\0y": {"size": 0, "sha256": "0" * 64}}))


@case("a path spelled in another way", "transformer", "inside the folder")
def _(folder):
    edit(folder / MANIFEST, lambda m: m["files"].update({"./" + WEIGHTS: m["files"][WEIGHTS]}))


@case("a newer format", MANIFEST.replace("dite_manifest.json", "format_version"), "newer dite")
def _(folder):
    edit(folder / MANIFEST, lambda m: m.update(format_version=2, compression="new"))


@case("a format before the first", MANIFEST, "format_version")
def _(folder):
    edit(folder / MANIFEST, lambda m: m.update(format_version=0))


@case("an unknown key in the manifest", MANIFEST, "run")
def _(folder):
    edit(folder / MANIFEST, lambda m: m.update(run="rm"))


@case("a key twice in the manifest", MANIFEST, "appears twice")
def _(folder):
    replace_text(folder / MANIFEST, '"format_version"', '"format_version": 1, "format_version"')


@case("a manifest of 17 million bytes", MANIFEST, "too large")
def _(folder):
    edit(folder / MANIFEST, lambda m: m.update(dite_version="x" * 17_000_000))


@case("a manifest nested 100,000 deep", MANIFEST, "nested deeper")
def _(folder):
    (folder / MANIFEST).write_text('{"a":' * 100_000)


@case("a manifest in UTF-16", MANIFEST, "UTF-8")
def _(folder):
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_text().encode("utf-16"))


@case("a manifest that lists 200,000 files", "f0", "missing")
def _(folder):
    edit(folder / MANIFEST, lambda m: m.update(files={f"f{index}": {"size": 0, "sha256": "0" * 64} for index in range(140_000)}))


@case("a size beyond any file", WEIGHTS, "size")
def _(folder):
    edit(folder / MANIFEST, lambda m: m["files"][WEIGHTS].update(size=2**63))
