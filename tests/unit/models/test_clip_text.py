"""Captions through CLIP: skipped layers, chunks of 75 tokens, weights; against stock pipelines and kohya."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from lowrank.errors import Refused
from lowrank.models import clip_text, memory
from lowrank.models.family import Source
from lowrank.models.sd import SD15, SdOptions
from lowrank.models.sdxl import SDXL
from lowrank.models.weighting import weighted
from lowrank.train.text_conditions import stack_text


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return SD15.load(Source(str(tiny_sd), dtype=torch.float32), ("text",))


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl):
    return SDXL.load(Source(str(tiny_sdxl), dtype=torch.float32), ("text",))


# ---------- skipped layers


@pytest.mark.parametrize("skip", [None, 1, 2, 3])
def test_clip_skip_leaves_out_layers_but_not_the_norm(skip, sd, tiny_sd):
    stock = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    layers = stock.text_encoder.encoder.layers
    del layers[len(layers) - (skip or 1) + 1 :]  # an encoder without the last n − 1 layers
    expected, _ = stock.encode_prompt("a cat on the beach", "cpu", 1, False)
    ours = SD15.encode_text(sd, ["a cat on the beach"], SdOptions(clip_skip=skip))[0]["context"]
    assert torch.allclose(ours, expected[0], atol=1e-5)
    if skip in (2, 3):
        plain = SD15.encode_text(sd, ["a cat on the beach"])[0]["context"]
        assert not torch.allclose(plain, ours, atol=1e-2)


def test_more_layers_than_there_are_cannot_be_skipped(sd):
    with pytest.raises(Refused, match="--clip_skip 4 is more than the 3 layers"):
        SD15.encode_text(sd, ["a dog"], SdOptions(clip_skip=4))


@pytest.mark.parametrize("skip", [None, 1, 3])
def test_sdxl_takes_the_last_layer_but_one(skip, sdxl, tiny_sdxl):
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    context, _, pooled, _ = stock.encode_prompt("a dog", device="cpu", do_classifier_free_guidance=False)
    ours = SDXL.encode_text(sdxl, ["a dog"], SdOptions(clip_skip=skip))[0]
    assert torch.allclose(ours["context"], context[0], atol=1e-5)
    assert torch.allclose(ours["pooled"], pooled[0], atol=1e-5)


# ---------- chunks


def kohya_chunks(tokenizer, caption: str, length: int) -> torch.Tensor:
    """kohya's rule, from the padded ids: each chunk is BOS, 75 ids, and the last id; then put right."""
    ids = tokenizer(
        caption, padding="max_length", truncation=True, max_length=length + 2, return_tensors="pt"
    ).input_ids[0]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for i in range(1, length + 2 - 77 + 2, 75):
        row = torch.cat([ids[:1], ids[i : i + 75], ids[-1:]])
        if pad != eos:
            if row[-2] not in (eos, pad):
                row[-1] = eos
            if row[1] == pad:
                row[1] = eos
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("count", [0, 1, 73, 74, 75, 76, 149, 150, 151, 224, 225, 226, 400])
@pytest.mark.parametrize("length", [75, 150, 225])
def test_chunks_are_kohyas(count, length, sdxl):
    caption = " ".join(["cat", "dog"] * 200)[: count * 4]
    for tokenizer in sdxl.tokenizers:  # one pads with the end, the other with another token
        ours = clip_text.tokenize(tokenizer, caption, length // 75, False)
        assert torch.equal(ours.chunks, kohya_chunks(tokenizer, caption, length))
        assert torch.equal(ours.weights, torch.ones(length + 2))


def test_what_is_joined(sd, sdxl):
    """BOS of the first chunk, the chunks' insides, the end of the last; pooled of the first."""
    options = SdOptions(max_token_length=150)
    caption = " ".join(["cat"] * 100)
    with torch.no_grad():
        ids = kohya_chunks(sd.tokenizers[0], caption, 150)
        h = sd.text_encoders[0](ids).last_hidden_state
    expected = torch.cat([h[0, :76], h[1, 1:77]])
    ours = SD15.encode_text(sd, [caption], options)[0]["context"]
    assert ours.shape == (152, 64) and torch.allclose(ours, expected, atol=1e-5)
    with torch.no_grad():
        ids = kohya_chunks(sdxl.tokenizers[1], caption, 150)
        out = sdxl.text_encoders[1](ids, output_hidden_states=True)
    two = SDXL.encode_text(sdxl, [caption], options)[0]
    assert two["context"].shape == (152, 64 + 128)
    assert torch.allclose(
        two["context"][:, 64:],
        torch.cat([out.hidden_states[-2][0, :76], out.hidden_states[-2][1, 1:]]),
        atol=1e-5,
    )
    assert torch.allclose(two["pooled"], out.text_embeds[0], atol=1e-5)


def test_tokens_of_captions_are_counted(sd):
    texts = [" ".join(["cat"] * count) for count in (1, 75, 76)]
    counts = SD15.token_counts(sd, texts, SdOptions())
    assert counts == ("CLIP", 75, [1, 75, 76], "give --max_token_length 225")
    assert SD15.token_counts(sd, ["(cat:1.5)"], SdOptions(weighted_captions=True)).counts == [1]
    assert SD15.token_counts(sd, texts, SdOptions(max_token_length=225))[1::2] == (225, "")


# ---------- weights


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("", [("", 1)]),
        ("a cat", [("a cat", 1)]),
        ("(cat)", [("cat", 1.1)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("(cat: .5 )", [("cat", 0.5)]),
        ("(cat:-1)", [("cat", -1)]),
        (r"\(cat\) \[x\] \\", [("(cat) [x] \\", 1)]),
        ("(never closed", [("never closed", 1.1)]),
        ("(one)(two)", [("onetwo", 1.1)]),
        ("a ) b ] c: 1", [("a ) b ] c: 1", 1)]),
        ("cat:1.2)", [("cat:1.2)", 1)]),
        ("[a (b:2) c]", [("a ", 1 / 1.1), ("b", 2 / 1.1), (" c", 1 / 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                *(("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55)),
                *((", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)),
            ],
        ),
    ],
)
def test_weights_of_a_caption(caption, expected):
    found = weighted(caption)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize("length", [75, 150])
def test_weights_multiply_the_states(length, sd):
    caption = " ".join(["cat"] * 74) + " (red dog:1.5) moon"
    plain = SdOptions(max_token_length=length)
    asked = SdOptions(max_token_length=length, weighted_captions=True)
    bare = SD15.encode_text(sd, [caption.replace("(", "").replace(":1.5)", "")], plain)[0]["context"]
    ours = SD15.encode_text(sd, [caption], asked)[0]["context"]
    factor = torch.ones(length + 2)
    factor[75:77] = 1.5
    if length == 75:
        factor[76:] = 1  # the last row is the end token
    assert torch.allclose(ours, bare * factor[:, None], atol=1e-5)
    unasked = SD15.encode_text(sd, [caption], plain)[0]["context"]
    assert not torch.allclose(unasked, ours, atol=1e-2)


# ---------- trained encoders


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_trained_text_is_the_encoded_with_gradient(name, request):
    models = request.getfixturevalue(name)
    family = {"sd": SD15, "sdxl": SDXL}[name]
    captions, options = ["a (cat:1.2)", "two dogs"], SdOptions(None, 150, True)
    expected = stack_text(family.encode_text(models, captions, options))
    assert (
        len(family.keep_trained_text(models, options))
        == len(models.text_encoders)
        == (1 if name == "sd" else 2)
    )
    layers = [encoder.get_submodule(path) for encoder in models.text_encoders for path in paths(encoder)]
    try:
        for layer in layers:
            layer.weight.requires_grad_(True)
        live = family.trained_text(models, captions, options)
        assert live.keys() == expected.keys()
        assert all(torch.allclose(live[key], expected[key], atol=1e-5) for key in live)
        sum(value.square().mean() for value in live.values()).backward()
        assert all(layer.weight.grad.abs().max() > 0 for layer in layers)
    finally:
        for layer in layers:
            layer.weight.requires_grad_(False).grad = None


def test_checkpointed_text_has_the_same_gradient(tiny_sd):
    found = []
    for checkpointed in (False, True):
        models = SD15.load(Source(str(tiny_sd), dtype=torch.float32), ("text",))
        encoder = models.text_encoders[0]
        if checkpointed:
            memory.checkpoint_text(encoder)
        weight = encoder.get_parameter("encoder.layers.0.mlp.fc1.weight").requires_grad_(True)
        SD15.trained_text(models, ["a dog"], SdOptions(clip_skip=2))["context"].square().mean().backward()
        found.append(weight.grad)
    assert torch.allclose(*found, atol=1e-8) and found[0].abs().max() > 0


def paths(encoder) -> list[str]:
    return [name for name, _ in encoder.named_modules() if name.endswith("layers.0.self_attn.q_proj")]


def test_captions_do_not_depend_on_their_neighbours(sdxl):
    one, many = SDXL.encode_text(sdxl, ["a dog"])[0], SDXL.encode_text(sdxl, ["x " * 50, "a dog"])[1]
    assert all(torch.equal(one[key], many[key]) and one[key].device.type == "cpu" for key in one)
