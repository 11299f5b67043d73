"""From the typed options of a training script to its job: model files, family, switches, objective."""

from __future__ import annotations

from dataclasses import replace

from lowrank.cli.resolve import with_network
from lowrank.config.command_line import Parsed
from lowrank.config.flag import pairs, parse_text
from lowrank.config.flux import KOHYA_MODULES, FluxTrainOptions
from lowrank.config.sd import SdTrainOptions, SdxlTrainOptions
from lowrank.config.train import TrainOptions
from lowrank.errors import Refused
from lowrank.models.family import Family, FamilyOptions, Source
from lowrank.models.flux import FLUX, FluxOptions
from lowrank.models.sd import SD15, SdOptions
from lowrank.models.sdxl import SDXL
from lowrank.objective.diffusion import Diffusion
from lowrank.objective.flow import Flow
from lowrank.objective.objective import Objective
from lowrank.train.checkpoints import DIFFUSERS, KOHYAS
from lowrank.train.job import Script, TrainJob
from lowrank.train.run import launch

__all__ = ["flux_job", "launch", "sd_job", "sdxl_job"]

_SD = Script(tracker="network_train", unnamed=KOHYAS)
# the log folder's name in the user's documents
_FLUX = Script(tracker="dreambooth-flux-dev-qrlora-deltaR", unnamed=DIFFUSERS)


def sd_job(parsed: Parsed[SdTrainOptions]) -> TrainJob:
    """The job of SD 1.x and 2.x training. Raises `Refused` for arguments that the network does not take."""
    parsed = with_network(parsed, "networks.lora")
    generation, source = parsed.options.generation, _sd_source(parsed.options, parsed.options.generation.v2)
    switches = sd_switches(parsed.options, generation.clip_skip)
    return _job(parsed, _SD, SD15, source, switches, Diffusion(**vars(parsed.options.objective)))


def sdxl_job(parsed: Parsed[SdxlTrainOptions]) -> TrainJob:
    """The job of SDXL training. Raises `Refused` for arguments that the network does not take."""
    parsed = with_network(parsed, "networks.lora")
    source, switches = _sd_source(parsed.options), sd_switches(parsed.options)
    return _job(parsed, _SD, SDXL, source, switches, Diffusion(**vars(parsed.options.objective)))


def flux_job(parsed: Parsed[FluxTrainOptions]) -> TrainJob:
    """The job of FLUX training. Raises `Refused` for arguments that the network does not take."""
    parsed = with_network(parsed, "networks.delta_r_triu")
    model, flux = parsed.options.model, parsed.options.flux_model
    source = Source(
        model.pretrained_model_name_or_path or "",
        revision=model.revision,
        variant=model.variant,
        cache_dir=model.cache_dir,
        clip_l=flux.clip_l,
        t5xxl=flux.t5xxl,
        ae=flux.ae,
        tokenizer_cache_dir=flux.tokenizer_cache_dir,
    )
    switches = FluxOptions(
        guidance_scale=flux.guidance_scale,
        t5xxl_max_token_length=flux.t5xxl_max_token_length,
        apply_t5_attn_mask=flux.apply_t5_attn_mask,
        trains_t5=_trains_t5(parsed.options),
    )
    return _job(parsed, _FLUX, FLUX, source, switches, Flow(**vars(parsed.options.objective)))


def _trains_t5(options: FluxTrainOptions) -> bool:
    """Whether networks.lora_flux adapts T5. Raises `Refused` for cached outputs of T5."""
    network, data = options.network, options.data
    asked = pairs("--network_args", network.network_args).get("train_t5xxl", "False")
    if not (network.network_module in KOHYA_MODULES and options.trains_text and parse_text(bool, asked)):
        return False
    if data.cache_text_encoder_outputs or data.cache_text_encoder_outputs_to_disk:
        raise Refused(
            "--cache_text_encoder_outputs keeps the outputs of T5, and --network_args train_t5xxl=True would "
            "change them; leave one of them out"
        )
    return True


def _job(
    parsed: Parsed[TrainOptions],
    script: Script,
    family: Family,
    source: Source,
    switches: FamilyOptions,
    objective: Objective,
) -> TrainJob:
    return TrainJob(
        options=parsed.options,
        script=script,
        family=family,
        source=source,
        switches=switches,
        objective=objective,
        command=parsed.command,
        config=lambda options: replace(parsed, options=options).toml(),
        notes=parsed.notes,
    )


def _sd_source(options: SdxlTrainOptions, v2: bool = False) -> Source:
    return Source(
        options.model.pretrained_model_name_or_path or "",
        revision=options.model.revision,
        variant=options.model.variant,
        cache_dir=options.model.cache_dir,
        vae=options.sd_model.vae,
        tokenizer_cache_dir=options.sd_model.tokenizer_cache_dir,
        v2=v2,
        v_parameterization=options.objective.v_parameterization,
    )


def sd_switches(options: SdxlTrainOptions, clip_skip: int | None = None) -> SdOptions:
    """The switches of the text encoders."""
    return SdOptions(
        clip_skip=clip_skip,
        max_token_length=options.sd_model.max_token_length,
        weighted_captions=options.sd_model.weighted_captions,
    )
