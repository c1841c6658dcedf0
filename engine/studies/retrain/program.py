"""Does retraining on a run's samples help? Fine-tunes the target in several arms, over several seeds, and compares.

`before` is the target as it is; `none` is fine-tuned on real images alone; `plain` on real images and prompt-only
samples; `unfiltered` on real images and the samples of the risky requests whatever their rule says; `accepted` on real
images and the accepted ones. All arms have equal steps and batches, and as many generated samples as each other.
"""

from __future__ import annotations

import time

import torch

from engine.data.images import open_images
from engine.driver.progress import Display
from engine.errors import JobError
from engine.studies.retrain.inputs import check_study, read_material
from engine.studies.retrain.options import RetrainOptions
from engine.studies.retrain.results import Retrained, write_results
from engine.studies.retrain.training import train_arms


def retrain(uri: str, options: RetrainOptions, *, display: Display, folder: str | None = None) -> Retrained:
    """Fine-tune the target of a run in all arms and seeds, compare them, and keep a model.

    Args:
        uri: folder of the run.
        folder: where the results go, a folder or an address; `RUN-retrained`, next to the run, where not given.

    Raises:
        RiskforgeError: options, run, target, images or folder are not as they must be.

    Side effects:
        Replaces the results of an earlier retraining in the folder, at the very end.
    """
    started = time.monotonic()
    try:
        display.phase("checking run and data")
        study = check_study(uri, options, folder)
        real = open_images(options.real, study.labels, "--real")
        test = open_images(options.test, study.labels, "--test")
        spare = open_images(options.calibrate, study.labels, "--calibrate") if options.calibrate else None
        material = read_material(study, real, test, spare, display)
        tested, kept = train_arms(study, material, display)
        display.phase("comparing and writing")
        return write_results(study, material, tested, kept, started, display)
    except torch.OutOfMemoryError:
        raise JobError(
            f"--batch-size: batches of {options.batch_size} do not fit the GPU's memory; give a smaller size"
        ) from None
    finally:
        display.close()
