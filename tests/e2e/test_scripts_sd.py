"""The scripts after training on the tiny SD 1.5 and SDXL: draw, merge, compare, export."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sd_run import arguments, folders  # noqa: F401 (fixtures)

from lowrank.cli.merge import main as merge
from lowrank.cli.sd_train import main as sd
from lowrank.cli.sd_train import main_sdxl as sdxl
from lowrank.cli.similarity import main as similarity
from lowrank.errors import Refused
from lowrank.formats.read import read_adapter
from lowrank.formats.verify import difference
from lowrank.formats.write import write
from lowrank.formats.writers import Choices

pytestmark = pytest.mark.slow  # whole runs

STEPS = 2


def pixels(path: Path):
    return numpy.asarray(Image.open(path)).astype(int)


def stock(kind: str, folder: Path):
    import diffusers

    made = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[kind]
    pipe = made.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, **more):
    given = {"negative_prompt": "blurry", "guidance_scale": 5.0, "height": 64, "width": 64}
    generator = torch.Generator().manual_seed(3)
    picture = pipe("a <c> dog", num_inference_steps=STEPS, generator=generator, **given, **more).images[0]
    return numpy.asarray(picture).astype(int)


@pytest.fixture
def adapters(arguments, tmp_path, request):
    """A function (family, method, flags) that trains a style and a content adapter of one base."""

    def train(kind: str, method: str, *more: str) -> tuple[Path, Path, Path]:
        model = request.getfixturevalue(f"tiny_{kind}")
        main = {"sd": sd, "sdxl": sdxl}[kind]
        more = (*more, "--network_module", f"networks.{method}", "--max_train_steps", "2")
        for seed, name in enumerate(("style", "content")):
            rate = ("--seed", str(seed), "--learning_rate", "0.05")
            assert main(arguments(name, *more, *rate, model=model)) == 0
        return model, tmp_path / "style" / "cat.safetensors", tmp_path / "content" / "cat.safetensors"

    return train


def line(model: Path, style: Path, content: Path, out: Path, *more: str) -> list[str]:
    given = {
        "model_path": model,
        "style_lora_path": style,
        "content_lora_path": content,
        "prompt": "a <c> dog",
        "negative_prompt": "blurry",
        "guidance_scale": 5.0,
        "num_inference_steps": STEPS,
        "style_weights": "0.0,1.0",
        "content_weights": "0.0,1.0",
        "height": 64,
        "width": 64,
        "seed": 3,
        "output_dir": out,
    }
    return [w for k, v in given.items() if f"--{k}" not in more for w in (f"--{k}", str(v))] + list(more)


@pytest.mark.parametrize(("kind", "method"), [("sd", "delta_r_triu"), ("sdxl", "lora")])
def test_grid_and_merged_files(kind, method, adapters, tmp_path):
    """No strength is the stock pipeline's picture; the saved merge draws what the live one draws."""
    own = () if method == "lora" else ("--network_train_unet_only",)
    model, style, content = adapters(kind, method, *own)
    out = tmp_path / "out"
    assert merge(line(model, style, content, out, "--save_merged")) == 0
    cells = {
        (a, b): pixels(out / f"inference_s{a}_c{b}.png") for a in ("0.00", "1.00") for b in ("0.00", "1.00")
    }
    assert len({cell.tobytes() for cell in cells.values()}) == 4 and (out / "sheet.png").is_file()
    told = Image.open(out / "inference_s1.00_c0.00.png").text["parameters"]
    assert "Negative prompt: blurry" in told and "CFG scale: 5" in told and "Sampler: ddim" in told
    pipe = stock(kind, model)
    assert numpy.abs(drawn(pipe) - cells["0.00", "0.00"]).max() <= 1

    merged = out / "merged_s1.00_c1.00.safetensors"
    state = load_file(merged)
    assert all(key.startswith("lora_") for key in state)
    if method == "lora":  # what other programs load
        pipe.load_lora_weights(str(out), weight_name=merged.name)
        assert numpy.abs(drawn(pipe) - cells["1.00", "1.00"]).max() <= 1
    again = tmp_path / "again"
    strengths = ("--style_weights", "1.0", "--content_weights", "0.0")
    assert merge(line(model, merged, merged, again, *strengths)) == 0
    live = cells["1.00", "1.00"]
    assert numpy.abs(live - pixels(again / "inference_s1.00_c0.00.png")).max() <= 1


def test_rules_that_depend_on_the_model(adapters, tmp_path, capsys):
    """K-LoRA follows the steps, ZipLoRA learns on the model, and its file draws what was drawn."""
    model, style, content = adapters("sd", "lora")
    grid = ("--style_weights", "1.0", "--content_weights", "1.0")
    prompts = ("--style_prompt", "a cat in <s> style", "--content_prompt", "a <c> dog")
    given = {
        "sum": (),
        "klora": ("--merge", "klora"),
        "ziplora": ("--merge", "ziplora", "--merge_steps", "3", *prompts, "--save_merged"),
    }
    drawn_by = {}
    for rule, flags in given.items():
        assert merge(line(model, style, content, tmp_path / rule, *grid, *flags)) == 0
        picture = tmp_path / rule / "inference_s1.00_c1.00.png"
        drawn_by[rule] = pixels(picture)
        assert (f"Merge: {rule}" in Image.open(picture).text["parameters"]) == (rule != "sum")
    assert len({cell.tobytes() for cell in drawn_by.values()}) == 3
    assert "ziplora: 3 steps, loss" in capsys.readouterr().out
    saved = tmp_path / "ziplora" / "merged_s1.00_c1.00.safetensors"
    half = ("--style_weights", "1.0", "--content_weights", "0.0")
    assert merge(line(model, saved, saved, tmp_path / "again", *half)) == 0
    again = pixels(tmp_path / "again" / "inference_s1.00_c0.00.png")
    assert numpy.abs(drawn_by["ziplora"] - again).max() <= 1
    with pytest.raises(Refused, match="chooses an adapter at each step"):
        merge(line(model, style, content, tmp_path / "k", *grid, "--merge", "klora", "--save_merged"))


def test_blora_takes_one_block_of_each_file(adapters, tmp_path):
    model, style, content = adapters("sdxl", "lora", "--network_train_unet_only")
    grid = ("--style_weights", "1.0", "--content_weights", "1.0", "--merge", "blora")
    assert merge(line(model, style, content, tmp_path / "out", *grid, "--save_merged", "--skip_images")) == 0
    made = read_adapter(tmp_path / "out" / "merged_s1.00_c1.00.safetensors", "sdxl")
    assert {place.path[:24] for place in made.layers} == {
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    }
    for number, source in (("0", content), ("1", style)):
        alone = read_adapter(source, "sdxl")
        for place, layer in made.layers.items():
            if place.path.startswith(f"up_blocks.0.attentions.{number}."):
                assert torch.allclose(layer.delta(), alone.layers[place].delta(), atol=1e-7)


def test_extra_adapters_and_layer_strengths(adapters, tmp_path):
    """DoRA runs live beside the sum; a further file at −0.5 takes as much of itself away again."""
    model, style, content = adapters("sd", "lora")
    one = ("--style_weights", "1.0", "--content_weights", "0.5")
    more = ("--more_loras", f"{content}=-0.5", "--style_blocks", "lora_te_ -> 0; up_blocks -> 0.5")
    alone = ("--style_weights", "1.0", "--content_weights", "0.0", "--style_blocks", more[-1])
    for folder, given in (("plain", one), ("blocks", (*one, *more)), ("alone", alone)):
        assert merge(line(model, style, content, tmp_path / folder, *given)) == 0
    plain, blocks = (
        pixels(tmp_path / folder / "inference_s1.00_c0.50.png") for folder in ("plain", "blocks")
    )
    assert numpy.abs(blocks - pixels(tmp_path / "alone" / "inference_s1.00_c0.00.png")).max() <= 1
    assert numpy.abs(blocks - plain).max() > 1
    lora = content.rename(tmp_path / "lora.safetensors")
    model, dora, _ = adapters("sd", "dora")
    live = ("--style_weights", "0.0,1.0", "--content_weights", "0.0")
    assert merge(line(model, dora, lora, tmp_path / "live", *live)) == 0
    cells = [pixels(tmp_path / "live" / f"inference_s{a}_c0.00.png") for a in ("0.00", "1.00")]
    assert numpy.abs(cells[0] - cells[1]).max() > 1
    assert numpy.abs(drawn(stock("sd", model)) - cells[0]).max() <= 1
    with pytest.raises(Refused, match="draw without --save_merged"):
        merge(line(model, dora, lora, tmp_path / "saved", "--save_merged", "--skip_images"))


def test_single_file_base_and_flux_only_flags(adapters, tmp_path, caplog):
    model, style, content = adapters("sd", "lora", "--network_train_unet_only")
    given = line(model, style, content, tmp_path / "folder", "--sample_sampler", "pndm")
    for flag, said in (
        ("--max_sequence_length=77", "is not for sd"),
        ("--height=68", "is not a multiple of 8"),
        ("--num_inference_steps=1001", "is above 1000"),
    ):
        with pytest.raises(Refused, match=said):
            merge([*given, flag])
    assert merge(given) == 0
    file = model / "single" / "model.safetensors"
    more = ("--tokenizer_cache_dir", str(model / "single" / "tokenizers"), "--sample_sampler", "pndm")
    assert merge(line(file, style, content, tmp_path / "file", *more)) == 0
    assert "is used all the same" in caplog.text
    name = "inference_s1.00_c1.00.png"
    assert numpy.abs(pixels(tmp_path / "folder" / name) - pixels(tmp_path / "file" / name)).max() <= 1


@pytest.mark.parametrize("method", ["qrlora"])
def test_compare_and_export_sd_adapters(method, adapters, tmp_path, tiny_sd):
    _, style, content = adapters("sd", method, "--network_train_unet_only")
    paths = ("--lora1_path", str(style), "--lora2_path", str(content))
    assert similarity([*paths, "--output_dir", str(tmp_path / "same")]) == 0
    assert "deltaW" in (tmp_path / "same" / "summary_statistics.txt").read_text()
    plain = tmp_path / "plain.safetensors"
    write(read_adapter(style), "kohya", plain, Choices())
    state = load_file(plain)
    assert difference(read_adapter(style), read_adapter(plain)) < 1e-6
    convolution = "lora_unet_down_blocks_0_attentions_0_proj_in"
    assert state[f"{convolution}.lora_down.weight"].shape[2:] == (1, 1)
    pipe = stock("sd", tiny_sd)
    before = drawn(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=plain.name)
    assert numpy.abs(drawn(pipe) - before).max() > 0
