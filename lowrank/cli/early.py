"""What is checked together with the flags of a training: files, folders, datasets, network arguments."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

from lowrank.config.checks import check_machine, gathered
from lowrank.config.command_line import Parsed
from lowrank.config.train import TrainOptions
from lowrank.data.sources import training_datasets


def checks_of(unnamed: str) -> Callable[[Parsed[TrainOptions]], None]:
    """The checks of a trainer beyond its flags, which raise all problems together.

    `unnamed` is the network module without --network_module. torch is imported only for network arguments.
    """

    def check(parsed: Parsed[TrainOptions]) -> None:
        def network(parsed: Parsed[TrainOptions]) -> None:
            _check_network_arguments(parsed, unnamed)

        for _ in gathered(parsed, (check_machine, _check_datasets, network)):
            pass

    return check


def _check_datasets(parsed: Parsed[TrainOptions]) -> None:
    """Raise `Refused` for a --dataset_config with problems, and for folders that are no dataset."""
    data = parsed.options.data
    if data.dataset_config and not os.path.isfile(data.dataset_config):
        return  # check_machine names it
    if data.dataset_config or data.train_data_dir or data.instance_data_dir:
        # without class images, which the run may have to draw first
        prior = replace(parsed.options.prior, with_prior_preservation=False)
        with _without_warnings():
            training_datasets(replace(parsed.options, prior=prior))


def _check_network_arguments(parsed: Parsed[TrainOptions], unnamed: str) -> None:
    """Raise `Refused` for arguments that the network module does not take."""
    network = parsed.options.network
    if not (network.network_args or network.lycoris_config):
        return
    if network.lycoris_config and not os.path.isfile(network.lycoris_config):
        return  # check_machine names it
    from lowrank.cli.resolve import check_arguments  # imports torch

    check_arguments(parsed, unnamed)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Log nothing: the run reads the same datasets again."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
