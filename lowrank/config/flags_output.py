"""What a run leaves: adapter files, uploads, pictures, held-out losses, logs."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.config.flag import file_name, option, path
from lowrank.config.flags_training import SEEDS


@dataclass(frozen=True)
class Saving:
    """Saving"""

    output_dir: str | None = path(None, "folder for everything that is written")
    output_name: str | None = option(None, "name of the adapter files, without ending", convert=file_name)
    save_model_as: str = option("safetensors", "file format", choices=("safetensors", "ckpt", "pt"))
    save_precision: str | None = option(
        None, "precision of adapter files (unset: that of training)", choices=("float", "fp16", "bf16")
    )
    upcast_before_saving: bool = option(False, "the same as --save_precision float")
    checkpointing_steps: int | None = option(
        None, "every n steps a folder checkpoint-N with the adapter and all that --resume needs", low=1
    )
    checkpoints_total_limit: int | None = option(
        None, "delete the oldest of these folders beyond this number", low=1
    )
    save_every_n_epochs: int | None = option(None, "an adapter file every n epochs", low=1)
    save_every_n_steps: int | None = option(None, "an adapter file every n steps", low=1)
    save_n_epoch_ratio: int | None = option(None, "about this many adapter files over all epochs", low=1)
    save_last_n_epochs: int | None = option(
        None, "keep the epoch files of the last n × --save_every_n_epochs epochs", low=1
    )
    save_last_n_steps: int | None = option(None, "keep the step files of the last n steps", low=1)
    save_last_n_epochs_state: int | None = option(None, "likewise for states (unset: as the files)", low=1)
    save_last_n_steps_state: int | None = option(None, "likewise for states (unset: as the files)", low=1)
    save_state: bool = option(False, "a state folder for --resume beside every adapter file")
    save_state_on_train_end: bool = option(False, "a state folder at the end")
    no_metadata: bool = option(False, "keep only the metadata that reading the file needs")
    training_comment: str | None = option(None, "comment in the metadata")
    metadata_title: str | None = option(None, "title in the metadata (unset: --output_name)")
    metadata_author: str | None = option(None, "author in the metadata")
    metadata_description: str | None = option(None, "description in the metadata")
    metadata_license: str | None = option(None, "licence in the metadata")
    metadata_tags: str | None = option(None, "tags in the metadata")
    metadata_usage_hint: str | None = option(None, "usage hint in the metadata")
    metadata_thumbnail: str | None = path(None, "picture that is put into the metadata")
    metadata_merged_from: str | None = option(None, "models it was merged from, in the metadata")
    metadata_trigger_phrase: str | None = option(None, "trigger phrase in the metadata")
    metadata_preprocessor: str | None = option(None, "preprocessor in the metadata")
    metadata_is_negative_embedding: str | None = option(
        None, "'true' for a negative embedding, in the metadata"
    )


@dataclass(frozen=True)
class Hub:
    """Upload"""

    huggingface_repo_id: str | None = option(
        None, "OWNER/NAME where adapter files are uploaded", aliases=("--hub_model_id",)
    )
    huggingface_repo_type: str | None = option(
        None, "type of that repository", choices=("model", "dataset", "space")
    )
    huggingface_path_in_repo: str | None = option(None, "folder in it")
    huggingface_token: str | None = option(
        None, "token; never logged or saved", aliases=("--hub_token",), secret=True
    )
    huggingface_repo_visibility: str | None = option(
        None, "of a repository that is made", choices=("private", "public")
    )
    async_upload: bool = option(False, "upload while training goes on")


@dataclass(frozen=True)
class Sampling:
    """Pictures while training"""

    validation_prompt: str | None = option(None, "prompt of pictures made while training and at the end")
    validation_epochs: int = option(50, "make them every n epochs", low=1)
    num_validation_images: int = option(4, "how many of them", low=1)
    sample_prompts: str | None = path(
        None, "file of prompts (.txt, .toml, .json), a line as 'a cat --w 512 --s 20'"
    )
    sample_every_n_steps: int | None = option(None, "make them every n steps", low=1)
    sample_every_n_epochs: int | None = option(None, "make them every n epochs; wins over steps", low=1)
    sample_at_first: bool = option(False, "make them before the first step too")


@dataclass(frozen=True)
class Validation:
    """Held-out loss"""

    validation_split: float = option(
        0.0,
        "share of each folder's images that are held out of training, to measure the loss on",
        low=0,
        below=1,
    )
    validation_seed: int | None = option(
        None, "seed of which images those are, and of their noise (unset: --seed)", low=0, high=SEEDS
    )
    validate_every_n_steps: int | None = option(None, "measure every n steps", low=1)
    validate_every_n_epochs: int | None = option(
        None, "measure every n epochs (unset, without the flag before: every epoch)", low=1
    )
    max_validation_steps: int | None = option(None, "batches to measure at most (unset: all)", low=1)


@dataclass(frozen=True)
class Logging:
    """Logs and trackers"""

    logging_dir: str | None = path(None, "folder for tracker logs (unset: logs/ in --output_dir)")
    log_with: str | None = option(
        None, "tracker", aliases=("--report_to",), choices=("tensorboard", "wandb", "all", "none")
    )
    log_prefix: str | None = option(None, "put before the time stamp that names a run's log folder")
    log_tracker_name: str | None = option(None, "name of the run's project in the tracker")
    wandb_run_name: str | None = option(None, "name of the run in wandb")
    wandb_api_key: str | None = option(None, "key for wandb; never logged or saved", secret=True)
    console_log_level: str = option(
        "INFO", "least level of the log", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    )
    console_log_file: str | None = path(None, "write the log to this file instead of stderr")
