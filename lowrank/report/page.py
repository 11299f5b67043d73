"""The report of one or several runs as one HTML file: no network, no library, readable on a phone."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from html import escape

from PIL import Image

from lowrank.errors import shortened
from lowrank.report.advice import advice
from lowrank.report.charts import bar_chart, line_chart
from lowrank.report.run_folder import Layer, Picture, Run, smooth, step_order

SIDE = 256  # pixels of a picture in the page
BINS = re.compile(r"t\d+-\d+$")
_STYLE = """
:root{--ink:#1b1f24;--paper:#fff;--faint:#8b949e;--card:#f5f7f9;
--c1:#0072b2;--c2:#d55e00;--c3:#009e73;--c4:#cc79a7;--c5:#b87900;--c6:#2f8fc4;--c7:#6f6f00;--c8:#444}
@media (prefers-color-scheme:dark){
:root{--ink:#e6edf3;--paper:#0f1318;--faint:#7d8590;--card:#171c23;
--c1:#56b4e9;--c2:#f0803c;--c3:#2fc79a;--c4:#e29cc4;--c5:#f0b63c;--c6:#9ad4f5;--c7:#d6d64a;--c8:#bbb}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:16px;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
svg{width:100%;height:auto;font-family:inherit}
h1{font-size:1.5rem;margin:.2em 0}
h2{font-size:1.15rem;margin:1.6em 0 .5em;border-bottom:1px solid var(--faint)}
.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
.card{background:var(--card);border-radius:8px;padding:10px;min-width:0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem}
td,th{text-align:left;padding:3px 12px 3px 0;vertical-align:top}
th{white-space:nowrap}td+td{overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem}
.pictures{display:flex;flex-wrap:wrap;gap:10px}
.pictures figure{margin:0;width:min(256px,45vw)}
.pictures img{width:100%;border-radius:4px;display:none}
.pictures img.shown{display:block}
.pictures img.small{image-rendering:pixelated}
figcaption{font-size:.8rem;color:var(--faint);overflow-wrap:anywhere}
input[type=range]{width:100%;accent-color:var(--c1)}
.note{border-left:4px solid var(--c2);padding-left:10px}
"""
_SCRIPT = """
for(const box of document.querySelectorAll('.samples')){const bar=box.querySelector('input');
const show=()=>{box.querySelectorAll('img').forEach(i=>i.classList.toggle('shown',i.dataset.at===bar.value));
box.querySelector('output').textContent=bar.dataset.steps.split(' ')[bar.value]};
bar.addEventListener('input',show);show()}
"""


def page(runs: Sequence[Run]) -> str:
    """The HTML text. Everything that comes from files is escaped."""
    title = " and ".join(run.name for run in runs)
    parts = [_overview(runs), _curves(runs)]
    for run in runs:
        heading = f"<h1>{escape(run.name)}</h1>" if len(runs) > 1 else ""
        parts += [heading, _next(run), _samples(run), _layers(run), _settings(run)]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n<script>{_SCRIPT}</script></body></html>\n"
    )


# ---------- parts


def _overview(runs: Sequence[Run]) -> str:
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for of in facts for name in of))
    rows = [[name, *(of.get(name, "") for of in facts)] for name in names]
    head = ["", *(run.name for run in runs)] if len(runs) > 1 else []
    return f"<h2>Overview</h2>{_table(head, rows)}"


def _facts(run: Run) -> dict[str, str]:
    losses, facts = run.losses, {"folder": str(run.folder)}
    if losses.get("step"):
        average = losses.get("avr_loss") or losses["loss"]
        facts["steps"] = f"{losses['step'][-1]:.0f}"
        facts["loss (moving average)"] = f"{average[-1]:.5g}, lowest {_least(average):.5g}"
    if run.validation.get("value"):
        facts["held-out loss"] = (
            f"{run.validation['value'][-1]:.5g}, lowest {_least(run.validation['value']):.5g}"
        )
    if seconds := run.summary.get("seconds"):
        speed = run.summary.get("images", 0) / seconds
        facts["time"] = f"{seconds / 60:.1f} minutes, {speed:.3g} images per second"
    if peak := run.summary.get("peak_gib"):
        predicted = run.summary.get("predicted_gib")
        facts["memory, peak"] = f"{peak:.2f} GiB" + (f", predicted {predicted:.2f}" if predicted else "")
    if run.layers:
        facts["adapted layers"] = str(len(run.layers))
    facts["files"] = ", ".join(path.name for _, path in run.adapters[-6:])
    return facts


def _curves(runs: Sequence[Run]) -> str:
    charts, several = [], len(runs) > 1

    def named(run: Run, name: str) -> str:
        return f"{run.name}: {name}" if several else name

    raw = {run.name: (run.losses["step"], run.losses["loss"]) for run in runs if run.losses.get("step")}
    width = {run.name: max(10, len(run.losses["step"]) // 50) for run in runs if run.losses.get("step")}
    if raw:
        smoothed = {
            named(run, f"mean of {width[run.name]} steps"): (steps, smooth(values, width[run.name]))
            for run in runs
            for steps, values in [raw.get(run.name, ([], []))]
            if steps
        }
        held_out = {
            named(run, "held out"): (run.validation["step"], run.validation["value"])
            for run in runs
            if run.validation.get("step")
        }
        charts.append(line_chart("Loss", smoothed, behind=raw, marks=held_out))
    for run in runs:
        steps = run.losses.get("step", [])
        bins = {name: (steps, smooth(run.losses[name], max(20, len(steps) // 25))) for name in run.losses
                if BINS.match(name) and not all(map(math.isnan, run.losses[name]))}  # fmt: skip
        if bins:
            charts.append(line_chart(named(run, "loss by timestep, 0 is the picture"), bins))
    rates = {
        named(run, "learning rate"): (run.losses["step"], run.losses["lr"])
        for run in runs
        if run.losses.get("lr")
    }
    if rates:
        charts.append(line_chart("Learning rate", rates))
    for run in runs:
        norms = {name: (run.norms["step"], values) for name, values in run.norms.items()
                 if name != "step" and not all(map(math.isnan, values))}  # fmt: skip
        if norms:
            title = "norm of the gradient" if list(norms) == ["norm/gradient"] else "norms"
            charts.append(line_chart(named(run, title), norms))
    cards = "".join(f'<div class="card">{chart}</div>' for chart in charts)
    return f'<h2>Curves</h2><div class="grid">{cards}</div>' if cards else ""


def _next(run: Run) -> str:
    sentences = advice(run)
    items = "".join(f'<p class="note">{escape(text)}</p>' for text in sentences)
    return f"<h2>What to try next</h2>{items}" if sentences else ""


def _samples(run: Run) -> str:
    if not run.pictures:
        return ""
    steps = sorted({picture.step for picture in run.pictures}, key=step_order)
    prompts = sorted({picture.prompt for picture in run.pictures})
    latest = {(p.prompt, p.step): p for p in run.pictures}
    figures = []
    for prompt in prompts:
        shown = [(at, latest[prompt, step]) for at, step in enumerate(steps) if (prompt, step) in latest]
        images = "".join(_image(picture, at) for at, picture in shown)
        figures.append(f"<figure>{images}<figcaption>{escape(_prompt(shown[-1][1]))}</figcaption></figure>")
    bar = (
        f'<label>after step <output></output> <input type="range" min="0" max="{len(steps) - 1}" '
        f'value="{len(steps) - 1}" data-steps="{escape(" ".join(steps))}"></label>'
    )
    return f'<h2>Samples</h2><div class="samples">{bar}<div class="pictures">{"".join(figures)}</div></div>'


def _prompt(picture: Picture) -> str:
    """The prompt that a sample's file records, at most 200 letters; else its number."""
    with Image.open(picture.path) as image:
        text = str(image.info.get("parameters", ""))
    return shortened(text.partition("\nSteps:")[0].strip() or f"prompt {picture.prompt + 1}", 200)


def _image(picture: Picture, at: int) -> str:
    """One picture as an element, scaled to at most `SIDE`; small ones are enlarged without blur."""
    with Image.open(picture.path) as image:
        small = image.convert("RGB")
    tiny = max(small.size) <= SIDE // 2
    if max(small.size) > SIDE:
        small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=92 if tiny else 82)
    return (
        f'<img class="{"small" if tiny else ""}" data-at="{at}" alt="prompt {picture.prompt + 1} after step '
        f'{escape(picture.step)}" src="data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}">'
    )


def _layers(run: Run) -> str:
    if not run.layers:
        return ""
    groups: dict[str, list[Layer]] = {}
    for layer in run.layers:
        groups.setdefault(_block(layer.name), []).append(layer)
    sizes = {block: math.sqrt(sum(layer.norm**2 for layer in layers)) for block, layers in groups.items()}
    ranks = {block: sum(x.effective for x in layers) / len(layers) for block, layers in groups.items()}
    charts = (
        bar_chart("Size of the change by block", sizes, "‖ΔW‖ of the block's layers together"),
        bar_chart("Effective rank by block", ranks, f"mean of (Σσ²)²/Σσ⁴; the rank is {run.layers[0].rank}"),
    )
    cards = "".join(f'<div class="card">{chart}</div>' for chart in charts)
    return f'<h2>Layers</h2><div class="grid">{cards}</div>'


def _block(name: str) -> str:
    """The block of a layer: the name up to its first number, at most 30 letters."""
    short = re.sub(r"^(lora_unet_|lora_|transformer\.|unet\.)", "", name)
    match = re.match(r"(te\d*|[a-z_.]*?[a-z])[_.](\d+)", short)
    return (f"{match[1]} {match[2]}" if match else short)[:30]


def _settings(run: Run) -> str:
    rows = [
        [name, str(value), "" if default is None else str(default)]
        for name, (value, default) in run.changed.items()
    ]
    table = _table(["flag", "value", "default"], rows)
    versions = "\n".join(run.versions)
    return (
        f"<h2>Settings that differ from the defaults</h2>{table}"
        "<details><summary>Command and versions</summary>"
        f"<pre>{escape(run.command)}\n\n{escape(versions)}</pre></details>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def _least(values: Sequence[float]) -> float:
    return min((value for value in values if not math.isnan(value)), default=math.nan)
