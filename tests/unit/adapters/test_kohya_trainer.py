"""What a trainer that knows only the task's loss gets: gradients of penalties, or a refusal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from toys import base, network, probes

from lowrank.adapters import kohya_trainer
from lowrank.adapters.method import LORA_FACTOR, Method, Warmup
from lowrank.errors import Refused
from networks import lalora

PENALISED = probes()["penalty+rates"]
WARMED = Method("warmed", LORA_FACTOR, warmup=Warmup("stage", lambda *_: None))


def made():
    model = base("linear")
    return model, network("penalty+rates", model)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_penalty_is_the_gradient_that_it_is_in_the_loss(accumulated):
    torch.manual_seed(0)
    batches = [torch.randn(3, 5, 24) for _ in range(accumulated)]
    model, ours = made()
    losses = [model(x).square().mean() for x in batches]
    penalties = list(ours.penalties().values())
    (torch.stack(losses).mean() + torch.stack(penalties).sum()).backward()
    model, theirs = made()
    theirs.load_state_dict(ours.state_dict())
    theirs.prepare_network(SimpleNamespace(gradient_accumulation_steps=accumulated, mixed_precision="bf16"))
    for x in batches:  # as kohya's loop: the step's start, then a divided loss
        theirs.on_step_start(None, model)
        (model(x).square().mean() / accumulated).backward()
    assert penalties[0].item() > 0
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)


def test_a_penalty_of_strength_0_adds_nothing():
    model = base("linear")
    made = lalora.create_network(
        1.0, 4, 4.0, None, [], model, target=".", lalora_isotropic="True", lalora_lambda="0"
    )
    made.apply_to([], model, False, True)
    made.prepare_network(SimpleNamespace())
    made.on_step_start(None, model)
    assert all(parameter.grad is None for parameter in made.parameters())


def test_our_own_trainer_adds_penalties_itself():
    model, own = made()  # prepare_network is kohya's
    own.on_step_start(None, model)
    assert all(parameter.grad is None for parameter in own.parameters())


def test_what_kohya_cannot_do_is_refused():
    with pytest.raises(
        Refused, match=r"penalty\+rates adds the gradient of a penalty \(pull\), .*train with bf16 or no"
    ):
        kohya_trainer.check_trainer(PENALISED, SimpleNamespace(mixed_precision="fp16"))
    with pytest.raises(Refused, match=r"warmed needs a warm-up stage before step 0.*--network_weights"):
        kohya_trainer.check_trainer(WARMED, SimpleNamespace(network_weights=None))
    kohya_trainer.check_trainer(WARMED, SimpleNamespace(network_weights="warmed.safetensors"))
    with pytest.raises(Refused, match=r"abm_enabled needs the ABM stage .* --abm_enabled and give its file"):
        kohya_trainer.check_trainer(
            Method("plain", LORA_FACTOR), SimpleNamespace(network_args=["abm_enabled=True", "abm_steps=9"])
        )
    read = Method("plain", LORA_FACTOR, options={"abm_batch_size": 4})
    kohya_trainer.check_trainer(read, SimpleNamespace(network_args=["abm_batch_size=4"]))
    kohya_trainer.check_trainer(Method("plain", LORA_FACTOR), SimpleNamespace(mixed_precision="fp16"))
