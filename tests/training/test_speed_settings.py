"""Compiled blocks and selective recomputation: the same numbers, no second compilation, less memory.

Most of a compilation is Inductor's C++. One test runs it, on a model of one block; the others stop before it, as what they look
at is decided by tracing, guards and the partitioner.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager_decomp_partition
from torch.profiler import ProfilerActivity, profile

from focusdpo.data import PairBatch
from focusdpo.models import Flux1, PromptEmbeddings, TokenLayout
from focusdpo.models.tiny_flux import write_tiny_flux
from focusdpo.training.adapter import add_adapter
from focusdpo.training.compilation import _Inductor, compile_blocks
from focusdpo.training.config import FocusConfig, LoraConfig, LossConfig, ModelConfig
from focusdpo.training.step import Noised, PreferenceStep
from focusdpo.training.trainer import Trainer
from tests.runs import rows_of, train

LORA = LoraConfig(rank=4, alpha=8, target_modules=["to_q", "to_k", "to_v"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were compiled, run as they were traced."""
    compiled = []

    def backend(graph, inputs, config_patches):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", backend)
    return compiled


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory):
    """A model with one block of each kind."""
    return write_tiny_flux(tmp_path_factory.mktemp("model") / "two-blocks", layers=(1, 1))


@pytest.fixture(scope="module")
def one_block(tmp_path_factory):
    return write_tiny_flux(tmp_path_factory.mktemp("model") / "one-block", layers=(0, 1))


def preference_step(model, focus=None, **options):
    """A step whose adapter is not zero, and its parameters; the blocks are compiled where there are options."""
    backbone = Flux1.from_pretrained(str(model), dtype=torch.float32, max_sequence_length=16)
    parameters = add_adapter(backbone, LORA, seed=0)
    for p in parameters:
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(0))
    if options:
        compile_blocks(backbone, **options)
    return PreferenceStep(backbone, focus or FocusConfig(match_count=0.3), LossConfig(), "torch"), parameters


def random_batch(pairs=1, target=(4, 6), references=((2, 3), (3, 3))):
    """A noised batch that no VAE and no text encoder has seen, with its pairs."""
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout(target, references)

    def normal(*shape):
        return torch.randn(2 * pairs, *shape, generator=generator)

    def pixels(grid):
        return torch.rand(pairs, 3, 16 * grid[0], 16 * grid[1], generator=generator)

    images = [pixels(grid) for grid in references]
    noised = Noised(
        tokens=normal(layout.num_target, 16),
        target=normal(layout.num_target, 16),
        t=torch.rand(pairs, generator=generator).repeat(2),
        clean=torch.zeros(2 * pairs, layout.num_target, 16),
        draws=None,
        references=normal(layout.num_reference, 16),
        prompts=PromptEmbeddings({"prompt_embeds": normal(16, 32), "pooled_prompt_embeds": normal(32)}),
        layout=layout,
    )
    masks = tuple(torch.ones_like(image[:, 0], dtype=torch.bool) for image in images)
    winner = pixels(target)
    return noised, PairBatch([], [], winner, pixels(target), tuple(images), masks, winner[:, 0] > 0.5)


def compare(step, parameters, batch):
    result = step.compare(*batch)
    return result, torch.autograd.grad(result.output.loss, parameters)


# Four steps. With references of one token all pairs have the same sizes.
SETTINGS = {
    "data.reference_resolution_multiple": 16, "max_steps": 4, "checkpoint_every": 2,
}  # fmt: skip


@pytest.fixture
def config(config, one_block):
    """With references of one token all pairs have the same sizes."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(one_block)), lora=LORA)


def run(config):
    trainer = train(config)
    return rows_of(config), trainer


def test_a_compiled_run(config, one_block, tmp_path):
    """Inductor itself: what eager blocks compute, and the same bits after a resume."""
    step, parameters = preference_step(one_block)
    compiled, others = preference_step(one_block, sizes_vary=False)
    batch = random_batch(1, (6, 6), ((1, 1), (1, 1)))  # as the run's
    (result, gradients), (second, other_gradients) = compare(step, parameters, batch), compare(compiled, others, batch)
    assert abs(result.output.logits) > 0.01, "policy and reference differ"
    torch.testing.assert_close(second.output.loss, result.output.loss, rtol=1e-5, atol=0)
    # A difference of errors, which a compiler rounds in other places on each kind of CPU.
    rounding = 1e-7 * float(result.output.policy_win.max())
    torch.testing.assert_close(second.output.margin, result.output.margin, rtol=1e-4, atol=rounding)
    assert torch.equal(second.focus.structure, result.focus.structure)
    torch.testing.assert_close(second.focus.mask, result.focus.mask, rtol=0, atol=1e-5)
    for a, b in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * float(a.abs().max()))

    config.model.compile = True
    straight, trainer = run(config)
    assert straight[-1]["loss"] != straight[0]["loss"]
    resume = str(Path(config.output_dir) / "checkpoints" / "step-000002")
    torch.manual_seed(12345)
    resumed, other = run(dataclasses.replace(config, output_dir=str(tmp_path / "resumed"), resume=resume))
    assert resumed == straight[2:]
    assert all(torch.equal(a, b) for a, b in zip(trainer.parameters, other.parameters, strict=True))


def test_kernels_round_as_eager_ones_do():
    """Policy and reference are fused differently: what they round may not depend on it."""
    x, a, b = torch.randn(3, 64, 64).bfloat16()

    def function(x, a, b):
        return (x * a + b) * a - x

    assert torch.equal(torch.compile(function, backend=_Inductor(None))(x, a, b), function(x, a, b))


def test_nothing_is_compiled_twice(graphs, tiny_flux):
    step, parameters = preference_step(tiny_flux, sizes_vary=False)
    batch, transformer = random_batch(), step.backbone.transformer
    transformer.train()
    compare(step, parameters, batch)
    known = len(graphs)
    assert known == 7, "policy and reference, first and later blocks of a kind"
    for focus in (FocusConfig(), FocusConfig(feature_source="reference", layers=[1, 2]), FocusConfig(mask="none")):
        for checkpointing in (True, False):
            switch = transformer.enable_gradient_checkpointing if checkpointing else transformer.disable_gradient_checkpointing
            switch()
            compare(PreferenceStep(step.backbone, focus, LossConfig(), "torch"), parameters, batch)
    assert len(graphs) == known
    for _ in range(2):
        transformer.eval()
        with torch.no_grad():
            step.compare(*batch)
        transformer.train()
        compare(step, parameters, batch)
        assert len(graphs) == 11, "evaluation adds its own, once"
    again, others = preference_step(tiny_flux, sizes_vary=False)
    again.backbone.transformer.train()
    compare(again, others, batch)
    assert len(graphs) == 11, "a second model of the same settings shares the graphs"


def test_sizes_that_vary_share_graphs(graphs, tiny_flux):
    step, parameters = preference_step(tiny_flux, sizes_vary=True)
    with torch._dynamo.config.patch(recompile_limit=1):  # what earlier runs in the process leave
        compare(step, parameters, random_batch())
        assert torch._dynamo.config.recompile_limit == 1, "the process's setting is as it was"
    assert len(graphs) == 7
    for sizes in [(1, (6, 6)), (3, (5, 7)), (2, (4, 6), ((1, 1),)), (1, (12, 12), ((7, 3), (2, 2), (1, 1)))]:
        compare(step, parameters, random_batch(*sizes))
    assert len(graphs) == 7


def test_the_trainer_knows_whether_sizes_vary(config, monkeypatch):
    seen = []
    monkeypatch.setattr("focusdpo.training.prepared_run.compile_blocks", lambda backbone, **options: seen.append(options))
    compiled = dataclasses.replace(config.model, compile=True, activation_budget=0.5)
    for model, batch_size, resolution in [
        (compiled, 1, 16),
        (compiled, 3, 16),  # of 8 pairs: the last batch is smaller
        (compiled, 1, 48),
        (config.model, 1, 16),
    ]:
        data = dataclasses.replace(config.data, batch_size=batch_size, reference_resolution_multiple=resolution)
        Trainer(dataclasses.replace(config, model=model, data=data, overwrite=True))
    assert seen == [{"sizes_vary": vary, "activation_budget": 0.5} for vary in (False, True, True)]


def test_activation_budget(monkeypatch, two_blocks):
    """Less is kept from a budget of 1 to 0, where it is what gradient checkpointing keeps; the gradient stays."""

    def partitioned(graph, inputs, config_patches):
        return aot_eager_decomp_partition(graph, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", partitioned)
    noised, _ = random_batch(2, (8, 8))
    kept, gradients = {}, {}
    for name in (1.0, 0.5, 0.0, "checkpointing"):
        options = {} if name == "checkpointing" else {"activation_budget": name}
        step, parameters = preference_step(two_blocks, **options)
        if name == "checkpointing":
            step.backbone.transformer.enable_gradient_checkpointing()

        def predict(predict=step.backbone.predict):
            return predict(noised.tokens, noised.t, noised.prompts, noised.references, noised.layout)

        predict()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            prediction = predict()
        kept[name] = sum(event.self_cpu_memory_usage for event in measured.key_averages())
        gradients[name] = torch.autograd.grad(prediction.square().sum(), parameters)
    assert kept[0.0] < 0.3 * kept[1.0] and kept[0.0] < 0.6 * kept[0.5] < 0.4 * kept[1.0]
    assert kept["checkpointing"] < 1.1 * kept[0.0]
    for name in (0.5, 0.0):
        assert all(torch.equal(a, b) for a, b in zip(gradients[1.0], gradients[name], strict=True))
    for a, b in zip(gradients[1.0], gradients["checkpointing"], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * float(a.abs().max()))
    assert torch._functorch.config.activation_memory_budget == 1, "PyTorch's setting is as it was"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_budget": 0.5, "gradient_checkpointing": False}, "got 0.5; expected none without model.compile=true"),
        ({"activation_budget": 0.5, "compile": True}, "got 0.5; expected none unless model.gradient_checkpointing=false"),
        ({"activation_budget": 1.5, "compile": True, "gradient_checkpointing": False}, "got 1.5; expected 0 to 1"),
    ],
)
def test_settings_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=f"model.activation_budget: {message}"):
        ModelConfig(path="x", **options)


def test_no_budget_with_dropout(config):
    model = dataclasses.replace(config.model, compile=True, activation_budget=0.5)
    with pytest.raises(ValueError, match=r"lora.dropout: got 0.1; expected 0 with model.activation_budget"):
        dataclasses.replace(config, model=model, lora=LoraConfig(dropout=0.1))
