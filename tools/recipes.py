"""The command lines whose numbers a refactor must keep, for tools/make_golden.py and tools/same_numbers.py.

A recipe is one run of a public script. It runs in a work folder, which tools/run_recipes.py makes: `assets`
and `data` are the inputs, and each recipe writes to the folder of its name. A recipe can read what another
recipe wrote. Paths are relative to the work folder, so two trees get the same command lines and write the
same metadata.

    python tools/same_numbers.py --list        prints all recipes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch

SCRIPTS = {
    "sd15": "train_network_ABM.py",
    "sdxl": "sdxl_train_network_ABM.py",
    "flux": "flux_train_qrlora.py",
}
BASIS = ("delta_r", "delta_r_triu", "qrlora")  # the methods of the official QR-LoRA format
ROUTED = ("effilora", "network_null_lalora_plus_Effi_ABM")  # several experts: exported by calibration
LENGTHS = ("dora", "network_null_lalora_plus")  # DoRA
TRAINED = "adapter.safetensors"


@dataclass(frozen=True)
class Recipe:
    """One run of a script."""

    name: str
    """family/run, the folder of the output"""
    script: str
    """path of the script in the tree"""
    words: tuple[str, ...]
    """the command line after the script"""
    needs: tuple[str, ...] = field(default=())
    """recipes whose output is read"""
    refused: bool = False
    """the script must refuse this command line"""
    printed: bool = False
    """standard output is a result (JSON) and is compared"""

    @property
    def trains(self) -> bool:
        """Whether the run writes a loss.csv."""
        return self.script in SCRIPTS.values()


def train(
    family: str, run: str, *flags: str, model: str = "", needs: tuple[str, ...] = (), steps: int = 4
) -> Recipe:
    """A training run of a few steps on the family's demo model; `flags` replace the options below."""
    name = f"{family}/{run}"
    options = {
        "--pretrained_model_name_or_path": model or f"assets/demo/{family}",
        "--output_dir": name,
        "--output_name": TRAINED.split(".")[0],
        "--resolution": "64",
        "--network_module": "networks.lora",
        "--network_dim": "4",
        "--learning_rate": "2e-3",
        "--max_train_steps": str(steps),
        "--train_batch_size": "2",
        "--max_data_loader_n_workers": "0",
        "--seed": "7",
    }
    if "--instance_data_dir" not in flags and "--dataset_config" not in flags:
        options["--train_data_dir"] = "data/train"
    words = [word for flag, value in options.items() if flag not in flags for word in (flag, value)]
    return Recipe(name, SCRIPTS[family], (*words, *flags), needs)


def methods(family: str) -> Iterator[Recipe]:
    """Every network of networks/ that is for the family; Stable Diffusion's text encoders are trained too."""
    context, basis = f"{family}/context/context.safetensors", f"{family}/basis/basis.safetensors"
    arguments: dict[str, tuple[str, ...]] = {
        "lora": (),
        "dora": (),
        "delta_r": ("use_zero_init=False",),
        "delta_r_triu": (),
        "qrlora": (),
        "tlora": ("tlora_alpha=1.5",),
        "effilora": ("num_experts=2",),
        "lalora": (f"lalora_context_path={context}", "lalora_lambda=10"),
        "null_lora": (),
        "pissa": (),
        "lora_fa": (),
        "vera": (),
        "universal_lora": (f"basis_path={basis}",),
        "universal_lalora": (
            *("basis_path=auto:grad", "basis_samples=4", "lalora_isotropic=True", "lalora_lambda=1"),
        ),
        "network_null_lalora": (
            *("basis_path=auto:weight", f"lalora_context_path={context}", "lalora_lambda=10"),
        ),
        "network_null_lalora_plus": ("basis_path=none", "use_dora=True"),
        "network_null_lalora_plus_Effi_ABM": (
            *("basis_path=auto:random", "enable_effilora=True", "num_experts=2", "router_scope=sample"),
        ),
    }  # fmt: skip
    if family == "flux":
        arguments["lora_flux"] = ("train_single_block_indices=all", "single_mod_dim=2")
    for method, given in arguments.items():
        words = ("--network_args", *given) if given else ()
        read = (
            *(("context",) if context in str(given) else ()),
            *(("basis",) if basis in str(given) else ()),
        )
        needs = tuple(f"{family}/{run}" for run in read)
        # The exports verify DoRA against the size of the change, which must be well above rounding.
        rate = ("--learning_rate", "2e-2") if method in LENGTHS else ()
        rate += ("--network_alpha", "16") if rate and family == "sdxl" else ()
        yield train(family, method, "--network_module", f"networks.{method}", *rate, *words, needs=needs)


def options(family: str) -> Iterator[Recipe]:
    """Option sets that change what a step computes."""
    alone = "--network_train_unet_only"
    kept = ("--checkpointing_steps", "2", "--gradient_accumulation_steps", "2", "--lr_scheduler", "cosine")
    yield train(family, "whole", alone, *kept, "--flip_aug")
    resumed = ("--resume", f"{family}/whole/checkpoint-2")
    yield train(family, "resumed", alone, *kept, "--flip_aug", *resumed, needs=(f"{family}/whole",))
    warm = ("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "2")
    yield train(family, "ema", alone, "--ema_decay", "0.5", "--save_every_n_steps", "2", *warm)
    yield train(family, "masks", alone, "--conditioning_data_dir", "data/masks", "--masked_loss")
    yield train(family, "alpha", alone, "--alpha_mask", "--train_data_dir", "data/alpha")
    yield train(family, "prior", alone, "--reg_data_dir", "data/reg", "--prior_loss_weight", "0.5")
    yield train(
        *(family, "class_images", alone, "--instance_data_dir", "assets/cnt/dog"),
        *("--instance_prompt", "a <c> dog"),
        *("--with_prior_preservation", "--class_data_dir", "data/class", "--class_prompt", "a dog"),
        *("--num_class_images", "2", "--validation_epochs", "1000"),
    )  # fmt: skip
    abm = ("--abm_enabled", "--abm_steps", "2", "--abm_lr", "1e-3", "--no-abm_guard", "--abm_layers", "0.5")
    yield train(
        *(family, "abm", alone, *abm, "--abm_teacher", f"{family}/lora/{TRAINED}"), needs=(f"{family}/lora",)
    )
    yield train(
        *(family, "tlora_plain", alone, "--network_module", "networks.tlora"),
        *("--network_args", "orthogonal=False", "tlora_min_rank=1", "loraplus_lr_ratio=4"),
    )
    yield train(
        *(family, "tlora_data", alone, "--network_module", "networks.tlora"),
        *("--network_args", "sig_type=principal", "use_data_init=True"),
    )
    yield train(
        *(family, "experts", alone, "--network_module", "networks.effilora"),
        *("--network_args", "num_experts=3", "effi_update_ratio=0.5", "effi_probe_every=2"),
    )
    yield train(family, "fp8", alone, "--mixed_precision", "bf16", "--fp8_base", "--gradient_checkpointing")
    yield train(family, "bf16", alone, "--mixed_precision", "bf16", "--full_bf16")
    yield train(
        *(family, "captions", alone, "--shuffle_caption", "--keep_tokens", "1"),
        *("--caption_tag_dropout_rate", "0.3"),
        *("--caption_dropout_rate", "0.5", "--enable_bucket", "--min_bucket_reso", "32", "--cache_latents"),
        *("--bucket_reso_steps", "32"),
    )  # fmt: skip
    yield train(
        family, "metadata", alone, "--dataset_config", "data/dataset.toml", "--network_dropout", "0.2"
    )
    yield train(
        *(family, "continued", alone, "--network_weights", f"{family}/lora/{TRAINED}", "--base_weights"),
        *(f"{family}/lalora/{TRAINED}", "--base_weights_multiplier", "0.5", "--loss_type", "huber"),
        needs=(f"{family}/lora", f"{family}/lalora"),
    )
    yield train(
        *(family, "convolutions", alone, "--network_args", "conv_dim=2", "--validation_split", "0.3"),
        *("--validate_every_n_steps", "2", "--scale_weight_norms", "0.5", "--save_precision", "fp16"),
    )
    yield from flux_options() if family == "flux" else sd_options(family)


def sd_options(family: str) -> Iterator[Recipe]:
    """Options that only the diffusion objective has."""
    alone = "--network_train_unet_only"
    noise = ("--noise_offset", "0.05", "--adaptive_noise_scale", "0.01", "--ip_noise_gamma", "0.1")
    yield train(family, "noise", alone, *noise, "--min_snr_gamma", "5")
    more = ("--multires_noise_iterations", "2", "--debiased_estimation_loss", "--zero_terminal_snr")
    yield train(family, "velocity", alone, *more, "--min_timestep", "200", "--max_timestep", "900")
    clip = () if family == "sdxl" else ("--clip_skip", "2")
    yield train(
        *(family, "text", "--network_train_text_encoder_only", *clip, "--max_token_length", "150"),
        "--weighted_captions",
    )


def flux_options() -> Iterator[Recipe]:
    """Options that only flow matching has."""
    for name in ("uniform", "sigmoid", "shift", "flux_shift"):
        yield train("flux", f"timesteps_{name}", "--timestep_sampling", name, "--rank", "4")
    weights = ("--weighting_scheme", "logit_normal", "--model_prediction_type", "additive")
    yield train("flux", "weighting", *weights, "--apply_t5_attn_mask")
    yield train("flux", "text", "--train_text_encoder", "--text_encoder_lr", "1e-3")


def exports(family: str, trained: Recipe) -> Iterator[Recipe]:
    """One adapter in every format, and kohya's file read back."""
    method, model = trained.name.split("/")[1], f"assets/demo/{family}"
    source = f"{trained.name}/{TRAINED}"

    def export(to: str, target: str, *flags: str, refused: bool = False) -> Recipe:
        name = f"{trained.name}-{to}"
        words = (source, f"{name}/{target}", "--to", to, *flags)
        return Recipe(name, "tools/export_lora.py", words, (trained.name,), refused)

    if method in ROUTED:
        near = ("--model", model, "--calibrate", "data/prompts.txt")
        yield export("kohya", "out.safetensors", *near, refused=family == "sdxl")
        yield export("diffusers", "out.safetensors", refused=True)
        return
    joined = ("--model", model) if family == "flux" and method in LENGTHS else ()
    # DoRA of a text layer that the loss hardly reaches is too close to rounding to be verified.
    parts = ("--parts", "unet") if family == "sdxl" and method in LENGTHS else ()
    yield export("kohya", "out.safetensors", *joined, *parts)
    denoiser = ("--parts", "unet") if method in LENGTHS else ()  # diffusers loads no lengths into CLIP
    yield export("diffusers", "out.safetensors", "--dtype", "fp16", "--rank", "2", *denoiser)
    yield export("peft", "out")
    yield export("lycoris", "out.safetensors", "--parts", "unet")
    yield export("merged", "out", "--model", model, "--strength", "0.8", refused=family == "sdxl")
    qr = family == "flux" and method in BASIS
    needed = ("--model", model) if method == "qrlora" else ()
    if qr or method == "lora":
        yield export("qrlora", "out.safetensors", *needed, refused=not qr)
    if method == "tlora":
        baked = (source, f"{trained.name}-baked/out.safetensors", "--at-timestep", "500")
        yield Recipe(f"{trained.name}-baked", "tools/export_lora.py", baked, (trained.name,))
    name, foreign = f"{trained.name}-imported", f"{trained.name}-kohya"
    words = (f"{foreign}/out.safetensors", f"{name}/{TRAINED}")
    yield Recipe(name, "tools/import_lora.py", words, (foreign,), refused=method == "tlora")


def others(family: str) -> Iterator[Recipe]:
    """Scripts that measure, collect, merge, compare, describe and import."""
    yield from _measurements(family)
    yield from _uses(family)
    yield from _imports(family)
    if family == "flux":
        words = ("--model_path", "assets/demo/flux", "--output_dir", "flux/residual")
        yield Recipe("flux/residual", "save_flux_residual.py", (*words, "--rank", "4", "--dtype", "fp32"))


def _measurements(family: str) -> Iterator[Recipe]:
    """A LaLoRA context and a universal basis."""
    model = f"assets/demo/{family}"
    measure = ("--pretrained_model_name_or_path", model, "--source_data_dir", "data/source", "--force")
    yield Recipe(
        f"{family}/context",
        "calc_lalora_context.py",
        (
            *(*measure, "--output_path", f"{family}/context/context.safetensors", "--mixed_precision", "no"),
            *("--resolution", "64", "--kfac_rank", "2", "--num_samples", "4", "--batch_size", "2"),
            *("--seed", "3"),
        ),
    )  # fmt: skip
    collected = tuple(f"{family}/{method}" for method in ("lora", "lalora", "delta_r"))
    yield Recipe(
        f"{family}/basis",
        "tools/extract_universal_basis.py",
        (
            *("--lora_dir", *collected, "--output", f"{family}/basis/basis.safetensors"),
            *("--report", f"{family}/basis/report.json", "--rank", "4"),
        ),
        collected,
    )


def _uses(family: str) -> Iterator[Recipe]:
    """Two adapters merged and compared, and files inspected."""
    model, adapter = f"assets/demo/{family}", f"{family}/{{}}/{TRAINED}"
    pair = (f"{family}/delta_r_triu", f"{family}/delta_r")
    strengths = ("--style_weights", "0.5,1", "--content_weights", "1", "--num_inference_steps", "2")
    yield Recipe(
        f"{family}/drawn",
        "inference_merge.py",
        (
            *("--model_path", model, "--style_lora_path", adapter.format("delta_r_triu")),
            *("--content_lora_path", adapter.format("delta_r")),
            *("--prompt", "a <c> dog in <s> style", *strengths, "--save_merged"),
            *("--height", "64", "--width", "64", "--output_dir", f"{family}/drawn"),
        ),
        pair,
    )  # fmt: skip
    yield Recipe(
        f"{family}/similarity",
        "visualize_similarity.py",
        (
            *("--lora1_path", adapter.format("delta_r_triu"), "--lora2_path", adapter.format("delta_r")),
            *("--output_dir", f"{family}/similarity"),
        ),
        pair,
    )
    files = (adapter.format("lora"), f"{family}/dora-kohya/out.safetensors")
    needs = (f"{family}/lora", f"{family}/dora-kohya")
    yield Recipe(
        f"{family}/inspected", "tools/inspect_lora.py", (*files, "--json"), needs, printed=True
    )  # fmt: skip


def _imports(family: str) -> Iterator[Recipe]:
    """An import into another method, and T-LoRA to LyCORIS' format and back."""
    model, adapter = f"assets/demo/{family}", f"{family}/{{}}/{TRAINED}"
    name = f"{family}/projected"
    words = (
        f"{family}/lora-kohya/out.safetensors",
        f"{name}/{TRAINED}",
        "--method",
        "delta_r",
        "--model",
        model,
    )
    short = family == "sdxl"  # the demo model has fewer layers in a block than SDXL's names count
    needs = (f"{family}/lora-kohya",)
    yield Recipe(name, "tools/import_lora.py", (*words, "--rank", "4"), needs, refused=short)
    masked, back = f"{family}/tlora_data-lycoris-tlora", f"{family}/tlora_data-imported"
    words = (adapter.format("tlora_data"), f"{masked}/out.safetensors", "--to", "lycoris-tlora")
    yield Recipe(masked, "tools/export_lora.py", words, (f"{family}/tlora_data",))
    words = (f"{masked}/out.safetensors", f"{back}/{TRAINED}", "--model", model)
    yield Recipe(back, "tools/import_lora.py", words, (masked,))


def every() -> dict[str, Recipe]:
    """All recipes by name, each after those that it needs."""
    recipes: dict[str, Recipe] = {}
    for family in SCRIPTS:
        for recipe in (*methods(family), *options(family), *others(family)):
            recipes[recipe.name] = recipe
        for trained in methods(family):
            recipes |= {recipe.name: recipe for recipe in exports(family, trained)}
    ordered: dict[str, Recipe] = {}
    for name in recipes:
        _visit(name, recipes, ordered)
    return ordered


def _visit(name: str, recipes: dict[str, Recipe], ordered: dict[str, Recipe]) -> None:
    for needed in recipes[name].needs:
        if needed not in ordered:
            _visit(needed, recipes, ordered)
    ordered[name] = recipes[name]


def select(patterns: Iterable[str]) -> dict[str, Recipe]:
    """The recipes whose names match any pattern (`flux/*`, `*/lora`), with those that they need."""
    recipes, patterns = every(), list(patterns)
    chosen: dict[str, Recipe] = {}
    for name in recipes:
        if not patterns or any(fnmatch(name, pattern) for pattern in patterns):
            _visit(name, recipes, chosen)
    return {name: recipe for name, recipe in recipes.items() if name in chosen}
