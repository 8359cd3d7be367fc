"""Tapping hidden states, and masks on the token grid."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from focusdpo.features import SimilarityTap, pool_mask, reference_token_mask
from focusdpo_kernels import cross_layer_similarity


class Blocks(nn.Module):
    """A stack of blocks with (text, image) outputs, as FLUX has them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.runs = 0

        def forward(self, text, image):
            self.runs += 1
            return text, image + torch.tanh(self.linear(image))

    def __init__(self, reentrant=None, recomputed=(0, 1, 2)):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.reentrant, self.recomputed = reentrant, recomputed

    def forward(self, image):
        text, self.seen = image[:, :0], []
        for i, block in enumerate(self.blocks):
            if self.reentrant is None or i not in self.recomputed:
                text, image = block(text, image)
            else:
                text, image = checkpoint(block, text, image, use_reentrant=self.reentrant)
            self.seen.append(image.detach())
        return image


def tapped(model, image, mask, rows=slice(None), paths=("blocks.0", "blocks.2"), **more):
    options = {"image_tokens": lambda output: output[1], "num_target": 5, "reference_mask": mask}
    return SimilarityTap(model, paths, rows=rows, **options, **more)


@pytest.mark.parametrize(("reentrant", "recomputed"), [(None, ()), (True, (0,)), (False, (0,)), (False, (0, 1, 2))])
def test_streams_what_the_kernels_compute_at_once(reentrant, recomputed):
    """A block that runs twice counts once: with one recomputed alone, the mean over the layers would change."""
    model, mask = Blocks(reentrant, recomputed), torch.rand(2, 3, 4) > 0.3
    image = torch.randn(4, 9, 8, requires_grad=True)
    with tapped(model, image, mask, rows=slice(0, 2)) as tap:
        output = model(image)
        # The backward pass inside the context recomputes the blocks: they must not count again.
        output.sum().backward()
    assert [block.runs for block in model.blocks] == [1 + (i in recomputed) for i in range(3)]
    layers = [model.seen[0][:2], model.seen[2][:2]]
    expected = cross_layer_similarity([h[:, :5] for h in layers], [h[:, 5:] for h in layers], mask)
    torch.testing.assert_close(tap.scores(), expected)


def test_hooks_are_removed_even_after_an_error():
    model, mask = Blocks(), torch.ones(2, 1, 4)
    with pytest.raises(RuntimeError, match="stop"), tapped(model, None, mask):
        raise RuntimeError("stop")
    assert not any(block._forward_hooks for block in model.blocks)


def test_keeps_no_hidden_state():
    model, mask = Blocks(), torch.ones(2, 1, 4)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output[1])))
    with tapped(model, None, mask) as tap, torch.no_grad():
        model(torch.randn(2, 9, 8))
        model.seen.clear()
        gc.collect()
        assert len(outputs) == 3
        assert [ref() for ref in outputs] == [None] * 3, "a block's output is still held"
        assert tap.scores().shape == (2, 1, 5)


def test_serves_one_pass():
    model, mask = Blocks(), torch.ones(2, 1, 4)
    with tapped(model, None, mask) as tap:
        model(torch.randn(2, 9, 8))
    with (
        pytest.raises(RuntimeError, match="^SimilarityTap: it has served a forward pass already; make a new one for each$"),
        tap,
    ):
        pass


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_blocks_compiled_one_by_one(backend):
    model, mask = Blocks(), torch.rand(2, 3, 4) > 0.3
    image = torch.randn(2, 9, 8)
    scores = []
    for compiled in (False, True):
        if compiled:
            for block in model.blocks:
                block.compile(backend="aot_eager")
        with tapped(model, None, mask, backend=backend) as tap, torch.no_grad():
            model(image)
        scores.append(tap.scores())
    torch.testing.assert_close(*scores, rtol=0, atol=1e-6)


def test_refusals():
    model, mask = Blocks(), torch.ones(2, 1, 4)
    model.last = nn.Identity()
    with pytest.raises(ValueError, match=r"^paths: the model has no block 'blocks.7'; its children are blocks, last$"):
        tapped(model, None, mask, paths=("blocks.7",))
    with pytest.raises(ValueError, match="^paths: no block to tap; name at least one$"):
        tapped(model, None, mask, paths=())
    with pytest.raises(ValueError, match="^paths: a block is named twice in .'blocks.0', 'blocks.0'.$"):
        tapped(model, None, mask, paths=("blocks.0", "blocks.0"))
    with pytest.raises(ValueError, match="none such"), tapped(model, None, mask, backend="none such"):
        model(torch.randn(2, 9, 8))
    with tapped(model, None, mask) as tap:
        pass
    message = (
        "these blocks did not run inside the context: blocks.0, blocks.2; run the model once inside it, and if it is compiled"
    )
    with pytest.raises(RuntimeError, match=f"^SimilarityTap: {message}, compile block by block$"):
        tap.scores()


def test_pool_mask():
    mask = torch.zeros(32, 48)
    mask[:16, :16] = 1  # all of token 0
    mask[:8, 16:32] = 1  # half of token 1
    mask[:7, 32:] = 1  # less than half of token 2
    assert pool_mask(mask).tolist() == [True, True, False, False, False, False]
    small = torch.zeros(2, 32, 48)
    small[0, 20:23, 40:43] = 1  # a small subject stays, in the token it covers best
    assert pool_mask(small).tolist() == [[False] * 5 + [True], [False] * 6]
    with pytest.raises(ValueError, match="mask: 30x48 pixels are not whole patches of 16"):
        pool_mask(mask[:30])


def test_patches_of_another_size():
    mask = torch.zeros(1, 16, 24)
    mask[:, :8, 8:16] = 1
    assert pool_mask(mask, 8).tolist() == [[False, True, False, False, False, False]]
    assert reference_token_mask([mask, mask], 8).shape == (1, 2, 12)
    assert reference_token_mask([mask], 8).tolist() == [[[False, True, False, False, False, False]]]


def test_reference_token_mask_is_block_diagonal():
    first, second = torch.zeros(2, 16, 32), torch.ones(2, 32, 16)
    first[0, :, 16:] = 1
    tokens = reference_token_mask([first, second])
    assert tokens.shape == (2, 2, 4)
    assert tokens[0].tolist() == [[False, True, False, False], [False, False, True, True]]
    assert tokens[1].tolist() == [[False] * 4, [False, False, True, True]]
