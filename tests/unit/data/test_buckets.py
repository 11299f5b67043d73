"""Buckets are sd-scripts' buckets: its numbers, and what must hold for any image."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.data.buckets import bucket_sizes, crop_box, own_place
from lowrank.data.dataset import Dataset
from lowrank.data.plan import crop_top_left, place_image
from lowrank.errors import Refused

sides = st.integers(1, 6000)
sizes = st.tuples(sides, sides)


def dataset(**values):
    return Dataset(
        (), **({"resolution": (1024, 1024), "enable_bucket": True, "max_bucket_reso": 2048} | values)
    )


def test_buckets_of_1024_by_64_are_the_known_41():
    found = bucket_sizes((1024, 1024), 256, 2048, 64)
    assert len(found) == 41 and list(found) == sorted(found)
    assert {
        (1024, 1024),
        (832, 1216),
        (1216, 832),
        (512, 2048),
        (2048, 512),
        (768, 1344),
        (1536, 640),
    } <= set(found)
    # width 256 … 448 are cut at 2048, not at the area: the side limit is checked apart from the area
    assert (256, 2048) in found and (448, 2048) in found


def test_known_place_of_a_3_to_2_photo():
    assert place_image((3000, 2000), dataset()) == ((1216, 832), (1248, 832))


def test_limits_are_rounded_to_the_step():
    assert bucket_sizes((512, 512), 250, 1000, 64) == bucket_sizes((512, 512), 192, 1024, 64)


def test_an_exact_bucket_is_taken_even_if_another_has_its_aspect():
    found = bucket_sizes((1024, 1024), 256, 2048, 64)
    for bucket in found:
        assert place_image(bucket, dataset()) == (bucket, bucket)


def test_without_bucketing_the_image_covers_the_resolution():
    plain = Dataset((), resolution=(512, 384))
    assert place_image((100, 100), plain) == ((512, 384), (512, 512))
    assert place_image((4000, 1000), plain) == ((512, 384), (1536, 384))


def test_no_upscale_keeps_small_images_and_shrinks_large_ones():
    small = dataset(bucket_no_upscale=True)
    assert place_image((700, 500), small) == ((640, 448), (700, 500))
    bucket, resized = place_image((3000, 2000), small)
    # 1254 x 836 for that area; in steps 1216 x 768 (aspect 1.583) by width, 1216 x 832 (1.4615) by height:
    # the second is nearer to 1.5
    assert resized == (1248, 832) and bucket == (1216, 832)


@settings(max_examples=300, deadline=None)
@given(
    sizes,
    st.sampled_from([(512, 512), (1024, 1024), (768, 512), (640, 1100)]),
    st.sampled_from([8, 32, 64]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
def test_every_image_has_one_place_that_keeps_the_laws(size, resolution, step, bucketed, no_upscale, seed):
    given_dataset = Dataset(
        (),
        resolution=resolution,
        enable_bucket=bucketed,
        bucket_reso_steps=step,
        bucket_no_upscale=no_upscale,
        max_bucket_reso=1536,
    )
    try:
        where = place_image(size, given_dataset)
    except Refused:
        assert bucketed and no_upscale
        width, height = size
        scale = min(1, (resolution[0] * resolution[1] / (width * height)) ** 0.5)
        assert min(width, height) * scale < 2 * step  # only what is thinner than about one step is refused
        return
    assert where == place_image(size, given_dataset)
    (width, height), (whole_width, whole_height) = where
    assert whole_width >= width > 0 and whole_height >= height > 0
    area = resolution[0] * resolution[1]
    if bucketed:
        assert width % step == 0 and height % step == 0
        slack = width + height if no_upscale else 0  # sides are rounded before
        assert width * height <= area + slack
    if bucketed and not no_upscale:
        assert where.bucket in bucket_sizes(resolution, 256, 1536, step)
    if bucketed and no_upscale:
        assert whole_width <= size[0] + 1 and whole_height <= size[1] + 1
    for box in (crop_box(where), crop_box(where, random.Random(seed))):
        left, top, right, bottom = box
        assert 0 <= left < right <= whole_width and 0 <= top < bottom <= whole_height
        assert (right - left, bottom - top) == where.bucket


@settings(max_examples=200, deadline=None)
@given(sizes)
def test_the_chosen_bucket_has_the_nearest_aspect(size):
    found = bucket_sizes((1024, 1024), 256, 2048, 64)
    chosen = place_image(size, dataset()).bucket
    error = [abs(w / h - size[0] / size[1]) for w, h in found]
    assert size in found or abs(chosen[0] / chosen[1] - size[0] / size[1]) == min(error)


def test_a_sliver_is_refused_only_where_enlarging_is_forbidden():
    with pytest.raises(Refused, match=r"1x5000.*64.*bucket_no_upscale"):
        own_place((1, 5000), 1024 * 1024, 64)
    assert place_image((1, 5000), dataset()).bucket == (256, 2048)


def test_sdxl_crop_is_half_the_gap_to_the_contained_image():
    assert crop_top_left((1000, 1000), (1216, 832)) == (0, 192)
    assert crop_top_left((3000, 1000), (1216, 832)) == (213, 0)
    assert crop_top_left((1000, 1000), (1024, 1024)) == (0, 0)
    # gap 1216 - 832·1.25 = 176, half 88 on both sides
    assert (
        crop_top_left((1250, 1000), (1216, 832), flipped=True)
        == crop_top_left((1250, 1000), (1216, 832))
        == (0, 88)
    )
    # gap 63 splits 31 / 32
    assert crop_top_left((961, 1024), (1024, 1024)) == (0, 31)
    assert crop_top_left((961, 1024), (1024, 1024), flipped=True) == (0, 32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resolution": (128, 128)}, "min_bucket_reso 256 .* --min_bucket_reso 128"),
        ({"resolution": (4096, 512)}, "max_bucket_reso 2048 .* --max_bucket_reso 4096"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"bucket_reso_steps": 0}, "bucket_reso_steps 0"),
        ({"resize_interpolation": "lanzcos"}, "did you mean 'lanczos'"),
        ({"resolution": (32, 32), "min_bucket_reso": 1}, "bucket_reso_steps 64"),
        ({"resolution": (32, 32), "bucket_no_upscale": True}, "bucket_reso_steps 64"),
    ],
)
def test_impossible_buckets_are_refused(values, message):
    with pytest.raises(Refused, match=message):
        dataset(**values)
