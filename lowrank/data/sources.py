"""From the options of a run to its datasets: folders, a metadata file or --dataset_config, without torch."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from lowrank.config.train import TrainOptions
from lowrank.data.dataset import Dataset, Subset, from_folders, from_instance, from_metadata
from lowrank.data.dataset_config import from_config

logger = logging.getLogger(__name__)


def training_datasets(options: TrainOptions) -> tuple[Dataset, ...]:
    """The datasets of the one source that is named; masks of a folder only with --masked_loss."""
    datasets = _datasets(options)
    if options.data.masked_loss:
        return datasets
    if any(subset.masks.conditioning_data_dir for dataset in datasets for subset in dataset.subsets):
        logger.warning("conditioning_data_dir has no effect without --masked_loss")

    def without_masks(subset: Subset) -> Subset:
        return replace(subset, masks=replace(subset.masks, conditioning_data_dir=None))

    return tuple(replace(dataset, subsets=tuple(map(without_masks, dataset.subsets))) for dataset in datasets)


def _values(options: TrainOptions) -> dict[str, Any]:
    """The options that datasets and subsets have too, by name."""
    hold_out = options.validation
    return {
        **vars(options.captions),
        **vars(options.augmentation),
        **vars(options.masks),
        **vars(options.sizes),
        **vars(options.buckets),
        "validation_split": hold_out.validation_split,
        "validation_seed": hold_out.validation_seed,
        "batch_size": options.train.train_batch_size,
    }


def _datasets(options: TrainOptions) -> tuple[Dataset, ...]:
    data, prior, values = options.data, options.prior, _values(options)
    if data.dataset_config:
        return from_config(
            data.dataset_config,
            values | {"num_repeats": data.dataset_repeats},
            allow_unknown=options.config_file.allow_unknown_config_keys,
        )
    if data.in_json:
        return from_metadata(data.in_json, data.train_data_dir, **values, num_repeats=data.dataset_repeats)
    if data.train_data_dir:
        return from_folders(data.train_data_dir, data.reg_data_dir, **values)
    assert data.instance_data_dir is not None  # the command line has one source
    return from_instance(
        data.instance_data_dir,
        data.instance_prompt,
        prior.class_data_dir if prior.with_prior_preservation else None,
        prior.class_prompt if prior.with_prior_preservation else None,
        repeats=data.dataset_repeats,
        **values,
    )
