"""Train, validate, test and predict: LightningCLI on a YAML file.

    vssm train fit --config configs/classification/vmamba_mnist5k.yaml
    vssm train fit --config FILE --ckpt_path last          # continue a run that was interrupted
    vssm train test --config RUN/config.yaml --ckpt_path best
    vssm train predict --config RUN/config.yaml --ckpt_path best --data.init_args.predict photos/

``fit --print_config`` prints the whole configuration with its defaults; ``--trainer.max_epochs=3`` and the like set
single keys. Under torchrun or SLURM the same commands run on several GPUs or hosts.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from vssm.tasks.finite import NonFiniteLoss
from vssm.tasks.report import PredictionWriter, RunReport
from vssm.tasks.saving import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, RandomState

__all__ = ["main"]

EXPECTED = (
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 with torch 2.14
    r".*Checkpoint directory .* exists and is not empty",  # of a run that is resumed
    r".*get_mask_edges:always_return_as_numpy",  # monai 1.6 to itself
    r"Precision .* is not supported by the model summary",
)
STARTS = {"pretrained": False, "backbone_pretrained": False, "checkpoint_path": None, "encoder_weights": None,
          "backbone_checkpoint_path": None}  # fmt: skip
"""Arguments of tasks that say from which weights training starts, and their values for none."""
SOURCES = str(Path(__file__).resolve().parent.parent)


class StrictParser(LightningArgumentParser):
    """Takes an abbreviated key for a wrong one, in nested classes too: jsonargparse makes their parsers from this."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def print_usage(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing before an error: it would be lost below a hundred options. The line after it names --help."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Of a class and its arguments, say what is wrong with them and no more."""
        inner = re.search(r"\n *Errors:\n(.*?)\n *- Expected a <class 'NoneType'>", message, re.DOTALL)
        if inner is not None:
            message = message.partition("\n")[0] + "\n" + inner[1]
        super().error(message, ex)
        raise SystemExit(2)


class SaveConfig(SaveConfigCallback):
    """Save the resolved configuration in the run folder when training starts, not when a run is evaluated."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.config.ckpt_path = None  # the file repeats the run; it does not resume it
            super().setup(trainer, pl_module, stage)


class FindTestData(Callback):
    """Find the data of the test after ``fit``, and refuse what does not fit, before anything is trained."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.datamodule.setup("test")


class TrainCLI(LightningCLI):
    """LightningCLI with a run folder, checkpoints to resume from exactly, and reports.

    A run folder is ``trainer.default_root_dir/version_N`` (``runs/NAME/version_N``, NAME being that of the config
    file). ``fit`` makes a new one, unless ``--ckpt_path`` names a checkpoint of an old one, which then goes on.
    ``--ckpt_path last`` and ``best`` are those of the run whose ``config.yaml`` is given, else of the newest run that
    saved any.
    """

    def __init__(self, argv: Sequence[str] | None):
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=StrictParser,
            parser_kwargs={"prog": "vssm train", "description": __doc__.partition("\n")[0]},
            args=None if argv is None else list(argv),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.set_defaults(
            {
                "best_checkpoint.mode": "max",
                "best_checkpoint.filename": "best",
                "best_checkpoint.enable_version_counter": False,
            }
        )
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_argument(
            "--matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="Of float32 matrix products on GPUs (torch.set_float32_matmul_precision); high is TF32.",
        )
        parser.add_argument(
            "--test_after_fit",
            type=Literal["best", "last"] | None,
            default=None,
            help="The checkpoint to test at the end of fit; null tests none.",
        )

    # ---- parsing ----

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str] | None) -> None:
        self.config = parser.parse_args(args)  # Lightning's own warns if sys.argv is not empty, as under `vssm train`

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as given: Lightning would overwrite it with the arguments in the checkpoint."""

    # ---- the run folder ----

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        torch.set_float32_matmul_precision(config.matmul_precision)
        trainer = config.trainer
        files = [Path(str(path)) for path in config.get("config") or []]
        if trainer.default_root_dir is None:
            trainer.default_root_dir = str(Path("runs") / (files[-1].stem if files else "run"))
        self.run_folder = _newest_run(Path(trainer.default_root_dir))
        if files and (files[-1].parent / "checkpoints").is_dir():
            self.run_folder = files[-1].parent
        checkpoint = config.get("ckpt_path")
        if checkpoint in ("last", "best"):
            config.ckpt_path = str(self._checkpoint(checkpoint, Path(trainer.default_root_dir)))
        elif checkpoint is not None:
            if not Path(checkpoint).is_file():
                self.parser.error(f"--ckpt_path: {checkpoint} must be a checkpoint file, last or best, found no file")
            self.run_folder = _run_of(Path(checkpoint))
        elif self.subcommand != "fit" and _untrained(config.model):
            self.parser.error(
                f"{self.subcommand} needs trained weights, got none: give --ckpt_path best, last or FILE of a run or, "
                "where the task has weights for its whole model, --model.init_args.pretrained true or "
                "--model.init_args.checkpoint_path FILE"
            )
        if checkpoint is not None and self.subcommand != "fit":  # its weights replace those; they need not be there
            given = config.model.get("init_args") or {}
            for name in STARTS:
                if name in given:
                    given[name] = STARTS[name]

    def _checkpoint(self, name: str, root: Path) -> Path:
        file = self.run_folder / "checkpoints" / f"{name}.ckpt" if self.run_folder else root / "version_*/checkpoints"
        if not file.is_file():
            self.parser.error(f"--ckpt_path {name}: {file} must exist, found no such checkpoint; run fit first")
        return file

    def instantiate_classes(self) -> None:
        """A value that a class refuses is an error of the configuration, said in one line."""
        try:
            super().instantiate_classes()
        except (ValueError, OSError, ImportError) as error:
            refused = _refusal(error)
            if refused is None:
                raise
            self.parser.error(str(refused))
        except MisconfigurationException as error:  # Lightning's: no such accelerator, more devices than there are, …
            self.parser.error(f"trainer: {error}")

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        trainer = self.config_init[self.subcommand].trainer
        resumed = self.config[self.subcommand].get("ckpt_path") is not None
        if trainer.logger in (None, True):
            version = self.run_folder.name if resumed and self.run_folder else None
            root = self.run_folder.parent if version else Path(trainer.default_root_dir)
            number = re.fullmatch(r"version_(\d+)", version or "")  # as which the progress bar shows it
            kwargs["logger"] = TensorBoardLogger(root, name="", version=int(number[1]) if number else version)
        kwargs["plugins"] = [*_as_list(trainer.plugins), AtomicCheckpointIO()]
        rates = [LearningRateMonitor("step")] if self.subcommand == "fit" and trainer.logger is not False else []
        tested = [FindTestData()] if self.config[self.subcommand].get("test_after_fit") else []
        kwargs["callbacks"] = [*_as_list(trainer.callbacks), RandomState(), *rates, *tested]
        return super().instantiate_trainer(**kwargs)

    # ---- after the commands ----

    def after_fit(self) -> None:
        if self.trainer.fast_dev_run:
            return
        name = self.config[self.subcommand].test_after_fit
        if not name:
            self._say("val", "last validation")
        else:
            file = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "checkpoints" / f"{name}.ckpt"
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=str(file), verbose=False)
            self.after_test()

    def after_test(self) -> None:
        self._say("test")

    def after_validate(self) -> None:
        self._say("val", "validation")

    def after_predict(self) -> None:
        if self.trainer.is_global_zero:
            file = Path(self.config[self.subcommand].predictions.path)
            rows = max(0, len(file.read_text(encoding="utf-8").splitlines()) - 1)
            print(f"predictions {file}, {rows} rows", flush=True)

    def _say(self, split: str, name: str | None = None) -> None:
        folder = self.trainer.log_dir  # asks all processes
        value = self.trainer.callback_metrics.get(f"{split}/{getattr(self.model, 'score', None)}")
        if self.trainer.is_global_zero:
            print(f"run folder {folder}")
            if value is not None:
                print(f"{name or split} {self.model.score_name} {float(value):.4f}", flush=True)


def _as_list(value: object) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _untrained(model: Any) -> bool:
    """Whether a model of the zoo would be evaluated as it was initialised; a module of one's own may load weights."""
    given = model.get("init_args") or {}
    if isinstance(given.get("detector"), str):
        return True  # its pretrained and checkpoint_path are those of the backbone
    return isinstance(given.get("model"), str) and not (given.get("pretrained") or given.get("checkpoint_path"))


def _refusal(error: Exception) -> Exception | None:
    """The error below those that jsonargparse wraps around it; None where a class failed in another way."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ValueError) and not str(link).startswith("Does not validate against"):
            return link
        if isinstance(link, (OSError, ImportError)) and _said_here(link):
            return link
        link = link.__cause__ or link.__context__
    return None


def _said_here(error: BaseException) -> bool:
    """Whether vssm raised the error for the caller to read, ``who: what must hold, …``."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(SOURCES) and re.match(r"[\w-]+: ", str(error)) is not None


def _newest_run(root: Path) -> Path | None:
    """The newest run that saved something; one that ended before left a folder as well."""
    saved = [path.parent for path in root.glob("version_*/checkpoints")]
    runs = [path for path in saved if re.fullmatch(r"version_\d+", path.name)]
    return max(runs, key=lambda path: int(path.name.removeprefix("version_")), default=None)


def _run_of(checkpoint: Path) -> Path | None:
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; return 0, or leave with status 2 on a bad argument.

    What the data, the task or a checkpoint refuse is said in one line, too, with status 1.
    """
    with warnings.catch_warnings():
        for message in EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_worth_saying)
        try:
            TrainCLI(sys.argv[1:] if argv is None else argv)
        except (ValueError, OSError, ImportError, NonFiniteLoss) as error:
            if not _said_here(error):
                raise
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def _worth_saying(record: logging.LogRecord) -> bool:
    """Neither an advertisement, nor that a test after ``fit`` has the callbacks of the task again."""
    return not re.search("litlogger|will override existing callbacks", record.getMessage())
