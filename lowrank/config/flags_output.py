"""Output of a run: adapter files, uploads, pictures, validation losses, logs."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.config.flag import file_name, option, path
from lowrank.config.flags_data import HoldOut

DRAWN = "sample_prompts or sample_prompt_lines or validation_prompt"  # what a picture can be drawn of


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Saving"""

    output_dir: str | None = path(
        None, "folder for adapter files, states, pictures, the log of losses and config.toml", essential=True
    )
    output_name: str | None = option(
        None, "name of the adapter files, without ending", convert=file_name, metadata=True
    )
    save_model_as: str = option(
        "safetensors",
        "format of adapter files; ckpt and pt are refused, since such files can run code",
        choices=("safetensors", "ckpt", "pt"),
    )
    save_precision: str | None = option(
        None,
        "precision of adapter files (unset: the precision of training)",
        choices=("float", "fp16", "bf16"),
    )
    upcast_before_saving: bool = option(False, "save adapter files in fp32, as --save_precision float does")
    checkpointing_steps: int | None = option(
        None,
        "every n steps write a folder checkpoint-N with the adapter and everything that --resume needs",
        low=1,
    )
    checkpoints_total_limit: int | None = option(
        None,
        "keep at most this many checkpoint-N folders; the oldest are deleted",
        low=1,
        acts_with=("checkpointing_steps",),
    )
    save_every_n_epochs: int | None = option(
        None,
        "write an adapter file every n epochs",
        low=1,
        off_at_zero=True,
        acts_with=("not save_n_epoch_ratio",),
    )
    save_every_n_steps: int | None = option(
        None, "write an adapter file every n steps", low=1, off_at_zero=True
    )
    save_n_epoch_ratio: int | None = option(
        None, "write about this many adapter files over all epochs", low=1, off_at_zero=True
    )
    save_last_n_epochs: int | None = option(
        None,
        "keep the epoch files of the last n × --save_every_n_epochs epochs",
        low=1,
        off_at_zero=True,
        acts_with=("save_every_n_epochs or save_n_epoch_ratio",),
    )
    save_last_n_steps: int | None = option(
        None,
        "keep the step files of the last n steps",
        low=1,
        off_at_zero=True,
        acts_with=("save_every_n_steps",),
    )
    save_last_n_epochs_state: int | None = option(
        None,
        "keep the state folders of the last n × --save_every_n_epochs epochs (unset: --save_last_n_epochs)",
        low=1,
        off_at_zero=True,
        acts_with=("save_every_n_epochs or save_n_epoch_ratio", "save_state"),
    )
    save_last_n_steps_state: int | None = option(
        None,
        "keep the state folders of the last n steps (unset: --save_last_n_steps)",
        low=1,
        off_at_zero=True,
        acts_with=("save_every_n_steps", "save_state"),
    )
    save_state: bool = option(False, "write a state folder for --resume beside every adapter file")
    save_state_on_train_end: bool = option(
        False, "write a state folder for --resume at the end of training", acts_with=("not save_state",)
    )
    no_metadata: bool = option(False, "write only the metadata that is needed to read the adapter file")
    training_comment: str | None = option(
        None, "comment in the metadata of adapter files", metadata=True, acts_with=("not no_metadata",)
    )
    metadata_title: str | None = option(None, "title in the metadata of adapter files (unset: --output_name)")
    metadata_author: str | None = option(None, "author in the metadata of adapter files")
    metadata_description: str | None = option(None, "description in the metadata of adapter files")
    metadata_license: str | None = option(None, "licence in the metadata of adapter files")
    metadata_tags: str | None = option(None, "tags in the metadata of adapter files")
    metadata_usage_hint: str | None = option(None, "usage hint in the metadata of adapter files")
    metadata_thumbnail: str | None = path(None, "picture that is put into the metadata of adapter files")
    metadata_merged_from: str | None = option(
        None, "models that the adapter was merged from, in the metadata of adapter files"
    )
    metadata_trigger_phrase: str | None = option(None, "trigger phrase in the metadata of adapter files")
    metadata_preprocessor: str | None = option(None, "preprocessor in the metadata of adapter files")
    metadata_is_negative_embedding: str | None = option(
        None, "'true' for a negative embedding, in the metadata of adapter files"
    )


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Upload"""

    huggingface_repo_id: str | None = option(
        None, "OWNER/NAME where adapter files are uploaded", aliases=("--hub_model_id",)
    )
    huggingface_repo_type: str | None = option(
        None,
        "type of the repository --huggingface_repo_id",
        choices=("model", "dataset", "space"),
        acts_with=("huggingface_repo_id",),
    )
    huggingface_path_in_repo: str | None = option(
        None, "folder in the repository --huggingface_repo_id", acts_with=("huggingface_repo_id",)
    )
    huggingface_token: str | None = option(
        None,
        "access token of the Hugging Face hub; never logged or saved",
        aliases=("--hub_token",),
        secret=True,
        acts_with=("huggingface_repo_id",),
    )
    huggingface_repo_visibility: str | None = option(
        None,
        "visibility of the repository --huggingface_repo_id, if the run creates it",
        choices=("private", "public"),
        acts_with=("huggingface_repo_id",),
    )
    async_upload: bool = option(
        False, "upload files in the background while training goes on", acts_with=("huggingface_repo_id",)
    )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Pictures while training"""

    validation_prompt: str | None = option(
        None, "prompt of pictures that are drawn while training and at the end"
    )
    validation_epochs: int = option(
        50, "draw pictures of --validation_prompt every n epochs", low=1, acts_with=("validation_prompt",)
    )
    num_validation_images: int = option(
        4, "number of pictures of --validation_prompt each time", low=1, acts_with=("validation_prompt",)
    )
    sample_prompts: str | None = path(
        None,
        "file of prompts (.txt, .toml, .json) to draw while training; a line is like 'a cat --w 512 --s 20'",
        essential=True,
    )
    sample_prompt_lines: tuple[str, ...] = option(
        (), "prompts to draw while training, each as a line of the file --sample_prompts"
    )
    sample_every_n_steps: int | None = option(
        None,
        "draw pictures of --sample_prompts every n steps",
        low=1,
        off_at_zero=True,
        acts_with=(DRAWN, "not sample_every_n_epochs"),
    )
    sample_every_n_epochs: int | None = option(
        None,
        "draw pictures of --sample_prompts every n epochs; has precedence over --sample_every_n_steps",
        low=1,
        off_at_zero=True,
        acts_with=(DRAWN,),
    )
    sample_at_first: bool = option(
        False,
        "draw pictures before the first step too",
        acts_with=(DRAWN,),
    )


@dataclass(frozen=True, kw_only=True)
class Validation(HoldOut):
    """Validation loss"""

    validate_every_n_steps: int | None = option(
        None,
        "measure the validation loss every n steps",
        low=1,
        metadata=True,
        off_at_zero=True,
        acts_with=("validation_split or dataset_config",),
    )
    validate_every_n_epochs: int | None = option(
        None,
        "measure the validation loss every n epochs (unset, without --validate_every_n_steps: every epoch)",
        low=1,
        metadata=True,
        off_at_zero=True,
        acts_with=("validation_split or dataset_config",),
    )
    max_validation_steps: int | None = option(
        None,
        "largest number of batches in each measurement of the validation loss (unset: all)",
        low=1,
        metadata=True,
        off_at_zero=True,
        acts_with=("validation_split or dataset_config",),
    )


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Logs and trackers"""

    logging_dir: str | None = path(None, "folder for tracker logs (unset: logs/ in --output_dir)")
    log_with: str | None = option(
        None,
        "tracker that records the run",
        aliases=("--report_to",),
        choices=("tensorboard", "wandb", "all", "none"),
    )
    log_prefix: str | None = option(
        None, "text put before the time stamp that names a run's log folder", acts_with=("logging_dir",)
    )
    log_tracker_name: str | None = option(None, "name of the run's project in the tracker")
    wandb_run_name: str | None = option(None, "name of the run in wandb", acts_with=("log_with=wandb|all",))
    wandb_api_key: str | None = option(
        None, "API key of wandb; never logged or saved", secret=True, acts_with=("log_with=wandb|all",)
    )
    console_log_level: str = option(
        "INFO",
        "lowest level of messages that are logged",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: str | None = path(None, "write the log to this file instead of stderr")
