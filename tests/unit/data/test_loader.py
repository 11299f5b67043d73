"""Batches: what an epoch holds, and that nothing but (seed, epoch, position) decides it."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest
import torch
from PIL import Image

from lowrank.data.cache import Cache
from lowrank.data.dataset import from_folders, from_instance
from lowrank.data.images import header, read_image
from lowrank.data.loader import Loader
from lowrank.data.summary import bucket_info, dataset_dirs, dataset_summary, metadata_datasets, tag_frequency
from lowrank.errors import Refused


def draw(path, size=(40, 24), seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(
        0, 256, (size[1], size[0], len(mode)), generator=torch.Generator().manual_seed(seed)
    )
    Image.fromarray(noise.byte().numpy()).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for index, size in enumerate([(40, 24), (24, 40), (32, 32), (33, 31), (64, 20)]):
        draw(tmp_path / "img" / "3_sks dog" / f"{index}.png", size, index)
        (tmp_path / "img" / "3_sks dog" / f"{index}.txt").write_text(f"Dog, number {index}, grass")
    for index in range(2):
        draw(tmp_path / "reg" / "1_dog" / f"{index}.png", (32, 32), 10 + index)
    return tmp_path


VARIED = {
    "resolution": 32,
    "batch_size": 2,
    "enable_bucket": True,
    "min_bucket_reso": 16,
    "max_bucket_reso": 64,
    "bucket_reso_steps": 8,
    "caption_extension": ".txt",
    "shuffle_caption": True,
    "caption_dropout_rate": 0.2,
}


def loader(folder, *, seed=1, workers=0, reg=True, **values):
    datasets = from_folders(folder / "img", folder / "reg" if reg else None, **(VARIED | values))
    return Loader(datasets, seed=seed, prior_loss_weight=0.5, workers=workers)


def same(one, two):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(one).values(), vars(two).values(), strict=True)
    )


def average(pixels):
    """A stand-in for the VAE: (B, 3, H, W) to (B, 3, H/8, W/8)."""
    return torch.nn.functional.avg_pool2d(pixels, 8)


def test_an_epoch_holds_every_repeat_once_and_one_bucket_per_batch(folder):
    made = loader(folder, flip_aug=True)
    batches = list(made.epoch(0))
    assert len(batches) == len(made)
    counts = Counter(one.path.name for batch in batches for one in batch.examples if not one.is_reg)
    assert counts == {f"{index}.png": 3 for index in range(5)}
    assert sum(one.is_reg for batch in batches for one in batch.examples) == 15  # as many as training images
    for position, batch in enumerate(batches):
        assert (batch.epoch, batch.position) == (0, position)
        height, width = batch.target_sizes[0].tolist()
        assert batch.pixels.shape == (len(batch.examples), 3, height, width) and len(batch.examples) <= 2
        assert batch.pixels.abs().max() <= 1 and batch.encoded is None and batch.masks is None
        assert batch.loss_weights.tolist() == [0.5 if one.is_reg else 1.0 for one in batch.examples]
        assert batch.original_sizes.tolist() == [list(one.size[::-1]) for one in batch.examples]
        assert batch.crop_top_lefts.shape == (len(batch.examples), 2)


def test_order_changes_with_epoch_and_seed_only(folder):
    def order(made, epoch):
        return [tuple(one.path for one in batch.examples) for batch in made.epoch(epoch)]

    made = loader(folder)
    assert order(made, 0) == order(made, 0) == order(loader(folder, workers=3), 0)
    assert loader(folder, workers=10_000).workers == os.cpu_count()
    assert order(made, 0) != order(made, 1)
    assert order(made, 1) == order(loader(folder, seed=2), 0)  # sd-scripts shuffles with seed + epoch
    flat = [Counter(path for batch in order(made, epoch) for path in batch) for epoch in (0, 1)]
    assert flat[0] == flat[1]


def test_choices_differ_from_batch_to_batch_and_epoch_to_epoch(tmp_path):
    draw(tmp_path / "x.png", (48, 32))
    made = Loader(
        from_instance(tmp_path, "x", repeats=32, resolution=32, flip_aug=True, random_crop=True), seed=0
    )
    first, second = ([batch.pixels for batch in made.epoch(epoch)] for epoch in (0, 1))
    # 17 crops, each both ways round: 34 pictures, of which 32 draws show about 21
    assert len({tuple(pixels.flatten().tolist()) for pixels in first}) > 12
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("cached", [None, "memory", "disk"])
def test_resuming_anywhere_yields_the_same_batches_with_any_worker_count(folder, cached):
    values = {"flip_aug": True, **({} if cached else {"color_aug": True, "random_crop": True})}
    whole = None
    for workers in (0, 1, 4):
        made = loader(folder, workers=workers, **values)
        if cached:
            made = made.encode_all(
                average, model_hash="m", cache=Cache(folder / "c" if cached == "disk" else None)
            )
        torch.manual_seed(workers)  # global streams must not matter
        batches = list(made.epoch(2))
        whole = whole or batches
        assert all(same(one, two) for one, two in zip(whole, batches, strict=True))
        for start in (1, 5, len(made)):
            rest = list(made.epoch(2, start))
            assert len(rest) == len(made) - start
            assert all(same(one, two) for one, two in zip(whole[start:], rest, strict=True))
    assert len({text for batch in whole for text in batch.captions}) > 5


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_share_the_batches_and_wrap_around(folder, world):
    made = loader(folder)
    whole = list(made.epoch(1))
    parts = [list(made.shard(rank, world).epoch(1)) for rank in range(world)]
    assert {len(part) for part in parts} == {-(-len(whole) // world)} == {len(made.shard(0, world))}
    for turn in range(len(parts[0])):
        for rank in range(world):
            assert same(parts[rank][turn], whole[(turn * world + rank) % len(whole)])
    assert same(next(made.shard(world - 1, world).epoch(1, 2)), parts[-1][2])


def test_cached_batches_equal_encoded_pixels_also_flipped(folder):
    made = loader(folder, flip_aug=True)
    calls = []

    def encode(pixels):
        calls.append(len(pixels))
        return average(pixels)

    cached = made.encode_all(encode, model_hash="m", cache=Cache(), batch_size=3)
    assert sum(calls) == 14 and max(calls) <= 3  # 7 images, both ways round
    flipped = set()
    for one, two in zip(made.epoch(0), cached.epoch(0), strict=True):
        assert two.pixels is None and one.captions == two.captions
        assert torch.allclose(average(one.pixels), two.encoded, atol=1e-6)
        straight = torch.stack(
            [
                next(
                    b.pixels[b.examples.index(example)]
                    for b in loader(folder).epoch(0)
                    if example in b.examples
                )
                for example in one.examples
            ]
        )
        flipped |= set((one.pixels != straight).flatten(1).any(1).tolist())
    assert flipped == {True, False}


def test_the_disk_cache_notices_a_changed_image_model_or_size(folder):
    cache, calls = Cache(folder / "cache"), []

    def count(**values):
        calls.clear()
        model = values.pop("model", "m")
        made = loader(folder, reg=False, **values)
        made.encode_all(
            lambda pixels: calls.append(len(pixels)) or average(pixels), model_hash=model, cache=cache
        )
        return sum(calls)

    assert count() == 5
    assert count() == 0
    assert count(model="other") == 5
    draw(folder / "img" / "3_sks dog" / "0.png", (40, 24), seed=99)
    assert count() == 1
    assert count(enable_bucket=False) == 3  # the two square ones come out the same either way
    assert count(flip_aug=True) == 5
    for file in (folder / "cache").iterdir():
        file.write_bytes(b"broken")
    assert count() == 5
    assert count() == 0


def test_processes_share_the_encoding(folder):
    cache, waits = Cache(folder / "cache"), []
    calls = {0: 0, 1: 0}

    def run(rank, wait):
        def encode(pixels):
            calls[rank] += len(pixels)
            return average(pixels)

        return loader(folder).shard(rank, 2).encode_all(encode, model_hash="m", cache=cache, wait=wait)

    class Barrier(Exception):
        pass

    def leave():
        waits.append(0)
        raise Barrier

    with pytest.raises(Barrier):
        run(0, leave)
    assert calls == {0: 4, 1: 0}
    second = run(1, lambda: waits.append(1))
    assert calls == {0: 4, 1: 3} and waits == [0, 1]
    assert next(second.epoch(0)).encoded is not None


def test_a_broken_body_is_refused_or_left_out(folder, caplog):
    path = folder / "img" / "3_sks dog" / "2.png"
    path.write_bytes(path.read_bytes()[:-400])
    datasets = from_folders(folder / "img", folder / "reg", **VARIED)
    strict = Loader(datasets, seed=0)
    for attempt in (
        lambda: list(strict.epoch(0)),
        strict.decodable,
        lambda: strict.encode_all(average, model_hash="m", cache=Cache()),
    ):
        with pytest.raises(Refused, match=r"2\.png cannot be read .*--skip_bad_images"):
            attempt()
    loose = Loader(datasets, seed=0, skip_bad_images=True)
    for made in (loose.decodable(), loose.encode_all(average, model_hash="m", cache=Cache())):
        assert "skipped: image" in caplog.text
        names = {one.path.name for batch in made.epoch(0) for one in batch.examples if not one.is_reg}
        assert names == {"0.png", "1.png", "3.png", "4.png"}
        assert dataset_summary(made)["num_train_images"] == 12 == dataset_summary(made)["num_reg_images"]
    for path in (folder / "img" / "3_sks dog").glob("*.png"):
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(Refused, match="no training image is left"):
        loose.decodable()


def test_a_vae_that_gives_nan_names_the_image(folder):
    def encode(pixels):
        latents = average(pixels)
        latents[-1, 0, 0, 0] = float("nan")
        return latents

    with pytest.raises(Refused, match=r"NaN or infinity for image .*\.png.*--no_half_vae"):
        loader(folder).encode_all(encode, model_hash="m", cache=Cache())


@pytest.mark.parametrize("option", ["color_aug", "random_crop"])
def test_what_changes_pixels_cannot_be_cached(folder, option):
    with pytest.raises(Refused, match=f"--{option} or --cache_latents"):
        loader(folder, **{option: True}).encode_all(average, model_hash="m", cache=Cache())


def test_alpha_masks(tmp_path):
    draw(tmp_path / "a" / "x.png", (32, 32), mode="RGBA"), draw(tmp_path / "a" / "y.png", (32, 32))
    (dataset,) = from_instance(
        tmp_path / "a", "x", resolution=32, batch_size=2, alpha_mask=True, flip_aug=True
    )
    made = Loader([dataset], seed=0)
    (batch,) = made.epoch(0)
    assert batch.masks.shape == (2, 1, 32, 32)
    plain = [example.path.name for example in batch.examples].index("y.png")
    assert torch.equal(batch.masks[plain], torch.ones(1, 32, 32)) and 0 < batch.masks[1 - plain].mean() < 1
    (cached,) = made.encode_all(average, model_hash="m", cache=Cache()).epoch(0)
    assert cached.masks.shape == (2, 1, 4, 4)
    assert torch.allclose(cached.masks, torch.nn.functional.avg_pool2d(batch.masks, 8), atol=1e-6)


def test_mask_files_go_with_the_image_into_the_cache_flipped_and_cropped(folder):
    """A mask that is the image itself, in grey, must follow it through bucket, crop, flip and cache."""
    for path in (folder / "img" / "3_sks dog").glob("*.png"):
        mask = folder / "masks" / "3_sks dog" / path.name
        mask.parent.mkdir(parents=True, exist_ok=True)
        read_image(path).getchannel("R").save(mask)
    values = {"flip_aug": True, "conditioning_data_dir": folder / "masks"}
    made = loader(folder, **values)
    assert [one.mask is None for one in made.examples[0]] == [False] * 5 + [True] * 2  # not the class images
    cached = made.encode_all(average, model_hash="m", cache=Cache())
    for one, two in zip(made.epoch(0), cached.epoch(0), strict=True):
        if one.masks is None:
            assert all(example.is_reg for example in one.examples) and two.masks is None
            continue
        red = (one.pixels[:, :1] + 1) / 2
        expected = torch.stack(
            [torch.ones_like(r) if e.is_reg else r for r, e in zip(red, one.examples, strict=True)]
        )
        assert torch.allclose(one.masks, expected, atol=1e-6)
        assert two.masks.shape == (len(two.examples), 1, *two.encoded.shape[-2:])
        assert torch.allclose(two.masks, torch.nn.functional.avg_pool2d(expected, 8), atol=1e-6)


def test_a_changed_mask_is_noticed(folder):
    cache, calls = Cache(folder / "cache"), []
    for path in (folder / "img" / "3_sks dog").glob("*.png"):
        draw(folder / "masks" / path.name, header(path).size)

    def count():
        calls.clear()
        made = loader(folder, reg=False, conditioning_data_dir=folder / "masks")
        made.encode_all(
            lambda pixels: calls.append(len(pixels)) or average(pixels), model_hash="m", cache=cache
        )
        return sum(calls)

    assert (count(), count()) == (5, 0)
    draw(folder / "masks" / "1.png", (24, 40), seed=5)
    assert (count(), count()) == (1, 0)


def test_held_out_images_are_not_trained_on_and_never_vary(folder):
    values = {"flip_aug": True, "color_aug": True, "random_crop": True, "token_warmup_step": 4}
    made = loader(folder, validation_split=0.4, validation_seed=7, **values)
    held = made.held_out()
    trained = {one.path for batch in made.epoch(0) for one in batch.examples if not one.is_reg}
    kept = {one.path for batch in held.epoch(0) for one in batch.examples}
    assert (len(trained), len(kept)) == (3, 2) and not trained & kept
    assert dataset_summary(made)["num_train_images"] == 9 == dataset_summary(made)["num_reg_images"]
    assert dataset_summary(held)["num_train_images"] == 2 and dataset_summary(held)["num_reg_images"] == 0
    assert all(same(one, two) for one, two in zip(held.epoch(0), held.epoch(0), strict=True))
    assert all(
        text.count(",") == 2 for batch in held.epoch(0) for text in batch.captions
    )  # not dropped, whole
    elsewhere = loader(folder, validation_split=0.4, validation_seed=7, workers=3).shard(1, 2).held_out()
    assert all(same(one, two) for one, two in zip(held.epoch(0), elsewhere.epoch(0), strict=True))
    plain = loader(folder, seed=8, validation_split=0.4, validation_seed=7, reg=False).held_out()
    assert {one.example.path for one in plain.placed} == kept  # by validation_seed, not by the run's
    assert held.encode_all(average, model_hash="m", cache=Cache()).encoded and held.held_out() is None
    assert loader(folder).held_out() is None


def test_several_datasets_are_concatenated_not_mixed(folder):
    (small,) = from_folders(folder / "img", **VARIED)
    (large,) = from_folders(
        folder / "img", **(VARIED | {"resolution": 64, "enable_bucket": False, "batch_size": 4})
    )
    made = Loader([small, large], seed=0)
    batches = list(made.epoch(0))
    assert len(made) == len(Loader([small], seed=0)) + 4
    assert sum(batch.pixels.shape[-1] == 64 == batch.pixels.shape[-2] for batch in batches) == 4


def test_captions_that_can_be_cached(folder):
    assert loader(folder).captions() is None
    assert loader(folder, reg=False, shuffle_caption=False).captions() == (
        "",
        *(f"Dog, number {index}, grass" for index in range(5)),
    )
    made = loader(folder, shuffle_caption=False)
    assert {text for batch in made.epoch(0) for text in batch.captions} <= set(made.captions())


def test_warm_up_counts_steps_over_epochs(folder):
    made = loader(folder, reg=False, shuffle_caption=False, caption_dropout_rate=0, token_warmup_step=0.5)

    def lengths(epoch, **keywords):
        return [len(text.split(", ")) for batch in made.epoch(epoch, **keywords) for text in batch.captions]

    assert set(lengths(0, max_train_steps=10 * len(made))) == {1}
    assert set(lengths(9, max_train_steps=10 * len(made))) == {3}
    assert set(lengths(9, max_train_steps=10 * len(made), batches_per_step=9)) == {1}


def test_sides_must_fit_the_model(folder):
    with pytest.raises(Refused, match="multiples of 16; give a --bucket_reso_steps"):
        Loader(from_folders(folder / "img", **VARIED), seed=0, multiple=16)
    with pytest.raises(Refused, match=r"30x30 .* multiples of 16; give a --resolution"):
        Loader(from_folders(folder / "img", resolution=30), seed=0, multiple=16)


def test_more_regularisation_than_training_images_is_said(folder, caplog):
    draw(folder / "few" / "1_x" / "a.png")
    Loader(from_folders(folder / "few", folder / "reg", resolution=32), seed=0)
    assert "1 of 2 are not used" in caplog.text


def test_strong_crops_are_said(tmp_path, caplog):
    draw(tmp_path / "a.png", (8, 200))
    made = Loader(from_instance(tmp_path, "x", resolution=32), seed=0)
    assert "a.png, 8x200 into bucket 32x32; give --enable_bucket to keep more" in caplog.text
    assert next(made.epoch(0)).pixels.shape == (1, 3, 32, 32)


def test_metadata(folder):
    made = loader(folder)
    assert tag_frequency(made) == {
        "3_sks dog": {"dog": 5, "grass": 5, **{f"number {index}": 1 for index in range(5)}},
        "1_dog": {"dog": 2},
    }
    assert dataset_dirs(made) == {"3_sks dog": {"n_repeats": 3, "img_count": 5}}
    assert dataset_dirs(made, reg=True) == {"1_dog": {"n_repeats": 1, "img_count": 2}}
    info = bucket_info(made)
    assert sum(bucket["count"] for bucket in info["buckets"].values()) == 30
    assert info["buckets"]["0"]["resolution"] == [24, 40] and info["mean_img_ar_error"] > 0
    assert bucket_info(Loader(from_folders(folder / "img", resolution=32), seed=0)) is None
    (described,) = json.loads(json.dumps(metadata_datasets(made)))
    assert (described["num_train_images"], described["num_reg_images"], described["resolution"]) == (
        15,
        15,
        [32, 32],
    )
    assert [
        (one["image_dir"], one["img_count"], one["is_reg"], one["class_tokens"])
        for one in described["subsets"]
    ] == [("3_sks dog", 5, False, "sks dog"), ("1_dog", 2, True, "dog")]
    twice = Loader([*made.datasets, *made.datasets], seed=0)
    assert tag_frequency(twice) == tag_frequency(made)  # once, as in sd-scripts
    assert list(dataset_dirs(twice)) == ["3_sks dog", "3_sks dog (2)"]
    counts = json.loads(json.dumps(dataset_summary(made)))
    assert counts["batches_per_epoch"] == len(made) and sum(counts["datasets"][0]["buckets"].values()) == 30


def test_image_that_changes_during_a_run_is_noticed(tmp_path):
    """Without cached latents images are read each epoch: a touched file is fine, another is refused."""
    path = tmp_path / "1_cat" / "a.png"
    path.parent.mkdir()
    Image.new("RGB", (64, 64), (1, 2, 3)).save(path)
    loader = Loader(from_folders(tmp_path, resolution=64, color_aug=True), seed=0, workers=0).decodable()
    next(loader.epoch(0))
    os.utime(path, (5, 5))
    next(loader.epoch(1))
    Image.new("RGB", (64, 64), (3, 2, 1)).save(path)
    with pytest.raises(Refused, match=r"a\.png has changed since the run began"):
        next(loader.epoch(2))
