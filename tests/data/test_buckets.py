"""Aspect-ratio buckets: which is chosen, what is cut, who gets which pair, and which pairs are left out and reported."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from focusdpo.commands import cli
from focusdpo.data import DatasetError, LongestSide, PairDataset, SizeBatches, leave_out_misfits, load_pairs
from focusdpo.data.images import bucket_size, share_cut, token_size
from focusdpo.training.announcements import Announcements
from focusdpo.training.batches import TrainingBatches, dataset_of
from focusdpo.training.config import DataConfig, ModelConfig, TrainConfig
from focusdpo.training.trainer import Trainer
from tests.runs import rows_of

RATIOS = [(1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16)]
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((700, 700), (512, 512)),
        ((4000, 3000), (512, 384)),
        ((3000, 4000), (384, 512)),
        ((1500, 1000), (512, 336)),
        ((1920, 1080), (512, 288)),
        ((1100, 1000), (512, 512)),
        ((1200, 1000), (512, 384)),
        ((9000, 100), (512, 288)),
        ((1, 9000), (288, 512)),
    ],
)
def test_the_nearest_ratio(size, expected):
    assert bucket_size(size, 512, RATIOS) == expected


def test_nearest_is_in_the_logarithm():
    """Halfway between 1:1 and 4:1 lies 2:1, not 2.5:1."""
    assert bucket_size((1990, 1000), 512, [(1, 1), (4, 1)]) == (512, 512)
    assert bucket_size((2010, 1000), 512, [(1, 1), (4, 1)]) == (512, 128)
    sizes = [token_size(ratio, 512) for ratio in RATIOS]
    draw = random.Random(0)
    for size in ((draw.randint(1, 4000), draw.randint(1, 4000)) for _ in range(300)):
        distances = {bucket: abs(math.log(size[0] * bucket[1] / (size[1] * bucket[0]))) for bucket in sizes}
        assert distances[bucket_size(size, 512, RATIOS)] == pytest.approx(min(distances.values()), abs=1e-9)


def test_of_two_as_near_the_first():
    assert bucket_size((70, 70), 512, [(4, 3), (3, 4)]) == (512, 384)
    assert bucket_size((70, 70), 512, [(3, 4), (4, 3)]) == (384, 512)
    assert bucket_size((200, 100), 512, [(4, 1), (1, 1)]) == (512, 128), "as far from one as from the other"


def test_share_cut():
    assert share_cut((100, 100), (100, 50)) == share_cut((100, 100), (32, 64)) == share_cut((300, 100), (150, 100)) == 0.5
    assert share_cut((640, 480), (512, 384)) == 0


def write_pairs(folder, pairs):
    """A dataset of red rectangles on blue; `pairs` has (size, box of winner and prior, size and box of the reference)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (size, box, reference_size, reference_box) in enumerate(pairs):
        for name, (shape, inside) in {"winner": (size, box), "reference": (reference_size, reference_box)}.items():
            image, mask = Image.new("RGB", shape, BLUE), Image.new("L", shape)
            image.paste(RED, inside)
            mask.paste(255, inside)
            image.save(folder / f"{number}_{name}.png")
            mask.save(folder / f"{number}_{name}_mask.png")
        Image.new("RGB", size, BLUE).save(folder / f"{number}_loser.png")
        reference = {"image": f"{number}_reference.png", "mask": f"{number}_reference_mask.png"}
        files = {"winner": f"{number}_winner.png", "loser": f"{number}_loser.png", "prior": f"{number}_winner_mask.png"}
        lines.append({"prompt": f"pair {number}", "references": [reference], **files})
    return rewrite(folder, lines)


def rewrite(folder, lines):
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


SQUARE = ((64, 64), (16, 16, 48, 48))
WIDE = ((96, 64), (0, 16, 48, 64))
TALL = ((60, 80), (20, 20, 40, 60))


def dataset(folder, buckets=((1, 1), (4, 3), (3, 4)), reference_buckets=((1, 1),)):
    return PairDataset(
        load_pairs(folder, progress=False),
        resolution=64,
        reference_rule=LongestSide(48),
        reference_rule_multiple=LongestSide(32),
        buckets=buckets,
        reference_buckets=reference_buckets,
    )


def test_image_prior_and_masks_are_cut_alike(tmp_path):
    write_pairs(tmp_path, [(*WIDE, *TALL)])
    plain, cut = dataset(tmp_path, None, None)[0], dataset(tmp_path, [(1, 1)], [(4, 3)])[0]
    assert plain.winner.shape[1:] == (32, 64) and plain.references[0].shape[1:] == (48, 32)
    assert cut.winner.shape[1:] == cut.loser.shape[1:] == cut.prior.shape == (64, 64)
    assert cut.references[0].shape[1:] == cut.reference_masks[0].shape == (32, 48)
    for image, mask in ((cut.winner, cut.prior), (cut.references[0], cut.reference_masks[0])):
        assert ((image[0] > 0.5) == mask).float().mean() > 0.97
        assert 0.1 < mask.float().mean() < 0.7
    # 96x64 to a square loses 16 columns on either side: of the 48 that were inside, 32 are left.
    assert cut.prior[40, :30].all() and not cut.prior[40, 34:].any() and not cut.prior[:14].any()


def test_photos_of_many_shapes_share_few_layouts(tmp_path):
    draw = random.Random(1)
    sizes = [(draw.randint(60, 90), draw.randint(60, 90)) for _ in range(24)]
    write_pairs(tmp_path, [(size, (20, 20, 40, 40), size, (20, 20, 40, 40)) for size in sizes])
    plain, cut = dataset(tmp_path, None, None), dataset(tmp_path)
    assert len(set(cut.sizes)) == 3 < len(set(plain.sizes))
    counts = SizeBatches(cut, 4, shuffle=False, seed=0).layouts
    assert sum(counts.values()) == 24 and list(counts.values()) == sorted(counts.values(), reverse=True)


def simulated(folder, config, processes):
    """The batches of each process, as accelerate would number them."""
    return [
        TrainingBatches(
            dataset(folder),
            config,
            SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu"), is_main_process=rank == 0),
        )
        for rank in range(processes)
    ]


def numbers(batches, position, count):
    return [(batch.indices, factor) for batch, factor in itertools.islice(batches.start(position), count)]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_pair_once_an_epoch_on_every_number_of_processes(tmp_path, processes, accumulation):
    """The last round's gaps are filled with the epoch's first batches; any position can be gone on from."""
    shapes = [SQUARE] * 5 + [WIDE] * 4 + [TALL] * 4
    write_pairs(tmp_path, [(*shape, *SQUARE) for shape in shapes])
    data = DataConfig(train=str(tmp_path), batch_size=2, num_workers=0)
    config = TrainConfig(ModelConfig("x"), data, "out", gradient_accumulation=accumulation)
    ranks = simulated(tmp_path, config, processes)
    plan, sizes = ranks[0].plan, dataset(tmp_path).sizes
    assert len({*sizes}) == 3 and len(plan.epoch(0)) == 7
    rounds = -(-7 // processes)
    for epoch in range(2):
        shares = [numbers(batches, epoch * rounds, rounds) for batches in ranks]
        seen = [shares[rank][i][0] for i in range(rounds) for rank in range(processes)]
        assert sorted(i for batch in seen[:7] for i in batch) == list(range(13)), "once each"
        assert seen[7:] == seen[: rounds * processes - 7], "and the first again where processes would have none"
        assert all(len({sizes[i] for i in batch}) == 1 for batch in seen)
    for batches in ranks:
        straight = numbers(batches, 0, 3 * rounds)
        for position in range(0, 2 * rounds, accumulation):  # wherever an optimiser step, and so a checkpoint, may end
            fresh = simulated(tmp_path, config, processes)[ranks.index(batches)]
            assert numbers(fresh, position, 3 * rounds - position) == straight[position:]


def problems_of(data, max_crop):
    return [(p.line, p.field, f"{p.message}; {p.remedy}") for p in leave_out_misfits(data, max_crop, progress=False)]


def test_pairs_that_fit_no_bucket(tmp_path):
    strip = ((128, 64), (0, 0, 20, 64))  # half is cut away, all inside with it
    edge = ((80, 60), (0, 0, 6, 60))  # a quarter is cut away, all inside with it
    lines = write_pairs(tmp_path, [(*SQUARE, *SQUARE), (*strip, *SQUARE), (*SQUARE, *edge), (*WIDE, *SQUARE), (*SQUARE, *WIDE)])
    data = dataset(tmp_path, [(1, 1)], [(1, 1)])
    records = data.records
    found = problems_of(data, max_crop=0.34)
    assert found == [
        (2, "winner", "loses 50.0% of its area from 128x64 px to the nearest bucket, 64x64 px, data.max_crop allows 34.0%; add "
         "a bucket for its shape, or cut it by hand"),
        (2, "prior", "has nothing left inside when winner is cut from 128x64 px to the nearest bucket, 64x64 px; cut both by "
         "hand, around the subject"),
        (3, "references[0].mask", "has nothing left inside when references[0].image is cut from 80x60 px to the nearest "
         "bucket, 48x48 px; cut both by hand, around the subject"),
    ]  # fmt: skip
    assert data.records == [records[0], records[3], records[4]] and len(data.sizes) == len(data) == 3
    assert [data[i].prompt for i in range(3)] == ["pair 0", "pair 3", "pair 4"]
    again = dataset(tmp_path, [(1, 1)], [(1, 1)])
    assert [line for line, _, _ in problems_of(again, max_crop=0.3)] == [2, 2, 3, 4, 5], "a third is more than that"
    assert problems_of(dataset(tmp_path, None, None), max_crop=0.0) == [], "no buckets, nothing to fit"
    wide = dataset(tmp_path, None, [(3, 2), (1, 1), (4, 3)])
    assert problems_of(wide, max_crop=0.12) == [], "targets keep their own shapes"
    empty = dataset(tmp_path, [(1, 9)], None)
    with pytest.raises(DatasetError, match=f"no pair of {tmp_path / 'pairs.jsonl'} fits data.buckets") as error:
        leave_out_misfits(empty, 0.2, progress=False)
    assert {p.line for p in error.value.problems} == {1, 2, 3, 4, 5}

    # A subject that is the same in winner and loser has an empty prior from the start.
    Image.new("L", SQUARE[0]).save(tmp_path / "empty.png")
    rewrite(tmp_path, [{**lines[0], "references": lines[0]["references"] * 2, "prior": ["0_winner_mask.png", "empty.png"]}])
    assert problems_of(dataset(tmp_path, [(1, 1)], [(1, 1)]), 0.2) == []


def test_a_mask_that_cannot_be_read(tmp_path):
    """With `data.check: headers` nobody has decoded it before."""
    lines = write_pairs(tmp_path, [(*SQUARE, *SQUARE)] * 2)
    Image.effect_noise(SQUARE[0], 100).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    rewrite(tmp_path, [lines[0], {**lines[1], "prior": "cut.jpg"}])
    data = PairDataset(
        load_pairs(tmp_path, check="headers", progress=False),
        resolution=64,
        reference_rule=LongestSide(48),
        reference_rule_multiple=LongestSide(32),
        buckets=[(1, 1)],
    )
    with pytest.raises(DatasetError, match=r"pairs.jsonl:2: prior: cannot be read as an image \(.*data.check=full lists"):
        leave_out_misfits(data, 0.2, progress=False)


def test_a_cut_out_whose_shape_is_cut_away(tmp_path):
    lines = write_pairs(tmp_path, [(*SQUARE, *SQUARE)] * 2)
    cut_out = Image.new("RGBA", (80, 60), (0, 0, 0, 0))
    cut_out.paste((255, 0, 0, 255), (0, 0, 6, 60))
    cut_out.save(tmp_path / "cut_out.png")
    rewrite(tmp_path, [lines[0], {**lines[1], "references": [{"image": "cut_out.png"}]}])
    ((line, field, message),) = problems_of(dataset(tmp_path), 0.3)
    assert (line, field) == (2, "references[0].image") and "has nothing left inside" in message


SETTINGS = {
    "model.gradient_checkpointing": True,
    "data.validation": "{folder}/held_out", "data.resolution": 64, "data.reference_resolution": 32,
    "data.reference_resolution_multiple": None, "data.batch_size": 2, "data.check": "full",
    "data.buckets": ["1:1", "3:4", "2:1"], "data.reference_buckets": ["1:1"], "optim.lr": 2e-05,
    "max_steps": 2,
}  # fmt: skip


@pytest.fixture
def tiny_pairs(tmp_path):
    wide, strip = ((100, 50), (20, 10, 60, 40)), ((200, 64), (80, 20, 120, 50))
    write_pairs(tmp_path / "pairs", [(*target, *SQUARE) for target in (SQUARE, wide, SQUARE, strip, TALL)])
    write_pairs(tmp_path / "held_out", [((64, 200), (10, 80, 40, 120), *SQUARE), (*SQUARE, *SQUARE)])
    return tmp_path / "pairs"


def test_a_run_leaves_out_and_reports(config, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="focusdpo")
    trainer = Trainer(config, callbacks=[Announcements()])
    assert [record.line for record in trainer.train_set.records] == [1, 2, 3, 5]
    assert [record.line for record in trainer.validation_set.records] == [2]
    (warning,) = [r.getMessage() for r in caplog.records if "are left out" in r.getMessage()]
    assert warning.startswith(f"2 pairs fit no bucket and are left out; {tmp_path / 'run' / 'left_out.jsonl'} lists why:\n")
    assert f"  {tmp_path / 'pairs' / 'pairs.jsonl'}:4: winner: loses 36.0%" in warning
    listed = [json.loads(line) for line in (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()]
    places = [(row["file"], row["line"], row["field"]) for row in listed]
    assert places == [(str(tmp_path / name / "pairs.jsonl"), line, "winner") for name, line in (("pairs", 4), ("held_out", 1))]
    assert all("data.max_crop allows 20.0%" in row["reason"] for row in listed)
    trainer.train()
    (begun,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("training begins")]
    assert "4 pairs in 3 layouts, 1 held out" in begun and " 2 of 64x64 px with references of 32x32 px\n" in begun
    assert "; an epoch has 3 batches, 2 of them smaller than data.batch_size" in begun
    expected = rows_of(config)

    for output, changes in (("cached", {"cache": str(tmp_path / "cache")}), ("resumed", {})):
        AcceleratorState._reset_state(reset_partial_state=True)
        config.output_dir, config.data.cache = str(tmp_path / output), changes.get("cache")
        config.max_steps = 1
        Trainer(config).train()
        AcceleratorState._reset_state(reset_partial_state=True)
        config.max_steps, config.resume = 2, "latest"
        Trainer(config).train()
        config.resume = None
        assert rows_of(config) == expected


def test_reported_before_a_model_is_loaded(config, tmp_path, caplog):
    config.model.path = "nobody/no-such-model"
    with pytest.raises(ValueError, match="nobody/no-such-model"):
        Trainer(config)
    assert "pairs fit no bucket and are left out" in caplog.text
    assert not (tmp_path / "run").exists(), "a run that was refused leaves nothing"
    config.data.buckets = ["9:1"]
    config.data.max_crop = 0.1
    with pytest.raises(DatasetError, match="no pair of .* fits data.buckets"):
        Trainer(config)


def test_a_foreign_list_is_not_overwritten(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "left_out.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds left_out.jsonl, which this command did not write"):
        Trainer(config)


def test_sizes_without_buckets_are_each_images_own(config):
    config.data.buckets = config.data.reference_buckets = None
    data = dataset_of(load_pairs(config.data.train, progress=False), config.data, "flux")
    own = [(64, 64), (100, 50), (64, 64), (200, 64), (60, 80)]
    assert [sizes.target for sizes in data.sizes] == [token_size(size, 64) for size in own]
    assert data.buckets is None and DataConfig(train="x").buckets is None and DataConfig(train="x").reference_buckets is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.buckets", "[1:1, 61]"], "data.buckets: got '61'; expected an aspect ratio such as \"4:3\""),
        (["--data.reference_buckets", '["4/3"]'], "data.reference_buckets: got '4/3'; expected an aspect ratio"),
        (["--data.buckets", '["0:3"]'], "data.buckets: got '0:3'"),
        (["--data.buckets", "[]"], "data.buckets: got []; expected at least one aspect ratio, or null"),
        (["--data.max_crop", "1.5"], "data.max_crop: got 1.5; expected 0 <= max_crop < 1"),
    ],
)  # fmt: skip
def test_refused_by_name(arguments, message, capsys):
    run = ["train", "--model.path", "x", "--data.train", "x", "--output_dir", "x"]
    with pytest.raises(SystemExit) as stop:
        cli.parse_config([*run, *arguments])
    assert message in f"{stop.value.code} {capsys.readouterr().err}"
    for text in ('["1:1", "16:9"]', "[1:1, 16:9]"):
        _, parsed = cli.parse_config([*run, "--data.buckets", text])
        assert parsed.data.buckets == ["1:1", "16:9"], "and not YAML 1.1's numbers 61 and 969"
