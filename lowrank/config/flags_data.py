"""Pictures to train on: where they are, captions, augmentation, sizes, masks, class pictures.

`data.dataset.Subset` is `Captions`, `Augmentation` and `Masks` of one folder; `data.dataset.Dataset` is
`Sizes`, `Buckets` and `HoldOut` of several folders. `--dataset_config` reads the same declarations.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.config.flag import SEEDS, ending, option, path, resolution

MAX_SIDE = 16384  # pixels


@dataclass(frozen=True, kw_only=True)
class Data:
    """Pictures"""

    train_data_dir: str | None = path(
        None,
        "parent of training folders named <repeats>_<class>, with captions beside the images",
        essential=True,
    )
    reg_data_dir: str | None = path(
        None, "parent of folders of regularisation images, named <repeats>_<class>"
    )
    dataset_config: str | None = path(None, "TOML or JSON file that describes datasets and their folders")
    in_json: str | None = path(
        None, "JSON file of images and their captions; --train_data_dir is then the folder of the images"
    )
    instance_data_dir: str | None = path(
        None, "folder of training images that all have --instance_prompt as caption"
    )
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
    masked_loss: bool = option(
        False, "count the loss only where the masks of --conditioning_data_dir or --alpha_mask are white"
    )
    center_crop: bool = option(
        False, "crop the middle of an image; this is also the default without --random_crop"
    )
    cache_latents: bool = option(
        False, "encode each image once and keep its latents in memory", metadata=True
    )
    cache_latents_to_disk: bool = option(
        False, "keep cached latents on disk as well as in memory; implies --cache_latents"
    )
    vae_batch_size: int = option(1, "images that the VAE encodes at once", low=1)
    cache_text_encoder_outputs: bool = option(False, "encode each caption once and free the text encoders")
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "keep encoded captions on disk as well; implies --cache_text_encoder_outputs"
    )
    text_encoder_batch_size: int | None = option(
        None, "captions that the text encoders encode at once (unset: --train_batch_size)", low=1
    )
    max_data_loader_n_workers: int = option(
        8,
        "threads that read images ahead, at most one per CPU; 0 reads in the main thread",
        aliases=("--dataloader_num_workers",),
        low=0,
    )


@dataclass(frozen=True, kw_only=True)
class Resizing:
    """How images are resized"""

    resize_interpolation: str | None = option(
        None,
        "filter for resizing images (unset: area to shrink, lanczos to enlarge)",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
        metadata=True,
    )


@dataclass(frozen=True, kw_only=True)
class Augmentation(Resizing):
    """Augmentation"""

    random_crop: bool = option(False, "crop each image at a random place", metadata=True, per_folder=True)
    flip_aug: bool = option(
        False, "mirror every second image", aliases=("--random_flip",), metadata=True, per_folder=True
    )
    color_aug: bool = option(False, "vary hue and gamma of every third image", metadata=True, per_folder=True)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Image sizes"""

    skip_image_resolution: tuple[int, int] | None = option(
        None,
        "leave out images of at most this area, '512' or 'width,height'",
        unit="pixels",
        low=1,
        convert=resolution,
    )
    resolution: tuple[int, int] = option(
        (512, 512),
        "image size, '512' or 'width,height'",
        unit="pixels",
        low=1,
        high=MAX_SIDE,
        convert=resolution,
        resume=True,
        essential=True,
    )


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Aspect-ratio buckets"""

    enable_bucket: bool = option(
        False,
        "keep the aspect ratio: train in sizes of about the area of --resolution",
        metadata=True,
        per_folder=True,
    )
    min_bucket_reso: int = option(
        256,
        "smallest side of a bucket",
        unit="pixels",
        low=1,
        metadata=True,
        per_folder=True,
        acts_with=("enable_bucket or dataset_config", "not bucket_no_upscale"),
    )
    max_bucket_reso: int = option(
        1024,
        "largest side of a bucket",
        unit="pixels",
        low=1,
        metadata=True,
        per_folder=True,
        acts_with=("enable_bucket or dataset_config", "not bucket_no_upscale"),
    )
    bucket_reso_steps: int = option(
        64,
        "the sides of a bucket are multiples of this number",
        unit="pixels",
        low=1,
        acts_with=("enable_bucket or dataset_config",),
    )
    bucket_no_upscale: bool = option(
        False,
        "never enlarge an image; buckets come from the images",
        metadata=True,
        per_folder=True,
        acts_with=("enable_bucket or dataset_config",),
    )


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Captions"""

    caption_extension: str | None = option(
        None,
        "ending of caption files (unset: .caption, and with --instance_data_dir caption files are not "
        "looked for)",
        aliases=("--caption_extention",),
        convert=ending,
        essential=True,
    )
    caption_separator: str = option(
        ",", "text between the tags of a caption", acts_with=("tags that move or secondary_separator",)
    )
    shuffle_caption: bool = option(False, "shuffle the tags of a caption", metadata=True, per_folder=True)
    keep_tokens: int = option(
        0,
        "leading tags that are never shuffled or dropped",
        low=0,
        metadata=True,
        per_folder=True,
        acts_with=("tags that move",),
    )
    keep_tokens_separator: str = option(
        "",
        "tags before this text stay in place, and so do those after its second occurrence",
        acts_with=("tags that move",),
    )
    secondary_separator: str | None = option(None, "tags joined by this text stay together")
    enable_wildcard: bool = option(
        False, "choose one of {a|b} in a caption, and one line of a caption file with several lines"
    )
    caption_prefix: str | None = option(None, "text put before every caption, followed by a space")
    caption_suffix: str | None = option(None, "text put after every caption, preceded by a space")
    caption_dropout_rate: float = option(
        0.0, "share of captions that are emptied", low=0, high=1, metadata=True
    )
    caption_dropout_every_n_epochs: int = option(
        0, "empty all captions of every n-th epoch; 0 is never", low=0, metadata=True
    )
    caption_tag_dropout_rate: float = option(
        0.0, "share of a caption's tags that are dropped", low=0, high=1, metadata=True
    )
    token_warmup_min: int = option(
        1,
        "number of leading tags used at the first step, with --token_warmup_step",
        low=0,
        acts_with=("token_warmup_step or dataset_config",),
    )
    token_warmup_step: float = option(
        0.0, "step from which all tags of a caption are used; a number below 1 is a share of all steps", low=0
    )


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Masks"""

    conditioning_data_dir: str | None = path(
        None,
        "folder of mask images, each named as its training image; their red channel is the mask",
        acts_with=("masked_loss or dataset_config",),
    )
    alpha_mask: bool = option(False, "use the alpha channel of each image as the mask of its loss")


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Images that are held out of training"""

    validation_split: float = option(
        0.0,
        "share of each folder's images that are held out of training, to measure the loss on them",
        low=0,
        below=1,
        metadata=True,
    )
    validation_seed: int | None = option(
        None,
        "seed that chooses the held-out images and their noise (unset: --seed)",
        low=0,
        high=SEEDS,
        metadata=True,
        acts_with=("validation_split or dataset_config",),
    )


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Prior preservation"""

    with_prior_preservation: bool = option(
        False, "train on class images too, so that the class is not forgotten"
    )
    class_data_dir: str | None = path(
        None,
        "folder of class images; missing class images are generated",
        acts_with=("with_prior_preservation",),
    )
    class_prompt: str | None = option(
        None,
        "caption of the class images, and the prompt that generates missing ones",
        acts_with=("with_prior_preservation",),
    )
    num_class_images: int = option(
        100, "number of class images to train on", low=1, acts_with=("with_prior_preservation",)
    )
    prior_generation_precision: str | None = option(
        None,
        "precision in which class images are generated (unset: the precision of training)",
        choices=("no", "fp32", "fp16", "bf16"),
        acts_with=("with_prior_preservation",),
    )
    prior_loss_weight: float = option(
        1.0,
        "weight of the loss of class or regularisation images",
        low=0,
        metadata=True,
        acts_with=("reg_data_dir or with_prior_preservation or dataset_config",),
    )
