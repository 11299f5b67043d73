"""What is trained on: pictures, buckets, captions, class images."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.config.flag import option, path, resolution


@dataclass(frozen=True)
class Data:
    """Pictures"""

    train_data_dir: str | None = path(
        None, "parent of folders named <repeats>_<class>, captions beside the images"
    )
    reg_data_dir: str | None = path(None, "as --train_data_dir, for regularisation images")
    dataset_config: str | None = path(None, "TOML or JSON file that describes datasets and their folders")
    in_json: str | None = path(
        None, "JSON file of images and their captions; --train_data_dir is then the folder they are in"
    )
    instance_data_dir: str | None = path(None, "plain folder of images that all have --instance_prompt")
    instance_prompt: str | None = option(None, "caption of the images in --instance_data_dir")
    dataset_repeats: int = option(
        1,
        "how often an epoch shows each image of --instance_data_dir or --in_json",
        aliases=("--repeats",),
        low=1,
        high=10**6,
    )
    skip_bad_images: bool = option(
        False, "leave out images that cannot be read, and list them, instead of stopping"
    )
    skip_image_resolution: tuple[int, int] | None = option(
        None,
        "leave out images of at most this area, '512' or 'width,height'",
        unit="pixels",
        low=1,
        convert=resolution,
    )
    resolution: tuple[int, int] | None = option(
        None, "image size, '512' or 'width,height'", unit="pixels", low=1, convert=resolution
    )
    center_crop: bool = option(False, "crop the middle, which is the rule without --random_crop")
    random_crop: bool = option(False, "crop anywhere")
    flip_aug: bool = option(False, "mirror every second image", aliases=("--random_flip",))
    color_aug: bool = option(False, "vary hue and gamma of every third image")
    resize_interpolation: str | None = option(
        None,
        "filter for resizing (unset: area to shrink, lanczos to enlarge)",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    )
    cache_latents: bool = option(False, "encode each image once and keep its latents in memory")
    cache_latents_to_disk: bool = option(False, "keep the latents on disk too; implies --cache_latents")
    vae_batch_size: int = option(1, "images encoded at once", low=1)
    cache_text_encoder_outputs: bool = option(False, "encode each caption once and free the text encoders")
    cache_text_encoder_outputs_to_disk: bool = option(False, "keep them on disk too; implies the flag before")
    text_encoder_batch_size: int | None = option(
        None, "captions encoded at once (unset: --train_batch_size)", low=1
    )
    max_data_loader_n_workers: int = option(
        8,
        "threads that read images ahead, at most one per CPU; 0 reads in the main one",
        aliases=("--dataloader_num_workers",),
        low=0,
    )


@dataclass(frozen=True)
class Buckets:
    """Aspect-ratio buckets"""

    enable_bucket: bool = option(
        False, "keep the aspect ratio: train in sizes of about the area of --resolution"
    )
    min_bucket_reso: int = option(256, "least side of a bucket", unit="pixels", low=1)
    max_bucket_reso: int = option(1024, "largest side of a bucket", unit="pixels", low=1)
    bucket_reso_steps: int = option(64, "a side is a multiple of this", unit="pixels", low=1)
    bucket_no_upscale: bool = option(False, "never enlarge an image; buckets come from the images")


@dataclass(frozen=True)
class Captions:
    """Captions"""

    caption_extension: str | None = option(
        None,
        "ending of caption files (unset: .caption, and with --instance_data_dir caption files are not "
        "looked for)",
        aliases=("--caption_extention",),
    )
    caption_separator: str = option(",", "text between tags")
    shuffle_caption: bool = option(False, "shuffle the tags of a caption")
    keep_tokens: int = option(0, "leading tags that are never shuffled or dropped", low=0)
    keep_tokens_separator: str = option(
        "", "tags before this text stay in place, and those after a second one"
    )
    secondary_separator: str | None = option(None, "tags joined by this text stay together")
    enable_wildcard: bool = option(False, "choose from {a|b}, and one line of a caption file with several")
    caption_prefix: str | None = option(None, "put before every caption, with a blank")
    caption_suffix: str | None = option(None, "put after every caption, with a blank")
    caption_dropout_rate: float = option(0.0, "share of captions that are emptied", low=0, high=1)
    caption_dropout_every_n_epochs: int = option(
        0, "empty all captions of every n-th epoch; 0 is never", low=0
    )
    caption_tag_dropout_rate: float = option(0.0, "share of tags that are dropped", low=0, high=1)
    token_warmup_min: int = option(1, "tags used at the first step, with --token_warmup_step", low=0)
    token_warmup_step: float = option(
        0.0, "step at which all tags are used; below 1 a share of all steps", low=0
    )


@dataclass(frozen=True)
class Masks:
    """Masks"""

    masked_loss: bool = option(False, "count the loss where the masks of --conditioning_data_dir are white")
    conditioning_data_dir: str | None = path(
        None, "folder of mask images, each named as its image; their red channel is the mask"
    )
    alpha_mask: bool = option(False, "take the images' alpha channel as a mask of the loss")


@dataclass(frozen=True)
class Prior:
    """Prior preservation"""

    with_prior_preservation: bool = option(
        False, "train on class images too, so that the class is not forgotten"
    )
    class_data_dir: str | None = path(None, "folder of class images; missing ones are generated")
    class_prompt: str | None = option(None, "caption of the class images, and what generates them")
    num_class_images: int = option(100, "class images there shall be", low=1)
    prior_generation_precision: str | None = option(
        None, "precision of that generation (unset: that of training)", choices=("no", "fp32", "fp16", "bf16")
    )
    prior_loss_weight: float = option(1.0, "weight of the loss of class or regularisation images", low=0)
