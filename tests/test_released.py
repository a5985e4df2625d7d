"""The released files at their true sizes, taken through the real loaders.

golden/released.json holds the name and the shape of every tensor of DiT^DH-XL, DiT^DH-S and the
decoder, from the official code. The files that are made here hold these tensors, each filled with
one number: such a tensor is a view of a single float32 and takes a few bytes on the disk. Only the
names of DINOv2 are our own; golden/dinov2_reg_native.pt proves them with a smaller network.
"""
import json
from pathlib import Path

import pytest
import torch

import drift_rae as dr
import helpers

RELEASED = json.loads((Path(__file__).parent / "golden" / "released.json").read_text())


def shapes(state_dict):
    return {key: list(x.shape) for key, x in state_dict.items()}


def expected_shapes(network, sizes):
    """Names and shapes of a network of these sizes; on "meta" it takes neither memory nor time."""
    with torch.device("meta"):
        return shapes(network(**sizes).state_dict())


def save_constants(path, shape_of, first=0.0, step=0.0):
    """Write {name: tensor}; the tensors are filled with first, first + step, first + 2·step, …"""
    state_dict = {}
    for i, (key, shape) in enumerate(shape_of.items()):
        state_dict[key] = torch.tensor(first + i * step).expand(shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state_dict, path)
    assert path.stat().st_size < 1e6
    return state_dict


@pytest.mark.parametrize("name, sizes", [("DiTDH-XL", dr.DITDH_XL), ("DiTDH-S", dr.DITDH_S)])
def test_our_sizes_give_the_released_names_and_shapes(name, sizes):
    assert expected_shapes(dr.DiTDH, sizes) == RELEASED[name]


def test_the_sizes_of_xl_are_read_off_its_tensors(monkeypatch):
    """XL has 3.4 GB, so this one stays on the meta device, where no number can be checked."""
    monkeypatch.setattr(dr, "load_weights", lambda model, sd, path: model.load_state_dict(sd))
    with torch.device("meta"):
        state_dict = {key: torch.empty(shape) for key, shape in RELEASED["DiTDH-XL"].items()}
        model = dr.DiTDH.from_state_dict(state_dict)
    assert shapes(model.state_dict()) == RELEASED["DiTDH-XL"]
    assert model.depth == dr.DITDH_XL["depth"]


def test_the_small_teacher_loads(tmp_path):
    path = tmp_path / "stage2_model.pt"
    saved = save_constants(path, RELEASED["DiTDH-S"], step=0.25)
    assert dr.load(path)["pos_embed"].stride() == (0, 0, 0)     # still a view
    model = dr.load_teacher(path)
    found = model.state_dict()
    assert shapes(found) == RELEASED["DiTDH-S"]
    assert all(found[key].flatten()[-1] == x.flatten()[-1] for key, x in saved.items())
    read = {name: getattr(model, name) for name in ("input_size", "in_channels", "num_classes")}
    read["depth"] = model.depth
    read["hidden_size"] = tuple(model.blocks[i].norm1.weight.numel() for i in (0, -1))
    read["num_heads"] = tuple(model.blocks[i].attn.num_heads for i in (0, -1))
    assert read == dr.DITDH_S


def test_the_autoencoder_loads_and_encodes(tmp_path):
    """Its statistics are released with mean None, and the official code then subtracts nothing."""
    decoder = tmp_path / helpers.DECODER
    saved = save_constants(decoder, RELEASED["ViTXL_n08"], step=0.25)
    encoder = tmp_path / helpers.ENCODER
    save_constants(encoder, expected_shapes(dr.ViT, dr.VIT_B14), first=0.5)
    statistics = tmp_path / helpers.STATISTICS
    statistics.parent.mkdir(parents=True)
    torch.save({"mean": None, "var": torch.ones(768, 16, 16)}, statistics)

    rae = dr.load_autoencoder({}, "a released teacher", tmp_path)
    found = rae.decoder.state_dict()
    assert shapes(found) == expected_shapes(dr.Decoder, dr.DECODER_XL)
    assert rae.decoder.image_size == 256
    assert rae.decoder.blocks[-1].attn.num_heads == dr.DECODER_XL["num_heads"]
    for part, name in enumerate(("query", "key", "value")):
        official = saved[f"decoder_layers.27.attention.attention.{name}.weight"]
        rows = found["blocks.27.attn.qkv.weight"].chunk(3)[part]
        assert rows[0, 0] == rows[-1, -1] == official[0, 0]
    assert (found["blocks.27.ls2.gamma"] == 1).all()

    assert rae.input_size == 224
    assert not rae.mean.any()
    latents = rae.encode(torch.rand(1, 3, 256, 256))
    assert latents.shape == (1, 768, 16, 16)
    assert latents.isfinite().all()
