"""mlx-optiq's layout, made from a folder of ours: a bit width per layer, and the vision tower in a file of its own.

Source   mlx-optiq 0.7.7: optiq_vision.safetensors at the root (0.3.1 to 0.4: under optiq/), names without
         `model.encoder.`, listed in the index; config.json names the sidecar under "optiq_vision"
"""

import json

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from convert import convert
from mlx_dgemma.tensors import VISION_PREFIXES, is_vision
from tests.tiny import make_tiny_checkpoint, write_json

STRIPPED = "model.encoder."


def make_optiq_folder(source, out, sidecar="optiq_vision.safetensors"):
    """`source` quantized as mlx-optiq would: experts of layer 2 at 8 bits, self-conditioning unquantized."""
    write_json(out.with_suffix(".json"), {"roles": {"expert": "q4", "self_conditioning": "fp32"}})
    convert(source, out, recipe=out.with_suffix(".json"))
    (file,) = out.glob("*.safetensors")
    arrays = mx.load(str(file))
    original = mx.load(str(source / "model.safetensors"))
    config = json.loads((out / "config.json").read_text())
    for name in ("gate_up_proj", "down_proj"):
        module = f"model.decoder.layers.2.experts.{name}"
        parts = mx.quantize(original[module], group_size=64, bits=8)
        arrays |= dict(zip((f"{module}.weight", f"{module}.scales", f"{module}.biases"), parts, strict=True))
        config["quantization"][module] = {"group_size": 64, "bits": 8}
    config["quantization_config"] = config["quantization"]
    vision = {name: arrays.pop(name) for name in list(arrays) if is_vision(name)}
    vision = {name.removeprefix(STRIPPED): array.astype(mx.bfloat16) for name, array in vision.items()}
    config["optiq_vision"] = {"sidecar": sidecar, "dtype": "bfloat16", "n_tensors": len(vision)}
    (out / sidecar).parent.mkdir(exist_ok=True)
    mx.eval(arrays, vision)
    file.unlink()
    mx.save_safetensors(str(out / "model.safetensors"), arrays, {"format": "mlx"})
    mx.save_safetensors(str(out / sidecar), vision, {"format": "mlx"})
    weight_map = dict.fromkeys(arrays, "model.safetensors") | dict.fromkeys(vision, sidecar)
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(out / "config.json", config)
    return arrays, vision


@pytest.mark.parametrize("sidecar", ["optiq_vision.safetensors", "optiq/optiq_vision.safetensors"])
def test_mlx_optiqs_layout_loads(tmp_path, sidecar):
    source = make_tiny_checkpoint(tmp_path / "source", vision=True)
    arrays, vision = make_optiq_folder(source, tmp_path / "optiq", sidecar)
    assert {name.split(".")[0] for name in vision} == {p.removeprefix(STRIPPED).rstrip(".") for p in VISION_PREFIXES}
    model, _ = mlx_dgemma.load(tmp_path / "optiq")
    layers = model.model.decoder.layers
    assert (layers[1].experts.down_proj.packing.bits, layers[2].experts.down_proj.packing.bits) == (4, 8)
    name = "model.decoder.layers.2.experts.down_proj.weight"
    assert mx.array_equal(layers[2].experts.down_proj.weight, arrays[name])
    cache = model.make_cache()
    model.encode(mx.arange(20)[None] + 200, cache)
    assert np.isfinite(np.array(model.denoise(mx.arange(16)[None] + 107, cache))).all()
