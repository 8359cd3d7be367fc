"""One training step recomputed in float64 from docs/method.md alone, with every switch at a value where it matters.

Here stand the equations once more, written out pair by pair and independent of the package: of it, only the model's own call
and its encoders are used. The policy's adapter has moved, so that no margin is 0.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.nn import functional as F

from focusdpo.data import Encodings, LongestSide, PairBatch
from focusdpo.models import Flux1, TokenLayout
from focusdpo.models.tiny_flux import write_tiny_flux
from focusdpo.training.adapter import add_adapter
from focusdpo.training.config import FocusConfig, LoraConfig, LossConfig
from focusdpo.training.seeding import fixed_round_robin_places, round_robin_places
from focusdpo.training.step import PreferenceStep

GRID, REFERENCES, PATCH = (4, 6), ((2, 3), (3, 3)), 16
PAIRS, SEED = 3, 5  # another number of pairs than of subjects


def smooth(*shape, seed):
    """Random pixels in [0, 1] whose patches differ in complexity: flat ones beside noisy ones."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[-2] // PATCH, shape[-1] // PATCH
    level = (
        torch.rand(*shape[:-2], rows, columns, generator=generator).repeat_interleave(PATCH, -1).repeat_interleave(PATCH, -2)
    )
    amount = torch.rand(*shape[:-2], rows, columns, generator=generator).repeat_interleave(PATCH, -1)
    noise = torch.randn(*shape, generator=generator) * amount.repeat_interleave(PATCH, -2) ** 3
    # 8 bits, as files have them: no value is so near to a bin's edge that fp32 and float64 would differ.
    return ((level + 0.3 * noise).clamp(0, 1) * 255).round() / 255


@pytest.fixture(scope="module")
def batch():
    height, width = (side * PATCH for side in GRID)
    masks = [torch.zeros(PAIRS, side[0] * PATCH, side[1] * PATCH, dtype=torch.bool) for side in REFERENCES]
    masks[0][0, :20, 3:40] = True  # covers no token in its second row by half
    masks[0][1] = True
    masks[1][0, 10:30, 10:30] = True
    masks[1][1, 2:5, 2:5] = True  # covers none by half: its best token counts
    masks[0][2, :, 20:] = True
    masks[1][2, 8:40] = True
    prior = torch.zeros(PAIRS, 2, height, width, dtype=torch.bool)
    prior[0, 0, :40, :40] = True
    prior[0, 1, 20:, 50:] = True
    prior[1, 0, 8:48, 16:56] = True
    prior[1, 1, 30:64, 0:60] = True  # overlaps the other subject's
    prior[2, 0, :, :30] = True
    prior[2, 1, :24, 40:90] = True
    winner = smooth(PAIRS, 3, height, width, seed=1)
    loser = torch.where(prior.any(1)[:, None], smooth(PAIRS, 3, height, width, seed=2), winner)
    references = tuple(smooth(PAIRS, 3, side[0] * PATCH, side[1] * PATCH, seed=3 + i) for i, side in enumerate(REFERENCES))
    return PairBatch([3, 7, 4], ["a cat and a cup", "a dog", "two cups"], winner, loser, references, tuple(masks), prior)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The step's backbone in fp32 with a moved adapter; and in float64 the policy, and the base without any adapter."""
    path = str(write_tiny_flux(tmp_path_factory.mktemp("model") / "flux", layers=(2, 2)))

    def load():
        return Flux1.from_pretrained(path, dtype=torch.float32, max_sequence_length=16)

    ours = load()
    generator = torch.Generator().manual_seed(9)
    for parameter in add_adapter(ours, LoraConfig(rank=4, alpha=12), seed=0):
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    policy, base = copy.deepcopy(ours.transformer).double(), load().transformer.double()
    return SimpleNamespace(ours=ours, policy=policy, base=base, encodings={})


# --- The model: E2's noised tokens through it, and the hidden states of its blocks.


def run(transformer, models, tokens, t, given, blocks):
    """Prediction [2B, P, C], and the image streams [2B, P + Q, D] after the blocks of these numbers, in float64."""
    alone = Flux1(SimpleNamespace(transformer=transformer, components={}), max_sequence_length=16)
    layers = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    streams = {}
    handles = [
        layers[number].register_forward_hook(
            lambda module, args, output, number=number: streams.update({number: output[1].detach()})
        )
        for number in blocks
    ]
    prediction = alone.predict(tokens, t, given.prompts, given.references, TokenLayout(GRID, REFERENCES))
    for handle in handles:
        handle.remove()
    return prediction, [streams[number] for number in blocks]


def conditioning(models, batch):
    """Clean tokens of winners and losers, references and text, by the backbone's own encoders, brought to float64."""
    ours = models.ours
    if not models.encodings:
        with torch.no_grad():
            models.encodings["win"], models.encodings["lose"] = (
                torch.cat([ours.encode_images(image[None]) for image in images]).double()
                for images in (batch.winner, batch.loser)
            )
            references = [torch.cat([ours.encode_images(one[None]) for one in images]) for images in batch.references]
            models.encodings["references"] = torch.cat(references, dim=1).double()
            models.encodings["text"] = ours.encode_prompts(batch.prompts)
    known = models.encodings
    text = known["text"].to(torch.device("cpu"), torch.float64).repeat(2)
    return known["win"], known["lose"], SimpleNamespace(prompts=text, references=known["references"].repeat(2, 1, 1))


# --- Times and noise.


def times_of(loss, generator, turns, shift):
    """docs/method.md, E2's times: t, of each pair."""
    if isinstance(loss.times, list):
        if loss.time_order == "round_robin":
            return torch.tensor([loss.times[turn % len(loss.times)] for turn in turns])
        return torch.tensor([loss.times[i] for i in torch.randint(len(loss.times), (len(turns),), generator=generator)])
    if loss.times == "uniform":
        t = torch.rand(len(turns), generator=generator)
    else:
        t = torch.sigmoid(torch.normal(loss.logit_mean, loss.logit_std, (len(turns),), generator=generator))
    return shift * t / (1 + (shift - 1) * t)


# --- E3 to E8, one pair at a time, in float64.


def tokens_inside(mask):
    """A pixel mask [H, W] on the token grid [P]: covered by half, or, if none is, covered as much as the best."""
    cells = share_inside(mask)
    bar = min(0.5, float(cells.max()))
    return (cells >= bar) & (cells > 0)


def share_inside(mask):
    """The share of each token [P] that a pixel mask [H, W] covers."""
    height, width = mask.shape
    return mask.double().reshape(height // PATCH, PATCH, width // PATCH, PATCH).mean((1, 3)).reshape(-1)


def similarity(streams, reference_masks, pooling):
    """E3, E4: S [R, P], or E4' with "max"."""
    targets = GRID[0] * GRID[1]
    scores = []
    for r, mask in enumerate(reference_masks):
        start = targets + sum(len(other) for other in reference_masks[:r])
        layers = []
        for stream in streams:
            own = stream[start : start + len(mask)][mask]
            if pooling == "reference":
                own = own.mean(0, keepdim=True)
            layers.append(torch.stack([F.cosine_similarity(own, token[None]).max() for token in stream[:targets]]))
        scores.append(sum(layers) / len(layers))
    return torch.stack(scores)


def entropy(image, method, bins, sigma):
    """E7: H [P] of pixels [3, H, W]."""
    red, green, blue = image.double()
    gray = 0.2989 * red + 0.587 * green + 0.114 * blue
    values = []
    for i in range(GRID[0]):
        for j in range(GRID[1]):
            patch = gray[i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH].reshape(-1)
            if method == "kde":
                centres = torch.linspace(0, 1, bins, dtype=torch.float64)
                q = torch.exp(-(((patch[:, None] - centres) / sigma) ** 2) / 2).mean(0)
            else:
                q = torch.bincount((patch * bins).long().clamp(max=bins - 1), minlength=bins).double()
            q = q / q.sum()
            values.append(-sum(p * math.log(p) for p in q.tolist() if p > 0))
    return torch.tensor(values, dtype=torch.float64)


def aligned_by_estimate(prediction, noised, t, winner, loser, kappa):
    """E10: the tokens [P] whose estimate x_t - t v of the clean image has come more than kappa of the way to the winner."""
    found = []
    for v, x, good, bad in zip(prediction, noised, winner, loser, strict=True):
        way = good - bad
        share = float(((x - t * v - bad) * way).sum() / (way**2).sum()) if way.any() else 0.5
        found.append(share > kappa)
    return torch.tensor(found)


def field(scores, aligned, priors, image, reference_masks, focus, draws):
    """E5 to E8: M [P] and A of one image, from S [R, P] or from the tokens that an estimate calls aligned."""
    union = priors.any(0)
    if aligned is not None:
        return blend(union & ~aligned, union, image, focus)
    matched = torch.zeros_like(priors)
    for r, row in enumerate(scores):
        count = {"reference": int(reference_masks[r].sum()), "prior": int(priors[r].sum())}.get(
            focus.match_count, focus.match_count
        )
        if isinstance(count, float):
            count = round(count * len(row))
        best = sorted(range(len(row)), key=lambda p: (-float(row[p]), p))[:count]
        matched[r, best] = True
    structure = (priors & ~matched).any(0) if focus.per_subject else union & ~matched.any(0)
    if focus.source == "random":  # as many tokens of the prior: those with the smallest draws
        first = sorted((p for p in range(len(union)) if union[p]), key=lambda p: float(draws[p]))[: int(structure.sum())]
        structure = torch.zeros_like(structure)
        structure[first] = True
    return blend(structure, union, image, focus)


def blend(structure, union, image, focus):
    """E7, E8."""
    coverage = float(structure.sum()) / max(int(union.sum()), 1)
    if coverage > focus.tau:
        return structure.double(), coverage
    h = entropy(image, focus.entropy_method, focus.entropy_bins, focus.entropy_sigma)
    detail = (h - h.min()) / (h.max() - h.min()) * union
    return focus.gamma * structure + (1 - focus.gamma) * detail, coverage


# --- E9, E1 and the family.


def error(prediction, target, mask, loss):
    """e(x) of one sample."""
    weight = mask[:, None].expand_as(prediction) ** loss.mask_power
    total = (weight * (target - prediction) ** 2).sum()
    if loss.reduction == "sum":
        return total
    size = prediction.numel() if loss.reduction == "mean" else float(weight.sum())
    return total / size if size else 0 * total


def preference(logit, scaled, winner_error, weight, loss, beta):
    """The loss of one pair: of its logit; scaled is the logit over beta."""
    if loss.loss_type == "sigmoid":
        kept = -(1 - loss.label_smoothing) * F.logsigmoid(logit)
        return kept - loss.label_smoothing * F.logsigmoid(-logit)
    if loss.loss_type == "hinge":
        return torch.relu(1 - logit)
    if loss.loss_type == "ipo":
        return (2 * scaled - 1 / beta) ** 2
    return weight * winner_error


def recompute(models, batch, focus, loss, *, beta=None, seeds=(SEED,), turns=(0, 1, 2), shift=None):
    """Loss, gradient of the adapter, and everything between, of the step with these settings."""
    beta = loss.beta if beta is None else beta
    clean_win, clean_lose, given = conditioning(models, batch)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shares = [PAIRS // len(seeds)] * len(seeds)
    shift = loss.shift if shift is None else shift
    t = torch.cat(
        [times_of(loss, g, turns[i * n : (i + 1) * n], shift) for i, (g, n) in enumerate(zip(generators, shares, strict=True))]
    )
    eps = torch.cat(
        [torch.randn(n, *clean_win.shape[1:], generator=g) for g, n in zip(generators, shares, strict=True)]
    ).double()
    at = t.double()[:, None, None]
    noised = torch.cat([(1 - at) * x + at * eps for x in (clean_win, clean_lose)])
    target = torch.cat([eps - clean_win, eps - clean_lose])

    blocks = list(range(4)) if focus.layers == "all" else focus.layers
    both = t.double().repeat(2)
    policy, policy_streams = run(models.policy, models, noised, both, given, blocks)
    with torch.no_grad():
        reference, reference_streams = run(models.base, models, noised, both, given, blocks)
    streams = policy_streams if focus.feature_source == "policy" else reference_streams

    priors = torch.stack([torch.stack([tokens_inside(one) for one in pair]) for pair in batch.prior])  # [B, R, P]
    ones = torch.ones(GRID[0] * GRID[1], dtype=torch.float64)
    masks, coverage = [], []
    for i in range(PAIRS):
        reference_masks = [tokens_inside(images[i]) for images in batch.reference_masks]
        sides = []
        for row, image in ((i, batch.winner[i]), (PAIRS + i, batch.loser[i])):
            if focus.mask == "none":
                sides.append((ones, None))
            elif focus.mask == "prior":
                sides.append((priors[i].any(0).double(), None))
            else:
                scores = similarity([stream[row] for stream in streams], reference_masks, focus.pooling)
                if focus.source == "truth":
                    scores = torch.stack([share_inside(one) for one in batch.prior[i]])
                aligned = None
                if focus.source == "estimate":
                    seen = policy.detach() if focus.feature_source == "policy" else reference
                    clean = clean_win[i], clean_lose[i]
                    aligned = aligned_by_estimate(seen[row], noised[row], both[row], *clean, focus.kappa)
                bits = int(eps[i, 0, 0].float().view(torch.int32)) % 2**32
                draws = torch.rand(len(ones), generator=torch.Generator().manual_seed(bits))
                sides.append(field(scores, aligned, priors[i], image, reference_masks, focus, draws))
        coverage.append(sides[0][1])
        masks.append((sides[0][0], sides[1][0] if focus.mask_from == "each" else sides[0][0]))

    win, lose = ([policy[i + k].detach().requires_grad_() for i in range(PAIRS)] for k in (0, PAIRS))
    out = {name: [] for name in ("logits", "margin", "policy_win", "policy_lose", "reference_win", "reference_lose")}
    chosen, anchors, scales = [], [], []
    units = []  # (pair, what of the image counts), for each sigmoid
    for i in range(PAIRS):
        shown = [ones] if loss.granularity == "image" else [one.double() for one in priors[i]]
        units += [(i, one, len(shown)) for one in shown]
    gradients = []
    for i, shown, count in units:
        weight = (1 - t.double()[i]) ** 2 if loss.timestep_weight == "noise" else torch.tensor(1.0, dtype=torch.float64)
        own = [mask * shown for mask in masks[i]]
        errors = [
            error(x, target[i + k * PAIRS], own[k], loss)
            for x, k in ((win[i], 0), (lose[i], 1), (reference[i], 0), (reference[PAIRS + i], 1))
        ]
        margin = (errors[0] - errors[2]) - (errors[1] - errors[3])
        logit = -(beta / 2) * weight * margin
        chosen.append(preference(logit, logit / beta, errors[0], weight, loss, beta) / count)
        drift = ((win[i] - reference[i]) ** 2).mean() + ((lose[i] - reference[PAIRS + i]) ** 2).mean()
        anchors.append((loss.winner_anchor * errors[0] + loss.reference_anchor / 2 * drift) / count)
        for name, value in zip(out, (logit, margin, *errors), strict=True):
            out[name].append(value.detach())
        # SDPO's g = M (prediction - target), in the reduction's measure.
        sides = [
            (own[k][:, None] ** loss.mask_power, x.detach() - target[i + k * PAIRS]) for x, k in ((win[i], 0), (lose[i], 1))
        ]
        scale = [float(e.detach() / (m * d**2).sum()) for e, (m, d) in zip(errors[:2], sides, strict=True)]
        gradients.append([s * m * d for s, (m, d) in zip(scale, sides, strict=True)])
    norms = [float((g[0] ** 2).sum()) for g in gradients]
    inner = [float((g[0] * g[1]).sum()) for g in gradients]
    if loss.loser_scale == "sdpo_batch":
        norms, inner = [sum(norms)] * len(units), [sum(inner)] * len(units)
    scales = [min(1, (1 - loss.sdpo_mu) * n / p) if p > 0 else 1 for n, p in zip(norms, inner, strict=True)]
    if loss.loser_scale is None:
        scales = [1] * len(units)

    total = (sum(chosen) + sum(anchors)) / PAIRS
    of_anchors = torch.autograd.grad(sum(anchors) / PAIRS, [*win, *lose], allow_unused=True, retain_graph=True)
    incoming = torch.zeros_like(policy)
    for i, gradient in enumerate(of_anchors):
        if gradient is not None:
            incoming[i] += gradient
    for (i, _, _), one, scale in zip(units, chosen, scales, strict=True):
        of_win, of_lose = torch.autograd.grad(one / PAIRS, [win[i], lose[i]], allow_unused=True, retain_graph=True)
        for row, gradient, factor in ((i, of_win, 1), (PAIRS + i, of_lose, scale)):
            if gradient is not None:
                incoming[row] += factor * gradient
    named = {name: p for name, p in models.policy.named_parameters() if "lora_" in name}
    adapter = torch.autograd.grad(policy, list(named.values()), incoming)
    return SimpleNamespace(
        loss=total.detach(),
        gradient=dict(zip(named, adapter, strict=True)),
        mask=torch.stack([m[0] for m in masks]),
        coverage=coverage,
        t=t,
        scales=scales,
        **{name: torch.stack(values).reshape(PAIRS, -1).squeeze(1) for name, values in out.items()},
    )


# --- Settings. Together they give every switch a value at which it matters, which is a test of its own.

FOCUS = {
    "default": {},
    "structure": {"tau": 0.2, "match_count": 3},
    "detail": {"tau": 0.9, "gamma": 0.6},
    "prior": {"mask": "prior"},
    "none": {"mask": "none"},
    "prior's count": {"match_count": "prior", "tau": 0.3},
    "a share": {"match_count": 0.3, "tau": 0.1},
    "per subject": {"per_subject": True, "match_count": 5, "tau": 0.9},
    "each its own": {"mask_from": "each", "tau": 0.9},
    "of the reference": {"feature_source": "reference", "match_count": 4},
    "each of the reference": {"feature_source": "reference", "mask_from": "each", "match_count": 4},
    "estimate": {"source": "estimate", "tau": 0.9, "kappa": 0.55},
    "estimate of the reference": {"source": "estimate", "feature_source": "reference", "tau": 0.0},
    "random": {"source": "random", "match_count": 4, "tau": 0.2},
    "random, per subject": {"source": "random", "per_subject": True, "match_count": 5, "tau": 0.2},
    "truth": {"source": "truth", "match_count": 4, "tau": 0.2},
    "best token": {"pooling": "max", "match_count": 4, "tau": 0.2},
    "two blocks": {"layers": [3, 1], "match_count": 6},
    "histogram": {"entropy_method": "histogram", "tau": 0.9},
    "bins": {"entropy_bins": 12, "tau": 0.9},
    "sigma": {"entropy_sigma": 0.05, "tau": 0.9},
}
LOSS = {
    "a sigmoid for each subject": {"granularity": "subject"},
    "each subject's sdpo": {
        "granularity": "subject", "reduction": "masked_mean", "beta": 2.0, "loser_scale": "sdpo", "sdpo_mu": 0.6,
        "winner_anchor": 0.2, "reference_anchor": 0.3, "label_smoothing": 0.1,
    },
    "sum": {"reduction": "sum", "beta": 0.05},
    "masked mean": {"reduction": "masked_mean", "beta": 2.0},
    "inside the norm": {"mask_power": 2},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "sft": {"loss_type": "sft", "timestep_weight": "noise"},
    "smoothing": {"label_smoothing": 0.2},
    "winner's anchor": {"winner_anchor": 0.7},
    "reference's anchor": {"reference_anchor": 0.9},
    "sft with an anchor": {"loss_type": "sft", "reference_anchor": 0.9},
    "sdpo": {"loser_scale": "sdpo", "sdpo_mu": 0.6},
    "sdpo of a batch": {"loser_scale": "sdpo_batch", "sdpo_mu": 0.6, "reference_anchor": 0.3},
    "noise weight": {"timestep_weight": "noise"},
    "mean and spread of t": {"logit_mean": 0.8, "logit_std": 0.4},
    "uniform": {"times": "uniform"},
    "listed": {"times": [0.3, 0.9, 0.6]},
    "in turn": {"times": [0.3, 0.9, 0.6], "time_order": "round_robin"},
    "shifted": {"shift": 3.0},
}  # fmt: skip
BETA = 40.0
DETAIL = {"tau": 0.9, "gamma": 0.6}  # M between 0 and 1, so that its power matters
CASES = {
    **{name: (focus, {}) for name, focus in FOCUS.items()},
    **{name: (DETAIL, loss) for name, loss in LOSS.items()},
    "all at once": (
        {"tau": 0.9, "gamma": 0.6, "mask_from": "each", "feature_source": "reference", "per_subject": True, "layers": [0, 3]},
        {"reduction": "masked_mean", "beta": 2.0, "mask_power": 2, "label_smoothing": 0.1, "winner_anchor": 0.2,
         "loser_scale": "sdpo", "sdpo_mu": 0.3, "timestep_weight": "noise", "shift": 2.0},
    ),
}  # fmt: skip


def settings(name):
    focus, loss = CASES[name]
    return FocusConfig(**focus), LossConfig(**{"beta": BETA} | loss)


def close(ours, truth, scale=None):
    scale = float(truth.abs().max()) if scale is None else scale
    torch.testing.assert_close(ours.double(), truth.double(), rtol=2e-4, atol=2e-5 * scale)


def check(result, truth, backbone):
    """All that a step gives against the truth, and the adapter's gradient."""
    output = result.output
    close(output.loss, truth.loss)
    for name in ("logits", "margin", "policy_win", "policy_lose", "reference_win", "reference_lose"):
        close(getattr(output, name), getattr(truth, name))
    close(output.accuracy, (truth.logits > 0).double().mean())
    close(result.t, truth.t)
    if truth.coverage[0] is not None:
        close(result.focus.coverage, torch.tensor(truth.coverage))
        torch.testing.assert_close(result.focus.mask.double(), truth.mask, rtol=0, atol=1e-5)
    assert truth.margin.abs().max() > 1e-3, "the adapter has moved"
    named = {name: p for name, p in backbone.transformer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(output.loss, list(named.values()), allow_unused=True)
    largest = max(float(g.abs().max()) for g in truth.gradient.values())
    assert named.keys() == truth.gradient.keys() and largest > 0
    for name, gradient in zip(named, gradients, strict=True):
        close(gradient, truth.gradient[name], largest)


@pytest.mark.parametrize("name", CASES)
def test_a_step(models, batch, name):
    focus, loss = settings(name)
    step = PreferenceStep(models.ours, focus, loss)
    truth = recompute(models, batch, focus, loss)
    check(step(batch, torch.Generator().manual_seed(SEED)), truth, models.ours)


def test_every_switch_matters(models, batch):
    """Each setting differs from its default in a case whose loss or gradient would be another one with the default."""

    def differs(name, which, field):
        focus, loss = settings(name)
        config = {"focus": focus, "loss": loss}
        default = field.default if field.name != "beta" else BETA / 2
        changed = {field.name: default} | ({"sdpo_mu": 0.0} if field.name == "loser_scale" else {})
        try:
            other = {**config, which: dataclasses.replace(config[which], **changed)}
        except ValueError:  # no setting by itself
            return False
        ours, theirs = (recompute(models, batch, c["focus"], c["loss"]) for c in (config, other))
        same = torch.allclose(ours.loss, theirs.loss, rtol=1e-3, atol=0)
        return not same or any(
            not torch.allclose(g, theirs.gradient[n], rtol=1e-2, atol=1e-3 * float(g.abs().max()))
            for n, g in ours.gradient.items()
        )

    # The trainer's own: how beta moves, and that draws come again.
    elsewhere = {"auto_beta", "draws"}
    for which, kind in (("focus", FocusConfig), ("loss", LossConfig)):
        for field in dataclasses.fields(kind):
            if field.name in elsewhere:
                continue
            index = 0 if which == "focus" else 1
            cases = [name for name, case in CASES.items() if field.name in case[index]] or ["default"]
            if not any(differs(name, which, field) for name in cases):
                pytest.fail(f"no case in which {which}.{field.name} makes a difference: {cases}")


def test_sdpo_bites_and_tells_pairs_from_batches(models, batch):
    """The cases above say something: factors below 1, and another one for the whole batch."""
    per_pair, whole = (recompute(models, batch, *settings(name)).scales for name in ("sdpo", "sdpo of a batch"))
    assert min(per_pair) < 0.9 and whole[0] == whole[1] < 0.9 and per_pair[0] != pytest.approx(per_pair[1], rel=0.01)


def test_beta_may_move(models, batch):
    focus, loss = settings("detail")
    step = PreferenceStep(models.ours, focus, loss)
    step.beta = 11.0
    check(step(batch, torch.Generator().manual_seed(SEED)), recompute(models, batch, focus, loss, beta=11.0), models.ours)


def test_a_generator_for_each_pair(models, batch):
    focus, loss = settings("detail")
    result = PreferenceStep(models.ours, focus, loss)(batch, [torch.Generator().manual_seed(seed) for seed in (4, 8, 2)])
    check(result, recompute(models, batch, focus, loss, seeds=(4, 8, 2)), models.ours)


def test_turns(models, batch):
    """Pairs get the time whose turn it is; without numbers they count from 0."""
    focus, loss = settings("in turn")
    step = PreferenceStep(models.ours, focus, loss)
    for turns in ((4, 5, 6), (2, 7, 0)):
        result = step(batch, torch.Generator().manual_seed(SEED), round_robin=turns)
        check(result, recompute(models, batch, focus, loss, turns=turns), models.ours)
    each = step(batch, [torch.Generator().manual_seed(seed) for seed in (4, 8, 2)], round_robin=(4, 5, 9))
    check(each, recompute(models, batch, focus, loss, seeds=(4, 8, 2), turns=(4, 5, 9)), models.ours)
    assert each.t.tolist() == pytest.approx([0.9, 0.6, 0.3])
    assert round_robin_places(10, 3, 2) == [13, 14], "each epoch begins one further"
    assert fixed_round_robin_places([4, 9], 2) == [6, 11]


def test_given_times_are_taken(models, batch):
    step = PreferenceStep(models.ours, *settings("default"))
    assert step(batch, torch.Generator(), t=torch.tensor([0.25, 0.75, 0.5])).t.tolist() == [0.25, 0.75, 0.5]


def test_the_reference_given_is_the_reference_computed(models, batch):
    """For every source of the mask, what the reference cache keeps gives the same bits."""
    for name in ("default", "of the reference", "each of the reference", "prior"):
        step = PreferenceStep(models.ours, *settings(name))
        noised = step.noise(batch, torch.Generator().manual_seed(SEED))
        kept = step.reference_output(noised, batch)
        first, second = step.compare(noised, batch), step.compare(noised, batch, kept)
        assert torch.equal(first.output.loss, second.output.loss) and torch.equal(first.output.margin, second.output.margin)
        assert not kept.prediction.requires_grad
        other = dataclasses.replace(kept, prediction=kept.prediction + 0.1)
        third = step(batch, torch.Generator().manual_seed(SEED), reference=other)
        assert not torch.allclose(third.output.margin, first.output.margin), "what is given is used"


def test_masks_and_predictions_are_the_steps_own(models, batch):
    """What masks, samples and ablation look at is what the loss uses; groups of blocks are told apart."""
    for name in ("detail", "of the reference"):
        focus, loss = settings(name)
        step = PreferenceStep(models.ours, focus, loss)
        result = step(batch, torch.Generator().manual_seed(SEED), t=torch.full((PAIRS,), 0.4))
        masks = step.masks(batch, 0.4, SEED)
        assert masks.keys() == {"all"} and torch.equal(masks["all"].mask, result.focus.mask)
        grouped = step.masks(batch, 0.4, SEED, {"late": step.paths[2:], "all": step.paths})
        assert torch.equal(grouped["all"].scores, result.focus.scores)
        assert not torch.allclose(grouped["late"].scores, result.focus.scores)
        noised = step.noise(batch, torch.Generator().manual_seed(SEED), torch.full((PAIRS,), 0.4))
        policy, reference, focus = step.predictions(noised, batch)
        assert torch.equal(focus.scores, result.focus.scores) and not policy.requires_grad
        again = step.reference_output(noised, batch).prediction
        assert torch.equal(reference.prediction, again) and not torch.allclose(policy, again)
        assert torch.equal(policy, step.predict(noised))
        known = dataclasses.replace(reference, prediction=reference.prediction + 1)
        same, kept, focus = step.predictions(noised, batch, known)
        assert torch.equal(same, policy) and kept is known and torch.equal(focus.scores, result.focus.scores)


def test_only_the_loss_carries_a_gradient(models, batch):
    output = PreferenceStep(models.ours, *settings("default"))(batch, torch.Generator().manual_seed(SEED)).output
    assert output.loss.requires_grad
    assert output.present is None and not any(value.requires_grad for value in output[1:-1])


def test_the_pipelines_own_shift(models, batch, monkeypatch):
    """With "auto" it is the scheduler's for as many tokens as the target has."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    monkeypatch.setattr(models.ours.pipeline, "scheduler", scheduler)
    shift = math.exp(0.5 + (GRID[0] * GRID[1] - 256) * (1.15 - 0.5) / (4096 - 256))
    focus, loss = settings("detail")
    result = PreferenceStep(models.ours, focus, dataclasses.replace(loss, shift="auto"))(
        batch, torch.Generator().manual_seed(SEED)
    )
    check(result, recompute(models, batch, focus, loss, shift=shift), models.ours)


def test_a_tap_pools_as_it_is_told(models, batch):
    """E4': the best matching reference token, of winners and losers."""
    step = PreferenceStep(models.ours, *settings("two blocks"))
    noised = step.noise(batch, torch.Generator().manual_seed(SEED))
    taps = [
        step.tap(noised, batch, ["transformer_blocks.1"], "max", each=True),
        step.tap(noised, batch, ["transformer_blocks.1"]),
    ]
    streams = []
    handle = models.ours.transformer.transformer_blocks[1].register_forward_hook(lambda m, a, output: streams.append(output[1]))
    with torch.no_grad():
        step.predict(noised, taps)
    handle.remove()
    targets, start = GRID[0] * GRID[1], GRID[0] * GRID[1]
    for r, (rows, columns) in enumerate(REFERENCES):
        for i in range(2 * PAIRS):
            inside = tokens_inside(batch.reference_masks[r][i % PAIRS])
            reference, target = streams[0][i, start : start + rows * columns][inside].double(), streams[0][i, :targets].double()
            cosines = F.cosine_similarity(reference[:, None], target[None], dim=-1)
            torch.testing.assert_close(taps[0].scores()[i, r].double(), cosines.amax(0), rtol=0, atol=1e-5)
            if i < PAIRS:
                pooled = F.cosine_similarity(reference.mean(0)[None], target, dim=-1)
                torch.testing.assert_close(taps[1].scores()[i, r].double(), pooled, rtol=0, atol=1e-5)
        start += rows * columns


def test_the_backend_reaches_every_kernel(models, batch):
    """One that does not exist is refused by each of them."""
    step = PreferenceStep(models.ours, *settings("default"), backend="none such")
    noised = step.noise(batch, torch.Generator().manual_seed(SEED))
    for call in (
        lambda: step.predict(noised, [step.tap(noised, batch)]),
        lambda: step.mask_of(torch.zeros(PAIRS, 2, GRID[0] * GRID[1]), batch),
        lambda: PreferenceStep(models.ours, *settings("none"), backend="none such").compare(noised, batch),
    ):
        with pytest.raises(ValueError, match="none such"):
            call()


def test_a_block_that_is_not_there_is_refused(models):
    for layers in ([0, 4], [-1]):
        with pytest.raises(ValueError, match=rf"focus.layers: the model has blocks 0 to 3, got {layers[-1]}"):
            PreferenceStep(models.ours, FocusConfig(layers=layers), LossConfig())


def test_one_prior_for_all_subjects(models, batch):
    """[B, H, W] is the union that several priors make."""
    union = dataclasses.replace(batch, prior=batch.prior.any(1))
    for name in ("prior", "detail", "prior's count"):
        step = PreferenceStep(models.ours, *settings(name))
        one, several = (step(pairs, torch.Generator().manual_seed(SEED)).output for pairs in (union, batch))
        if name == "prior's count":  # of the union, not of each subject's own
            assert not torch.equal(one.loss, several.loss)
        else:
            assert torch.equal(one.loss, several.loss) and torch.equal(one.margin, several.margin)


def test_kept_encodings_give_the_same_bits(models, batch):
    """What data.cache kept of a pair stands for its images and its prompt."""
    ours, encodings = models.ours, []
    for i, prompt in enumerate(batch.prompts):
        images = [batch.winner[i], batch.loser[i], *(one[i] for one in batch.references)]
        winner, loser, *references = (ours.encode_images(image[None])[0] for image in images)
        kept = {name: value[0] for name, value in ours.encode_prompts([prompt]).tensors.items()}
        encodings.append(Encodings(tuple(references), kept, winner, loser))
    blank = dataclasses.replace(batch, prompts=["?"] * PAIRS, loser=batch.winner, encodings=tuple(encodings))
    step = PreferenceStep(ours, *settings("detail"))
    direct, cached = (step(pairs, torch.Generator().manual_seed(SEED)).output for pairs in (batch, blank))
    assert all(torch.equal(a, b) for a, b in zip(direct[:-1], cached[:-1], strict=True))
    in_half = dataclasses.replace(encodings[0], winner=encodings[0].winner.bfloat16(), prompt={
        name: value.bfloat16() for name, value in encodings[0].prompt.items()
    })  # fmt: skip
    half = dataclasses.replace(blank, encodings=(in_half, *encodings[1:]))
    noised = step.noise(half, torch.Generator().manual_seed(SEED))
    assert noised.tokens.dtype == torch.float32 and {x.dtype for x in noised.prompts.tensors.values()} == {torch.float32}


def test_prompts_are_encoded_once(models, batch, monkeypatch):
    """By their text and by what the encoder sees of the references; the one that was used first is forgotten first."""
    step, calls, encode = PreferenceStep(models.ours, *settings("default")), [], models.ours.encode_prompts

    def recorded(prompts, references=()):
        calls.append((list(prompts), [tuple(image.shape) for image in references]))
        return encode(prompts)

    monkeypatch.setattr(models.ours, "encode_prompts", recorded)
    first = step.condition(batch).prompts
    assert calls == [([prompt], []) for prompt in batch.prompts]
    assert all(torch.equal(x, step.condition(batch).prompts.tensors[name]) for name, x in first.tensors.items())
    assert len(calls) == 3
    monkeypatch.setattr("focusdpo.models.conditioning.KEPT_PROMPTS", 3)
    again = dataclasses.replace(batch, prompts=[batch.prompts[0], "new", batch.prompts[0]])
    step.condition(again)
    assert calls[3:] == [(["new"], [])]
    step.condition(batch)
    assert [prompts for prompts, _ in calls[4:]] == [[batch.prompts[1]]], "of four, the one that was used first had gone"

    # A text encoder that sees the references: theirs and no other pair's, each in its own size.
    monkeypatch.setattr(type(models.ours), "prompt_rule", LongestSide(16))
    with pytest.raises(ValueError, match=r"batch.prompt_images: got those of 0 pairs; expected 3"):
        step.condition(batch)
    shown = tuple((torch.rand(3, 8 + i, 9), torch.rand(3, 10, 11)) for i in range(PAIRS))
    seeing = dataclasses.replace(batch, prompts=["a", "a", "a"], prompt_images=shown)
    del calls[:]
    step.condition(seeing)
    assert calls == [(["a"], [(1, 3, 8 + i, 9), (1, 3, 10, 11)]) for i in range(PAIRS)]
    step.condition(seeing)
    other = dataclasses.replace(seeing, prompt_images=(shown[0], (shown[1][0], shown[1][1] + 0.1), shown[2]))
    step.condition(other)
    assert len(calls) == 4, "another picture is another prompt"
    turned = (shown[0], (shown[1][0].transpose(1, 2).reshape(3, 9, 9), shown[1][1]), shown[2])
    reshaped = tuple((pair[0].reshape(3, -1, 3), pair[1]) for pair in turned)
    step.condition(dataclasses.replace(seeing, prompt_images=reshaped))
    assert len(calls) == 7, "the same values in another shape are another picture"
