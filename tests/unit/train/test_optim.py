"""Optimizers by name, schedules against the libraries they come from, and the plan of steps."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import json
import logging
import sys
import types
import warnings

import diffusers.optimization
import pytest
import torch
import transformers.optimization
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from lowrank.config.flag import SCHEDULERS
from lowrank.config.flag import scheduler as scheduler_by_name
from lowrank.config.flags_training import Optimizer as Options
from lowrank.errors import Refused
from lowrank.train import schedule
from lowrank.train.log import RunLog
from lowrank.train.optim import KNOWN, averaged_weights, build_optimizer, chosen, training
from lowrank.train.schedule import build_scheduler, plan_run
from tools import make_schedules


def options(**changes) -> Options:
    return dataclasses.replace(Options(learning_rate=0.1), **changes)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.linspace(1.0, 2.0, 4))


def groups(*rates: float) -> list[dict]:
    return [{"params": iter([parameter()]), "lr": rate} for rate in rates] or [{"params": [parameter()]}]


def build(*rates: float, **changes) -> torch.optim.Optimizer:
    return build_optimizer(groups(*rates), options(**changes))[2]


def refused(*rates: float, **changes) -> str:
    with pytest.raises(Refused) as caught:
        build(*rates, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def falls(optimizer: torch.optim.Optimizer, steps: int = 20) -> bool:
    """Whether the sum of squares of the parameters falls."""
    (group,) = optimizer.param_groups
    (p,) = group["params"]
    before = float(p.detach().square().sum())
    for _ in range(steps):
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()
    return float(p.detach().square().sum()) < before


# ---------- optimizers


@pytest.mark.parametrize(
    "name", ["", "AdamW", "adamw", "ADAMW", "SGDNesterov", "RMSprop", "torch.optim.Adagrad"]
)
def test_torch_optimizers_by_name(name):
    optimizer = build(optimizer_type=name, learning_rate=1e-2)
    assert falls(optimizer)
    if not name or name.lower() == "adamw":
        assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["weight_decay"] == 0.01


def test_optimizer_names_match_kohya():
    args = ("weight_decay=0.05", "betas=0.9,0.99")
    name, text, optimizer = build_optimizer(groups(1e-3, 2e-3), options(optimizer_args=args))
    assert (name, text) == ("torch.optim.adamw.AdamW", "weight_decay=0.05,betas=(0.9, 0.99)")
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 2e-3]
    assert build_optimizer(groups(), options(optimizer_type="SGDNesterov"))[1] == "nesterov=True,momentum=0.9"
    sgd = build(optimizer_type="SGDNesterov", optimizer_args=("momentum=0.5",))
    assert sgd.defaults["momentum"] == 0.5 and sgd.defaults["nesterov"]


def test_diffusers_flags_are_arguments():
    made = chosen(options(adam_beta2=0.99, adam_weight_decay=1e-4, adam_epsilon=1e-6))
    assert made.arguments == {"weight_decay": 1e-4, "eps": 1e-6, "betas": (0.9, 0.99)}
    same = chosen(options(adam_weight_decay=1e-4, optimizer_args=("weight_decay=1e-4",)))
    assert same.arguments == {"weight_decay": 1e-4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer_type": "AdamV"}, "--optimizer_type AdamV is unknown (did you mean 'AdamW'?)"),
        ({"optimizer_type": "torch.optim.AdamV"}, "(did you mean 'AdamW'?)"),
        ({"optimizer_type": "torch.nn.Linear"}, "--optimizer_type torch.nn.Linear is no optimizer"),
        ({"optimizer_type": "nowhere.Adam"}, "needs the package nowhere; run `pip install nowhere`"),
        (
            {"optimizer_args": ("weight_decy=1",)},
            "weight_decy is no argument of AdamW (did you mean 'weight_decay'?)",
        ),
        ({"optimizer_args": ("lr=1",)}, "lr is no argument of AdamW; use --learning_rate"),
        ({"optimizer_args": ("weight_decay=abc",)}, "weight_decay=abc: the value is not a Python literal"),
        ({"optimizer_args": ("weight_decay",)}, "is not of the form key=value"),
        ({"optimizer_args": ("eps=-1.0",)}, "rejects lr=0.1,eps=-1.0 (Invalid epsilon value: -1.0)"),
        ({"optimizer_args": ("foreach=True", "fused=True")}, "correct --learning_rate or --optimizer_args"),
        ({"optimizer_type": "LBFGS"}, "LBFGS computes the loss several times per step"),
        ({"optimizer_type": "SparseAdam"}, "SparseAdam needs sparse gradients"),
        ({"adam_weight_decay": 0.1, "optimizer_args": ("weight_decay=0.2",)}, "differ; give one of them"),
        ({"prodigy_decouple": True}, "--prodigy_decouple has no meaning for AdamW"),
        (
            {"optimizer_type": "SGD", "adam_beta1": 0.5},
            "--adam_beta1 has no meaning for SGD, which takes no betas",
        ),
        ({"optimizer_type": "Lion", "use_8bit_adam": True}, "--use_8bit_adam is for AdamW"),
        ({"optimizer_type": "AdamW", "use_lion_optimizer": True}, "--use_lion_optimizer is Lion"),
    ],
)
def test_bad_optimizer_options_are_refused(changes, said):
    assert said in refused(**changes)


def test_nothing_to_train_is_refused():
    for nothing in ([], [{"params": []}]):
        with pytest.raises(Refused, match="no parameter is trained; check --network_module"):
            build_optimizer(nothing, options())


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("Lion", "lion-pytorch"),
        ("prodigy", "prodigyopt"),
        ("DAdaptAdam", "dadaptation"),
        ("adamwschedulefree", "schedulefree"),
        ("AdamW8bit", "bitsandbytes"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    for module in [m for m in sys.modules if m.startswith(f"{package.replace('-', '_')}.")]:
        monkeypatch.setitem(sys.modules, module, None)
    assert f"needs the package {package}; run `pip install {package}`" in refused(optimizer_type=name)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("name", [name for name, path in KNOWN.items() if path.startswith("bitsandbytes")])
def test_bitsandbytes_optimizers_are_made(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its notes about absent GPUs are its own affair
        optimizer = build(optimizer_type=name.upper())
        if name == "AdamW8bit":
            assert type(build(use_8bit_adam=True)) is type(optimizer)
    assert type(optimizer).__module__.startswith("bitsandbytes")


def test_adafactors_rate_is_a_number_in_loss_csv(tmp_path):
    """Its own rate depends on the size of the parameters and is a tensor."""
    _, _, optimizer = build_optimizer(groups(1e-3), options(optimizer_type="adafactor"))
    scheduler = build_scheduler(optimizer, options(lr_scheduler="adafactor:0.5"), 10)
    log = RunLog(Accelerator(cpu=True), tmp_path, ("mse",), total=2, window=5)
    log.begin(0)
    for step in (1, 2):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
        rates = {"unet": optimizer.param_groups[0]["lr"]}
        log.step(step, 1, {"loss": 1.0, "mse": 1.0}, rates, images=1, extra={})
    log.close()
    with open(tmp_path / "loss.csv", newline="") as file:
        logged = [float(row["lr"]) for row in csv.DictReader(file)]
    rms = float(parameter().detach().square().mean().sqrt())
    # after n steps the relative step is min(1e-2, 1/sqrt(n)), times the RMS of the parameter before the step
    assert logged[0] == pytest.approx(1e-2 * rms, rel=1e-5) and logged[1] != logged[0]


def test_adafactor_sets_its_own_rate(caplog):
    name, text, optimizer = build_optimizer(groups(1e-3, 2e-3), options(optimizer_type="adafactor"))
    assert name == "transformers.optimization.Adafactor" and text == "relative_step=True"
    assert [group["lr"] for group in optimizer.param_groups] == [None, None]
    assert "sets its own rate" in caplog.text
    scheduler = build_scheduler(optimizer, options(lr_scheduler="adafactor:0.5"), 10)
    assert scheduler.get_last_lr() == [0.5, 0.5]
    bare = scheduler_by_name("Adafactor")  # interfaces offer the name alone: its rate is --learning_rate
    assert build_scheduler(optimizer, options(lr_scheduler=bare), 10).get_last_lr() == [0.1, 0.1]
    optimizer = build(optimizer_type="adafactor", optimizer_args=("warmup_init=True", "relative_step=False"))
    assert optimizer.defaults["relative_step"] is True
    optimizer = build(
        optimizer_type="Adafactor", optimizer_args=("relative_step=False", "scale_parameter=False")
    )
    assert falls(optimizer) and optimizer.defaults["lr"] == 0.1
    assert "only for --optimizer_type Adafactor" in scheduler_refused(lr_scheduler="adafactor:0.5")


class OneRate(torch.optim.SGD):
    """Stands for prodigyopt.Prodigy, which is not installed everywhere."""

    def __init__(self, params, lr=1.0, betas=(0.9, 0.999), decouple=True, use_bias_correction=False):
        super().__init__(params, lr=lr)


@pytest.fixture
def prodigy(monkeypatch):
    module = types.ModuleType("prodigyopt")
    module.Prodigy = type("Prodigy", (OneRate,), {"__module__": "prodigyopt"})
    monkeypatch.setitem(sys.modules, "prodigyopt", module)


def test_prodigy_has_one_rate(prodigy, caplog):
    made = chosen(
        options(optimizer_type="prodigy", prodigy_use_bias_correction=True, optimizer_args=("decouple=True",))
    )
    assert made.arguments == {"decouple": True, "use_bias_correction": True}
    with caplog.at_level(logging.WARNING):
        build(1.0, 1.0, 0.0, optimizer_type="Prodigy", learning_rate=1.0)
    assert not caplog.records
    message = refused(1e-4, 1.6e-3, optimizer_type="Prodigy")
    assert "they are 0.0001, 0.0016 (--unet_lr, --text_encoder_lr, LoRA+)" in message
    build(1e-4, optimizer_type="Prodigy")
    assert "0.0001, which is very low; 1 is usual" in caplog.text


class Averaging(torch.optim.SGD):
    """Stands for a schedule-free optimizer: evaluates at another point than it trains."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = False

    def _shift(self, training: bool):
        for group in self.param_groups:
            if group["train_mode"] != training:
                group["train_mode"] = training
                for p in group["params"]:
                    p.data += 1.0 if training else -1.0

    def train(self):
        self._shift(True)

    def eval(self):
        self._shift(False)


@pytest.fixture
def schedulefree(monkeypatch):
    module = types.ModuleType("schedulefree")
    module.AdamWScheduleFree = Averaging
    monkeypatch.setitem(sys.modules, "schedulefree", module)


def test_schedule_free_weights_are_swapped_and_put_back(schedulefree):
    optimizer = build(optimizer_type="AdamWScheduleFree")
    (p,) = optimizer.param_groups[0]["params"]
    trained = p.detach().clone()
    with training(optimizer):
        assert torch.equal(p, trained)
        with averaged_weights(types.SimpleNamespace(optimizer=optimizer)):  # as accelerate wraps it
            assert torch.equal(p, trained - 1)
            with averaged_weights(optimizer):
                assert torch.equal(p, trained - 1)
            assert torch.equal(p, trained - 1)
        assert torch.equal(p, trained)
    with pytest.raises(RuntimeError), averaged_weights(optimizer):
        raise RuntimeError
    assert torch.equal(p, trained) and optimizer.param_groups[0]["train_mode"]
    optimizer.eval()
    with training(optimizer):
        assert torch.equal(p, trained)
    assert torch.equal(p, trained - 1)
    scheduler = build_scheduler(optimizer, options(lr_scheduler="cosine"), 10)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.1]


def test_other_optimizers_are_left_alone():
    optimizer = build()
    (p,) = optimizer.param_groups[0]["params"]
    before = p.detach().clone()
    with training(optimizer), averaged_weights(optimizer):
        assert torch.equal(p, before)


REAL = [
    name for name, path in KNOWN.items() if not path.startswith(("torch", "bitsandbytes", "transformers"))
]


@pytest.mark.parametrize("name", REAL)
def test_the_real_packages_where_they_are(name):
    pytest.importorskip(KNOWN[name].split(".")[0])
    finds_its_rate = name.startswith(("DAdapt", "Prodigy"))
    optimizer = build(optimizer_type=name.lower(), learning_rate=1.0 if finds_its_rate else 1e-2)
    (before,) = (p.detach().clone() for p in optimizer.param_groups[0]["params"])
    with training(optimizer):
        falls(optimizer)  # whether it falls is the library's affair
    (after,) = optimizer.param_groups[0]["params"]
    assert not torch.equal(after, before) and after.isfinite().all()


# ---------- schedules


def scheduler_refused(**changes) -> str:
    with pytest.raises(Refused) as caught:
        build_scheduler(build(), options(**changes), 10)
    return str(caught.value)


def rates(scheduler, steps: int, times: int = 1) -> list[float]:
    """The rate at each optimizer step, when the scheduler is stepped `times` per optimizer step."""
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        for _ in range(times):
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # "scheduler before optimizer": there is nothing to optimize here
                scheduler.step()
    return seen


def oracle(name: str, steps: int, warmup: int, decay: int):
    """The libraries that kohya's scripts call for this name, with the arguments those give."""
    optimizer = build()
    if name == "inverse_sqrt":
        return transformers.optimization.get_inverse_sqrt_schedule(optimizer, warmup, timescale=7)
    if name == "cosine_with_min_lr":
        return transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, steps, num_cycles=1.5, min_lr_rate=0.2
        )
    if name == "warmup_stable_decay":
        return transformers.optimization.get_wsd_schedule(
            optimizer,
            num_warmup_steps=warmup,
            num_stable_steps=steps - warmup - decay,
            num_decay_steps=decay,
            num_cycles=1.5,
            min_lr_ratio=0.2,
        )
    lengths = {"num_warmup_steps": warmup, "num_training_steps": steps}
    cycles = {"num_cycles": 3} if name == "cosine_with_restarts" else {}
    rules = "1:10,0.1:20,0.01"
    return diffusers.optimization.get_scheduler(
        name, optimizer, step_rules=rules, power=2.0, **lengths, **cycles
    )


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_equal_their_libraries(name, warmup, processes):
    if name == "constant" and warmup:
        pytest.skip("refused on the command line")
    steps, decay = 30, 9
    ours = build_scheduler(
        build(),
        options(
            lr_scheduler=name,
            lr_warmup_steps=warmup,
            lr_decay_steps=0.3,
            lr_scheduler_num_cycles=3,
            lr_scheduler_power=2.0,
            lr_scheduler_timescale=7,
            lr_scheduler_min_lr_ratio=0.2,
            lr_scheduler_args=("step_rules='1:10,0.1:20,0.01'",) if name == "piecewise_constant" else (),
        ),
        steps,
        processes,
    )
    expected = rates(oracle(name, steps, warmup, decay), steps + 3)
    assert rates(ours, steps + 3, processes) == pytest.approx(expected, abs=1e-12)


def rows_of(name: str) -> list[dict]:
    return [row for row in json.loads(make_schedules.TABLE.read_text()) if row["name"] == name]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_golden_table(name):
    """Every factor that was once computed. 1e-12: two orders of the same operations differ by some last bits
    of a double, and 1 - a/b by one of 1 where it is close to 0 (the absolute part)."""
    rows = rows_of(name)
    assert len(rows) >= 15, "make the table again with tools/make_schedules.py"
    for row in rows:
        expected = row.pop("factors")
        for processes in (1, 2):
            found = make_schedules.factors(row, processes)[::processes]
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-15), row


def test_schedule_golden_table_is_that_of_its_script():
    table = [row for name in SCHEDULERS for row in rows_of(name)]
    stored = [{key: value for key, value in row.items() if key != "factors"} for row in table]
    assert stored == json.loads(json.dumps(make_schedules.cases()))


def test_accelerate_steps_it_as_often_as_there_are_processes(monkeypatch):
    """The reason for `processes`: read off accelerate itself, so that a change there is seen."""
    monkeypatch.setattr(AcceleratorState, "__init__", lambda self: setattr(self, "num_processes", 4))
    monkeypatch.setattr(GradientState, "sync_gradients", True, raising=False)
    optimizer = build()
    optimizer.step_was_skipped = False
    inner = build_scheduler(optimizer, options(lr_scheduler="linear"), 10, processes=4)
    wrapped = AcceleratedScheduler(inner, optimizer)
    seen = []
    for _ in range(10):
        seen.append(wrapped.get_last_lr()[0])
        optimizer.step()
        wrapped.step()
    assert seen == pytest.approx([0.1 * (1 - step / 10) for step in range(10)])


def test_warmup_as_a_share_of_the_steps():
    linear = build_scheduler(build(), options(lr_scheduler="constant_with_warmup", lr_warmup_steps=0.2), 50)
    assert rates(linear, 12) == pytest.approx([0.1 * min(1, step / 10) for step in range(12)])


def test_scheduler_resumes_from_its_state():
    straight, first, second = (build_scheduler(build(), options(lr_scheduler="cosine"), 10) for _ in range(3))
    whole = rates(straight, 10)
    assert rates(first, 4) == whole[:4]
    second.load_state_dict(first.state_dict())
    assert rates(second, 6) == whole[4:]


def test_custom_schedules():
    args = ("T_max=10", "eta_min=0.01")
    for name in ("CosineAnnealingLR", "torch.optim.lr_scheduler.CosineAnnealingLR"):
        scheduler = build_scheduler(build(), options(lr_scheduler_type=name, lr_scheduler_args=args), 10)
        assert rates(scheduler, 11)[-1] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr_scheduler_type": "CosineAnealingLR"}, "(did you mean 'CosineAnnealingLR'?)"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "is not a schedule of the step alone"),
        ({"lr_scheduler_type": "torch.nn.Linear"}, "is not a schedule of the step alone"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("T_max=1",)}, "StepLR rejects {'T_max': 1}"),
        ({"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ("T_max=0",)}, "rejects T_max=0 ("),
        (
            {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ("T_max='a'",)},
            "rejects T_max='a'",
        ),
        ({"lr_scheduler": "piecewise_constant"}, 'needs --lr_scheduler_args "step_rules='),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules='1;2'",)},
            "not of the form 1:10",
        ),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_args": ("num_cycles=2",)},
            "num_cycles is no argument of cosine",
        ),
        ({"lr_scheduler": "cosine_with_min_lr"}, "needs --lr_scheduler_min_lr_ratio"),
    ],
)
def test_bad_schedule_options_are_refused(changes, said):
    assert said in scheduler_refused(**changes)


def test_a_warmup_longer_than_the_run_is_told(caplog):
    build_scheduler(build(), options(lr_scheduler="linear", lr_warmup_steps=11), 10)
    assert "warm-up (11) and decay (0) are longer than the 10 steps" in caplog.text


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "piecewise_constant"])
def test_factors_stay_between_floor_and_one(name):
    for warmup, decay, steps in itertools.product((0, 1, 5), (0, 3), (1, 2, 10)):
        curve = schedule.Curve(steps, warmup=warmup, decay=decay, cycles=2, floor=0.1, end=0.01)
        values = [schedule.rate_factor(name, curve)(step) for step in range(steps + 3)]
        assert all(0 <= value <= 1 for value in values)


# ---------- the plan


@pytest.mark.parametrize(
    ("batches", "processes", "accumulation", "steps", "epochs", "expected"),
    [
        (10, 1, 1, 100, None, (100, 10)),
        (10, 1, 4, 5, None, (5, 2)),  # 20 micro-batches
        (1, 1, 4, 1000, None, (1000, 4000)),  # one image: a step takes four epochs
        (1, 1, 4, 1600, 10, (3, 12)),  # 10 epochs hold 2.5 steps; the last is a whole one
        (7, 2, 2, 1600, 2, (7, 2)),
        (3, 1, 1, 1600, 4, (12, 4)),
        (3, 1, 1, 2, None, (2, 1)),
    ],
)
def test_plan(batches, processes, accumulation, steps, epochs, expected):
    made = plan_run(batches, processes, accumulation, steps, epochs)
    assert (made.steps, made.epochs) == expected
    assert (made.epochs - 1) * batches < made.steps * accumulation <= made.epochs * batches


def test_steps_per_epoch_is_never_nothing():
    assert plan_run(1, 1, 4, 10).steps_per_epoch == 1
    assert plan_run(8, 1, 4, 10).steps_per_epoch == 2


def test_a_plan_without_batches_is_refused():
    with pytest.raises(Refused, match="an epoch has no batch"):
        plan_run(0, 1, 1, 10)
