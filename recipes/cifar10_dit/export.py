"""Turn a finished run into the folder that ships: a plain DiTPipeline in bf16, with classifier, statistics, pictures and a model card.

builtin/cifar10-dit/
  model_index.json, scheduler/, vae/, transformer/    what DiTPipeline.from_pretrained loads
  classifier/                                         config.json, model.safetensors
  statistics.safetensors                              mu, sigma of the classifier's features over the training images
  samples.png, README.md, metrics.json                what it looks like, and what is known of it
"""

import json
import shutil
from pathlib import Path

import classifier as classifier_stage
import dit
import torch
import vae as vae_stage
from data import Split
from diffusers import DiTPipeline
from grids import GUIDANCE, PER_CLASS, STEPS, draw_samples
from loop import Run, hours_spent, load_average
from reference import image_fid, write_statistics

from dite.checkpoint.save import complete_configs
from dite_evals.classifier import SmallClassifier
from dite_evals.extractors import load_classifier, save_classifier

NAME = "cifar10-dit"
SHARD = "15MB"
NOTES = "notes.txt"  # what happened to a run that its settings don't say; goes into the model card


def export(train: Split, test: Split, run: Run, preset: str, vae, transformer) -> Path:
    """Write `run.folder/run.name`; `vae` is the trained autoencoder with standardised latents, `transformer` an untrained one of the run's shape."""
    folder = run.folder / run.name
    shutil.rmtree(folder, ignore_errors=True)
    pipe = build_pipeline(run, train.names, vae, transformer)
    metrics = {
        "name": run.name,
        "parameters": sum(parameter.numel() for parameter in pipe.transformer.parameters()),
        "preset": preset,
        "hours": {stage: round(hours_spent(run, stage), 2) for stage in ("vae", "classifier", "dit")},
    }
    metrics |= json.loads((run.folder / "settings.json").read_text())
    notes = run.folder / NOTES
    metrics["notes"] = notes.read_text().strip() if notes.exists() else "none"
    pipe.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    vae.float()  # what follows measures the autoencoder as it was stored
    complete_configs(pipe, folder)
    model = trained_classifier(run, len(train.names))
    save_classifier(model, folder, NAME, train.images.shape[-1], torch.float16)
    metrics["classifier_accuracy"] = classifier_stage.accuracy(model, test.images, test.labels, run.device)
    write_statistics(model, train.images, folder / "statistics.safetensors", "cifar10 train")
    reconstructed = vae_stage.decode(vae, vae_stage.encode(vae, test.images, run.device), run.device)
    error = (reconstructed.float() - test.images.float()).square().mean((1, 2, 3))
    metrics["vae_psnr_db"] = float((10 * torch.log10(255**2 / error)).mean())
    metrics["fid_test_images"] = image_fid(model, test.images, folder / "statistics.safetensors")
    metrics["fid_vae_reconstructions"] = image_fid(model, reconstructed, folder / "statistics.safetensors")
    metrics["fid_n"] = len(test.images)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    draw_samples(DiTPipeline.from_pretrained(folder), len(train.names), folder / "samples.png")
    write_card(folder)
    return folder


def write_card(folder: Path) -> Path:
    """Write README.md of an exported folder, with the FID of its samples if `dite eval fid` has left its report beside it (`-o RUN/fid`)."""
    metrics, report = json.loads((folder / "metrics.json").read_text()), folder.with_name("fid") / "report.json"
    samples = json.loads(report.read_text()) if report.exists() else None
    if samples is not None and samples["metrics"]["extractor"] != load_classifier(folder).id:
        raise SystemExit(f"{report} was measured with another classifier; measure again")
    path = folder / "README.md"
    path.write_text(model_card(metrics, samples))
    return path


def build_pipeline(run: Run, names: list[str], vae, model) -> DiTPipeline:
    """The averaged weights, put into `model`, as a pipeline; label rows that no class uses are zeroed."""
    load_average(run.folder / "dit" / "checkpoint.safetensors", model)
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight[len(names) : dit.NULL_LABEL] = 0
    return DiTPipeline(model, vae, dit.scheduler(), id2label=dict(enumerate(names)))


def trained_classifier(run: Run, num_classes: int) -> SmallClassifier:
    """The averaged classifier as it will be loaded: weights rounded to fp16, fp32 arithmetic."""
    model = SmallClassifier(num_classes)
    load_average(run.folder / "classifier" / "checkpoint.safetensors", model)
    return model.half().float().to(run.device).eval()


def model_card(metrics: dict, fid: dict | None) -> str:
    """README.md of the folder; `fid` is the report of its samples."""
    hours, settings, shape = metrics["hours"], metrics["dit"], metrics["model"]
    tokens, width = (8 // shape["patch_size"]) ** 2, 64 * shape["num_heads"]
    layout = f"{shape['num_layers']} blocks, width {width}, {shape['num_heads']} heads, patch {shape['patch_size']} ({tokens} tokens)"
    name, size = metrics["name"], f"{metrics['parameters'] / 1e6:.1f} M parameters"
    accuracy, psnr = f"{metrics['classifier_accuracy']:.1%}", f"{metrics['vae_psnr_db']:.1f} dB"
    real, floor = f"{metrics['fid_test_images']:.3f}", f"{metrics['fid_vae_reconstructions']:.3f}"
    return f"""---
license: apache-2.0
library_name: diffusers
---
# {name}

A small class-conditional latent diffusion transformer that ships with dite, so that everything dite does can be tried, measured and tested offline.

![samples: a row a class, seeds 0 to {PER_CLASS - 1}, guidance {GUIDANCE}, {STEPS} DDIM steps](samples.png)

| part | what |
|---|---|
| data | CIFAR-10 training images (50,000 of 32×32 in 10 classes; as JPEG), random flips |
| transformer | `DiTTransformer2DModel`: {layout}, {size}, v-prediction |
| autoencoder | `AutoencoderKL`: f=4, 4 latent channels, 1.6 M parameters; {psnr} on the test images |
| classifier | `SmallClassifier` of `dite_evals`: {accuracy} of the test images right; 192 features for FID |
| recipe | `recipes/cifar10_dit`, preset `{metrics["preset"]}`: {settings["epochs"]:g} epochs, batch {settings["batch_size"]}, EMA {settings["ema"]} |
| hours | autoencoder {hours["vae"]}, classifier {hours["classifier"]}, transformer {hours["dit"]} |
| notes on the run | {metrics["notes"]} |
| stored | bf16 (classifier fp16) |

FID here is under the bundled classifier against the 50,000 training images, and compares with nothing but itself:
real test images {real}, their reconstructions by the autoencoder {floor}
(the floor of anything sampled), each with N = {metrics["fid_n"]}. {fid_sentence(name, fid)}

Labels are 0 to 9; the null label of classifier-free guidance is 1000, as DiTPipeline wants it.
"""


def fid_sentence(name: str, report: dict | None) -> str:
    """The samples' own figure, or how to get it."""
    if report is None:
        return f"FID of samples is measured by `dite eval fid builtin:{name} --protocol cifar10-5k`."
    metrics, settings = report["metrics"], report["configuration"]
    low, high = metrics["interval"]
    how = f"{settings['steps']} steps, guidance {settings['guidance']}, seed {settings['seed']}, {settings['dtype']}"
    value = f"**{metrics['fid']:.2f}** [{low:.2f}, {high:.2f}]"
    return f"Samples: {value}, N = {metrics['n']}, {how}\n(`dite eval fid builtin:{name} --protocol cifar10-5k`)."
