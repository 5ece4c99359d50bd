"""Sound safetensors files that hold the wrong tensors."""

from collections.abc import Callable

from tests.checkpoint.hostile.spoil import LAYER, VAE, WEIGHTS, case, edit_tensors


def tensor_case(name: str, tensor: str, word: str, change: Callable, seal: str = "resealed", file: str = WEIGHTS) -> None:
    case(name, tensor, word, seal)(lambda folder: edit_tensors(folder, change, file))


def _set(name: str, value: float) -> Callable:
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value)


tensor_case("a scale of NaN", LAYER, "NaN or inf", _set(f"{LAYER}.scale", float("nan")))
tensor_case("a scale of infinity", LAYER, "NaN or inf", _set(f"{LAYER}.scale", float("inf")))
tensor_case("a scale of zero", LAYER, "> 0", _set(f"{LAYER}.scale", 0.0))
tensor_case("a negative scale", LAYER, "> 0", _set(f"{LAYER}.scale", -1.0))
tensor_case("a scale of NaN, without a manifest", LAYER, "NaN or inf", _set(f"{LAYER}.scale", float("nan")), "unsealed")
tensor_case("a weight of NaN", "proj_out_1.weight", "NaN or inf", _set("proj_out_1.weight", float("nan")))
tensor_case("a bias of infinity", f"{LAYER}.bias", "NaN or inf", _set(f"{LAYER}.bias", float("inf")))
tensor_case("a decoder of NaN", "decoder.conv_in.weight", "NaN or inf", _set("decoder.conv_in.weight", float("nan")), file=VAE)
tensor_case("a zero point beyond the last group", f"{LAYER}", "padded", lambda t: t[f"{LAYER}.zero_point"].view(-1)[:1].bitwise_or_(0xF0))
tensor_case("a tensor missing", f"{LAYER}.scale", "is missing", lambda t: t.pop(f"{LAYER}.scale"))
tensor_case("a decoder's tensor missing", "decoder.conv_in.bias", "is missing", lambda t: t.pop("decoder.conv_in.bias"), file=VAE)
tensor_case("a tensor too many", f"{LAYER}.smooth", "should not be there", lambda t: t.update({f"{LAYER}.smooth": t[f"{LAYER}.bias"].clone()}))
tensor_case("codes that are floats", f"{LAYER}.qdata", "dtype", lambda t: t.update({f"{LAYER}.qdata": t[f"{LAYER}.qdata"].float()}))
tensor_case("scales in bfloat16", f"{LAYER}.scale", "dtype", lambda t: t.update({f"{LAYER}.scale": t[f"{LAYER}.scale"].bfloat16()}))
tensor_case("weights that are integers", "proj_out_1.weight", "dtype", lambda t: t.update({"proj_out_1.weight": t["proj_out_1.weight"].int()}))
tensor_case("a row too few", f"{LAYER}.qdata", "wrong shape", lambda t: t.update({f"{LAYER}.qdata": t[f"{LAYER}.qdata"][1:]}))
tensor_case("a bias of another shape", f"{LAYER}.bias", "wrong shape", lambda t: t.update({f"{LAYER}.bias": t[f"{LAYER}.bias"][1:]}))
