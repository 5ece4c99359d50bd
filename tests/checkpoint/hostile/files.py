"""Files that are damaged, missing, too many, or of the wrong sort."""

import os
import pickle
import socket

from tests.checkpoint.hostile.spoil import CONFIG, MANIFEST, SCHEDULER, VAE, WEIGHTS, case, edit, outside


@case("truncated weights", WEIGHTS, "the manifest says")
def _(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


@case("empty weights", WEIGHTS, "the manifest says 5")
def _(folder):
    (folder / WEIGHTS).write_bytes(b"")


@case("empty weights in a manifest that agrees", WEIGHTS, "header", "resealed")
def _(folder):
    (folder / WEIGHTS).write_bytes(b"")


@case("a flipped bit in the weights", WEIGHTS, "SHA-256")
def _(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-100] ^= 1
    (folder / WEIGHTS).write_bytes(data)


@case("a digest that is another file's", WEIGHTS, "SHA-256")
def _(folder):
    edit(folder / MANIFEST, lambda m: m["files"][WEIGHTS].update(sha256=m["files"][VAE]["sha256"]))


@case("a digest that is no digest", MANIFEST, "sha256")
def _(folder):
    edit(folder / MANIFEST, lambda m: m["files"][WEIGHTS].update(sha256="0"))


@case("weights missing", WEIGHTS, "missing")
def _(folder):
    (folder / WEIGHTS).unlink()


@case("a part's folder missing", "scheduler/scheduler_config.json", "missing", "resealed")
def _(folder):
    (folder / SCHEDULER).unlink()
    (folder / "scheduler").rmdir()


@case("a file that is not listed", "transformer/more.safetensors", "not in the manifest")
def _(folder):
    (folder / "transformer/more.safetensors").write_bytes(b"")


@case("a pickle that is not listed", "transformer/diffusion_pytorch_model.bin", "not in the manifest")
def _(folder):
    (folder / "transformer/diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))


@case("a pickle that is listed", "transformer/diffusion_pytorch_model.bin", "no pickles", "resealed")
def _(folder):
    (folder / "transformer/diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))


@case("a pickle under the weights' name", WEIGHTS, "header claims", "resealed")
def _(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps({"a": 1}, protocol=4))


@case("code that is listed", "transformer/diffusers.py", "no code", "resealed")
def _(folder):
    (folder / "transformer/diffusers.py").write_text("raise SystemExit('code was run')")


@case("a link out of the folder", WEIGHTS, "is a link")
def _(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside(folder))


@case("a link out of the folder, without a manifest", WEIGHTS, "is a link", "unsealed")
def _(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside(folder))


@case("a part that is a link", CONFIG, "is a link")
def _(folder):
    (folder / "transformer").rename(folder.parent / "outside" / "transformer")
    (folder / "transformer").symlink_to(folder.parent / "outside" / "transformer")


@case("a part that is a link, without a manifest", "transformer", "is a link", "unsealed")
def _(folder):
    (folder / "transformer").rename(folder.parent / "outside" / "transformer")
    (folder / "transformer").symlink_to(folder.parent / "outside" / "transformer")


@case("a link in a circle", CONFIG, "is a link")
def _(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("config.json")


@case("a hard link", WEIGHTS, "hard link")
def _(folder):
    os.link(folder / WEIGHTS, folder.parent / "another-name")


@case("a named pipe", WEIGHTS, "not a regular file")
def _(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@case("a named pipe, without a manifest", WEIGHTS, "not a regular file", "unsealed")
def _(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@case("a named pipe as configuration, without a manifest", CONFIG, "not a regular file", "unsealed")
def _(folder):
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


@case("a manifest that is a named pipe", MANIFEST, "not a regular file")
def _(folder):
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)


@case("a socket", WEIGHTS, "not a regular file")
def _(folder):
    (folder / WEIGHTS).unlink()
    here = os.getcwd()
    os.chdir((folder / WEIGHTS).parent)  # a socket's path has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind((folder / WEIGHTS).name)
    finally:
        os.chdir(here)


@case("a device", WEIGHTS, "a link")
def _(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")


@case("a device, without a manifest", CONFIG, "a link", "unsealed")
def _(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/dev/zero")


@case("a folder where a file should be", WEIGHTS, "not a regular file")
def _(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


@case("a file where a folder should be", "transformer", "missing")
def _(folder):
    (folder / "transformer").rename(folder.parent / "gone")
    (folder / "transformer").write_text("")
