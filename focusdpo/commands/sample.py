"""`focusdpo sample`: everything is checked first, then what is missing is made, in all processes of a launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from focusdpo.foundation.launch import Launch
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.settings import check_begun
from focusdpo.foundation.text import counted
from focusdpo.sampling import page
from focusdpo.sampling.config import SampleConfig
from focusdpo.sampling.inputs import Inputs, may_differ, read_inputs, settings_of
from focusdpo.sampling.work import BASE, IMAGES, Wanted, file_name, load, make_images, share_of, wanted_images
from focusdpo.training.sharding import check_devices

logger = logging.getLogger(__name__)

SETTINGS_FILE = "sample.json"
# What the command writes, see `focusdpo.foundation.output_folder`.
WRITTEN = (r"sample\.json", rf"({IMAGES}|{BASE})/\d{{4,}}_\d+\.png", *page.WRITTEN)


def prepare(config: SampleConfig) -> Callable[[], None]:
    """Checks settings, prompts, LoRA and folder, loads the model if an image is missing, and returns what makes them.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: run, model, LoRA or prompts cannot be used.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
        ElsewhereError: another process of the launch failed.
    """
    launch = Launch.join()
    folder = Path(config.output_dir)
    out = OutputFolder("output_dir", folder, "sample", WRITTEN, leads=launch.is_main)
    with launch.failing():
        check_devices(launch, config.cpu)
        inputs = read_inputs(config, launch)
        try:
            found = launch.from_main("prompts and folder are looked at", lambda: _missing(config, inputs, out))
            missing = [Wanted(*one) for one in found]
            out.check_shared(launch)
            if launch.is_main:
                logger.info("LoRA: %s", inputs.lora or "none, the model itself")
            share = share_of(missing, launch.rank, launch.size)
            backbone = load(config, inputs, launch) if share else None
        except BaseException:
            out.release()
            raise

    def work() -> None:
        with launch.failing(), out.begin() if launch.is_main else nullcontext():
            if launch.is_main:
                out.tidy()
                page.remove_sheets(out, inputs, missing)
                for name in (IMAGES, BASE) if config.compare else (IMAGES,):
                    (folder / name).mkdir(exist_ok=True)
            launch.wait("the folder is ready")
            if backbone is not None:
                make_images(config, inputs, share, backbone, launch)
            launch.wait("images are made")
            if launch.is_main:
                _show(config, inputs, missing)

    return work


def _missing(config: SampleConfig, inputs: Inputs, out: OutputFolder) -> list[Wanted]:
    """The images that are to be made; a folder with others is refused."""
    out.lock()  # before anything that another process may be writing is looked at
    compare = partial(check_begun, "set of images", out.path, may_differ=may_differ)
    out.check_begun(config.overwrite, SETTINGS_FILE, settings_of(config, inputs), compare, aside=(page.PAGE_FILE,))
    wanted = wanted_images(config, inputs)
    return [one for one in wanted if not (out.goes_on and _file(out.path, inputs, one).is_file())]


def _show(config: SampleConfig, inputs: Inputs, made: Sequence[Wanted]) -> None:
    """Draws sheets and page, and says how many images there are."""
    folder = Path(config.output_dir)
    if config.compare:
        page.write_sheets(config, inputs, folder)
    page.write_page(config, inputs, folder)
    count, new = len(inputs.prompts) * config.images_per_prompt, sum(one.folder == IMAGES for one in made)
    shown = folder / page.PAGE_FILE
    logger.info("%s: %s, %d of them new; %s shows them", folder / IMAGES, counted(count, "image"), new, shown)


def _file(folder: Path, inputs: Inputs, wanted: Wanted) -> Path:
    return folder / wanted.folder / file_name(inputs.prompts[wanted.prompt].line, wanted.number)
