"""Write tests/golden/schedules.json: the factor of every learning-rate schedule at every step.

python tools/make_schedules.py

tests/test_optim.py compares the schedules of the present code with the table. Make it again only where a
schedule is meant to change, and say so in the commit.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from lowrank.config.flag import SCHEDULERS  # noqa: E402
from lowrank.config.flags_training import Optimizer as Options  # noqa: E402
from lowrank.files import atomic  # noqa: E402
from lowrank.train.schedule import build_scheduler  # noqa: E402

TABLE = ROOT / "tests" / "golden" / "schedules.json"
AFTER = 3  # steps after the planned ones: --resume and max_train_epochs may go on that far
# what a schedule depends on besides the steps, the warm-up and the rate: (option, values)
EXTRA = {
    "cosine_with_restarts": {"lr_scheduler_num_cycles": (1, 2, 3)},
    "polynomial": {"lr_scheduler_power": (0.5, 1.0, 2.0)},
    "inverse_sqrt": {"lr_scheduler_timescale": (None, 1, 50)},
    "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": (0.0, 0.1), "lr_scheduler_num_cycles": (1, 3)},
    "warmup_stable_decay": {
        "lr_decay_steps": (0, 0.3, 5),
        "lr_scheduler_min_lr_ratio": (None, 0.1),
        "lr_scheduler_num_cycles": (1, 2),
    },
    "piecewise_constant": {
        "lr_scheduler_args": [
            (f"step_rules='{rules}'",) for rules in ("1:10,0.1:20,0.01", "0.1:3,1:2,.5", "2")
        ]
    },
}
RATES = {"polynomial": (1e-3, 1e-7, 1e-8)}  # it ends at 1e-7, so that its factor depends on the rate


def cases() -> list[dict]:
    """The rows of the table without their factors: schedule, steps, processes, options, rate."""
    rows = []
    for name in SCHEDULERS:
        extra = EXTRA.get(name, {})
        for steps, warmup in itertools.product((1, 8, 33), (0, 1, 5, 8, 0.2)):
            for values in itertools.product(*extra.values()):
                given = dict(zip(extra, values, strict=True))
                rows += [
                    {"name": name, "steps": steps, "rate": rate, "lr_warmup_steps": warmup, **given}
                    for rate in RATES.get(name, (1e-3,))
                ]
    return rows


def factors(case: dict, processes: int = 1) -> list[float]:
    """The factor on the rate at each step of a row and `AFTER` steps more."""
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in case.items()
    }
    name, steps, rate = (given.pop(key) for key in ("name", "steps", "rate"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    options = dataclasses.replace(Options(learning_rate=rate), lr_scheduler=name, **given)
    schedule: Any = build_scheduler(optimizer, options, steps, processes)
    return [float(schedule.lr_lambdas[0](step)) for step in range((steps + AFTER) * processes)]


def main() -> None:
    """The command line."""
    logging.disable(logging.WARNING)  # warm-ups longer than the run are rows too
    warnings.simplefilter("ignore")
    with atomic(TABLE) as part:
        rows = [json.dumps({**case, "factors": factors(case)}) for case in cases()]
        part.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
    print(f"{TABLE}: {len(rows)} rows")


if __name__ == "__main__":
    main()
